"""From a run's folder to its model on this machine's devices, whatever it was trained on."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from caat_jax import activity
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.resolve import resolve_mesh
from caat_jax.config.sections import Config
from caat_jax.data import carried_tokenizer
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.devices import sharding
from caat_jax.model.transformer import Blueprint


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The model of one checkpoint, on the devices of a mesh."""

    workdir: Path
    step: int
    config: Config  # the checkpoint's, the mesh worked out
    mesh: Mesh
    parameters: Any  # nested dictionary, laid out for the mesh; matrices in the compute type

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's; raises as `tokenizer_of` does."""
        return tokenizer_of(self.config, self.workdir)


def tokenizer_of(config: Config, workdir: Path) -> Tokenizer:
    """The tokeniser that a checkpoint's configuration names, or the workdir's copy of it.

    Raises:
      InputError: it cannot be loaded, or has more ids than the model.
    """
    tokenizer = carried_tokenizer.load(config.data.tokenizer, workdir)
    config.with_vocabulary(tokenizer.size)
    return tokenizer


def restore_model(
    workdir: Path, step: int, config: Config, devices: Sequence[jax.Device] | None = None
) -> TrainedModel:
    """Loads the parameters of a checkpoint; every process of a run calls it.

    Args:
      workdir: the run's folder.
      step: the checkpoint's.
      config: the checkpoint's, as `newest_config` gives it; its mesh may be another.
      devices: those of the mesh; by default all of this job's.

    Raises:
      InputError: the devices do not fit the configuration.
    """
    devices = jax.devices() if devices is None else list(devices)
    config = dataclasses.replace(config, mesh=resolve_mesh(config, len(devices)))
    mesh = sharding.create_mesh(config.mesh, devices)
    blueprint = Blueprint(config.model, config.compute, sharding.platform(mesh))
    with Checkpoints(workdir) as checkpoints, activity.shown(f"restoring step {step}"):
        # Every program casts matrices to the compute type before anything else: read so, they never
        # take the memory of float32.
        shapes = blueprint.on_mesh(mesh, jnp.dtype(config.compute.dtype))
        parameters = checkpoints.restore_parameters(step, shapes)
    return TrainedModel(workdir, step, config, mesh, parameters)
