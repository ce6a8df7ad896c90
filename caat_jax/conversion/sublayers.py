"""What conversion computes on the mesh: one sublayer at a time, one batch at a time.

The dense model's stream x and each shard's stream x_j go through the network side by side.  They
are global arrays here, [B, T, D] and [S, B, T, D], so that nothing depends on how many shards a
device holds; the sublayers are the model's own, of `layers.py`.

Sums over tokens of what is added to the stream count each token by one over the mean square of its
dense stream after the sublayer.  What reads the stream sees it normalised; and a few tokens, the
first of all, have streams that are hundreds of times longer than the others'.

Axis letters: S shards, L of them on this device, B batch, T sequence, D residual width, k rows of
one shard's part of an output projection.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from caat_jax.config.sections import Config
from caat_jax.devices import sharding
from caat_jax.model import layers
from caat_jax.model.norm_product import norm_and_project
from caat_jax.model.partial_sync import Stream, project_and_add
from caat_jax.model.reductions import Wire
from caat_jax.model.transformer import Blueprint, Layer

# Of each kind's weights, those that read the stream, and the one that writes to it.
INPUTS = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}
OUTPUTS = {"attention": "output", "mlp": "down"}

_BATCH = sharding.LOGICAL_AXIS_RULES["batch"]
_DENSE = P(_BATCH)  # [B, T, D]
_BY_SHARD = P("model")  # [S, ...]
_STREAMS = P("model", _BATCH)  # [S, B, T, D]
_WIRE = Wire(jnp.dtype("float32"), jnp.dtype("float32"))


class InputMoments(NamedTuple):
    """Sums over tokens of products of normalised streams h, without γ; float32 [S, D, D]."""

    own: jax.Array  # h_jᵀ h_j
    dense: jax.Array  # h_jᵀ h


class OutputMoments(NamedTuple):
    """Sums over tokens of products with a_j, what shard j's output projection multiplies."""

    activations: jax.Array  # a_jᵀ a_k for every k: float32 [S, k, S·k]
    missing: jax.Array  # a_jᵀ (x after the sublayer − x_j before it): float32 [S, k, D]


class DenseMoments(NamedTuple):
    """Of the dense model: what the other shards add, o_j, and what shard j may know of it."""

    own: jax.Array  # a_jᵀ a_j: float32 [S, k, k]
    cross: jax.Array  # a_jᵀ o_j: float32 [S, k, D]
    others: jax.Array  # o_jᵀ o_j: float32 [S, D, D]


