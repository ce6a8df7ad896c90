"""The parameters as inference multiplies with them: once prepared, nothing is rearranged a token.

Axis letters: V vocabulary, D residual width, n the vocabulary's part of a shard group
(`caat_jax.model.partial_sync`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from caat_jax.config.sections import Config
from caat_jax.devices import sharding
from caat_jax.model import partial_sync, transformer
from caat_jax.model.partial_sync import Columns, SublayerWeights
from caat_jax.model.transformer import Blueprint, LayerSpan


class LayerWeights(NamedTuple):
    """Of the layers of one span, stacked along a leading axis; of one layer when unrolled."""

    attention: SublayerWeights
    mlp: SublayerWeights


class Weights(NamedTuple):
    """All parameters as inference multiplies with them, in the compute type, whole over `fsdp`."""

    table: jax.Array  # the embedding, [V, D]
    spans: tuple[LayerWeights, ...]
    head: Columns  # n being the vocabulary's part of a shard group


class WeightLayout:
    """How the parameters of one configuration become `Weights` on one mesh."""

    def __init__(self, config: Config, mesh: Mesh | AbstractMesh):
        arch = config.model
        self.config, self.mesh = config, mesh
        self.blueprint = Blueprint(arch, config.compute, sharding.platform(mesh))
        self.dtype = jnp.dtype(config.compute.dtype)
        self.is_stacked = config.compute.scan_layers  # else a layer's weights are arrays of its own
        self.spans = transformer.layer_spans(arch)
        if not self.is_stacked:
            self.spans = [
                LayerSpan(layer, layer + 1, span.sync_widths)
                for span in self.spans
                for layer in range(span.first, span.last)
            ]
        self._grouping = partial_sync.grouping(
            arch.tp_shards // mesh.shape["model"],
            0 if config.compute.emulate_wires else transformer.smallest_sync_width(arch),
            arch.embed_dim,
        )
        axes = ("layers",) if self.is_stacked else ()
        rows = sharding.partition_spec((*axes, "shards", "unsplit", "unsplit"))
        common = sharding.partition_spec((*axes, "unsplit", "shards"))
        sublayer = SublayerWeights(Columns(common, rows), rows, rows)
        table = ("vocab", "unsplit") if arch.tied_head else ("unsplit", "channels")
        self.specs = Weights(
            sharding.partition_spec(table),
            (LayerWeights(sublayer, sublayer),) * len(self.spans),
            Columns(
                sharding.partition_spec(("unsplit", "shards")),
                sharding.partition_spec(("shards", "unsplit", "unsplit")),
            ),
        )

    def prepare(self, parameters: Any) -> Weights:
        """`Weights` of parameters as training has them, or with matrices in the compute type."""

        def in_compute_type(parameter: jax.Array, logical_axes: tuple[str, ...]) -> jax.Array:
            return parameter if "norm" in logical_axes else parameter.astype(self.dtype)

        specs = jax.tree.map(sharding.without_fsdp, self.blueprint.specs)
        prepare = sharding.over_mesh(
            self._local_weights,
            self.mesh,
            self.dtype.name,
            in_specs=(specs,),
            out_specs=self.specs,
        )
        return prepare(jax.tree.map(in_compute_type, parameters, self.blueprint.logical_axes))

    def _local_weights(self, parameters: Any) -> Weights:
        """On each device's part, inside `shard_map`."""
        arch, grouping, dtype = self.config.model, self._grouping, self.dtype
        model = self.blueprint.bind(parameters)
        graph, stacked = nnx.split(model.layers)

        def layer_weights(weights: Any, span: LayerSpan) -> LayerWeights:
            layer = nnx.merge(graph, weights)
            return LayerWeights(
                layer.attention.sublayer_weights(grouping, span.sync_widths[0], dtype),
                layer.mlp.sublayer_weights(grouping, span.sync_widths[1], dtype),
            )

        spans = []
        for span in self.spans:
            if self.is_stacked:
                some = jax.tree.map(lambda w, span=span: w[span.first : span.last], stacked)
                spans.append(jax.vmap(functools.partial(layer_weights, span=span))(some))
            else:
                one = jax.tree.map(lambda w, span=span: w[span.first], stacked)
                spans.append(layer_weights(one, span))
        table = model.embedding[...]
        head = table.T if arch.tied_head else model.head[...]
        head = partial_sync.scaled_columns(
            model.final_norm[...],
            head.reshape(arch.embed_dim, grouping.groups, -1),
            grouping.common_width,
            dtype,
        )
        return Weights(table, tuple(spans), head)
