"""Plots runs side by side from their metrics files.

    python -m caat_jax.plot RUN_DIR [RUN_DIR ...] [--output=runs.png] [--label=NAME ...]

On the left the losses against the step, on the right the median tokens per second.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from caat_jax.errors import InputError
from caat_jax.figures import COLOURS, MARKERS
from caat_jax.training.metrics import METRICS_FILE, read_metrics

_NOTHING = (np.zeros(0, np.int64), np.zeros(0))

Metrics = dict[str, tuple[np.ndarray, np.ndarray]]  # as `read_metrics` returns them


def plot_runs(runs: Sequence[tuple[str, Metrics]], output: Path) -> None:
    """Writes the PNG `output` of up to 8 runs, each a label and what `read_metrics` returned.

    Raises:
      InputError: `output` cannot be written.
    """
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    with_speed = any("tokens_per_second" in metrics for _, metrics in runs)
    panels = figure.subplots(
        1, 2 if with_speed else 1, squeeze=False, width_ratios=(5, 2)[: 1 + with_speed]
    )[0]
    _plot_losses(panels[0], runs)
    if with_speed:
        _plot_speeds(panels[1], runs)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(output, format="png")
    except OSError as error:
        raise InputError(f"--output={output}: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        given = _parse(arguments)
        runs = [
            (label, _read_run(folder))
            for label, folder in zip(
                _labels(given.run_dir, given.label), given.run_dir, strict=True
            )
        ]
        plot_runs(runs, given.output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Plotted {len(runs)} {'run' if len(runs) == 1 else 'runs'}: {given.output.resolve()}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for all other bad input, instead of the usage and a line."""
        raise InputError(f"{message} (--help explains)")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m caat_jax.plot",
        description="Plots the losses and the speed of runs side by side.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="the --workdir of a run")
    parser.add_argument("--output", type=Path, default=Path("runs.png"), help="PNG to write")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        help="name of a run in the plot, once for each in their order (default: its folder's name)",
    )
    return parser.parse_args(arguments)


def _labels(folders: Sequence[Path], labels: Sequence[str]) -> Sequence[str]:
    if len(folders) > len(COLOURS):
        raise InputError(f"{len(folders)} runs; more than {len(COLOURS)} cannot be told apart")
    if labels:
        if len(labels) != len(folders):
            raise InputError(
                f"{len(labels)} --label for {len(folders)} runs; give one for each, or none"
            )
        return labels
    names = [folder.resolve().name for folder in folders]
    # Runs of one name in different folders are told apart by their paths.
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _read_run(folder: Path) -> Metrics:
    path = folder / METRICS_FILE
    metrics = read_metrics(path)
    if "train/loss" not in metrics and "eval/loss" not in metrics:
        raise InputError(f"{path}: no train/loss and no eval/loss in it, so nothing to plot")
    return metrics


def _plot_losses(panel: Axes, runs: Sequence[tuple[str, Metrics]]) -> None:
    validation_lines = []
    for (_, metrics), colour, marker in zip(runs, COLOURS, MARKERS, strict=False):
        panel.plot(*metrics.get("train/loss", _NOTHING), color=colour, linewidth=0.8, alpha=0.35)
        validation_lines += panel.plot(
            *metrics.get("eval/loss", _NOTHING),
            color=colour,
            marker=marker,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linewidth=2,
        )
    panel.set_ylim(*_loss_limits([metrics for _, metrics in runs]))
    panel.set_title("Loss (thin: training; with markers: validation)", fontsize=11, loc="left")
    panel.set_xlabel("step")
    panel.set_ylabel("nats per token")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    legend = panel.legend(
        validation_lines,
        [label + _last_validation_loss(metrics) for label, metrics in runs],
        title="run: last validation loss",
        title_fontsize=9,
        alignment="left",
        loc="upper right",
        fontsize=9,
        framealpha=0.9,
        edgecolor="none",
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


def _plot_speeds(panel: Axes, runs: Sequence[tuple[str, Metrics]]) -> None:
    speeds = [_median_finite(metrics.get("tokens_per_second", _NOTHING)[1]) for _, metrics in runs]
    rows = np.arange(len(runs))
    panel.barh(rows, speeds, height=0.4, color=COLOURS[: len(runs)])
    readable = EngFormatter(places=2, sep="")
    for row, (label, _), speed in zip(rows, runs, speeds, strict=True):
        # The label stands above its bar, where a long one has the panel's whole width.
        panel.text(0, row - 0.25, label, fontsize=9, verticalalignment="bottom", parse_math=False)
        panel.annotate(
            readable(speed) if speed else "none",
            (speed, row),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=9,
        )
    panel.set_ylim(max(len(runs), 4) - 0.5, -0.7)  # the first run on top; few bars stay slim
    panel.set_xlim(0, 1.25 * max(*speeds, 1))  # room for the number right of the bar
    panel.set(xticks=[], yticks=[])  # each bar has its number
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.set_title("Median tokens per second", fontsize=11, loc="left")


def _median_finite(values: np.ndarray) -> float:
    """The median of the finite values, 0 when there is none."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else 0.0


if __name__ == "__main__":
    sys.exit(main())