class Sublayers:
    """The programs of one kind of sublayer; a program is compiled once, whatever the layer.

    Weights are one layer's, as dictionaries of global arrays; `specs` lays them out.  Moments are
    added to the first argument, whose memory is used up.
    """

    def __init__(self, config: Config, mesh: Mesh, kind: str):
        """`kind` is "attention" or "mlp"; all is float32, and `mesh` whole over `fsdp`."""
        self._arch, self._mesh, self._kind = config.model, mesh, kind
        blueprint = Blueprint(config.model, config.compute, sharding.platform(mesh))
        layer = nnx.eval_shape(lambda: Layer(config.model, blueprint.attend, nnx.Rngs(0)))
        self._graph, self._state = nnx.split(getattr(layer, kind))
        stacked = blueprint.specs["layers"][kind]
        self.specs = {name: P(*spec[1:]) for name, spec in stacked.items()}
        weights = self.specs
        self.input_moments = self._program(
            self._input_moments, (_BY_SHARD, _DENSE, _STREAMS), _BY_SHARD
        )
        self.output_moments = self._program(
            self._output_moments,
            (_BY_SHARD, weights, weights, P(), _DENSE, _STREAMS),
            (_BY_SHARD, _DENSE, _STREAMS),
        )
        self.dense_moments = self._program(
            self._dense_moments, (_BY_SHARD, weights, _DENSE), (_BY_SHARD, _DENSE)
        )
        self.add = functools.cache(self._add_program)

    def on_mesh(self, weights: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """One layer's weights, laid out."""
        return jax.device_put(weights, sharding.named_shardings(self._mesh, self.specs))

    def no_input_moments(self) -> InputMoments:
        """Sums over no tokens."""
        S, D = self._arch.tp_shards, self._arch.embed_dim
        return self._zeros(InputMoments((S, D, D), (S, D, D)))

    def no_output_moments(self) -> OutputMoments:
        """Sums over no tokens."""
        S, k, D = self._output_shape()
        return self._zeros(OutputMoments((S, k, S * k), (S, k, D)))

    def no_dense_moments(self) -> DenseMoments:
        """Sums over no tokens."""
        S, k, D = self._output_shape()
        return self._zeros(DenseMoments((S, k, k), (S, k, D), (S, D, D)))

    def _output_shape(self) -> tuple[int, int, int]:
        """(S, k, D)"""
        arch = self._arch
        rows = {"attention": arch.heads * arch.head_dim, "mlp": arch.mlp_dim}
        return arch.tp_shards, rows[self._kind] // arch.tp_shards, arch.embed_dim

    def _zeros(self, shapes: Any) -> Any:
        layout = NamedSharding(self._mesh, _BY_SHARD)
        return type(shapes)(*(jnp.zeros(shape, jnp.float32, device=layout) for shape in shapes))

    def _program(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        mapped = sharding.over_mesh(
            function, self._mesh, "float32", in_specs=in_specs, out_specs=out_specs
        )
        return jax.jit(mapped, donate_argnums=0)

    def _add_program(self, sync_width: int) -> Callable:
        """(streams before, fitted weights, the dense model's, activations, dense stream after) ->
        (streams after, float32 [3] of `_add`)."""
        return self._program(
            functools.partial(self._add, sync_width=sync_width),
            (_STREAMS, self.specs, self.specs, _STREAMS, _DENSE),
            (_STREAMS, P()),
        )

    # What follows runs on each device's part, inside `shard_map`.

    def _input_moments(
        self, moments: InputMoments, x_BTD: jax.Array, x_LBTD: jax.Array
    ) -> InputMoments:
        h_LBTD = self._normalised(x_LBTD)
        own = jnp.einsum("lbtd,lbte->lde", h_LBTD, h_LBTD)
        dense = jnp.einsum("lbtd,bte->lde", h_LBTD, self._normalised(x_BTD))
        return _added(moments, InputMoments(own, dense))

    def _output_moments(
        self,
        moments: OutputMoments,
        weights: dict[str, jax.Array],
        fitted: dict[str, jax.Array],
        is_shared_D: jax.Array,
        x_BTD: jax.Array,
        x_LBTD: jax.Array,
    ) -> tuple[OutputMoments, jax.Array, jax.Array]:
        """Moments; the dense stream after the sublayer; a_j [L, B, T, k] with `fitted` inputs."""
        dense_LBTk = self._dense_activations(weights, x_BTD)
        after_BTD = x_BTD + _sum_over_shards(self._outputs(weights, dense_LBTk))
        a_LBTk = self._activations(fitted, _stream(x_LBTD))
        # Of a channel that is summed, all shards can have the same change only.
        mean_BTD = lax.pmean(jnp.mean(x_LBTD, axis=0), "model")
        before_LBTD = jnp.where(is_shared_D, mean_BTD, x_LBTD)
        every_a = lax.all_gather(a_LBTk, "model", tiled=True)
        weight_BT1 = self._token_weights(after_BTD)
        weighted_LBTk = weight_BT1 * a_LBTk
        products = jnp.einsum("lbtk,sbtm->lksm", weighted_LBTk, every_a)
        activations = products.reshape(*products.shape[:2], -1)
        missing = jnp.einsum("lbtk,lbtd->lkd", weighted_LBTk, after_BTD - before_LBTD)
        return _added(moments, OutputMoments(activations, missing)), after_BTD, a_LBTk

    def _dense_moments(
        self, moments: DenseMoments, weights: dict[str, jax.Array], x_BTD: jax.Array
    ) -> tuple[DenseMoments, jax.Array]:
        """Moments, and the dense stream after the sublayer."""
        a_LBTk = self._dense_activations(weights, x_BTD)
        y_LBTD = self._outputs(weights, a_LBTk)
        total_BTD = _sum_over_shards(y_LBTD)
        o_LBTD = total_BTD - y_LBTD
        after_BTD = x_BTD + total_BTD
        weight_BT1 = self._token_weights(after_BTD)
        weighted_LBTk = weight_BT1 * a_LBTk
        measured = DenseMoments(
            jnp.einsum("lbtk,lbtm->lkm", weighted_LBTk, a_LBTk),
            jnp.einsum("lbtk,lbtd->lkd", weighted_LBTk, o_LBTD),
            jnp.einsum("lbtd,lbte->lde", weight_BT1 * o_LBTD, o_LBTD),
        )
        return _added(moments, measured), after_BTD

    def _add(
        self,
        x_LBTD: jax.Array,
        fitted: dict[str, jax.Array],
        weights: dict[str, jax.Array],
        a_LBTk: jax.Array,
        after_BTD: jax.Array,
        *,
        sync_width: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Streams after the sublayer; sums over tokens and shards, float32 [3]: of their squared
        distance from the dense stream, of that with the dense weights, of the dense square."""

        def streams(weights: dict[str, jax.Array]) -> jax.Array:
            stream = _stream(x_LBTD)
            matrices = self._module(weights).sublayer_weights(
                stream.grouping, sync_width, jnp.dtype("float32")
            )
            return project_and_add(stream, a_LBTk, matrices, _WIRE).private

        new_LBTD = streams(fitted)
        scale_BT1 = jnp.sqrt(self._token_weights(after_BTD))

        def square(x_BTD: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(scale_BT1 * x_BTD))

        after_LBTD = jnp.broadcast_to(after_BTD, x_LBTD.shape)
        squares = (
            square(new_LBTD - after_LBTD),
            square(streams(weights) - after_LBTD),
            lax.pcast(square(after_LBTD), "model", to="varying"),
        )
        return new_LBTD, lax.psum(jnp.stack(squares), ("model", *_BATCH))

    def _dense_activations(self, weights: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
        """[L, B, T, k] of the stream that all shards share."""
        varying = lax.pcast(x_BTD, "model", to="varying")
        stream = Stream(varying, varying[None, ..., :0])
        a_BTm = self._activations(weights, stream)[0]
        local_shards = self._arch.tp_shards // lax.axis_size("model")
        return jnp.moveaxis(a_BTm.reshape(*a_BTm.shape[:2], local_shards, -1), 2, 0)

    def _activations(self, weights: dict[str, jax.Array], stream: Stream) -> jax.Array:
        """[G, B, T, n]: what the output projection multiplies."""
        module, arch = self._module(weights), self._arch
        matrices = module.sublayer_weights(stream.grouping, arch.embed_dim, jnp.dtype("float32"))
        if self._kind == "mlp":
            return layers.swiglu(
                norm_and_project(stream, matrices.inputs, epsilon=arch.norm_epsilon)
            )
        rotation = layers.rotary_angles(jnp.arange(stream.common.shape[1]), arch)
        attended = module.attend(*layers.query_key_value(stream, matrices, rotation, arch))
        return attended.reshape(*attended.shape[:-2], -1)

    def _outputs(self, weights: dict[str, jax.Array], a_LBTk: jax.Array) -> jax.Array:
        """y_j of each shard, whole: [L, B, T, D]."""
        rows = weights[OUTPUTS[self._kind]]
        rows_LkD = rows.reshape(len(a_LBTk), -1, rows.shape[-1])
        return jnp.einsum("lbtk,lkd->lbtd", a_LBTk, rows_LkD)

    def _module(self, weights: dict[str, jax.Array]) -> nnx.Module:
        varying = sharding.mark_varying(weights, self.specs)
        state = jax.tree.unflatten(jax.tree.structure(self._state), jax.tree.leaves(varying))
        return nnx.merge(self._graph, state)

    def _token_weights(self, after_BTD: jax.Array) -> jax.Array:
        mean_square = jnp.mean(jnp.square(after_BTD), axis=-1, keepdims=True)
        return 1 / (mean_square + self._arch.norm_epsilon)

    def _normalised(self, x: jax.Array) -> jax.Array:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * lax.rsqrt(mean_square + self._arch.norm_epsilon)


def _stream(x_LBTD: jax.Array) -> Stream:
    """This device's streams, every channel private."""
    return Stream(x_LBTD[0, ..., :0], x_LBTD)


def _sum_over_shards(y_LBTD: jax.Array) -> jax.Array:
    return lax.psum(jnp.sum(y_LBTD, axis=0), "model")


def _added(moments: NamedTuple, of_batch: NamedTuple) -> NamedTuple:
    """The moments with those of a batch, which every device has a part of."""
    return jax.tree.map(lambda total, part: total + lax.psum(part, _BATCH), moments, of_batch)
