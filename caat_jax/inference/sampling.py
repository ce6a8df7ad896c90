"""The next token from logits that are split over the vocabulary.

Runs inside `jax.shard_map` over the whole mesh.  Which token is drawn depends on the seed, the row
of the batch and the step only, not on the mesh.

Axis letters: B batch, V vocabulary, v this device's part of it in groups, G groups of shards on
this device (`partial_sync.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from caat_jax.devices.sharding import LOGICAL_AXIS_RULES
from caat_jax.errors import InputError
from caat_jax.model import loss

# What a program is compiled for; the numbers of `Sampling` are its arguments.
GREEDY, ANY_TOKEN, LIKELIEST = "greedy", "any token", "the likeliest tokens"
SEEDS = 2**32


class Sampling(NamedTuple):
    """How to choose; scalars.  Logits are divided by the temperature first, then tokens left out.

    `top_k` tokens at most remain, then the fewest of them that together have a probability of
    `top_p`.
    """

    temperature: np.float32  # 0: the likeliest token, whatever the other fields
    top_k: np.int32  # 0: all
    top_p: np.float32
    seed: np.uint32

    @property
    def kind(self) -> str:
        """GREEDY, ANY_TOKEN or LIKELIEST."""
        if self.temperature == 0:
            return GREEDY
        return LIKELIEST if self.top_k or self.top_p < 1 else ANY_TOKEN


def sampling(temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
    """Checks the values that a user gives.

    Raises:
      InputError: naming the value and what is allowed.
    """
    if not 0 <= temperature < np.inf:
        raise InputError(f"temperature={temperature} must be 0 (the likeliest token) or more")
    if not 0 <= top_k < 2**31:
        raise InputError(f"top_k={top_k} must be 0 (all tokens) or more, and below 2**31")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p} is outside (0, 1]")
    if not 0 <= seed < SEEDS:
        raise InputError(f"seed={seed} is outside [0, 2**32)")
    # A temperature that float32 would round to 0 is not greedy: it must not divide by 0.
    smallest = np.finfo(np.float32).tiny
    rounded = np.float32(max(temperature, smallest) if temperature else 0)
    return Sampling(rounded, np.int32(top_k), np.float32(top_p), np.uint32(seed))


def next_tokens(logits_GBv: jax.Array, step: jax.Array, sampling: Sampling, kind: str) -> jax.Array:
    """int32 [B], equal on all devices of the `model` axis.

    Args:
      logits_GBv: float32, this device's part of the vocabulary in G groups.
      step: int32 scalar, how many tokens were drawn before for these rows.
      sampling: its numbers, traced.
      kind: `Sampling.kind`, which is compiled in.
    """
    if kind == GREEDY:
        return loss.most_likely(logits_GBv[:, :, None])[:, 0]
    parts_Bv = jnp.moveaxis(logits_GBv, 0, 1).reshape(logits_GBv.shape[1], -1)
    logits_BV = lax.all_gather(parts_Bv, "model", axis=1, tiled=True, to="invarying")
    # Differences are what counts, and those of the largest never overflow when divided.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / sampling.temperature
    if kind == ANY_TOKEN:
        return jnp.argmax(logits_BV + _noise(logits_BV, step, sampling.seed), axis=-1)
    # Likeliest first; of equals the lower id, as greedily.
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    logits_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    ranks = jnp.arange(logits_BV.shape[-1])
    logits_BV = jnp.where((ranks < sampling.top_k) | (sampling.top_k == 0), logits_BV, -jnp.inf)
    probabilities = jax.nn.softmax(logits_BV, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    logits_BV = jnp.where((before < sampling.top_p) | (ranks == 0), logits_BV, -jnp.inf)
    drawn = jnp.argmax(logits_BV + _noise(logits_BV, step, sampling.seed), axis=-1)
    return jnp.take_along_axis(order_BV, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _noise(logits_BV: jax.Array, step: jax.Array, seed: jax.Array) -> jax.Array:
    """Gumbel noise [B, V]: the largest of logits plus it is a draw from their softmax."""
    rows, columns = logits_BV.shape
    first = lax.axis_index(LOGICAL_AXIS_RULES["batch"]) * rows
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))
    return jax.vmap(lambda key: jax.random.gumbel(key, (columns,)))(keys)
