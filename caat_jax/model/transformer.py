"""A Llama-style decoder whose activations are partly synchronised.

Parameters have the global shapes of a dense Llama of the same size, whatever S, p and the mesh.
The module's methods run inside `jax.shard_map` over the whole mesh, on this device's part of the
parameters and of the batch; `caat_jax.training.step` shows how.

Axis letters: B batch, T sequence, D residual width, V vocabulary, v this device's part of it in
groups, G groups of shards on this device (`partial_sync.py`).
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from caat_jax.config.architecture import Architecture
from caat_jax.config.sections import Compute
from caat_jax.devices import sharding
from caat_jax.model import attention, batch_parts, loss, partial_sync
from caat_jax.model.attention import Attend
from caat_jax.model.layers import Attention, Mlp, look_up, norm_scale, rotary_angles, weight
from caat_jax.model.norm_product import norm_and_project
from caat_jax.model.partial_sync import Stream
from caat_jax.model.reductions import REDUCED, Wire, all_reduce, gather_channels, wire_of
from caat_jax.model.scopes import EMBEDDING, HEAD_AND_LOSS, LAYERS


class LayerSpan(NamedTuple):
    """Layers that follow each other and have the same widths: they run as one loop."""

    first: int
    last: int  # the one after them
    sync_widths: tuple[int, int]  # D_s of attention and MLP


def layer_spans(arch: Architecture) -> list[LayerSpan]:
    """All layers in order."""
    spans, first = [], 0
    for widths, group in itertools.groupby(arch.sync_widths):
        spans.append(LayerSpan(first, first + len(list(group)), widths))
        first = spans[-1].last
    return spans


def smallest_sync_width(arch: Architecture) -> int:
    """The channels below it are equal on all shards throughout."""
    return min(itertools.chain.from_iterable(arch.sync_widths))


def embed(table: jax.Array, tokens_BT: jax.Array, arch: Architecture, wire: Wire) -> Stream:
    """The look-up of every token's row in this device's part of the table."""
    local_shards = arch.tp_shards // lax.axis_size("model")
    if arch.tied_head:  # a device has all channels of its part of the vocabulary
        local_ids = tokens_BT - lax.axis_index("model") * table.shape[0]
        present = (local_ids >= 0) & (local_ids < table.shape[0])
        rows = look_up(table, jnp.where(present, local_ids, 0))
        if wire.emulated:  # whose shard's row it is
            owner = local_ids // (table.shape[0] // local_shards)
            present = owner == jnp.arange(local_shards)[:, None, None]
        embedded = all_reduce(jnp.where(present[..., None], rows, 0), wire)
    else:  # a device has its part of the channels of every token
        part = look_up(table, tokens_BT)
        if wire.emulated:
            part = jnp.moveaxis(part.reshape(*tokens_BT.shape, local_shards, -1), 2, 0)
        embedded = gather_channels(part, wire)
    if wire.emulated:  # every shard's stream is kept whole: its gradient is the shard's own
        return Stream(embedded[0, ..., :0], embedded)
    return partial_sync.start(embedded, local_shards, smallest_sync_width(arch))


class Layer(nnx.Module):
    """Attention, then MLP."""

    def __init__(self, arch: Architecture, attend: Attend, rngs: nnx.Rngs):
        self.attention = Attention(arch, attend, rngs)
        self.mlp = Mlp(arch, rngs)


class Transformer(nnx.Module):
    """Embedding, layers, final norm and head."""

    def __init__(
        self, arch: Architecture, compute: Compute, attend: Attend, platform: str, rngs: nnx.Rngs
    ):
        D, V = arch.embed_dim, arch.vocab_size
        # Untied, the table is split by channel: gathering channels sends half of what summing
        # rows does.  A head needs its vocabulary split, so a tied one decides for both.
        axes = ("vocab", "embed") if arch.tied_head else ("vocab_rows", "channels")
        self.embedding = weight(rngs, (V, D), axes)
        self.layers = Layer(arch, attend, rngs)
        self.final_norm = norm_scale((D,), ("norm",))
        if not arch.tied_head:
            self.head = weight(rngs, (D, V), ("embed", "vocab"))
        self.arch = arch
        self.dtype = jnp.dtype(compute.dtype)
        self.wire = wire_of(compute, for_tpu=platform == "tpu")
        self.batch_parts = batch_parts.choose(arch, compute, platform)
        self.remat = compute.remat
        self.scan_layers = compute.scan_layers

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits, float32 [G, B, T, v], of int32 tokens."""
        with jax.named_scope(EMBEDDING):
            stream = self.embed(tokens_BT)
        with jax.named_scope(LAYERS):
            stream = self.run_layers(stream)
        with jax.named_scope(HEAD_AND_LOSS):
            return self.logits(stream)

    def embed(self, tokens_BT: jax.Array) -> Stream:
        """The look-up of every token's row: the same stream on each shard."""
        return embed(self._gathered(self.embedding), tokens_BT, self.arch, self.wire)

    def run_layers(self, stream: Stream) -> Stream:
        """The streams after all layers."""
        arch = self.arch
        positions = jnp.arange(stream.common.shape[1])
        rotation = rotary_angles(positions, arch)
        graph, stacked = nnx.split(self.layers)
        parts = batch_parts.split(stream, self.batch_parts)
        for span in layer_spans(arch):
            weights = stacked
            if span.last - span.first < arch.layers:
                weights = jax.tree.map(lambda w, span=span: w[span.first : span.last], stacked)

            def apply(parts, weights, widths=span.sync_widths):
                layer = nnx.merge(graph, self._gathered_tree(weights))
                parts = [
                    layer.attention(stream, rotation, sync_width=widths[0], wire=self.wire)
                    for stream in parts
                ]
                return tuple(
                    layer.mlp(stream, sync_width=widths[1], wire=self.wire) for stream in parts
                ), None

            if self.remat:
                policy = jax.checkpoint_policies.save_only_these_names(REDUCED)
                apply = jax.checkpoint(apply, policy=policy)
            parts, _ = lax.scan(apply, parts, weights, unroll=1 if self.scan_layers else True)
        return batch_parts.join(parts)

    def logits(self, stream: Stream) -> jax.Array:
        """Logits, float32 [G, B, T, v], of the final streams, private channels included."""
        if self.arch.tied_head:
            weights = self._gathered(self.embedding).T
        else:
            weights = self._gathered(self.head)
        groups, common_width = stream.grouping
        weights = weights.reshape(self.arch.embed_dim, groups, -1)
        columns = partial_sync.scaled_columns(
            self.final_norm[...], weights, common_width, self.dtype
        )
        logits = norm_and_project(
            stream,
            columns,
            epsilon=self.arch.norm_epsilon,
            out_dtype=jnp.float32,
            for_tpu=self.wire.for_tpu,
        )
        return loss.without_padding(logits, self.arch.vocab_padding)

    def _gathered(self, parameter: nnx.Param) -> jax.Array:
        return sharding.gather(parameter[...].astype(self.dtype), parameter.logical_axes)

    def _gathered_tree(self, layer_weights: Any) -> Any:
        """One layer's weights, whole over `fsdp`: matrices in the compute type, norms float32."""

        def whole(parameter: nnx.Param) -> nnx.Param:
            axes = parameter.logical_axes[1:]
            is_matrix = parameter[...].ndim > 1
            value = parameter[...].astype(self.dtype) if is_matrix else parameter[...]
            return parameter.replace(sharding.gather(value, axes))

        return jax.tree.map(whole, layer_weights, is_leaf=_is_parameter)


