"""From a folder in Hugging Face's format to a workdir, as `train.py` leaves it at step 0."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.checkpoints.trained import TrainedModel
from caat_jax.config.architecture import Architecture
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.data.carried_tokenizer import IMPORTED_FOLDER
from caat_jax.data.loader import NOTHING_READ
from caat_jax.devices import sharding
from caat_jax.errors import InputError
from caat_jax.files import refuse_links_out
from caat_jax.huggingface import (
    config_file,
    folders,
    llama_config,
    mapping,
    padding,
    safetensors_files,
)
from caat_jax.huggingface.safetensors_files import StoredTensor
from caat_jax.model.transformer import Blueprint
from caat_jax.training.step import Programs
from configs import base


class Imported(NamedTuple):
    """The workdir's configuration, and what the files held: architecture, parameters, dtypes.

    `real` differs from `config.model` where that is padded.  `unties`: config.json ties the head to
    the embedding, and the files have another head, which is kept as `transformers` keeps it.
    """

    config: Config
    real: Architecture
    parameters: int
    dtypes: tuple[str, ...]
    unties: bool


class _Source(NamedTuple):
    """A folder's checked tensors, their architecture (S = 1), and the model to make of them."""

    config: Config
    real: Architecture
    tensors: Mapping[str, StoredTensor]
    unties: bool


def import_llama(
    source: Path, workdir: Path, *, tp_shards: int, sync_factor: float, pad: bool = False
) -> Imported:
    """Writes a workdir with the weights of a Llama, a fresh optimizer state and a configuration.

    Values are read and placed on the devices of the mesh one parameter after another.

    Args:
      source: a folder with config.json and safetensors files.
      workdir: a folder that is new or empty.
      tp_shards: S.
      sync_factor: p of every sublayer; below 1 the function differs from the source's.
      pad: whether to add zero heads, MLP columns and ids where S does not divide them.

    Raises:
      InputError: something given cannot work; nothing is written then.
    """
    folders.check_new(workdir)
    refuse_links_out(source)
    opened = _open(source, workdir.absolute() / IMPORTED_FOLDER, tp_shards, sync_factor, pad)
    config = opened.config
    programs = Programs(config, _mesh(config.model))
    parameters = _parameters(opened, programs.state_shapes.parameters)
    with folders.complete_folder(workdir) as folder:
        folders.copy_files(folders.CARRIED, source, folder / IMPORTED_FOLDER)
        (folder / config_file.NAME).write_text(config_file.source_code(config, folder))
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(programs.fresh_state(parameters), 0, config, NOTHING_READ)
    dtypes = tuple(sorted({tensor.dtype for tensor in opened.tensors.values()}))
    size = Blueprint(opened.real, config.compute, "cpu").size
    return Imported(config, opened.real, size, dtypes, opened.unties)


def read_llama(
    source: Path, *, tp_shards: int, sizes: MeshConfig, devices: Sequence, pad: bool
) -> TrainedModel:
    """A Llama's model at p = 1 on the devices of a mesh, without a workdir.

    Args:
      source: a folder with config.json and safetensors files.
      tp_shards: S.
      sizes: of the mesh axes.
      devices: those of the mesh.
      pad: as for `import_llama`.

    Raises:
      InputError: something given cannot work.
    """
    opened = _open(source, source.absolute(), tp_shards, 1.0, pad)
    config = dataclasses.replace(opened.config, mesh=sizes)
    config = dataclasses.replace(config, mesh=resolve_mesh(config, len(devices)))
    mesh = sharding.create_mesh(config.mesh, list(devices))
    blueprint = Blueprint(config.model, config.compute, sharding.platform(mesh))
    return TrainedModel(source, 0, config, mesh, _parameters(opened, blueprint.on_mesh(mesh)))


def _open(
    source: Path, tokenizer_folder: Path, tp_shards: int, sync_factor: float, pad: bool
) -> _Source:
    fields = llama_config.read(source)
    tensors = safetensors_files.stored_tensors(source)
    path = source / llama_config.FILE
    model = llama_config.model_fields(fields, path)
    length = llama_config.max_length(fields, path)
    unties = model["tied_head"] and mapping.has_other_head(tensors)
    model["tied_head"] = model["tied_head"] and not unties
    real = _configuration(model, length, source, tokenizer_folder)
    if pad and tp_shards >= 1:
        model = padding.padded_fields(model, tp_shards)
    else:
        _check_shards(model, tp_shards)
    split = dict(tp_shards=tp_shards, sync_factor=sync_factor)
    config = _configuration(model | split, length, source, tokenizer_folder)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    mapping.check(found, real.model, Blueprint(real.model, real.compute, "cpu").shapes)
    return _Source(config, real.model, tensors, unties)


def _configuration(
    model: dict[str, Any], length: int, source: Path, tokenizer_folder: Path
) -> Config:
    config = base.get_config()
    config.model.update(dict(tp_shards=1) | model)
    config.data.sequence_length = min(config.data.sequence_length, length)
    for name in folders.TOKENIZERS:
        if (source / name).is_file():
            config.data.tokenizer = str(tokenizer_folder / name)
            break
    return resolve(config)


def _mesh(arch: Architecture) -> Mesh:
    """One that stores every value on one device only: there is no batch to split over `data`."""
    model = math.gcd(len(jax.devices()), arch.tp_shards)
    fsdp = math.gcd(len(jax.devices()) // model, arch.embed_dim, arch.vocab_size)
    sizes = MeshConfig(data=1, fsdp=fsdp, model=model, simulated_devices=0)
    return sharding.create_mesh(sizes, jax.devices()[: fsdp * model])


def _check_shards(model: Mapping[str, Any], tp_shards: int) -> None:
    """Refuses a number of shards that the weights cannot be split into.

    Key/value heads are split over the shards, or, where there are fewer, shared by some.
    """
    split = {name: model[name] for name in ("heads", "mlp_dim", "vocab_size")}
    common, kv_heads = math.gcd(*split.values()), model["kv_heads"]
    allowed = [
        n
        for n in range(1, min(common, 1024) + 1)
        if common % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    if tp_shards not in allowed:
        sizes = ", ".join(
            f"{name} {size}" for name, size in (split | {"kv_heads": kv_heads}).items()
        )
        raise InputError(
            f"--tp_shards={tp_shards} does not divide all of {sizes} (or is no multiple of"
            f" kv_heads); allowed: {', '.join(map(str, allowed))}, or others with --pad"
        )


def _parameters(source: _Source, shapes: Any) -> Any:
    """The nested dictionary of parameters, laid out as in `shapes`."""
    real_shapes = Blueprint(source.real, source.config.compute, "cpu").shapes
    parameters: dict[str, Any] = {}
    for row in mapping.rows(source.real):
        *groups, name = row.parameter
        place = parameters
        for group in groups:
            place = place.setdefault(group, {})
        real_shape = mapping.at(real_shapes, row).shape
        place[name] = _parameter(row, mapping.at(shapes, row), real_shape, source)
    return parameters


def _parameter(
    row: mapping.Row,
    wanted: jax.ShapeDtypeStruct,
    real_shape: tuple[int, ...],
    source: _Source,
) -> jax.Array:
    values = np.zeros(wanted.shape, wanted.dtype)
    for name, layer, _ in mapping.tensors(row, real_shape):
        whole = values if layer is None else values[layer]
        part = padding.real_part(whole, row, source.real, source.config.model)
        shape = real_shape if layer is None else real_shape[1:]
        tensor = source.tensors[name].array()
        part[...] = mapping.as_parameter(row, tensor, shape).reshape(part.shape)
    return jax.device_put(values, wanted.sharding)
