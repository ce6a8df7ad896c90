"""Sharded initialisation, and the compiled training and evaluation steps.

Forward and backward run inside one `jax.shard_map` over the whole mesh, so that every collective
is one that is written down: the partial channel-reduce in `partial_sync.py`, the `fsdp` gathers and
the gradient sums in `sharding.py`, the reductions of the loss in `loss.py`.  The optimizer runs
outside of it, on global arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from caat_jax.config.architecture import Architecture
from caat_jax.config.sections import Config
from caat_jax.devices import sharding, xla_options
from caat_jax.model import loss
from caat_jax.model.partial_sync import STREAM_AXES, Stream, at_boundary
from caat_jax.model.scopes import HEAD_AND_LOSS
from caat_jax.model.transformer import Blueprint
from caat_jax.training import optimizer

LOGITS_AXES = ("batch", "sequence", "vocab")
DATA_AXES = sharding.LOGICAL_AXIS_RULES["batch"]


class TrainState(NamedTuple):
    """Everything that a training step changes."""

    step: jax.Array  # int32: batches used
    parameters: Any  # nested dictionary, float32
    optimizer_state: optax.OptState
    skipped: jax.Array  # int32: steps without an update, since something was not finite
    skipped_in_a_row: jax.Array  # int32: those since the last update


class Programs:
    """The programs of one configuration on one mesh; each is compiled at its first call.

    With a teacher, a dense model of the same vocabulary, the training step takes its parameters
    too, in the compute type, after the batch.
    """

    def __init__(
        self, config: Config, mesh: Mesh | AbstractMesh, teacher: Architecture | None = None
    ):
        self.config = config
        self.mesh = mesh
        platform = sharding.platform(mesh)
        self.blueprint = Blueprint(config.model, config.compute, platform)
        self.teacher = teacher and Blueprint(teacher, config.compute, platform)
        self._teacher_architecture = teacher
        self.optimizer = optimizer.create(config.optimizer, self.blueprint.logical_axes)
        self.batch_sharding = sharding.batch_sharding(mesh)
        self._shapes = jax.eval_shape(self._initial_state)
        self.state_shardings = sharding.named_shardings(mesh, self._state_specs())
        # Shapes, types and layout of a state: for compiling and restoring.
        self.state_shapes = sharding.shapes_on_mesh(self._shapes, self.state_shardings)
        options = xla_options.options(platform)
        # One state in, one out, in the same memory.
        self.train_step = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=(self.state_shardings, None),
            compiler_options=options,
        )
        self.eval_step = jax.jit(
            self._shard_map(self._loss_sum, out_specs=(P(), P())), compiler_options=options
        )
        self.logits_step = jax.jit(
            self._shard_map(self._whole_logits, sharding.partition_spec(LOGITS_AXES)),
            compiler_options=options,
        )
        self.streams_step = jax.jit(
            self._shard_map(self._streams, Stream(*map(sharding.partition_spec, STREAM_AXES))),
            compiler_options=options,
        )
        rows = self.batch_sharding.spec
        self.score_step = jax.jit(
            self._shard_map(self._token_scores, out_specs=(rows, rows)),
            # Whole on every device, so that every process can read all of it: it is small.
            out_shardings=NamedSharding(mesh, P()),
            compiler_options=options,
        )

    def at_step(self, step: int) -> "Programs":
        """Those of the factors in effect at a step of these programs' configuration."""
        return type(self)(self.config.at_step(step), self.mesh, self._teacher_architecture)

    def initial_state(self) -> TrainState:
        """A fresh state, laid out on the mesh; the same values on every mesh."""
        return jax.jit(self._initial_state, out_shardings=self.state_shardings)()

    def fresh_state(self, parameters: Any) -> TrainState:
        """The state before the first step, of parameters on the mesh, which are used up."""
        fresh = jax.jit(self._fresh_state, out_shardings=self.state_shardings, donate_argnums=0)
        return fresh(parameters)

    def trace_train_step(self) -> jax.stages.Traced:
        """The training step, traced before there is a state or a batch.

        All that also works on a mesh without devices, `sharding.abstract_mesh`.
        """
        shape = (self.config.train.global_batch, self.config.data.sequence_length + 1)
        batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch_sharding)
        dtype = jnp.dtype(self.config.compute.dtype)
        taught_by = [self.teacher.on_mesh(self.mesh, dtype)] if self.teacher else []
        return self.train_step.trace(self.state_shapes, batch, *taught_by)

    def compile_train_step(self) -> jax.stages.Compiled:
        """The training step, compiled before there is a state or a batch."""
        return self.trace_train_step().lower().compile()

    def _initial_state(self) -> TrainState:
        return self._fresh_state(self.blueprint.initialise(self.config.seed))

    def _fresh_state(self, parameters: Any) -> TrainState:
        optimizer_state = self.optimizer.init(parameters)
        return TrainState(jnp.int32(0), parameters, optimizer_state, jnp.int32(0), jnp.int32(0))

    def _state_specs(self) -> TrainState:
        specs = self.blueprint.specs
        return TrainState(
            P(),
            specs,
            optax.tree.map_params(
                self.optimizer,
                lambda _, spec: spec,
                self._shapes.optimizer_state,
                specs,
                transform_non_params=lambda _: P(),
            ),
            P(),
            P(),
        )

    def _train_step(
        self, state: TrainState, batch: jax.Array, *taught_by: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update on a batch of token sequences, int32 [B, T + 1]; negative ids are padding.

        Where the loss or the gradient is not finite, parameters and optimizer stay as they were.
        `taught_by`: the teacher's parameters, where there is one.
        """
        loss_and_gradients = self._shard_map(
            self._loss_and_gradients,
            (P(), self.blueprint.specs),
            *([self.teacher.specs] if self.teacher else []),
        )
        mean_loss, gradients = loss_and_gradients(state.parameters, batch, *taught_by)
        updates, optimizer_state = self.optimizer.update(
            gradients, state.optimizer_state, state.parameters
        )
        gradient_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(mean_loss) & jnp.isfinite(gradient_norm)
        parameters, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.parameters, updates), optimizer_state),
            (state.parameters, state.optimizer_state),
        )
        updates_done = state.step - state.skipped
        state = TrainState(
            state.step + 1,
            parameters,
            optimizer_state,
            state.skipped + ~finite,
            jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics = {
            "train/loss": mean_loss,
            "train/grad_norm": gradient_norm,
            "train/skipped_updates": state.skipped,
            "train/skipped_in_a_row": state.skipped_in_a_row,
            "learning_rate": optimizer.learning_rate(self.config.optimizer)(updates_done),
        }
        return state, metrics

    def _shard_map(self, function: Callable, out_specs: Any, *more_specs: Any) -> Callable:
        return sharding.over_mesh(
            function,
            self.mesh,
            self.config.compute.dtype,
            in_specs=(self.blueprint.specs, self.batch_sharding.spec, *more_specs),
            out_specs=out_specs,
        )

    # What follows runs on each device's part, inside `shard_map`.

    def _loss_and_gradients(
        self, parameters: Any, batch: jax.Array, *taught_by: Any
    ) -> tuple[jax.Array, Any]:
        """Mean loss over all counted targets of the global batch, and its gradient."""
        count = lax.psum(jnp.sum(batch[:, 1:] >= 0), DATA_AXES)
        varying = sharding.mark_varying(parameters, self.blueprint.specs)

        def mean_loss(parameters: Any, rows: jax.Array) -> jax.Array:
            return jnp.sum(self._token_losses(parameters, rows, *taught_by)) / count

        value_and_gradient = jax.value_and_grad(mean_loss)

        def accumulate(total: Any, rows: jax.Array) -> tuple[Any, None]:
            # Without the barrier the TPU compiler (libtpu 0.0.42) fails: it tries to move the
            # reduce-scatters of `fsdp` out of this loop.
            part = jax.tree.map(lax.optimization_barrier, value_and_gradient(varying, rows))
            return jax.tree.map(jnp.add, total, part), None

        steps = self.config.train.accumulation_steps
        if steps == 1:
            value, gradients = value_and_gradient(varying, batch)
        else:
            microbatches = batch.reshape(steps, -1, batch.shape[1])
            zeros = jax.tree.map(jnp.zeros_like, varying)
            zero = lax.pcast(jnp.float32(0), DATA_AXES, to="varying")
            (value, gradients), _ = lax.scan(accumulate, (zero, zeros), microbatches)
        return (
            lax.psum(value, DATA_AXES),
            sharding.sum_gradients(gradients, self.blueprint.specs),
        )

    def _loss_sum(self, parameters: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sum of the losses (float32, nats) and number of counted targets of the global batch."""
        varying = sharding.mark_varying(parameters, self.blueprint.specs)
        losses = self._token_losses(varying, batch)
        return (
            lax.psum(jnp.sum(losses), DATA_AXES),
            lax.psum(jnp.sum(batch[:, 1:] >= 0), DATA_AXES),
        )

    def _token_scores(self, parameters: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of every target of sequences [B, T + 1]: its log-likelihood and whether it comes first.

        Returns:
          float32 [B, T] in nats, 0 for padding; bool [B, T], whether no id has a larger logit and
          no lower id the same.
        """
        varying = sharding.mark_varying(parameters, self.blueprint.specs)
        logits = _logits(self.blueprint, varying, batch)
        with jax.named_scope(HEAD_AND_LOSS):
            losses = loss.cross_entropy(logits, batch[:, 1:])
            return -losses, loss.most_likely(logits) == batch[:, 1:]

    def _token_losses(self, parameters: Any, rows: jax.Array, *taught_by: Any) -> jax.Array:
        """float32 [B, T] of token sequences [B, T + 1]: to the text, or to a teacher."""
        logits = _logits(self.blueprint, parameters, rows)
        with jax.named_scope(HEAD_AND_LOSS):
            if not taught_by:
                return loss.cross_entropy(logits, rows[:, 1:])
        (teacher,) = taught_by
        varying = sharding.mark_varying(teacher, self.teacher.specs)
        taught = _logits(self.teacher, varying, rows)
        with jax.named_scope(HEAD_AND_LOSS):
            return jnp.where(rows[:, 1:] >= 0, loss.divergence(logits, taught), 0.0)

    def _whole_logits(self, parameters: Any, tokens: jax.Array) -> jax.Array:
        """float32 [B, T, this device's part of V] of tokens [B, T]."""
        varying = sharding.mark_varying(parameters, self.blueprint.specs)
        return loss.in_groups(self.blueprint.bind(varying)(tokens), 1)[0]

    def _streams(self, parameters: Any, tokens: jax.Array) -> Stream:
        """All shards' streams after the last layer, as `STREAM_AXES` has them, of tokens [B, T]."""
        varying = sharding.mark_varying(parameters, self.blueprint.specs)
        model = self.blueprint.bind(varying)
        stream = model.run_layers(model.embed(tokens))
        return at_boundary(stream)


def _logits(blueprint: Blueprint, parameters: Any, rows: jax.Array) -> jax.Array:
    """float32 [G, B, T, v] of token sequences [B, T + 1], inside `shard_map`."""
    return blueprint.bind(parameters)(jnp.maximum(rows[:, :-1], 0))
