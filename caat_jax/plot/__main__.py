"""Plots runs side by side from their metrics files.

    python -m caat_jax.plot RUN_DIR [RUN_DIR ...] [--output=runs.png] [--label=NAME ...]

On the left the losses against the step, on the right the median tokens per second.
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from caat_jax import command_line, figures
from caat_jax.config import user_paths
from caat_jax.errors import InputError
from caat_jax.plot import report
from caat_jax.storage import mirrors
from caat_jax.training.metrics import METRICS_FILE, read_metrics

_OUTPUT = flags.DEFINE_string("output", "runs.png", "PNG to write.")
_LABELS = flags.DEFINE_multi_string(
    "label", [], "Name of a run, once for each in their order; by default its folder's name."
)


def main(folders: list[str]) -> None:
    labels = _labels(folders, _LABELS.value)
    runs = [
        (label, _read(mirrors.folder("run", folder)))
        for label, folder in zip(labels, folders, strict=True)
    ]
    output = user_paths.expanded("--output", _OUTPUT.value)
    report.plot_runs(runs, output)
    print(f"Plotted {len(runs)} {'run' if len(runs) == 1 else 'runs'}: {output.resolve()}")


def _labels(folders: Sequence[str], labels: Sequence[str]) -> Sequence[str]:
    if not folders:
        raise InputError("no run to plot; give the --workdir of one or more after the command")
    most = len(figures.COLOURS)
    if len(folders) > most:
        raise InputError(f"{len(folders)} runs; more than {most} cannot be told apart")
    if labels:
        if len(labels) != len(folders):
            raise InputError(
                f"{len(labels)} --label for {len(folders)} runs; give one for each, or none"
            )
        return labels
    names = [Path(folder).resolve().name for folder in folders]
    # Runs of one name in different folders are told apart by their paths.
    return names if len(set(names)) == len(names) else folders


def _read(folder: Path) -> report.Metrics:
    path = folder / METRICS_FILE
    metrics = read_metrics(path)
    if "train/loss" not in metrics and "eval/loss" not in metrics:
        raise InputError(f"{path}: it has neither train/loss nor eval/loss to plot")
    return metrics


if __name__ == "__main__":
    command_line.run(main, positionals=True)
