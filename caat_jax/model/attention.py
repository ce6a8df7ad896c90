"""Causal attention: the plain one, two fused kernels, and which of them a platform gets.

`plain` is ordinary JAX and runs everywhere.  `splash` is the Pallas kernel for TPUs that comes with
JAX, `cudnn` the flash attention of NVIDIA's library; neither writes the scores to memory.  All
compute the same function, for grouped queries: query head i uses key head i // (H/K).  All run
inside `jax.shard_map`, on this device's shards.

Axis letters: G groups of shards on this device (`partial_sync.py`), B batch, T sequence, H query
heads, K key/value heads, h width of a head, C slots of a cache.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib
from jax.sharding import PartitionSpec as P

from caat_jax.config.architecture import Architecture
from caat_jax.config.sections import Compute, cudnn_supports
from caat_jax.devices import sharding
from caat_jax.errors import InputError

# (query [G, B, T, H, h], key [G, B, T, K, h], value [G, B, T, K, h]) -> [G, B, T, H, h]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

SPLASH_LANES = 128  # the kernel's blocks are multiples of this
# Not tuned on a TPU: it is what MaxText starts from.  Larger blocks compile too, but compute more
# of what is masked on the diagonal; smaller ones fetch the keys more often.
SPLASH_BLOCK = 512


def choose(arch: Architecture, compute: Compute, platform: str) -> str:
    """The name of the kernel for `compute.attention` on devices of this platform.

    Raises:
      InputError: the kernel asked for does not run there.
    """
    if compute.attention == "auto":
        if platform == "tpu":
            return "splash"
        return "cudnn" if platform == "gpu" and cudnn_supports(arch, compute) else "plain"
    if compute.attention == "cudnn" and platform != "gpu":
        raise InputError(
            f"compute.attention=cudnn runs on NVIDIA GPUs, not on platform {platform!r}; give"
            " auto, plain or splash"
        )
    return compute.attention


def kernel(name: str, platform: str) -> Attend:
    """The function that `choose` names; other platforms than TPUs interpret the TPU's kernel."""
    if name == "splash":
        return functools.partial(splash, interpret=platform != "tpu")
    return {"plain": plain, "cudnn": cudnn}[name]


def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q·kᵀ/√h, causal) · v.

    Queries are taken in blocks, each against the keys up to its own end, so that most of the upper
    triangle is never computed.  Scores and softmax are float32.

    Args:
      query: [G, B, T, H, h].
      key: [G, B, T, K, h].
      value: [G, B, T, K, h].

    Returns:
      [G, B, T, H, h]
    """
    T, H, h = query.shape[2:]
    K = key.shape[3]
    # Heads before positions: batched matrix products want their batch axes first.
    query = jnp.moveaxis(query.reshape(*query.shape[:3], K, H // K, h), 2, -2)
    key, value = jnp.moveaxis(key, 2, -2), jnp.moveaxis(value, 2, -2)
    block = max(64, -(-T // 8))
    blocks = []
    for begin in range(0, T, block):
        end = min(begin + block, T)
        scores = jnp.einsum(
            "gbkrqh,gbkth->gbkrqt",
            query[..., begin:end, :],
            key[..., :end, :],
            preferred_element_type=jnp.float32,
        )
        visible = np.arange(end) <= np.arange(begin, end)[:, None]
        scores = jnp.where(visible, scores / math.sqrt(h), -jnp.inf)
        largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest)
        # Divided by their sum after the product with the values: that is the smaller array.
        total = jnp.sum(weights, axis=-1, keepdims=True)
        summed = jnp.einsum(
            "gbkrqt,gbkth->gbkrqh",
            weights.astype(value.dtype),
            value[..., :end, :],
            preferred_element_type=jnp.float32,
        )
        blocks.append((summed / total).astype(value.dtype))
    attended = jnp.moveaxis(jnp.concatenate(blocks, axis=-2), -2, 2)
    return attended.reshape(*attended.shape[:3], H, h)


def cache_rows(x: jax.Array) -> jax.Array:
    """Keys or values [G, B, T, K, h] in the order of a cache, [G·K·B, T, h]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(-1, *x.shape[3:])


