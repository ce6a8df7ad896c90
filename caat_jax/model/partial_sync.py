"""Tensor parallelism with partially synchronised activations: the method (arXiv:2506.19645, §3).

Everything here runs inside `jax.shard_map`.  The architecture has S shards; a device of the `model`
mesh axis (size M) holds L = S/M of them.  Shard j owns a residual stream x_j [B, T, D].  A sublayer
adds to it

    z_j[..., :D_s] = Σ_k y_k[..., :D_s]      summed over all shards: the only communication
    z_j[..., D_s:] = √S · y_j[..., D_s:]     the shard's own

where y_j is the product of shard j's activations and its rows of the output projection.  Backward
is the exact derivative: the same sum, over the gradients of the first D_s channels.

How a device keeps its L streams (`Stream`).  Channels that are equal on all its shards are kept
once, the others for each group of shards:

    G = 1, w = D   one array [B, T, D] as in a dense model: when L = 1 or nothing is private
    G = L, w < D   w common channels [B, T, w], and [L, B, T, D - w] private ones

w is the smallest D_s of any sublayer: a channel that is private once stays private.

Axis letters: B batch, T sequence, D residual width, G groups of shards on this device, w common
channels, n columns of a shard group, k rows of a shard group.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Rematerialisation keeps the activations of this name, so that no all-reduce is repeated.
REDUCED = "partial_channel_reduce"


class Wire(NamedTuple):
    """The types in which a reduction travels, forward and backward."""

    forward: jnp.dtype
    backward: jnp.dtype


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


class Columns(NamedTuple):
    """γ ⊙ W of an input projection, by what it is multiplied with: no product transposes it."""

    common: jax.Array  # [w, G·n]: of the common channels
    private: jax.Array  # [G, D - w, n]: of each group's private ones


class Factors(NamedTuple):
    """The matrices of one sublayer as they are multiplied with, of this device's shards by group.

    They hold γ and √S, so that a program that runs often can be given them ready made.
    """

    inputs: Columns
    shared: jax.Array  # [G, k, D_s]: rows of the output projection, the channels to be summed
    private: jax.Array  # [G, k, D - D_s]: the others, times √S


def all_reduce(partial: jax.Array, wire: Wire) -> jax.Array:
    """Sums over the `model` axis; backward, sums the gradients over it.

    The result has equal values on all devices of the axis, but counts as varying over it, as
    everything does that joins a residual stream.
    """
    return checkpoint_name(_all_reduce(partial, wire), REDUCED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_reduce(partial: jax.Array, wire: Wire) -> jax.Array:
    return _sum_over_model(partial, wire.forward)


def _sum_over_model(partial: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if lax.axis_size("model") == 1:
        return partial
    total = _in_wire_type(lambda x: lax.psum(x, "model"), partial, dtype)
    return lax.pcast(total, "model", to="varying")


_all_reduce.defvjp(
    lambda partial, wire: (_sum_over_model(partial, wire.forward), None),
    lambda wire, _, gradient: (_sum_over_model(gradient, wire.backward),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_channels(part_BTd: jax.Array, wire: Wire) -> jax.Array:
    """All D channels [B, T, D] on every device, from D/M of them on each.

    Backward, each device gets the sum over all of the gradients of its own channels: together half
    of the bytes that two all-reduces of whole rows would send.
    """
    return _gather_channels(part_BTd, wire)


def _gather_channels(part_BTd: jax.Array, wire: Wire) -> jax.Array:
    if lax.axis_size("model") == 1:
        return part_BTd
    return _in_wire_type(
        lambda x: lax.all_gather(x, "model", axis=2, tiled=True), part_BTd, wire.forward
    )


def _scatter_gradient(gradient_BTD: jax.Array, wire: Wire) -> jax.Array:
    if lax.axis_size("model") == 1:
        return gradient_BTD
    return _in_wire_type(
        lambda x: lax.psum_scatter(x, "model", scatter_dimension=2, tiled=True),
        gradient_BTD,
        wire.backward,
    )


gather_channels.defvjp(
    lambda part, wire: (_gather_channels(part, wire), None),
    lambda wire, _, gradient: (_scatter_gradient(gradient, wire),),
)


def _in_wire_type(
    collective: Callable[[jax.Array], jax.Array], x: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """`collective(x)` with what is sent, and its sum, in `dtype`; the result in x's type."""
    result = collective(x.astype(dtype))
    if dtype != x.dtype:
        # The same rounding as that of the cast below, but one that the TPU compiler does not move
        # before the sum: else it sums in the type that the total is cast to.
        to = jnp.finfo(x.dtype)
        result = lax.reduce_precision(result, to.nexp, to.nmant)
    return result.astype(x.dtype)


