"""The losses and the speed of runs as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from caat_jax import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NOTHING = (np.zeros(0, np.int64), np.zeros(0))

Metrics = dict[str, tuple[np.ndarray, np.ndarray]]  # as `read_metrics` returns them


@figures.style()
def plot_runs(runs: Sequence[tuple[str, Metrics]], output: Path) -> None:
    """Writes the PNG `output` of up to 8 runs, each a label and what `read_metrics` returned.

    Raises:
      InputError: `output` cannot be written.
    """
    figure = figures.new(12, 5)
    if any("tokens_per_second" in metrics for _, metrics in runs):
        losses, speeds = figure.subplots(1, 2, width_ratios=(5, 2))
        _plot_speeds(speeds, runs)
    else:
        losses = figure.subplots()
    _plot_losses(losses, runs)
    figures.save(figure, output)


def _plot_losses(panel: "Axes", runs: Sequence[tuple[str, Metrics]]) -> None:
    from matplotlib.ticker import EngFormatter

    validation_lines = []
    for number, (_, metrics) in enumerate(runs):
        look = figures.line(number)
        training = dict(color=look["color"], linewidth=0.8, alpha=0.35)
        panel.plot(*metrics.get("train/loss", _NOTHING), **training)
        validation_lines += panel.plot(*metrics.get("eval/loss", _NOTHING), **look)
    panel.set_ylim(*_loss_limits([metrics for _, metrics in runs]))
    panel.set(
        title="Loss (thin: training; with markers: validation)",
        xlabel="step",
        ylabel="nats per token",
    )
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend = panel.legend(
        validation_lines,
        [label + _last_validation_loss(metrics) for label, metrics in runs],
        title="run: last validation loss",
        alignment="left",
        loc="upper right",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a folder's name is a $


def _last_validation_loss(metrics: Metrics) -> str:
    losses = metrics.get("eval/loss", _NOTHING)[1]
    return f": {losses[-1]:.3f}" if losses.size else ""


def _loss_limits(runs: Sequence[Metrics]) -> tuple[float | None, float | None]:
    """Limits that the first steps' high losses, or a run that diverges, do not stretch."""
    lows, highs, firsts = [], [], []
    for metrics in runs:
        for name in ("train/loss", "eval/loss"):
            losses = metrics.get(name, _NOTHING)[1]
            losses = losses[np.isfinite(losses)]
            if losses.size:
                lows.append(np.percentile(losses, 1))
                firsts.append(losses[0])
                highs.append(np.percentile(losses, 90) if name == "train/loss" else losses[-1])
    if not lows:
        return None, None
    low, high = min(lows), min(max(highs), max(firsts))
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _plot_speeds(panel: "Axes", runs: Sequence[tuple[str, Metrics]]) -> None:
    from matplotlib.ticker import EngFormatter

    speeds = [_median_finite(metrics.get("tokens_per_second", _NOTHING)[1]) for _, metrics in runs]
    rows = np.arange(len(runs))
    panel.barh(rows, speeds, height=0.4, color=figures.COLOURS[: len(runs)])
    readable = EngFormatter(places=2, sep="")
    for row, (label, _), speed in zip(rows, runs, speeds, strict=True):
        # The label stands above its bar, where a long one has the panel's whole width.
        panel.text(
            0,
            row - 0.25,
            label,
            fontsize=figures.SMALL,
            verticalalignment="bottom",
            parse_math=False,
        )
        panel.annotate(
            readable(speed) if speed else "none",
            (speed, row),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=figures.SMALL,
        )
    panel.set_ylim(max(len(runs), 4) - 0.5, -0.7)  # the first run on top; few bars stay slim
    panel.set_xlim(0, 1.25 * max(*speeds, 1))  # room for the number right of the bar
    panel.set(title="Median tokens per second", xticks=[], yticks=[])  # each bar has its number
    panel.spines[["left", "bottom"]].set_visible(False)


def _median_finite(values: np.ndarray) -> float:
    """The median of the finite values, 0 when there is none."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else 0.0
