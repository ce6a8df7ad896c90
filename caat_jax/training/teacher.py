"""The dense model that a run learns from, `train.teacher`."""

import dataclasses

from jax.sharding import Mesh

from caat_jax.checkpoints import checkpoints
from caat_jax.checkpoints.trained import TrainedModel, restore_model
from caat_jax.config import user_paths
from caat_jax.config.architecture import Architecture, checked_architecture
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.devices import processes
from caat_jax.errors import InputError


def load(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> TrainedModel | None:
    """The newest model of `train.teacher`, laid out on the mesh of a run; None without one.

    Every process of the run calls it.

    Args:
      config: the run's, with its vocabulary.
      mesh: the run's.
      tokenizer: the run's.

    Raises:
      InputError: there is no such model, it is not dense, or it reads other tokens.
    """
    if not config.train.teacher:
        return None
    workdir = user_paths.expanded("train.teacher", config.train.teacher)
    name = f"train.teacher={workdir}"
    if not (workdir / checkpoints.FOLDER).is_dir():
        raise InputError(f"{name} has no checkpoint; give the workdir of a run")
    step, stored = checkpoints.newest_config(workdir)
    arch = _architecture(name, stored.model, config.model)
    sizes = MeshConfig(**mesh.shape, simulated_devices=0)
    teacher = dataclasses.replace(stored, model=arch, compute=config.compute, mesh=sizes)
    model = restore_model(workdir, step, teacher)
    if model.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{name} has another tokeniser than data.tokenizer={config.data.tokenizer}"
        )
    processes.check_same({f"the step of {name}": step})
    return model


def _architecture(name: str, teacher: Architecture, model: Architecture) -> Architecture:
    """The teacher's with the S of the model: at p = 1 neither function nor shapes depend on it."""
    if not teacher.is_dense:
        raise InputError(f"{name} has p={teacher.describe_sync_factors()}; a teacher has p = 1")
    for field in ("vocab_size", "vocab_padding"):
        theirs, ours = getattr(teacher, field), getattr(model, field)
        if theirs != ours:
            raise InputError(f"{name} has model.{field}={theirs}, and this run {ours}")
    fields = dataclasses.asdict(teacher) | {"tp_shards": model.tp_shards, "sync_factor": 1.0}
    del fields["sync_factors"]
    try:
        return checked_architecture(fields | {"sync_factor_per_layer": ()})
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