def attend_to_cache(
    query: jax.Array, key: jax.Array, value: jax.Array, visible_BC: jax.Array
) -> jax.Array:
    """Attention of one new position to the slots of a cache.

    Args:
      query: [G, B, 1, H, h].
      key: [G·K·B, C, h], all key heads of this device in the order of its groups.
      value: [G·K·B, C, h].
      visible_BC: bool, the slots that a sequence's query sees; at least one.

    Returns:
      [G, B, 1, H, h], of the query's type.
    """
    G, B, _, H, h = query.shape
    # The cache's own order: nothing of it is transposed.
    heads = jnp.moveaxis(query.reshape(G, B, len(key) // (G * B), -1, h), 2, 1)
    scores = jnp.einsum(
        "krh,kch->krc",
        heads.reshape(len(key), -1, h),
        key,
        preferred_element_type=jnp.float32,
    )
    visible = jnp.tile(visible_BC, (len(key) // B, 1))[:, None]
    scores = jnp.where(visible, scores / math.sqrt(h), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    summed = jnp.einsum(
        "krc,kch->krh",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    attended = (summed / jnp.sum(weights, axis=-1, keepdims=True)).astype(query.dtype)
    attended = jnp.moveaxis(attended.reshape(G, -1, B, H * B * G // len(key), h), 1, 2)
    return attended.reshape(G, B, 1, H, h)


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`plain` by the TPU's splash-attention kernel; `interpret` runs it elsewhere, slowly.

    Any length and any width will do.  Positions are appended up to a whole number of blocks: no
    query sees a key after its own position, so they change nothing.
    """
    T, h = query.shape[2], query.shape[-1]
    block, padded_length = splash_blocks(T)
    # The kernel does not scale the scores.
    query = (query.astype(jnp.float32) / math.sqrt(h)).astype(query.dtype)

    def heads_first(x: jax.Array) -> jax.Array:
        """[G, B, T, heads, h] to [G·B, heads, padded T, h]."""
        x = jnp.swapaxes(x.reshape(-1, *x.shape[2:]), 1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded_length - T), (0, 0)))

    def attend(*heads: jax.Array) -> jax.Array:
        mask = splash_lib.CausalMask((padded_length, padded_length))  # computed in the kernel
        one_sequence = splash_lib.make_splash_mha(
            splash_lib.MultiHeadMask([mask] * query.shape[3]),
            block_sizes=splash_lib.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                # All gradients in one pass over the scores instead of two.  For each block of
                # keys it writes a query gradient, to be summed: T/block times the query's size.
                use_fused_bwd_kernel=True,
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(one_sequence)(*heads)

    attended = _call_unchecked(attend, *map(heads_first, (query, key, value)))
    return jnp.swapaxes(attended[:, :, :T], 1, 2).reshape(query.shape)


def splash_blocks(length: int) -> tuple[int, int]:
    """The kernel's block of positions, and the length that it pads `length` to.

    As few blocks as `SPLASH_BLOCK` allows, all of one size: no block gains 128 positions.
    """
    blocks = math.ceil(length / SPLASH_BLOCK)
    block = math.ceil(length / blocks / SPLASH_LANES) * SPLASH_LANES
    return block, blocks * block


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`plain` by cuDNN's flash attention, for the types and widths of `config.cudnn_supports`."""
    attended = jax.nn.dot_product_attention(
        *(x.reshape(-1, *x.shape[2:]) for x in (query, key, value)),
        is_causal=True,
        implementation="cudnn",
    )
    return attended.reshape(query.shape)


# The type of a value inside `shard_map` says which mesh axes it varies over.  A Pallas kernel must
# say it of its outputs; splash attention does not, so `shard_map` refuses it where it checks.
# Within a second `shard_map`, over axes that are all manual already, nothing is split or sent: all
# it does is to leave the check out.  Types are put right on the way out, for the forward and the
# backward pass apart: the derivative of marking a value as varying would be a sum over devices.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call_unchecked(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function` of arrays that vary over all mesh axes, as its result does; not checked inside."""
    return _shard_map_unchecked(function, *arrays)


def _shard_map_unchecked(function: Callable, *inputs: Any) -> Any:
    def of_unmarked(*inputs: Any) -> Any:
        return function(*jax.tree.map(_unmarked, inputs))

    outputs = jax.shard_map(of_unmarked, in_specs=P(), out_specs=P(), check_vma=False)(*inputs)
    return jax.tree.map(lambda x: lax.pcast(x, sharding.MESH_AXES, to="varying"), outputs)


def _unmarked(x: jax.Array) -> jax.Array:
    """x: where nothing is checked, the results of operations vary over no axis, inputs still do."""
    return lax.squeeze(lax.expand_dims(x, (0,)), (0,))


_call_unchecked.defvjp(
    # Output and pullback; the pullback is a pytree of arrays, the residuals.
    lambda function, *arrays: _shard_map_unchecked(functools.partial(jax.vjp, function), *arrays),
    lambda function, pullback, gradient: _shard_map_unchecked(
        lambda pullback, gradient: pullback(gradient), pullback, gradient
    ),
)
