"""The factors that a limit allows, of bytes or of time, at the least rise of the loss.

Predicted rises are sums of the measured costs of single cuts; docs/sensitivity.md says what that
leaves out.  So the plan itself is measured, and a few that are like it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from caat_jax.config.architecture import Architecture, SyncFactors
from caat_jax.errors import InputError
from caat_jax.sensitivity.budget import Option, channels_allowed, choose, improve
from caat_jax.sensitivity.cuts import SUBLAYERS, Sensitivity


class Limit(NamedTuple):
    """What all sublayers together may cost."""

    flag: str  # that it comes from, such as "budget=0.5"
    purpose: str  # a sentence's beginning: what a plan within it does
    cost: Callable[[float], int]  # of one sublayer with this factor
    allowed: int


class Plan(NamedTuple):
    """The best factors found within a limit."""

    limit: Limit
    sync_factors: SyncFactors
    rise: float  # predicted, of the validation loss, in nats a token
    measured_rise: float


class Candidates(NamedTuple):
    """The factors that each sublayer may have, attention and MLP of the layers in turn."""

    factors: list[list[float]]  # its own first
    options: list[list[Option]]

    def sync_factors(self, choice: Sequence[int]) -> SyncFactors:
        """The model's, when each sublayer has the factor of this number."""
        taken = [some[number] for some, number in zip(self.factors, choice, strict=True)]
        return tuple(zip(taken[::2], taken[1::2], strict=True))

    def rise(self, choice: Sequence[int]) -> float:
        """Of the loss, predicted, in nats a token."""
        taken = zip(self.options, choice, strict=True)
        return math.fsum(sublayer[number].rise for sublayer, number in taken)


def candidates(sensitivity: Sensitivity, cost: Callable[[float], int]) -> Candidates:
    """Each sublayer's own factor, and those that were measured."""
    rises = [
        {own: 0.0}
        | {
            cut.sync_factor: sensitivity.rise(cut)
            for cut in sensitivity.cut_losses
            if (cut.layer, cut.sublayer) == (layer, sublayer)
        }
        for layer, pair in enumerate(sensitivity.config.model.sync_factors)
        for sublayer, own in zip(SUBLAYERS, pair, strict=True)
    ]
    return Candidates(
        [list(some) for some in rises],
        [[Option(cost(factor), rise) for factor, rise in some.items()] for some in rises],
    )


def find(
    sensitivity: Sensitivity, limit: Limit, loss: Callable[[SyncFactors], float], swaps: int
) -> Plan:
    """The factors of least predicted rise, or the best of those measured around them.

    Args:
      sensitivity: what single cuts cost.
      limit: what the factors may cost.
      loss: of the model with these factors, over the same sequences.
      swaps: how many neighbours of the best plan to measure beside it.

    Raises:
      InputError: the limit needs a cut whose loss is not finite.
    """
    some = candidates(sensitivity, limit.cost)
    choice = choose(some.options, limit.allowed)
    if choice is None:
        raise InputError(f"--{limit.flag} cannot be met: it takes cuts whose loss is not finite")
    choice, found = improve(
        some.options, limit.allowed, choice, lambda n: loss(some.sync_factors(n)), swaps
    )
    return Plan(limit, some.sync_factors(choice), some.rise(choice), found - sensitivity.uncut_loss)


def budget_limit(budget: float, model: Architecture, sync_factors: Sequence[float]) -> Limit:
    """A mean fraction of the channels, over all sublayers, that may be synchronised.

    Args:
      budget: the fraction.
      model: the checkpoint's.
      sync_factors: those that its sublayers can be cut to.

    Raises:
      InputError: it is out of range, or below the smallest factors.
    """
    if not 0 <= budget <= 1:
        raise InputError(f"--budget={budget} is outside [0, 1]")
    owns = [p for pair in model.sync_factors for p in pair]
    allowed = channels_allowed(budget, len(owns), model.embed_dim)
    smallest = sum(model.sync_width(min(own, *sync_factors)) for own in owns)
    if smallest > allowed:
        possible = math.ceil(1e6 * smallest / (len(owns) * model.embed_dim)) / 1e6
        raise InputError(
            f"--budget={budget} is below what every sublayer's smallest factor takes; at least"
            f" {possible:g} is possible, or less with smaller factors in --cut_to"
        )
    purpose = f"Synchronises at most {budget:g} of the channels"
    return Limit(f"budget={budget}", purpose, model.sync_width, allowed)


def uniform_rise(sensitivity: Sensitivity, factor: float) -> float | None:
    """Predicted for this factor in every sublayer that is above it; None: it was not measured."""
    if factor not in sensitivity.sync_factors():
        return None
    return math.fsum(
        sensitivity.rise(cut) for cut in sensitivity.cut_losses if cut.sync_factor == factor
    )


def synchronised(model: Architecture) -> float:
    """The mean fraction of channels, over sublayers, that a model's factors synchronise."""
    widths = [width for pair in model.sync_widths for width in pair]
    return sum(widths) / (len(widths) * model.embed_dim)
