"""Runs side by side as a picture."""

import math

import matplotlib.image
import numpy as np
import pytest

from caat_jax import plot
from caat_jax.training.metrics import MetricsWriter


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


def test_each_run_is_drawn_in_its_colour(runs, tmp_path, capsys):
    output = tmp_path / "runs.png"
    assert plot.main([*map(str, runs), f"--output={output}"]) == 0
    assert str(output) in capsys.readouterr().out
    pixels = (matplotlib.image.imread(output)[..., :3] * 255).round().astype(np.uint8)
    for colour in plot.COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels.astype(int) - rgb).max(axis=-1) <= 2).sum() > 1000
    third = [int(plot.COLOURS[2][i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels.astype(int) - third).max(axis=-1) <= 2).sum() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{missing}"], "metrics.jsonl"),
        (["{run}", "--label=a", "--label=b"], "2 --label for 1 runs"),
        (["{run}"] * 9, "9 runs"),
        ([], "run_dir"),
        (["{run}", "--output={missing}/a.png"], "--output"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, capsys, arguments, message):
    places = dict(run=runs[0], missing=tmp_path / "missing")
    assert plot.main([argument.format(**places) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_limits_leave_out_the_first_steps_and_a_diverging_run():
    steps = np.arange(1, 101)
    falling = {"train/loss": (steps, 2 + 9 * np.exp(-steps / 3))}
    diverging = {"train/loss": (steps, np.where(steps < 50, 4.0, 1e6))}
    low, high = plot._loss_limits([falling])
    assert 1.5 < low < 2 and 2 < high < 3
    low, high = plot._loss_limits([falling, diverging])
    assert 1 < low < 2 and 4 < high < 11


def test_a_label_that_looks_like_mathematics_is_text(tmp_path):
    with MetricsWriter(tmp_path / "$a_{$") as writer:  # as mathematics it does not parse
        writer.write(1, {"train/loss": 1.0, "eval/loss": 1.0, "tokens_per_second": 1.0})
    assert plot.main([str(tmp_path / "$a_{$"), f"--output={tmp_path / 'a.png'}"]) == 0
