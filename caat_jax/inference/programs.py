"""The compiled programs of inference: prefill of whole prompts, decode of one token at a time.

Both run inside one `jax.shard_map` over the whole mesh, as training does.  Sequences are split over
the data axes, the key/value cache also by its heads over `model`; what a layer sends over `model`
is the two partial channel-reduces of `partial_sync.py`, in decode of one token.

Prompts of different lengths are filled up on the right to Q slots.  New tokens go to the slots from
Q on, the same for all sequences, so that writing them is one update in place; what a sequence sees
are the first `length` slots and those from Q on.  Its positions, for the rotary embedding, go on
from its own length.

Axis letters: B batch, Q slots of the prompts, C slots of the cache, D residual width, V vocabulary,
K key/value heads, h width of a head, G groups of shards on this device (`partial_sync.py`), n
layers that run as one loop.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from caat_jax.config.sections import Config
from caat_jax.devices import sharding, xla_options
from caat_jax.inference import sampling
from caat_jax.inference.sampling import Numbers, Sampling
from caat_jax.inference.weights import LayerWeights, WeightLayout, Weights
from caat_jax.model import attention, batch_parts, layers
from caat_jax.model import transformer as model_lib
from caat_jax.model.norm_product import norm_and_project
from caat_jax.model.partial_sync import Stream
from caat_jax.model.reductions import wire_of
from caat_jax.model.scopes import ATTENTION_SCOPE, EMBEDDING, HEAD_AND_LOSS, LAYERS

_SCALAR = sharding.partition_spec(())
_BATCH = sharding.partition_spec(("batch",))
_TOKENS = sharding.partition_spec(("batch", "sequence"))
_STEP_TOKENS = sharding.partition_spec(("unsplit", "batch"))


class LayerCache(NamedTuple):
    """Keys and values [n, K·B, C, h] of the layers of one span, in the compute type.

    Unrolled, the arrays are those of one layer, [K·B, C, h].  XLA for CPUs updates them in place
    only if no reshaping, not even of an axis of length 1, stands between the update and the product
    that reads it.
    """

    key: jax.Array
    value: jax.Array


class State(NamedTuple):
    """Where the sequences of a batch are, beside their cache."""

    tokens: jax.Array  # int32 [B]: the last ones chosen, not in the cache yet
    lengths: jax.Array  # int32 [B]: tokens of the prompts
    prompt_slots: jax.Array  # int32: Q
    chosen: jax.Array  # int32: tokens chosen for each sequence


_STATE = State(_BATCH, _BATCH, _SCALAR, _SCALAR)
# The order in memory of a cache's [K·B, C, h], outermost first, where it is not that.  On TPUs one
# slot of all rows, which a step writes, is whole tiles then: XLA wants it so, and would copy the
# cache into this order at the start of every call and back at its end.
_CACHE_ORDER = {"tpu": (1, 0, 2)}
_NUMBERS = Numbers(_SCALAR, _SCALAR, _SCALAR, _SCALAR, _SCALAR)


class InferencePrograms:
    """The programs of one configuration on one mesh; each is compiled at its first call.

    `prepare(parameters)` makes `Weights` of the parameters, `prefill` and `decode` take those.
    """

    def __init__(self, config: Config, mesh: Mesh | AbstractMesh):
        self.config = config
        self.mesh = mesh
        self._layout = layout = WeightLayout(config, mesh)
        self._dtype = layout.dtype
        platform = sharding.platform(mesh)
        self._wire = wire_of(config.compute, for_tpu=platform == "tpu")
        offload = xla_options.can_offload_reductions(mesh, self._wire.forward)
        self._batch_parts = batch_parts.choose(
            config.model, config.compute, platform, offloaded=offload
        )
        axes = ("layers",) if layout.is_stacked else ()
        rows = sharding.partition_spec((*axes, "cache_rows", "unsplit", "unsplit"))
        self._cache_specs = (LayerCache(rows, rows),) * len(layout.spans)
        self._cache_formats = jax.tree.map(self._cache_format, self._cache_specs)
        self.prepare = jax.jit(layout.prepare)
        self.prefill = jax.jit(
            self._prefill,
            static_argnames=("cache_length", "kind"),
            out_shardings=(self._cache_formats, None),
            compiler_options=xla_options.options(platform, offload_reductions=offload),
        )
        self.decode = jax.jit(
            self._decode,
            static_argnames=("steps", "kind"),
            donate_argnames="cache",
            out_shardings=(self._cache_formats, None, None),
            compiler_options=xla_options.options(platform),
        )

    def trace_prefill(self, batch: int, length: int) -> jax.stages.Traced:
        """Greedy prefill of prompts [batch, length], traced before there are weights."""
        prompts = self._shape((batch, length), jnp.int32, _TOKENS)
        lengths = self._shape((batch,), jnp.int32, _BATCH)
        return self.prefill.trace(
            self.weight_shapes(),
            prompts,
            lengths,
            self._greedy_numbers(),
            cache_length=length,
            kind=sampling.GREEDY,
        )

    def trace_decode(self, batch: int, cache_length: int) -> jax.stages.Traced:
        """Greedy decode of one token for each of `batch` sequences, traced without a cache."""
        arch = self.config.model
        caches = []
        for span, formats in zip(self._layout.spans, self._cache_formats, strict=True):
            shape = (arch.computed_kv_heads * batch, cache_length, arch.head_dim)
            if self._layout.is_stacked:
                shape = (span.last - span.first, *shape)
            caches.append(
                LayerCache(*(jax.ShapeDtypeStruct(shape, self._dtype, sharding=f) for f in formats))
            )
        rows, number = np.zeros(batch, np.int32), np.int32(0)
        return self.decode.trace(
            self.weight_shapes(),
            tuple(caches),
            self._shapes_of(State(rows, rows, number, number), _STATE),
            self._greedy_numbers(),
            steps=1,
            kind=sampling.GREEDY,
        )

    def _greedy_numbers(self) -> Numbers:
        return self._shapes_of(Sampling().numbers(self.config.model.vocab_size), _NUMBERS)

    def weight_shapes(self) -> Weights:
        """What `prepare` returns, as shapes on the mesh."""
        layout = self._layout
        shapes = jax.eval_shape(layout.prepare, layout.blueprint.shapes)
        return self._shapes_of(shapes, layout.specs)

    def _shapes_of(self, arrays: Any, specs: Any) -> Any:
        return jax.tree.map(lambda a, spec: self._shape(a.shape, a.dtype, spec), arrays, specs)

    def _shape(self, shape: tuple, dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _cache_format(self, spec: P) -> NamedSharding | Format:
        """How an array of a cache lies over the devices, and in the memory of each."""
        split = NamedSharding(self.mesh, spec)
        order = _CACHE_ORDER.get(sharding.platform(self.mesh))
        if order is None:
            return split
        stacked = len(spec) - len(order)
        return Format(Layout((*range(stacked), *(stacked + axis for axis in order))), split)

    def _over_mesh(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        return sharding.over_mesh(
            function, self.mesh, self._dtype.name, in_specs=in_specs, out_specs=out_specs
        )

    def _prefill(
        self,
        weights: Weights,
        prompts: jax.Array,
        lengths: jax.Array,
        numbers: Numbers,
        *,
        cache_length: int,
        kind: str,
    ) -> tuple[tuple[LayerCache, ...], State]:
        """A cache of `cache_length` slots with the prompts in it, and the first new tokens.

        Args:
          weights: of `prepare`.
          prompts: int32 [B, Q], each filled up on the right with any ids.
          lengths: int32 [B], of the prompts, at least 1.
          numbers: how to choose the tokens, of `Sampling.numbers`.
          cache_length: C, at least Q.
          kind: `Sampling.kind`.
        """
        local = functools.partial(self._local_prefill, cache_length=cache_length, kind=kind)
        in_specs = (self._layout.specs, _TOKENS, _BATCH, _NUMBERS)
        function = self._over_mesh(local, in_specs, (self._cache_specs, _STATE))
        return function(weights, prompts, lengths, numbers)

    def _decode(
        self,
        weights: Weights,
        cache: tuple[LayerCache, ...],
        state: State,
        numbers: Numbers,
        *,
        steps: int,
        kind: str,
    ) -> tuple[tuple[LayerCache, ...], State, jax.Array]:
        """`steps` more tokens of every sequence, int32 [steps, B]; the cache given is used up.

        There must be a slot for each; the last token chosen is not in the cache yet.
        """
        local = functools.partial(self._local_decode, steps=steps, kind=kind)
        in_specs = (self._layout.specs, self._cache_specs, _STATE, _NUMBERS)
        function = self._over_mesh(local, in_specs, (self._cache_specs, _STATE, _STEP_TOKENS))
        return function(weights, cache, state, numbers)

    # What follows runs on each device's part, inside `shard_map`.

    def _local_prefill(
        self,
        weights: Weights,
        prompts_BQ: jax.Array,
        lengths_B: jax.Array,
        numbers: Numbers,
        *,
        cache_length: int,
        kind: str,
    ) -> tuple[tuple[LayerCache, ...], State]:
        stream, cache = self._through_prompts(weights, prompts_BQ, lengths_B, cache_length)
        chosen = jnp.int32(0)
        tokens_B = self._choose(weights, stream, chosen, numbers, kind)
        return cache, State(tokens_B, lengths_B, jnp.int32(prompts_BQ.shape[1]), chosen + 1)

    def _through_prompts(
        self, weights: Weights, prompts_BQ: jax.Array, lengths_B: jax.Array, cache_length: int
    ) -> tuple[Stream, tuple[LayerCache, ...]]:
        """The streams [B, 1, …] of the prompts' last tokens after all layers; a cache of all."""
        arch, wire = self.config.model, self._wire
        slots = prompts_BQ.shape[1]
        rotation = layers.rotary_angles(jnp.arange(slots), arch)

        def attend(
            stream: Stream, layer: LayerWeights
        ) -> tuple[Stream, tuple[jax.Array, jax.Array]]:
            query, key, value = layers.query_key_value(
                stream, layer.attention, rotation, arch, for_tpu=wire.for_tpu
            )
            with jax.named_scope(ATTENTION_SCOPE):
                attended = self._layout.blueprint.attend(query, key, value)
            return layers.add_attended(stream, attended, layer.attention, wire), (key, value)

        def apply(
            parts: tuple[Stream, ...], layer: LayerWeights
        ) -> tuple[tuple[Stream, ...], LayerCache]:
            streams, kept = zip(*(attend(stream, layer) for stream in parts), strict=True)
            streams = tuple(layers.mlp(stream, layer.mlp, arch, wire) for stream in streams)
            unused = (0, 0), (0, cache_length - slots), (0, 0)
            kept = (jnp.concatenate(x, axis=1) for x in zip(*kept, strict=True))
            return streams, LayerCache(*(jnp.pad(attention.cache_rows(x), unused) for x in kept))

        parts = batch_parts.split(self._embed(weights, prompts_BQ), self._batch_parts)
        caches = []
        with jax.named_scope(LAYERS):
            for layer_weights in weights.spans:
                if self._layout.is_stacked:
                    parts, cache = lax.scan(apply, parts, layer_weights)
                else:
                    parts, cache = apply(parts, layer_weights)
                caches.append(cache)
        stream = batch_parts.join(parts)
        last = (lengths_B - 1)[:, None, None]
        common = jnp.take_along_axis(stream.common, last, axis=1)
        private = jnp.take_along_axis(stream.private, last[None], axis=2)
        return Stream(common, private), tuple(caches)

    def _local_decode(
        self,
        weights: Weights,
        cache: tuple[LayerCache, ...],
        state: State,
        numbers: Numbers,
        *,
        steps: int,
        kind: str,
    ) -> tuple[tuple[LayerCache, ...], State, jax.Array]:
        def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
            cache, state = carry
            stream, cache = self._one_position(weights, cache, state)
            tokens_B = self._choose(weights, stream, state.chosen, numbers, kind)
            state = state._replace(tokens=tokens_B, chosen=state.chosen + 1)
            return (cache, state), tokens_B

        (cache, state), tokens = lax.scan(step, (cache, state), length=steps)
        return cache, state, tokens

    def _one_position(
        self, weights: Weights, cache: tuple[LayerCache, ...], state: State
    ) -> tuple[Stream, tuple[LayerCache, ...]]:
        """The streams [B, 1, …] of the last tokens after all layers; the cache with them in it."""
        arch, wire = self.config.model, self._wire
        before = state.chosen - 1  # new tokens in the cache already
        slot = state.prompt_slots + before
        positions = (state.lengths + before)[:, None]
        rotation = layers.rotary_angles(positions, arch)
        slots = jnp.arange(cache[0].key.shape[-2])
        is_prompt_BC = slots < state.lengths[:, None]
        visible_BC = is_prompt_BC | ((slots >= state.prompt_slots) & (slots <= slot))

        def apply(
            stream: Stream, cache: LayerCache, layer: LayerWeights, place: tuple[jax.Array, ...]
        ) -> tuple[Stream, LayerCache]:
            """One layer; `place` is its number in stacked caches, or empty."""

            def write(old: jax.Array, new: jax.Array) -> jax.Array:
                new = lax.expand_dims(attention.cache_rows(new), range(len(place)))
                return lax.dynamic_update_slice(old, new, (*place, 0, slot, 0))

            query, key, value = layers.query_key_value(
                stream, layer.attention, rotation, arch, for_tpu=wire.for_tpu
            )
            with jax.named_scope(ATTENTION_SCOPE):
                cache = LayerCache(write(cache.key, key), write(cache.value, value))
                key, value = (
                    lax.dynamic_index_in_dim(x, *place, keepdims=False) if place else x
                    for x in cache
                )
                attended = attention.attend_to_cache(query, key, value, visible_BC)
            stream = layers.add_attended(stream, attended, layer.attention, wire)
            return layers.mlp(stream, layer.mlp, arch, wire), cache

        def in_loop(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            # The loop carries the caches of all its layers: so they are updated in place.
            place, layer = inputs
            return apply(*carry, layer, (place,)), None

        stream, updated = self._embed(weights, state.tokens[:, None]), []
        with jax.named_scope(LAYERS):
            for span_cache, layer_weights in zip(cache, weights.spans, strict=True):
                if self._layout.is_stacked:
                    inputs = jnp.arange(len(span_cache.key)), layer_weights
                    (stream, span_cache), _ = lax.scan(in_loop, (stream, span_cache), inputs)
                else:
                    stream, span_cache = apply(stream, span_cache, layer_weights, ())
                updated.append(span_cache)
        return stream, tuple(updated)

    def _embed(self, weights: Weights, tokens_BT: jax.Array) -> Stream:
        with jax.named_scope(EMBEDDING):
            return model_lib.embed(weights.table, tokens_BT, self.config.model, self._wire)

    def _choose(
        self, weights: Weights, stream: Stream, step: jax.Array, numbers: Numbers, kind: str
    ) -> jax.Array:
        """The tokens [B] after streams of one position."""
        with jax.named_scope(HEAD_AND_LOSS):
            logits = self._logits(weights, stream)
            return sampling.next_tokens(logits, step, numbers, kind)

    def _logits(self, weights: Weights, stream: Stream) -> jax.Array:
        """Of streams of one position, float32 [G, B, this device's part of V]."""
        epsilon = self.config.model.norm_epsilon
        logits = norm_and_project(
            stream,
            weights.head,
            epsilon=epsilon,
            out_dtype=jnp.float32,
            for_tpu=self._wire.for_tpu,
        )
        return logits[:, :, 0]
