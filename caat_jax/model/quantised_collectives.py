"""Collectives over the `model` axis that send 8 bits a number, with a scale for each block.

A block is some channels of one token.  It travels as bytes,

    scale = bfloat16(max |x| / q)      q: the largest finite number of the wire's type
    x / scale                          rounded to the nearest number of that type, ties to even

so that a number is off by at most half a step of a grid that the block's largest number sets.  A
sum has two phases, as a ring's all-reduce has, and its result has equal bits on all devices:

    every device quantises its contribution; all-to-all: each gets one part from everybody
    each sums its part in float32 and quantises the sum; all-gather: everybody gets all parts

The M parts are whole blocks, whatever tokens they are of, so that one token of decode is spread
over the devices like a whole batch; as many blocks of zeros as M needs to divide them are added.
Rounding is no part of any derivative (`reductions.py`).  A block with an infinity or a NaN arrives
without a finite number in it.  Everything here runs inside `jax.shard_map`.

Axis letters: B batch, T sequence, D residual width, d channels of a part, M devices, u blocks of a
part, n blocks of a token, b channels of a block.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SCALE_BYTES = jnp.dtype(jnp.bfloat16).itemsize
# Numbers far below any activation are zeros: the reciprocal of a scale must be finite.
_SMALLEST_SCALE = 2.0**-100


class Blocks(NamedTuple):
    """Numbers as they travel: `values` [..., b], the wire's as bytes; `scales` [...], bfloat16."""

    values: jax.Array
    scales: jax.Array


def is_quantised(dtype: jnp.dtype) -> bool:
    """Whether a wire of this type needs scales."""
    return dtype.itemsize == 1


def block_shape(width: int, block: int) -> tuple[int, int]:
    """(n, b) of a token of so many channels: as few blocks of at most `block` as will do, equal.

    The last one may be short of n·b - width < n channels; zeros are sent for them.
    """
    count = math.ceil(width / block)
    return count, math.ceil(width / count)


def all_reduce(x: jax.Array, dtype: jnp.dtype, block: int) -> jax.Array:
    """The sum over `model` of x [..., d], float32, in two phases."""
    blocks_Nb = _cut(x, block).reshape(-1, block_shape(x.shape[-1], block)[1])
    devices = lax.axis_size("model")
    missing = -len(blocks_Nb) % devices
    parts_Mub = jnp.pad(blocks_Nb, ((0, missing), (0, 0))).reshape(devices, -1, blocks_Nb.shape[-1])
    sum_ub = _scatter_sum(parts_Mub, dtype)
    total_Nb = _gather(sum_ub, dtype).reshape(-1, blocks_Nb.shape[-1])[: len(blocks_Nb)]
    return _joined(total_Nb, x.shape)


def gather_channels(part_BTd: jax.Array, dtype: jnp.dtype, block: int) -> jax.Array:
    """[B, T, M·d], float32, of the devices' parts: the second phase alone."""
    blocks = _cut(part_BTd, block)
    parts = _gather(blocks.reshape(-1, blocks.shape[-1]), dtype)
    parts_MBTd = _joined(parts, (len(parts), *part_BTd.shape))
    return jnp.moveaxis(parts_MBTd, 0, 2).reshape(*part_BTd.shape[:2], -1)


def scatter_channels(x_BTD: jax.Array, dtype: jnp.dtype, block: int) -> jax.Array:
    """The sum over `model` of this device's part of the channels, [B, T, D/M]: the first phase."""
    devices = lax.axis_size("model")
    x_MBTd = jnp.stack(jnp.split(x_BTD, devices, axis=-1))  # moving an axis takes CPUs longer
    blocks = _cut(x_MBTd, block)
    total = _scatter_sum(blocks.reshape(devices, -1, blocks.shape[-1]), dtype)
    return _joined(total, x_MBTd.shape[1:])


def rounded(x: jax.Array, dtype: jnp.dtype, block: int) -> jax.Array:
    """x [..., d], float32, as it arrives after it was quantised once."""
    # The compiler may leave out a conversion to a shorter type and back; not across the barrier.
    blocks = lax.optimization_barrier(quantise(_cut(x, block), dtype))
    return _joined(dequantise(blocks, dtype), x.shape)


def quantise(x: jax.Array, dtype: jnp.dtype) -> Blocks:
    """float32 [..., b]."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float((jnp.iinfo if is_integer else jnp.finfo)(dtype).max)
    scales = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / largest, _SMALLEST_SCALE)
    # Rounded to bfloat16, a scale is too small by 2⁻⁹ at most: nothing leaves the type's range.
    scales = scales.astype(jnp.bfloat16)
    x = x * (1 / scales.astype(jnp.float32))[..., None]
    values = (jnp.round(x) if is_integer else x).astype(dtype)
    return Blocks(lax.bitcast_convert_type(values, jnp.uint8), scales)


def dequantise(blocks: Blocks, dtype: jnp.dtype) -> jax.Array:
    """float32 [..., b]."""
    values = lax.bitcast_convert_type(blocks.values, dtype).astype(jnp.float32)
    return values * blocks.scales.astype(jnp.float32)[..., None]


def _scatter_sum(parts_Mub: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 [u, b]: the sum of everybody's part for this device."""
    message = lax.all_to_all(_packed(quantise(parts_Mub, dtype)), "model", 0, 0)
    received = _unpacked(message, parts_Mub.shape[-1])
    # Added one by one, decoding and sum are one pass; for a sum over an axis XLA for CPUs takes
    # some ten times as long.
    return sum(dequantise(Blocks(*part), dtype) for part in zip(*received, strict=True))


def _gather(part_ub: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 [M, u, b]: everybody's part."""
    message = lax.all_gather(_packed(quantise(part_ub, dtype)), "model")
    return dequantise(_unpacked(message, part_ub.shape[-1]), dtype)


def _packed(blocks: Blocks) -> jax.Array:
    """Blocks [..., u] as one message of bytes [..., u·(b + 2)], values first."""
    lead = blocks.scales.shape[:-1]
    scales = lax.bitcast_convert_type(blocks.scales, jnp.uint8)
    parts = blocks.values.reshape(*lead, -1), scales.reshape(*lead, -1)
    return jnp.concatenate(parts, axis=-1)


def _unpacked(message: jax.Array, width: int) -> Blocks:
    """Blocks [..., u] of messages [..., u·(b + 2)]."""
    count = message.shape[-1] // (width + SCALE_BYTES)
    lead = message.shape[:-1]
    values, scales = jnp.split(message, [count * width], axis=-1)
    scales = scales.reshape(*lead, count, SCALE_BYTES)
    return Blocks(
        values.reshape(*lead, count, width), lax.bitcast_convert_type(scales, jnp.bfloat16)
    )


def _cut(x: jax.Array, block: int) -> jax.Array:
    """x [..., d] as float32 blocks [..., n, b]."""
    count, width = block_shape(x.shape[-1], block)
    unused = [(0, 0)] * (x.ndim - 1) + [(0, count * width - x.shape[-1])]
    return jnp.pad(x.astype(jnp.float32), unused).reshape(*x.shape[:-1], count, width)


def _joined(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `_cut` of an array of this shape."""
    return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]
