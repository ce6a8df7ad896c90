"""A sweep's picture shows its results: where, in which colour, in which words."""

import matplotlib.colors
import numpy as np
import pytest

from caat_jax import figures
from caat_jax.sweep import picture, report
from caat_jax.sweep import plan as sweep_plan
from configs import sweep


@pytest.fixture
def drawn(monkeypatch):
    """A function: the number of evaluations of a run -> the picture of four such runs."""
    pictures = []
    monkeypatch.setattr(figures, "save", lambda figure, output: pictures.append(figure))

    def draw(evaluations):
        config = sweep.get_config()
        config.grid.model.sync_factor, config.grid.seed = (1.0, 0.5), (0,)
        plan = sweep_plan.resolve(config)
        results = [
            report.Result(run.setting, run.seed, 1, 1, (9.0,) * 11 + (2.0 + n,))
            for n, run in enumerate(plan.runs)
        ]
        steps = list(range(1, evaluations + 1))
        curves = {
            result.setting: picture.Curve(steps, steps, np.array(result.losses[-evaluations:]))
            for result in results
        }
        picture.plot(plan, report.summarise(plan, results), curves, None)
        return pictures[-1]

    return draw


@pytest.mark.parametrize(("evaluations", "panels"), [(1, 2), (12, 3)])
def test_every_run_is_in_every_panel(drawn, evaluations, panels):
    by_value, *others = drawn(evaluations).axes
    assert len(others) == panels - 1
    marked = [line for line in by_value.lines if line.get_marker() in ("o", "s")]
    points = [line.get_xydata()[0].tolist() for line in marked]
    assert sorted(points) == [[0.5, 4.0], [0.5, 5.0], [1.0, 2.0], [1.0, 3.0]]
    for panel in others:
        assert sorted(line.get_ydata()[-1] for line in panel.lines) == [2.0, 3.0, 4.0, 5.0]
        lost = [
            line for line in panel.lines if len(line.get_xdata()) == 1 and not line.get_marker()
        ]
        assert lost == []


def test_a_colour_is_a_value_of_the_compared_field(drawn):
    figure = drawn(1)
    (legend,) = figure.legends
    colours = {
        text.get_text(): matplotlib.colors.to_hex(handle.get_color())
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    first, second = figures.COLOURS[:2]
    assert list(colours.items()) == [
        ("p = 1, S = 4", first),
        ("p = 1, S = 8", first),
        ("p = 0.5, S = 4", second),
        ("p = 0.5, S = 8", second),
    ]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model.sync_factor", 0.5, "p = 0.5"),
        ("model.sync_factor_per_layer", (), "p evenly"),
        ("model.sync_factor_per_layer", ((0.0, 0.75), 0.25), "p by layer, 0.31"),
        ("train.sync_schedule", (), "from the start"),
        ("train.sync_schedule", ((600, 1.0),), "p = 1 to step 600"),
        ("compute.forward_wire_dtype", "int8", "forward wire dtype int8"),
    ],
    ids=str,
)
def test_labels_of_the_picture_are_words(field, value, words):
    assert picture._label([field], (value,)) == words
