"""Runs side by side as a picture."""

import math

import matplotlib.image
import numpy as np
import pytest

from caat_jax import figures
from caat_jax.plot import report
from caat_jax.training.metrics import METRICS_FILE, MetricsWriter, read_metrics
from tests.command_line import assert_refused, run_forked

PLOT = "caat_jax/plot/__main__.py"


@pytest.fixture
def runs(tmp_path):
    folders = []
    for name, floor in (("half $p$", 1.7), ("full", 1.8)):
        folders.append(tmp_path / name)
        with MetricsWriter(folders[-1]) as writer:
            for step in range(1, 41):
                loss = floor + math.exp(-step / 10) if step != 7 else math.nan
                writer.write(step, {"train/loss": loss, "tokens_per_second": 1000.0})
                if step % 10 == 0:
                    writer.write(step, {"eval/loss": loss})
    return folders


def test_each_run_is_drawn_in_its_colour(runs, tmp_path):
    output = tmp_path / "runs.png"
    code, stdout, _ = run_forked([PLOT, *map(str, runs), f"--output={output}"], tmp_path)
    assert (code, stdout) == (0, f"Plotted 2 runs: {output}\n")
    pixels = (matplotlib.image.imread(output)[..., :3] * 255).round().astype(np.uint8)
    for colour in figures.COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - rgb).max(axis=-1) <= 2).sum() > 1000
    third = [int(figures.COLOURS[2][i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels.astype(int) - third).max(axis=-1) <= 2).sum() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{missing}"], "metrics.jsonl"),
        (["{run}", "--label=a", "--label=b"], "2 --label for 1 runs"),
        (["{run}"] * 9, "9 runs"),
        ([], "no run to plot"),
        (["{run}", "--output={missing}/a.png"], "missing/a.png"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, arguments, message):
    places = dict(run=runs[0], missing=tmp_path / "missing")
    given = [argument.format(**places) for argument in arguments]
    assert_refused(run_forked([PLOT, *given], tmp_path), message)


def test_the_limits_leave_out_the_first_steps_and_a_diverging_run():
    steps = np.arange(1, 101)
    falling = {"train/loss": (steps, 2 + 9 * np.exp(-steps / 3))}
    diverging = {"train/loss": (steps, np.where(steps < 50, 4.0, 1e6))}
    low, high = report._loss_limits([falling])
    assert 1.5 < low < 2 and 2 < high < 3
    low, high = report._loss_limits([falling, diverging])
    assert 1 < low < 2 and 4 < high < 11


def test_a_label_that_looks_like_mathematics_is_text(tmp_path):
    with MetricsWriter(tmp_path / "$a_{$") as writer:  # as mathematics it does not parse
        writer.write(1, {"train/loss": 1.0, "eval/loss": 1.0, "tokens_per_second": 1.0})
    metrics = read_metrics(tmp_path / "$a_{$" / METRICS_FILE)
    report.plot_runs([("$a_{$", metrics)], tmp_path / "a.png")
