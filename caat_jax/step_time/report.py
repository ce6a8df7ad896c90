"""Predicted step times as a table, as JSON and as a picture.

Each function takes the predictions of one chip after the other, those of p = 1 first.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caat_jax import figures
from caat_jax.communication.exposure import span
from caat_jax.figures import COLOURS
from caat_jax.step_time.model import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEFT_OUT = (
    "A prediction; nothing was measured. Left out: what kernels and links lose against the figures"
    " above (--efficiency scales the FLOP/s; most bandwidths are line rates); element-wise"
    " operations and copies; without --topology, the part of a reduction over model that the"
    " compiler runs beside products (docs/communication.md); collectives and mesh axes in each"
    " other's way; the start of kernels and collectives; other algorithms than rings; the scalar"
    " sums of clipping; activation memory; host, input, checkpoints and stragglers."
)

WIDTH = 100

Predictions = Sequence[Sequence[Prediction]]


def table(predictions: Predictions, efficiency: float) -> str:
    """For a terminal of 100 columns."""
    tokens = predictions[0][0].workload.tokens
    lines = [
        f"{_mesh(predictions)}, {tokens:,} tokens a step, matrix products at {efficiency:.0%} of"
        " the peak.",
        "Ranges: every gather and gradient sum that can overlap with compute does - none does.",
    ]
    for rows in predictions:
        lines += ["", *_chip_lines(rows[0]), *_rows(rows)]
    for reason in _unrecognised(predictions):
        lines += ["", *textwrap.wrap(f"UNRECOGNISED: {reason}", WIDTH)]
    return "\n".join([*lines, "", *textwrap.wrap(LEFT_OUT, WIDTH)])


def to_json(predictions: Predictions, efficiency: float) -> dict[str, Any]:
    """Times in seconds, rates in bytes/s and FLOP/s; bounds as `overlap` of `Prediction` has them.

    Everything in the result is JSON-able; no number is infinite.
    """
    work = predictions[0][0].workload
    return {
        "devices": work.devices,
        "mesh": {axis: getattr(work.config.mesh, axis) for axis in ("data", "fsdp", "model")},
        "tokens_per_step": work.tokens,
        "efficiency": efficiency,
        "chips": [_chip_json(rows[0]) for rows in predictions],
        "predictions": [_prediction_json(row, rows[0]) for rows in predictions for row in rows],
        "unrecognised": _unrecognised(predictions),
        "left_out": LEFT_OUT,
    }


@figures.style()
def plot(predictions: Predictions, output: Path) -> None:
    """Writes the PNG `output` of up to 8 chips.

    Raises:
      InputError: `output` cannot be written.
    """
    bars = sum(len(rows) for rows in predictions)
    figure = figures.new(12, max(4.5, 1.6 + 0.34 * bars))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_times(left, predictions)
    _plot_speed_ups(right, predictions)
    figures.save(figure, output)


def label(prediction: Prediction) -> str:
    """The name of a row: its p, or "config" where p differs by sublayer."""
    factors = {p for pair in prediction.workload.config.model.sync_factors for p in pair}
    return f"{factors.pop():g}" if len(factors) == 1 else "config"


def _mesh(predictions: Predictions) -> str:
    work = predictions[0][0].workload
    mesh = work.config.mesh
    return f"{work.devices} devices (data {mesh.data}, fsdp {mesh.fsdp}, model {mesh.model})"


def _chip_lines(prediction: Prediction) -> list[str]:
    chip, mesh = prediction.chip, prediction.workload.config.mesh
    figures = [f"{chip.flops / 1e12:,.0f} TFLOP/s", f"memory {chip.memory_rate / 1e12:.2f} TB/s"]
    for axis in ("model", "fsdp", "data"):
        size = getattr(mesh, axis)
        if size > 1:
            link = chip.link_over(span((axis,), vars(mesh)))
            figures.append(
                f"{axis} {link.send_rate(size) / 1e9:.3g} GB/s, {link.latency * 1e6:.3g} µs a hop"
            )
    lines = textwrap.wrap(f"{chip.name}: {chip.description}", WIDTH)
    lines += textwrap.wrap("; ".join(figures), WIDTH, initial_indent="  ", subsequent_indent="  ")
    if assumed := _assumptions_used(prediction):
        lines.append(f"  assumed, for want of a published figure: {', '.join(assumed)}")
    if not prediction.state_fits:
        lines.append(
            f"  DOES NOT FIT: the training state takes {prediction.workload.state_bytes / 1e9:,.0f}"
            f" GB of {chip.memory_bytes / 1e9:,.0f} GB"
        )
    return lines


def _assumptions_used(prediction: Prediction) -> list[str]:
    """Without those of a network that no group reaches, or of a link that none uses."""
    chip, work = prediction.chip, prediction.workload
    spans = [span(c.axes, vars(work.config.mesh)) for c in work.operations.collectives]
    unused = []
    if all(reach <= chip.domain for reach in spans):
        unused.append("network.")
    if all(reach > chip.domain for reach in spans):
        unused.append("link.")
    return [name for name in chip.assumptions if not name.startswith(tuple(unused))]


_COLUMNS = (
    ("p", 6),
    ("compute ms", 11),
    ("exposed ms", 16),
    ("exposed %", 11),
    ("step ms", 16),
    ("MFU %", 12),
    ("tokens/s/dev", 16),
    ("speed-up", 12),
)


def _rows(rows: Sequence[Prediction]) -> list[str]:
    lines = ["".join(f"{title:>{width}}" for title, width in _COLUMNS)]
    for row in rows:
        cells = (
            label(row),
            _number(1e3 * row.compute),
            _range(lambda overlap, row=row: 1e3 * row.exposed(overlap)),
            _range(lambda overlap, row=row: 100 * row.exposed(overlap) / row.step(overlap)),
            _range(lambda overlap, row=row: 1e3 * row.step(overlap)),
            _range(lambda overlap, row=row: 100 * row.mfu(overlap)),
            _range(lambda overlap, row=row: row.tokens_per_second(overlap)),
            _range(lambda overlap, row=row: _speed_up(row, rows[0], overlap), "{:.2f}".format),
        )
        lines.append(
            "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
        )
    return lines


def _number(value: float) -> str:
    """Three digits or all those before the point, in 7 characters at most."""
    if value >= 1e6:
        return f"{value:.2e}".replace("e+0", "e")
    decimals = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:,.{min(max(decimals, 0), 2)}f}"


def _range(value: Callable[[bool], float], form: Callable[[float], str] = _number) -> str:
    """Both bounds, or one where they look the same."""
    low, high = form(value(True)), form(value(False))
    return low if low == high else f"{low}-{high}"


def _speed_up(row: Prediction, full: Prediction, overlap: bool) -> float:
    return full.step(overlap) / row.step(overlap)


def _unrecognised(predictions: Predictions) -> list[str]:
    reasons = [r for row in predictions[0] for r in row.workload.operations.unrecognised]
    return list(dict.fromkeys(reasons))


def _chip_json(prediction: Prediction) -> dict[str, Any]:
    figures = dataclasses.asdict(prediction.chip)
    if math.isinf(figures["memory_bytes"]):
        figures["memory_bytes"] = None  # not known
    return figures | {
        "assumptions": prediction.chip.assumptions,
        "state_bytes": prediction.workload.state_bytes,
        "state_fits": prediction.state_fits,
    }


def _prediction_json(row: Prediction, full: Prediction) -> dict[str, Any]:
    def both(value: Callable[[bool], float]) -> dict[str, float]:
        return {"all_overlaps": value(True), "nothing_overlaps": value(False)}

    counted = row.workload.operations
    return {
        "chip": row.chip.name,
        "p": label(row),
        "shared_fraction": row.workload.shared,
        "flops_per_device": counted.flops,
        "wire_bytes_per_device": counted.wire_bytes,
        "matrix_products": row.products,
        "optimizer": row.optimizer,
        "quantising": row.quantising,
        "compute": row.compute,
        "reductions": row.reductions,
        "gathers_and_gradient_sums": row.overlappable,
        "exposed": both(row.exposed),
        "exposed_fraction": both(lambda overlap: row.exposed(overlap) / row.step(overlap)),
        "step": both(row.step),
        "mfu": both(row.mfu),
        "tokens_per_second_per_device": both(row.tokens_per_second),
        "speed_up": both(lambda overlap: _speed_up(row, full, overlap)),
    }


def _plot_times(panel: "Axes", predictions: Predictions) -> None:
    """Stacked bars, in percent of the chip's step at p = 1 when nothing overlaps."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    position, ticks, names = 0.0, [], []
    for rows, colour in zip(predictions, COLOURS, strict=False):
        unit = rows[0].step(overlap=False) / 100
        panel.text(
            0,
            position - 0.5,
            rows[0].chip.name,
            fontsize=10,
            weight="bold",
            va="bottom",
            parse_math=False,
        )
        for row in rows:
            always = row.exposed(overlap=True)
            parts = (
                (row.compute, dict(color="#d4d4d4")),
                (always, dict(color=colour)),
                (row.exposed(overlap=False) - always, dict(color=colour, alpha=0.35)),
            )
            begin = 0.0
            for seconds, style in parts:
                panel.barh(position, seconds / unit, left=begin, height=0.72, linewidth=0, **style)
                begin += seconds / unit
            milliseconds = _range(lambda overlap, row=row: 1e3 * row.step(overlap))
            panel.annotate(
                f"{milliseconds} ms",
                (begin, position),
                xytext=(4, 0),
                fontsize=8,
                textcoords="offset points",
                va="center",
            )
            ticks.append(position)
            names.append(f"p = {label(row)}" if label(row) != "config" else "config")
            position += 1
        position += 1
    panel.set_yticks(ticks, names, fontsize=figures.SMALL)
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(position - 1.3, -1.4)  # the first chip on top
    panel.set_xlim(0, 128)  # room for the number right of the bar
    panel.set_xticks(range(0, 101, 20))
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("step time, % of the same chip's at p = 1 (nothing overlapping)")
    panel.set_title(f"Predicted step time on {_mesh(predictions)}")
    of_chips = COLOURS[: len(predictions)]  # each has its own, in both panels
    always, at_most = (
        tuple(Patch(color=colour, alpha=alpha, linewidth=0) for colour in of_chips)
        for alpha in (1, 0.35)
    )
    panel.legend(
        [Patch(color="#d4d4d4"), always, at_most],
        ["compute", "exposed communication", "exposed unless it overlaps"],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower center",
        bbox_to_anchor=(0.5, 1.03),
        ncols=3,
        frameon=False,
    )


def _plot_speed_ups(panel: "Axes", predictions: Predictions) -> None:
    """Lines: all overlaps; shaded down to where nothing does."""
    for number, rows in enumerate(predictions):
        look = figures.line(number)
        ordered = sorted(rows, key=lambda row: row.workload.shared)
        shared = [row.workload.shared for row in ordered]
        best, worst = (
            [_speed_up(row, rows[0], overlap) for row in ordered] for overlap in (True, False)
        )
        panel.fill_between(shared, worst, best, color=look["color"], alpha=0.15, linewidth=0)
        panel.plot(shared, best, label=rows[0].chip.name, **look)
    panel.axhline(1, color="#999999", linewidth=0.8, zorder=1)
    panel.set(
        title="Predicted speed-up (shaded: with less overlap)",
        xlabel="p (share of the channels that is summed)",
        ylabel="times as fast as p = 1",
    )
    panel.legend(loc="upper right")
