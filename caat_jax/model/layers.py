"""The sublayers of the decoder, on the shards that one device holds.

Modules hold the weights of all layers, stacked along a leading axis: `transformer.py` hands each
call the weights of one.  Each weight is declared once, with its shape, logical axes and initial
standard deviation; how it is stored, decayed, saved and exported is derived from that.

Axis letters: N layers, B batch, T sequence, D residual width, H heads, K key/value heads, h width
of a head, F MLP width, G groups of shards on this device (`partial_sync.py`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from caat_jax.config.architecture import Architecture
from caat_jax.model import partial_sync
from caat_jax.model.attention import Attend
from caat_jax.model.norm_product import norm_and_project
from caat_jax.model.partial_sync import Grouping, Stream, SublayerWeights
from caat_jax.model.reductions import Wire
from caat_jax.model.scopes import ATTENTION_SCOPE

INITIAL_STD = 0.02


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], logical_axes: tuple[str, ...], std: float = INITIAL_STD
) -> nnx.Param:
    """A float32 parameter drawn from N(0, std²)."""
    return nnx.Param(std * rngs.params.normal(shape, jnp.float32), logical_axes=logical_axes)


def norm_scale(shape: tuple[int, ...], logical_axes: tuple[str, ...]) -> nnx.Param:
    """γ of an RMSNorm: a float32 parameter, 1 at first."""
    return nnx.Param(jnp.ones(shape, jnp.float32), logical_axes=logical_axes)


class Attention(nnx.Module):
    """Causal self-attention with rotary embedding and grouped queries."""

    def __init__(self, arch: Architecture, attend: Attend, rngs: nnx.Rngs):
        N, D, H, K, h = arch.layers, arch.embed_dim, arch.heads, arch.kv_heads, arch.head_dim
        self.norm = norm_scale((N, D), ("layers", "norm"))
        self.query = weight(rngs, (N, D, H, h), ("layers", "embed", "heads", "head_dim"))
        kv_heads = "shared_kv_heads" if K < arch.tp_shards else "kv_heads"
        self.key = weight(rngs, (N, D, K, h), ("layers", "embed", kv_heads, "head_dim"))
        self.value = weight(rngs, (N, D, K, h), ("layers", "embed", kv_heads, "head_dim"))
        self.output = weight(
            rngs, (N, H, h, D), ("layers", "heads", "head_dim", "embed"), output_std(arch)
        )
        self.arch = arch
        self.attend = attend

    def __call__(
        self,
        stream: Stream,
        rotation: tuple[jax.Array, jax.Array],
        *,
        sync_width: int,
        wire: Wire,
    ) -> Stream:
        """The streams after the sublayer; `rotation` is that of `rotary_angles`."""
        weights = self.sublayer_weights(stream.grouping, sync_width, stream.common.dtype)
        query, key, value = query_key_value(
            stream, weights, rotation, self.arch, for_tpu=wire.for_tpu
        )
        with jax.named_scope(ATTENTION_SCOPE):
            attended = self.attend(query, key, value)
        return add_attended(stream, attended, weights, wire)

    def sublayer_weights(
        self, grouping: Grouping, sync_width: int, dtype: jnp.dtype
    ) -> SublayerWeights:
        """What is multiplied with; the columns of a group are query, key and value in turn."""
        key, value = (heads_of_shards(w[...], self.arch) for w in (self.key, self.value))
        inputs = (self.query[...], key, value)
        return _sublayer_weights(
            self.arch, self.norm, inputs, self.output, grouping, sync_width, dtype
        )


class Mlp(nnx.Module):
    """SwiGLU: (silu(x @ gate) ⊙ (x @ up)) @ down."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        N, D, F = arch.layers, arch.embed_dim, arch.mlp_dim
        self.norm = norm_scale((N, D), ("layers", "norm"))
        self.gate = weight(rngs, (N, D, F), ("layers", "embed", "mlp"))
        self.up = weight(rngs, (N, D, F), ("layers", "embed", "mlp"))
        self.down = weight(rngs, (N, F, D), ("layers", "mlp", "embed"), output_std(arch))
        self.arch = arch

    def __call__(self, stream: Stream, *, sync_width: int, wire: Wire) -> Stream:
        """The streams after the sublayer."""
        weights = self.sublayer_weights(stream.grouping, sync_width, stream.common.dtype)
        return mlp(stream, weights, self.arch, wire)

    def sublayer_weights(
        self, grouping: Grouping, sync_width: int, dtype: jnp.dtype
    ) -> SublayerWeights:
        """What is multiplied with; the columns of a group are gate and up in turn."""
        inputs = (self.gate[...], self.up[...])
        return _sublayer_weights(
            self.arch, self.norm, inputs, self.down, grouping, sync_width, dtype
        )


