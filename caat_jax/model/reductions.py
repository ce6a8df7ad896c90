"""What travels over the `model` axis, in which type, and the derivative of each.

Backward, the gradients are reduced as the activations were, in a type of their own; rounding on the
wire counts as the identity (a straight-through derivative).  Everything here runs inside
`jax.shard_map`.

The wire rounds what a device sends.  With M devices for S > M shards that is the exact sum of the
contributions of its L = S/M shards, and with M = 1 nothing is rounded.  An emulated wire rounds
as M = S devices do, on any mesh: each shard's contribution, then the sum of all of them, which is
taken in float32.

Axis letters: B batch, T sequence, D residual width, d a part of it, L shards on this device.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from caat_jax.config.sections import Compute
from caat_jax.model import quantised_collectives as quantised

# Rematerialisation keeps the activations of this name, so that no all-reduce is repeated.
REDUCED = "partial_channel_reduce"


class Wire(NamedTuple):
    """How a reduction travels, and which compiler arranges what runs beside it."""

    forward: jnp.dtype
    backward: jnp.dtype
    for_tpu: bool = False  # see `norm_product.py`
    block: int = 128  # the most channels that share a scale, in types of 8 bits
    # Arrays that are reduced or gathered have a leading axis of L shards, and so have the results.
    emulated: bool = False


def wire_of(compute: Compute, *, for_tpu: bool) -> Wire:
    """The configuration's."""
    return Wire(
        jnp.dtype(compute.forward_wire_dtype),
        jnp.dtype(compute.backward_wire_dtype),
        for_tpu,
        compute.wire_block,
        compute.emulate_wires,
    )


def all_reduce(partial: jax.Array, wire: Wire) -> jax.Array:
    """Sums over the `model` axis; backward, sums the gradients over it.

    The result has equal values on all devices of the axis, but counts as varying over it, as
    everything does that joins a residual stream.
    """
    return checkpoint_name(_all_reduce(partial, wire), REDUCED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_reduce(partial: jax.Array, wire: Wire) -> jax.Array:
    return _sum_over_model(partial, wire.forward, wire)


def _sum_over_model(partial: jax.Array, dtype: jnp.dtype, wire: Wire) -> jax.Array:
    if wire.emulated:
        return _emulated_sum(partial, dtype, wire.block)
    if lax.axis_size("model") == 1:
        return partial
    if quantised.is_quantised(dtype):
        return quantised.all_reduce(partial, dtype, wire.block).astype(partial.dtype)
    total = _in_wire_type(lambda x: lax.psum(x, "model"), partial, dtype)
    return lax.pcast(total, "model", to="varying")


_all_reduce.defvjp(
    lambda partial, wire: (_sum_over_model(partial, wire.forward, wire), None),
    lambda wire, _, gradient: (_sum_over_model(gradient, wire.backward, wire),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_channels(part_BTd: jax.Array, wire: Wire) -> jax.Array:
    """All D channels [B, T, D] on every device, from D/M of them on each.

    Backward, each device gets the sum over all of the gradients of its own channels: together half
    of the bytes that two all-reduces of whole rows would send.
    """
    return _gather_channels(part_BTd, wire)


def _gather_channels(part: jax.Array, wire: Wire) -> jax.Array:
    if wire.emulated:
        return _emulated_gather(part, wire.forward, wire.block)
    if lax.axis_size("model") == 1:
        return part
    if quantised.is_quantised(wire.forward):
        return quantised.gather_channels(part, wire.forward, wire.block).astype(part.dtype)
    return _in_wire_type(
        lambda x: lax.all_gather(x, "model", axis=2, tiled=True), part, wire.forward
    )


def _scatter_gradient(gradient: jax.Array, wire: Wire) -> jax.Array:
    if wire.emulated:
        return _emulated_scatter(gradient, wire.backward, wire.block)
    if lax.axis_size("model") == 1:
        return gradient
    if quantised.is_quantised(wire.backward):
        total = quantised.scatter_channels(gradient, wire.backward, wire.block)
        return total.astype(gradient.dtype)
    return _in_wire_type(
        lambda x: lax.psum_scatter(x, "model", scatter_dimension=2, tiled=True),
        gradient,
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
        result = _reduce_precision(result, x.dtype)
    return result.astype(x.dtype)


def _emulated_sum(partial_LBTd: jax.Array, dtype: jnp.dtype, block: int) -> jax.Array:
    total = jnp.sum(_as_received(partial_LBTd, dtype, block), axis=0)
    total = _as_received(lax.psum(total, "model"), dtype, block).astype(partial_LBTd.dtype)
    return lax.pcast(jnp.broadcast_to(total, partial_LBTd.shape), "model", to="varying")


def _emulated_gather(part_LBTd: jax.Array, dtype: jnp.dtype, block: int) -> jax.Array:
    part = jnp.moveaxis(_as_received(part_LBTd, dtype, block), 0, 2)
    part_BTD = part.reshape(*part.shape[:2], -1).astype(part_LBTd.dtype)
    whole = lax.all_gather(part_BTD, "model", axis=2, tiled=True)
    return jnp.broadcast_to(whole, (len(part_LBTd), *whole.shape))


def _emulated_scatter(gradient_LBTD: jax.Array, dtype: jnp.dtype, block: int) -> jax.Array:
    local_shards, *tokens, width = gradient_LBTD.shape
    part = width // (local_shards * lax.axis_size("model"))
    by_part = gradient_LBTD.reshape(local_shards, *tokens, -1, part)
    total = jnp.sum(_as_received(by_part, dtype, block), axis=0).reshape(*tokens, width)
    total = lax.psum_scatter(total, "model", scatter_dimension=2, tiled=True)
    if not quantised.is_quantised(dtype):
        total = _as_received(total, dtype, block)
    own = total.reshape(*tokens, local_shards, part).astype(gradient_LBTD.dtype)
    return jnp.moveaxis(own, 2, 0)


def _as_received(x: jax.Array, dtype: jnp.dtype, block: int) -> jax.Array:
    """x, float32, rounded as when it is sent."""
    if quantised.is_quantised(dtype):
        return quantised.rounded(x, dtype, block)
    return _reduce_precision(x.astype(jnp.float32), dtype)


def _reduce_precision(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    to = jnp.finfo(dtype)
    return lax.reduce_precision(x, to.nexp, to.nmant)
