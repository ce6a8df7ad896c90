"""What travels over the `model` axis, in which type, and the derivative of each.

Everything here runs inside `jax.shard_map`.

Axis letters: B batch, T sequence, D residual width, d a device's part of it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Rematerialisation keeps the activations of this name, so that no all-reduce is repeated.
REDUCED = "partial_channel_reduce"


class Wire(NamedTuple):
    """How a reduction travels: its types, and which compiler arranges what runs beside it."""

    forward: jnp.dtype
    backward: jnp.dtype
    for_tpu: bool = False  # see `norm_product.py`


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