def heads_of_shards(weight_DKh: jax.Array, arch: Architecture) -> jax.Array:
    """The key or value heads of this device's shards, one a shard where shards share heads."""
    if arch.kv_heads >= arch.tp_shards:
        return weight_DKh
    local_shards = arch.tp_shards // lax.axis_size("model")
    shards = lax.axis_index("model") * local_shards + jnp.arange(local_shards)
    return jnp.take(weight_DKh, shards * arch.kv_heads // arch.tp_shards, axis=1)


def query_key_value(
    stream: Stream,
    weights: SublayerWeights,
    rotation: tuple[jax.Array, jax.Array],
    arch: Architecture,
    *,
    for_tpu: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query [G, B, T, H, h], key and value [G, B, T, K, h]; query and key are rotated."""
    projected = norm_and_project(stream, weights.inputs, epsilon=arch.norm_epsilon, for_tpu=for_tpu)
    # A group has the same part of all query, key and value heads.
    columns = projected.shape[-1]
    keys = columns * arch.computed_kv_heads // (arch.heads + 2 * arch.computed_kv_heads)
    query, key, value = (
        part.reshape(*part.shape[:-1], -1, arch.head_dim)
        for part in jnp.split(projected, (columns - 2 * keys, columns - keys), axis=-1)
    )
    return rotate(query, rotation), rotate(key, rotation), value


def add_attended(
    stream: Stream, attended: jax.Array, weights: SublayerWeights, wire: Wire
) -> Stream:
    """The streams after an attention sublayer whose heads gave `attended` [G, B, T, H, h]."""
    activations = attended.reshape(*attended.shape[:-2], -1)
    return partial_sync.project_and_add(stream, activations, weights, wire)


def mlp(stream: Stream, weights: SublayerWeights, arch: Architecture, wire: Wire) -> Stream:
    """The streams after an MLP sublayer."""
    projected = norm_and_project(
        stream, weights.inputs, epsilon=arch.norm_epsilon, for_tpu=wire.for_tpu
    )
    return partial_sync.project_and_add(stream, swiglu(projected), weights, wire)


def _sublayer_weights(
    arch: Architecture,
    norm: nnx.Param,
    inputs: tuple[jax.Array, ...],
    output: nnx.Param,
    grouping: Grouping,
    sync_width: int,
    dtype: jnp.dtype,
) -> SublayerWeights:
    columns = [w.reshape(arch.embed_dim, grouping.groups, -1) for w in inputs]
    columns = partial_sync.scaled_columns(
        norm[...], jnp.concatenate(columns, axis=-1), grouping.common_width, dtype
    )
    rows = partial_sync.output_rows(
        output[...].reshape(grouping.groups, -1, arch.embed_dim),
        sync_width=sync_width,
        tp_shards=arch.tp_shards,
        dtype=dtype,
    )
    return SublayerWeights(columns, *rows)


@jax.custom_vjp
def look_up(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Rows of a table, [B, T, D]; the gradients of a row that comes often are summed in float32."""
    return jnp.take(table_VD, ids_BT, axis=0, mode="clip")


def _look_up_backward(residuals, gradient):
    table, ids = residuals
    total = jnp.zeros_like(table, jnp.float32).at[ids].add(gradient.astype(jnp.float32))
    return total.astype(table.dtype), None


look_up.defvjp(lambda table, ids: (look_up(table, ids), (table, ids)), _look_up_backward)


def output_std(arch: Architecture) -> float:
    """Initial standard deviation of the output projections: 0.02/√(2·layers)."""
    return INITIAL_STD / math.sqrt(2 * arch.layers)


# Only its input is kept for the backward pass, not every factor of the product.
@jax.checkpoint
def swiglu(gate_and_up: jax.Array) -> jax.Array:
    """silu(gate) ⊙ up of an array [..., 2·n] that holds the two side by side."""
    gate, up = jnp.split(gate_and_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def rotary_angles(positions: jax.Array, arch: Architecture) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [..., T, 1, h/2] in float32 of the rotary embedding at positions [..., T]."""
    angles = positions.astype(jnp.float32)[..., None, None] * _rotary_frequencies(arch)
    return jnp.cos(angles), jnp.sin(angles)


def _rotary_frequencies(arch: Architecture) -> np.ndarray:
    """Radians a token, float32 [h/2], by which each pair of channels turns."""
    exponents = -np.arange(0, arch.head_dim, 2, dtype=np.float32) / arch.head_dim
    frequencies = arch.rope_base**exponents
    if arch.rope_scaling_factor == 1:
        return frequencies
    turns = arch.rope_scaling_original_length * frequencies / (2 * math.pi)
    low, high = arch.rope_scaling_low_turns, arch.rope_scaling_high_turns
    kept = np.clip((turns - low) / (high - low), 0, 1)  # the part that is not slowed down
    return (frequencies * (kept + (1 - kept) / arch.rope_scaling_factor)).astype(np.float32)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding in the half-split layout: channel i turns with channel i + h/2.

    Args:
      x: [..., T, heads, h].
      rotation: (cos, sin), each [T, 1, h/2] or [B, T, 1, h/2].
    """
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