def grouping(local_shards: int, smallest_sync_width: int, width: int) -> Grouping:
    """That of residual streams of `width` channels."""
    if local_shards == 1 or smallest_sync_width == width:
        return Grouping(1, width)
    return Grouping(local_shards, smallest_sync_width)


def start(x_BTD: jax.Array, local_shards: int, smallest_sync_width: int) -> Stream:
    """The streams x_j = x for every shard j of this device."""
    groups, common = grouping(local_shards, smallest_sync_width, x_BTD.shape[-1])
    private = x_BTD[..., common:]
    return Stream(x_BTD[..., :common], jnp.broadcast_to(private, (groups, *private.shape)))


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
    """`Factors.shared` and `Factors.private` of an output projection."""
    # √S goes into the weight: that is a smaller array than the activations.
    private = math.sqrt(tp_shards) * weight_GkD[..., sync_width:]
    return weight_GkD[..., :sync_width].astype(dtype), private.astype(dtype)


def norm_and_project(
    stream: Stream,
    columns: Columns,
    *,
    epsilon: float,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """RMSNorm of every shard's stream, times that shard's columns: [G, B, T, n].

    RMSNorm(x; γ) @ W = (x @ (γ ⊙ W)) / rms(x): the root mean square is one number a token, so it
    commutes with the product, and the normalised stream is never written to memory.

    Args:
      stream: the residual streams, in the type of the matrix product.
      columns: those of this device's shards, in the stream's type.
      epsilon: added to the mean square.
      out_dtype: of the result; the stream's type by default.
    """
    common, private = stream
    out_dtype = common.dtype if out_dtype is None else out_dtype
    if stream.grouping.groups == 1:
        return _normalised_product(common, columns.common, epsilon, out_dtype)[None]
    product = _product_by_group(stream, columns, out_dtype)
    square_sum = _square_sum(private) + _square_sum(common)
    width = common.shape[-1] + private.shape[-1]
    return _times_token(product, lax.rsqrt(square_sum / width + epsilon))


def project_and_add(
    stream: Stream,
    activations_GBTk: jax.Array,
    factors: Factors,
    wire: Wire,
) -> Stream:
    """Output projection, partial channel-reduce and residual connection of one sublayer.

    Args:
      stream: the residual streams.
      activations_GBTk: what the shards' heads or MLP columns computed.
      factors: the sublayer's, in the stream's type.
      wire: the types of the reduction.

    Returns:
      The streams after the sublayer.
    """
    common, private = stream
    parts = []
    if factors.shared.shape[-1]:
        partial = jnp.einsum("gbtk,gkd->btd", activations_GBTk, factors.shared)
        parts.append(all_reduce(partial, wire)[None])
    if factors.private.shape[-1]:
        parts.append(jnp.einsum("gbtk,gkd->gbtd", activations_GBTk, factors.private))
    if stream.grouping.groups == 1:
        return Stream(common + jnp.concatenate(parts, axis=-1)[0], private)
    width = common.shape[-1]
    if width:
        common += parts[0][0, ..., :width]
        parts[0] = parts[0][..., width:]
    if private.shape[-1]:
        parts = [jnp.broadcast_to(p, (len(private), *p.shape[1:])) for p in parts if p.shape[-1]]
        private += jnp.concatenate(parts, axis=-1)
    return Stream(common, private)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _normalised_product(
    x_BTD: jax.Array, weight_Dn: jax.Array, epsilon: float, out_dtype: jnp.dtype
) -> jax.Array:
    """(x @ W) / rms(x), [B, T, n], for one group."""
    return _normalised_product_forward(x_BTD, weight_Dn, epsilon, out_dtype)[0]


def _normalised_product_forward(x, weight, epsilon, out_dtype):
    inverse_rms = lax.rsqrt(_square_sum(x) / x.shape[-1] + epsilon)
    product = jnp.matmul(x, weight, preferred_element_type=out_dtype)
    return _times_token(product, inverse_rms), (x, weight, inverse_rms)


def _normalised_product_backward(epsilon, out_dtype, residuals, gradient):
    # With r = 1/rms(x) and g = r·gradient @ Wᵀ:  dx = g − r²/D · (x·g) · x.  Autodiff would take
    # the inner product over the n columns instead of D channels, and keep another [B, T, n].
    x, weight, inverse_rms = residuals
    gradient = _times_token(gradient, inverse_rms).astype(x.dtype)
    weight_gradient = jnp.einsum("btd,btn->dn", x, gradient)
    x_gradient = jnp.einsum("btn,dn->btd", gradient, weight)
    inner = jnp.sum(x.astype(jnp.float32) * x_gradient, axis=-1)
    correction = _times_token(x, jnp.square(inverse_rms) * inner / x.shape[-1])
    return x_gradient - correction, weight_gradient


_normalised_product.defvjp(_normalised_product_forward, _normalised_product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_by_group(stream: Stream, columns: Columns, out_dtype: jnp.dtype) -> jax.Array:
    """x @ W, [G, B, T, n]."""
    common, private = stream
    # The product is transposed, not the matrix, as one `einsum` would have it: in decode, which
    # multiplies one token of each sequence, the matrix is the larger array by far.
    of_common = jnp.matmul(common, columns.common, preferred_element_type=out_dtype)
    of_common = of_common.reshape(*of_common.shape[:-1], len(private), -1)
    of_private = jnp.einsum(
        "gbtd,gdn->gbtn", private, columns.private, preferred_element_type=out_dtype
    )
    return jnp.moveaxis(of_common, -2, 0) + of_private


def _product_by_group_forward(stream, columns, out_dtype):
    return _product_by_group(stream, columns, out_dtype), (stream, columns)


def _product_by_group_backward(_, residuals, gradient):
    # The gradient is the first operand: XLA for CPUs transposes another array then than in the
    # derivative of the above, which makes a training step at G = 8 an eighth longer.
    (common, private), columns = residuals
    gradient = gradient.astype(common.dtype)
    groups, _, n = columns.private.shape
    common_columns = columns.common.reshape(len(columns.common), groups, n)
    of_common = jnp.einsum("gbtn,btd->gnd", gradient, common)
    of_private = jnp.einsum("gbtn,gbtd->gnd", gradient, private)
    columns_gradient = Columns(
        jnp.moveaxis(of_common, -1, 0).reshape(columns.common.shape),
        jnp.swapaxes(of_private, 1, 2),
    )
    stream_gradient = Stream(
        jnp.einsum("gbtn,dgn->btd", gradient, common_columns),
        jnp.einsum("gbtn,gdn->gbtd", gradient, columns.private),
    )
    return stream_gradient, columns_gradient


_product_by_group.defvjp(_product_by_group_forward, _product_by_group_backward)


def _square_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)


def _times_token(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x [..., T, n] times one float32 number a token [..., T], in x's type."""
    return (x * factor[..., None]).astype(x.dtype)
