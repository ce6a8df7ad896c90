"""Tensor parallelism with partially synchronised activations: the method (arXiv:2506.19645, §3).

The architecture has S shards, each with a residual stream x_j [B, T, D] of its own.  At first all
are the embedding.  A sublayer, attention or MLP, computes on shard j, with that shard's heads or
columns only::

    y_j = f_j(RMSNorm(x_j; γ))

and adds to the shard's stream::

    z_j[..., :D_s] = Σ_k y_k[..., :D_s]      summed over all shards: the only communication
    z_j[..., D_s:] = √S · y_j[..., D_s:]     the shard's own

D_s = int(p·D).  √S gives the private channels at first the variance that the sum of S shards gives
the shared ones.  At p = 1 all streams are equal: ordinary tensor parallelism, a dense model.
Backward is the exact derivative: the same sum, over the gradients of the first D_s channels.

How a device keeps its streams (`Stream`).  Everything here runs inside `jax.shard_map`; a device of
the `model` mesh axis (size M) holds L = S/M shards.  The w channels that are equal on all shards
throughout are kept once [B, T, w], the others for each shard [L, B, T, D - w].  w is the smallest
D_s of any sublayer: a channel that is private once stays private.  Where nothing is private, w = D,
the device's shards are one group (G = 1) and compute as one; else each is its own (G = L).

Axis letters: B batch, T sequence, D residual width, G groups of shards on this device, w common
channels, n columns of a shard group, k rows of a shard group.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from caat_jax.model.reductions import Wire, all_reduce


class Grouping(NamedTuple):
    """How a device keeps its residual streams: G and w."""

    groups: int
    common_width: int


class Stream(NamedTuple):
    """This device's residual streams: `common` [B, T, w], `private` [G, B, T, D - w]."""

    common: jax.Array
    private: jax.Array

    @property
    def grouping(self) -> Grouping:
        return Grouping(self.private.shape[0], self.common.shape[-1])


# The logical axes of all streams of a model, as they cross the boundary of a `jax.shard_map`.
STREAM_AXES = Stream(
    common=("batch", "sequence", "residual"), private=("shards", "batch", "sequence", "residual")
)


class Columns(NamedTuple):
    """γ ⊙ W of an input projection, by what it is multiplied with: no product transposes it."""

    common: jax.Array  # [w, G·n]: of the common channels
    private: jax.Array  # [G, D - w, n]: of each group's private ones


class SublayerWeights(NamedTuple):
    """The matrices of one sublayer as they are multiplied with, of this device's shards by group.

    They hold γ and √S, so that a program that runs often can be given them ready made.
    """

    inputs: Columns
    shared: jax.Array  # [G, k, D_s]: rows of the output projection, the channels to be summed
    private: jax.Array  # [G, k, D - D_s]: the others, times √S


def grouping(local_shards: int, smallest_sync_width: int, width: int) -> Grouping:
    """That of residual streams of `width` channels."""
    return Grouping(1 if smallest_sync_width == width else local_shards, smallest_sync_width)


def start(x_BTD: jax.Array, local_shards: int, smallest_sync_width: int) -> Stream:
    """The streams x_j = x for every shard j of this device."""
    groups, common = grouping(local_shards, smallest_sync_width, x_BTD.shape[-1])
    private = x_BTD[..., common:]
    return Stream(x_BTD[..., :common], jnp.broadcast_to(private, (groups, *private.shape)))


def project_and_add(
    stream: Stream, activations_GBTk: jax.Array, weights: SublayerWeights, wire: Wire
) -> Stream:
    """Output projection, partial channel-reduce and residual connection of one sublayer.

    Args:
      stream: the residual streams x_j.
      activations_GBTk: what the shards' heads or MLP columns computed.
      weights: the sublayer's, in the stream's type.
      wire: the types of the reduction.

    Returns:
      The streams x_j + z_j.
    """
    common, private = stream
    own_GBTd = jnp.einsum("gbtk,gkd->gbtd", activations_GBTk, weights.private)
    if not weights.shared.shape[-1]:
        return Stream(common, private + own_GBTd)
    contributions = "gbtk,gkd->gbtd" if wire.emulated else "gbtk,gkd->btd"
    shared = all_reduce(jnp.einsum(contributions, activations_GBTk, weights.shared), wire)
    width = common.shape[-1]
    if width < shared.shape[-1]:  # another sublayer has a smaller D_s, or streams are kept whole
        synchronised = jnp.broadcast_to(
            shared[..., width:], (*own_GBTd.shape[:-1], shared.shape[-1] - width)
        )
        own_GBTd = jnp.concatenate([synchronised, own_GBTd], axis=-1)
    if width:
        common += shared[..., :width]
    return Stream(common, private + own_GBTd)


def at_boundary(stream: Stream) -> Stream:
    """The streams, the common channels marked as what they are: equal on all devices."""
    return Stream(lax.pmax(stream.common, "model"), stream.private)


def scaled_columns(
    scale_D: jax.Array, weight_DGn: jax.Array, common_width: int, dtype: jnp.dtype
) -> Columns:
    """γ ⊙ W, of float32 γ: the product is rounded to `dtype` once."""
    scaled = (scale_D[:, None, None] * weight_DGn).astype(dtype)
    common = scaled[:common_width].reshape(common_width, math.prod(weight_DGn.shape[1:]))
    return Columns(common, jnp.swapaxes(scaled[common_width:], 0, 1))


def output_rows(
    weight_GkD: jax.Array, *, sync_width: int, tp_shards: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """`SublayerWeights.shared` and `.private` of an output projection."""
    # √S goes into the weight: that is a smaller array than the activations.
    private = math.sqrt(tp_shards) * weight_GkD[..., sync_width:]
    return weight_GkD[..., :sync_width].astype(dtype), private.astype(dtype)
