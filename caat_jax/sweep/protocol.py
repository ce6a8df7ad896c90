"""Is a setting worse than the baseline by more than a margin that was stated before?

The test is that of non-inferiority, half of the two one-sided tests of equivalence (Schuirmann,
1987), on pairs of runs that share their initial parameters and their batches: Student's one-sided
bounds of the mean difference in loss are held against the margin.  A study may be looked at while
it runs; each look spends an equal part of the error (Bonferroni's inequality; Dunn, 1961), so that
all looks together call a setting "not worse" that is worse by the margin in at most `ERROR` of all
studies, and likewise the other way round.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

ERROR = 0.05  # of either verdict, over all looks together
POWER = 0.8  # with which the pairs that an undecided study still needs are worked out

NOT_WORSE = "not worse"  # by more than the margin
WORSE = "worse"  # by more than the margin
UNDECIDED = "undecided"

_MOST_PAIRS = 1000


class Verdict(NamedTuple):
    """What a study says about one setting."""

    word: str  # NOT_WORSE, WORSE or UNDECIDED
    pairs: int  # that it rests on: those of the look that decided it, or of the last
    difference: float  # mean loss minus the baseline's, nats a token
    lower: float  # one-sided bounds of it, each with the error of one look
    upper: float
    pairs_needed: int | None  # more than `pairs`, where undecided; None: over 1,000, or unknown


def look_sizes(pairs: int, looks: int) -> tuple[int, ...]:
    """Pairs at each of so many looks, evenly spread; the last has them all."""
    return tuple(math.ceil(pairs * look / looks) for look in range(1, looks + 1))


def judge(differences: Sequence[float], margin: float, looks: Sequence[int]) -> Verdict | None:
    """The verdict at the first look that decides, otherwise at the last that was reached.

    Args:
      differences: a loss minus the baseline's for each pair, in the order in which the pairs were
        planned.  What lies beyond the last look reached is not looked at.
      margin: nats a token, above 0.
      looks: pairs at each planned look, ascending, at least 2.

    Returns:
      None before the first look.
    """
    verdict = None
    for pairs in looks:
        if pairs > len(differences):
            break
        verdict = _look(np.asarray(differences[:pairs]), margin, ERROR / len(looks))
        if verdict.word != UNDECIDED:
            break
    return verdict


def _look(differences: np.ndarray, margin: float, error: float) -> Verdict:
    pairs, mean = len(differences), float(differences.mean())
    spread = float(differences.std(ddof=1))
    reach = float(stats.t.ppf(1 - error, pairs - 1)) * spread / math.sqrt(pairs)
    lower, upper = mean - reach, mean + reach
    # A loss that is not finite decides nothing.
    word = NOT_WORSE if upper < margin else WORSE if lower > margin else UNDECIDED
    needed = None
    if word == UNDECIDED:
        total = pairs_for(spread, abs(margin - mean), error)
        needed = total and max(total - pairs, 1)
    return Verdict(word, pairs, mean, lower, upper, needed)


def pairs_for(spread: float, distance: float, error: float) -> int | None:
    """Pairs that decide with a chance of `POWER`, in one look with that error.

    The normal approximation with Guenther's term for Student's t (1981): the square of
    (z_error + z_power)·spread/distance, plus z_error²/2.

    Args:
      spread: the standard deviation of the differences over the pairs.
      distance: of the true difference from the margin.
      error: of the look, one-sided.

    Returns:
      None where that would take more than 1,000 pairs.
    """
    z_error, z_power = stats.norm.ppf([1 - error, POWER])
    if not distance * _MOST_PAIRS**0.5 > (z_error + z_power) * spread:
        return None
    return math.ceil(((z_error + z_power) * spread / distance) ** 2 + z_error**2 / 2)


def equal_loss_steps(
    steps: Sequence[int], losses: Sequence[float], baseline: Sequence[float]
) -> float:
    """Steps that a setting needs for the loss that the baseline has, as a multiple of its steps.

    The loss is the higher of the two last ones, which both curves reach; the steps at which they do
    are interpolated.  A multiple above 1 says that the setting needs more.

    Args:
      steps: of the evaluations, ascending.
      losses: of the setting there, nats a token.
      baseline: of the baseline there.

    Returns:
      nan where a curve holds a loss that is not finite.
    """
    if not np.isfinite([losses, baseline]).all():
        return math.nan
    target = max(losses[-1], baseline[-1])
    return _first_at(target, steps, losses) / _first_at(target, steps, baseline)


def _first_at(target: float, steps: Sequence[int], losses: Sequence[float]) -> float:
    """The step, interpolated, at which the loss first is as low as `target`."""
    place = next(n for n, loss in enumerate(losses) if loss <= target)
    if place == 0:
        return float(steps[0])
    before, after = losses[place - 1], losses[place]
    share = (before - target) / (before - after)
    return steps[place - 1] + share * (steps[place] - steps[place - 1])
