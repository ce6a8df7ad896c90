"""The optimum under a budget is that of trying every choice."""

import itertools
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from caat_jax.sensitivity.budget import Option, channels_allowed, choose

# Sixteenths add up without rounding, in any order.
RISES = st.integers(-40, 160).map(lambda n: n / 16) | st.sampled_from([math.inf, math.nan])
OPTIONS = st.lists(st.builds(Option, st.integers(0, 12), RISES), min_size=1, max_size=4)


def best_of_all(options, allowed):
    """(rise, channels) of the best choice, the fewest channels among equals; None: there is none"""
    outcomes = [
        (sum(option.rise for option in choice), sum(option.channels for option in choice))
        for choice in itertools.product(*options)
    ]
    possible = [o for o in outcomes if math.isfinite(o[0]) and o[1] <= allowed]
    return min(possible, default=None)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 50))
def test_no_choice_is_better(options, allowed):
    choice = choose(options, allowed)
    if choice is None:
        assert best_of_all(options, allowed) is None
        return
    taken = [sublayer[number] for sublayer, number in zip(options, choice, strict=True)]
    outcome = sum(option.rise for option in taken), sum(option.channels for option in taken)
    assert outcome == best_of_all(options, allowed)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.0, 0),
        (0.5, 32),
        (0.51, 32),
        (1.0, 64),
        (1 / 3, 21),
    ],
)
def test_channels_of_a_budget(budget, expected):
    assert channels_allowed(budget, sublayers=4, embed_dim=16) == expected


@pytest.mark.parametrize("width", [3, 100, 768, 4096])
def test_a_factor_everywhere_meets_its_own_budget(width):
    """In float64, 0.3333333333333333 · 3 is 1, 0.29 · 100 is below 29."""
    for budget in (1 / 3, 2 / 3, 0.29, 0.57, 0.7, 0.1, 0.5):
        for sublayers in (1, 2, 6, 22, 64):
            assert sublayers * int(width * budget) <= channels_allowed(budget, sublayers, width)
