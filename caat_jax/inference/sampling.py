"""The next token from logits that are split over the vocabulary.

Runs inside `jax.shard_map` over the whole mesh.  Which token is drawn depends on the seed, the row
of the batch and the step only, not on the mesh.

Axis letters: B batch, V vocabulary, v this device's part of it in groups, G groups of shards on
this device (`partial_sync.py`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from caat_jax.devices.sharding import LOGICAL_AXIS_RULES
from caat_jax.errors import InputError
from caat_jax.model import loss

# What a program is compiled for; the `Numbers` are its arguments.
GREEDY, FULL, TRUNCATED = "greedy", "full", "truncated"
SEEDS = 2**32


class Numbers(NamedTuple):
    """The scalars that a program takes."""

    temperature: np.float32
    top_k: np.int32
    top_p: np.float32
    seed: np.uint32
    vocabulary: np.int32  # ids from here on only pad the vocabulary, and are never chosen


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: by default the most likely one.

    Logits are divided by the temperature first, then tokens are left out: at most `top_k` remain,
    then the fewest of them that together have a probability of `top_p`.

    Raises:
      InputError: naming the value and what is allowed.
    """

    temperature: float = 0.0  # 0: the most likely token, whatever the other fields
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0  # the same one draws the same tokens for a prompt at the same place, on any mesh

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise InputError(
                f"temperature={self.temperature} must be 0 (the most likely token) or more"
            )
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k={self.top_k} must be 0 (all tokens) or more, and below 2**31")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} is outside (0, 1]")
        if not 0 <= self.seed < SEEDS:
            raise InputError(f"seed={self.seed} is outside [0, 2**32)")

    @property
    def kind(self) -> str:
        """GREEDY, FULL or TRUNCATED."""
        if self.temperature == 0:
            return GREEDY
        return TRUNCATED if self.top_k or self.top_p < 1 else FULL

    def numbers(self, vocabulary: int) -> Numbers:
        """For a program, of a model whose ids below `vocabulary` mean something."""
        # A temperature that float32 would round to 0 is not greedy: it must not divide by 0.
        smallest = np.finfo(np.float32).tiny
        temperature = np.float32(max(self.temperature, smallest) if self.temperature else 0)
        return Numbers(
            temperature,
            np.int32(self.top_k),
            np.float32(self.top_p),
            np.uint32(self.seed),
            np.int32(vocabulary),
        )


def next_tokens(logits_GBv: jax.Array, step: jax.Array, numbers: Numbers, kind: str) -> jax.Array:
    """int32 [B], equal on all devices of the `model` axis.

    Args:
      logits_GBv: float32, this device's part of the vocabulary in G groups.
      step: int32 scalar, how many tokens were drawn before for these rows.
      numbers: of `Sampling.numbers`, traced.
      kind: `Sampling.kind`, which is compiled in.
    """
    logits_GBv = jnp.where(
        loss.vocabulary_ids(logits_GBv) < numbers.vocabulary, logits_GBv, -jnp.inf
    )
    if kind == GREEDY:
        return loss.most_likely(logits_GBv[:, :, None])[:, 0]
    parts_Bv = jnp.moveaxis(logits_GBv, 0, 1).reshape(logits_GBv.shape[1], -1)
    logits_BV = lax.all_gather(parts_Bv, "model", axis=1, tiled=True, to="invarying")
    # Differences are what counts, and those of the largest never overflow when divided.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / numbers.temperature
    if kind == FULL:
        return jnp.argmax(logits_BV + _noise(logits_BV, step, numbers.seed), axis=-1)
    # Most likely first; of equals the lower id, as greedily.
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    logits_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    ranks = jnp.arange(logits_BV.shape[-1])
    logits_BV = jnp.where((ranks < numbers.top_k) | (numbers.top_k == 0), logits_BV, -jnp.inf)
    probabilities = jax.nn.softmax(logits_BV, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    logits_BV = jnp.where((before < numbers.top_p) | (ranks == 0), logits_BV, -jnp.inf)
    drawn = jnp.argmax(logits_BV + _noise(logits_BV, step, numbers.seed), axis=-1)
    return jnp.take_along_axis(order_BV, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _noise(logits_BV: jax.Array, step: jax.Array, seed: jax.Array) -> jax.Array:
    """Gumbel noise [B, V]: the largest of logits plus it is a draw from their softmax."""
    rows, columns = logits_BV.shape
    first = lax.axis_index(LOGICAL_AXIS_RULES["batch"]) * rows
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))
    return jax.vmap(lambda key: jax.random.gumbel(key, (columns,)))(keys)
