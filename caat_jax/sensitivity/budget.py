"""The best choice of one option for each sublayer within a budget: an exact optimum, then trials.

Dynamic programming over whole units of cost: what matters is how many are left, not who used them.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Option(NamedTuple):
    """One factor that a sublayer may have."""

    cost: int  # D_s, or units of time
    rise: float  # of the loss, predicted, in nats a token; one that is not finite is never taken


def channels_allowed(budget: float, sublayers: int, embed_dim: int) -> int:
    """The most channels that all sublayers together may synchronise at a mean fraction `budget`."""
    # Rounding to just below a whole number must not cost a channel.
    return int(budget * sublayers * embed_dim * (1 + 1e-12))


def choose(options: Sequence[Sequence[Option]], allowed: int) -> list[int] | None:
    """Takes one option of each sublayer: a cost of at most `allowed` in all, and the least rise.

    Returns:
      The index of each sublayer's option, with the least cost among equal rises; None where no
      choice of finite rises is small enough.
    """
    least = np.zeros(allowed + 1)  # [c]: the least rise so far at a cost of at most c
    taken = []
    for sublayer in options:
        rises = np.full((len(sublayer), allowed + 1), np.inf)
        for row, (cost, rise) in zip(rises, sublayer, strict=True):
            if math.isfinite(rise) and cost <= allowed:
                row[cost:] = least[: allowed + 1 - cost] + rise
        taken.append(rises.argmin(axis=0).astype(np.int16))
        least = rises.min(axis=0)
    if math.isinf(least[-1]):
        return None
    left = int(np.argmax(least == least[-1]))
    choice = []
    for sublayer, best in zip(reversed(options), reversed(taken), strict=True):
        choice.append(int(best[left]))
        left -= sublayer[choice[-1]].cost
    return choice[::-1]


def improve(
    options: Sequence[Sequence[Option]],
    allowed: int,
    choice: Sequence[int],
    measure: Callable[[Sequence[int]], float],
    trials: int,
) -> tuple[list[int], float]:
    """Measures a choice, and others that differ in one or two sublayers, from the best one so far.

    Each trial is the neighbour of the best one that is predicted to cost least and was not tried.

    Args:
      options: of each sublayer.
      allowed: the most that all may cost.
      choice: where to start.
      measure: the loss of a choice.
      trials: how many neighbours to measure.

    Returns:
      The best choice of those measured, and its loss.
    """
    best, best_loss = list(choice), measure(choice)
    tried = {tuple(choice)}
    for _ in range(trials):
        untried = (n for n in _neighbours(options, best, allowed) if tuple(n[1]) not in tried)
        _, neighbour = min(untried, default=(0.0, None))
        if neighbour is None:
            break
        tried.add(tuple(neighbour))
        loss = measure(neighbour)
        if loss < best_loss or math.isnan(best_loss):
            best, best_loss = neighbour, loss
    return best, best_loss


def _neighbours(
    options: Sequence[Sequence[Option]], choice: list[int], allowed: int
) -> Iterator[tuple[float, list[int]]]:
    """Choices with another option in one or two sublayers, and how much more they should cost."""
    now = [sublayer[number] for sublayer, number in zip(options, choice, strict=True)]
    left = allowed - sum(option.cost for option in now)
    changes = [
        (index, number, option.cost - now[index].cost, option.rise - now[index].rise)
        for index, sublayer in enumerate(options)
        for number, option in enumerate(sublayer)
        if number != choice[index] and math.isfinite(option.rise)
    ]
    pairs = ((a, b) for a, b in itertools.combinations(changes, 2) if a[0] != b[0])
    for changed in itertools.chain(((change,) for change in changes), pairs):
        if sum(cost for _, _, cost, _ in changed) <= left:
            neighbour = list(choice)
            for index, number, _, _ in changed:
                neighbour[index] = number
            yield sum(rise for *_, rise in changed), neighbour