class Blueprint:
    """What is known of a model before any memory is taken: structure, shapes, axes, specs.

    Outside the module, parameters are plain nested dictionaries of arrays; `bind` makes a module
    of them again.
    """

    def __init__(self, arch: Architecture, compute: Compute, platform: str):
        """Takes the attention kernel that `compute.attention` gives on devices of this platform."""
        self.attention = attention.choose(arch, compute, platform)
        self.attend = attention.kernel(self.attention, platform)

        def build(rngs: nnx.Rngs) -> Transformer:
            return Transformer(arch, compute, self.attend, platform, rngs)

        self._build = build
        self._graph, self._state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
        self.shapes = nnx.to_pure_dict(self._state)
        self.logical_axes = self._per_parameter(lambda p: p.logical_axes)
        self.specs = self._per_parameter(lambda p: sharding.partition_spec(p.logical_axes))

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))

    def on_mesh(self, mesh: Mesh | AbstractMesh, matrices: jnp.dtype = jnp.float32) -> Any:
        """Shapes of the parameters, laid out on a mesh; norms float32, matrices in that type."""
        shapes = jax.tree.map(
            lambda leaf, axes: leaf if "norm" in axes else leaf.update(dtype=matrices),
            self.shapes,
            self.logical_axes,
        )
        return sharding.shapes_on_mesh(shapes, sharding.named_shardings(mesh, self.specs))

    def initialise(self, seed: int) -> Any:
        """Fresh parameters, float32; to be called under `jax.jit` with sharded outputs."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(seed)), nnx.Param))

    def bind(self, parameters: Any) -> Transformer:
        """The module with these parameters: a nested dictionary of (parts of) arrays."""
        values = jax.tree.leaves(parameters)
        return nnx.merge(self._graph, jax.tree.unflatten(jax.tree.structure(self._state), values))

    def _per_parameter(self, function: Callable[[nnx.Param], Any]) -> Any:
        values = [function(p) for p in jax.tree.leaves(self._state, is_leaf=_is_parameter)]
        return jax.tree.unflatten(jax.tree.structure(self.shapes), values)


def _is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param)
