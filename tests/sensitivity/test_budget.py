"""The optimum under a budget is that of trying every choice."""

import itertools
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from caat_jax.sensitivity.budget import Option, channels_allowed, choose, improve

# Sixteenths add up without rounding, in any order.
RISES = st.integers(-40, 160).map(lambda n: n / 16) | st.sampled_from([math.inf, math.nan])
OPTIONS = st.lists(st.builds(Option, st.integers(0, 12), RISES), min_size=1, max_size=4)


def best_of_all(options, allowed):
    """(rise, cost) of the best choice, the least cost among equals; None: there is none"""
    outcomes = [
        (sum(option.rise for option in choice), sum(option.cost for option in choice))
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
    outcome = sum(option.rise for option in taken), sum(option.cost for option in taken)
    assert outcome == best_of_all(options, allowed)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(OPTIONS, min_size=1, max_size=4), st.integers(0, 40), st.integers(0, 30), st.data()
)
def test_what_is_measured_fits_and_the_best_is_kept(options, allowed, trials, data):
    """Losses are anything: what was predicted decides only what is tried first."""
    choice = choose(options, allowed)
    if choice is None:
        return
    losses = {}

    def measure(some):
        assert tuple(some) not in losses
        losses[tuple(some)] = loss = data.draw(st.integers(0, 99))
        return loss

    best, loss = improve(options, allowed, choice, measure, trials)
    assert losses[tuple(best)] == loss == min(losses.values())
    assert 1 <= len(losses) <= 1 + trials
    for some in losses:
        taken = [sublayer[number] for sublayer, number in zip(options, some, strict=True)]
        assert sum(option.cost for option in taken) <= allowed
        assert all(math.isfinite(option.rise) for option in taken)


def test_swaps_reach_the_optimum_that_sums_do_not_know():
    """Two neighbouring sublayers at 0 cost 8 more than the sum says; three pairs must be found."""
    options = [[Option(1, 0.0), Option(0, 1.0 + n / 16)] for n in range(6)]

    def measure(choice):
        together = sum(a and b for a, b in itertools.pairwise(choice))
        rises = (sublayer[number].rise for sublayer, number in zip(options, choice, strict=True))
        return sum(rises) + 8.0 * together

    choice = choose(options, 3)
    assert choice == [1, 1, 1, 0, 0, 0]
    best, loss = improve(options, 3, choice, measure, trials=12)
    possible = [c for c in itertools.product((0, 1), repeat=6) if sum(c) >= 3]
    assert loss == measure(best) == min(map(measure, possible))


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
