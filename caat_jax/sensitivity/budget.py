"""The best synchronised widths that a communication budget allows: an exact optimum.

Dynamic programming over whole channels: what matters is how many are left, not who used them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Option(NamedTuple):
    """One width that a sublayer may have."""

    channels: int  # D_s
    rise: float  # of the loss, predicted, in nats a token; one that is not finite is never taken


def channels_allowed(budget: float, sublayers: int, embed_dim: int) -> int:
    """The most channels that all sublayers together may synchronise at a mean fraction `budget`."""
    # Rounding to just below a whole number must not cost a channel.
    return int(budget * sublayers * embed_dim * (1 + 1e-12))


def choose(options: Sequence[Sequence[Option]], allowed: int) -> list[int] | None:
    """Takes one option of each sublayer: at most `allowed` channels in all, and the least rise.

    Returns:
      The index of each sublayer's option, with the fewest channels among equal rises; None where no
      choice of finite rises is small enough.
    """
    least = np.zeros(allowed + 1)  # [c]: the least rise so far with at most c channels
    taken = []
    for sublayer in options:
        rises = np.full((len(sublayer), allowed + 1), np.inf)
        for row, (channels, rise) in zip(rises, sublayer, strict=True):
            if math.isfinite(rise) and channels <= allowed:
                row[channels:] = least[: allowed + 1 - channels] + rise
        taken.append(rises.argmin(axis=0).astype(np.int16))
        least = rises.min(axis=0)
    if math.isinf(least[-1]):
        return None
    left = int(np.argmax(least == least[-1]))
    choice = []
    for sublayer, best in zip(reversed(options), reversed(taken), strict=True):
        choice.append(int(best[left]))
        left -= sublayer[choice[-1]].channels
    return choice[::-1]
