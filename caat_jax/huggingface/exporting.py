"""From a workdir to a folder that `transformers` loads."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config import user_paths
from caat_jax.config.architecture import Architecture
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.data import carried_tokenizer
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.devices import sharding
from caat_jax.errors import InputError
from caat_jax.huggingface import folders, llama_config, mapping, padding, safetensors_files
from caat_jax.model.transformer import Blueprint
from caat_jax.training.step import Programs

CODE = Path(__file__).parent / "exported_code" / "modeling_caat_llama.py"

# Fields kept from the config.json that came with the weights, besides the architecture.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Exported(NamedTuple):
    """The step of the exported checkpoint, its configuration, and what is left of its sizes."""

    step: int
    config: Config
    arch: Architecture


def export(workdir: Path, destination: Path, *, dtype: str) -> Exported:
    """Writes a run's newest checkpoint in Hugging Face's format.

    One parameter and the tensors of one file are in memory at a time.

    Args:
      workdir: the run's folder.
      destination: a folder that is new or empty.
      dtype: of the tensors: float32, bfloat16 or float16.

    Raises:
      InputError: something given cannot work; nothing is written then.
    """
    folders.check_new(destination)
    if dtype not in safetensors_files.DTYPES.values():
        allowed = ", ".join(safetensors_files.DTYPES.values())
        raise InputError(f"--dtype={dtype} is not one of {allowed}")
    step, config = checkpoint.newest_config(workdir)
    one_device = sharding.create_mesh(MeshConfig(1, 1, 1, 0), jax.devices()[:1])
    programs = Programs(config, one_device)
    with Checkpoints(workdir) as checkpoints:
        arch = _without_padding(checkpoints, step, programs, workdir)
    if arch.is_dense and arch.embed_dim % arch.heads:
        raise InputError(
            f"model.embed_dim={arch.embed_dim} is not a multiple of model.heads={arch.heads}, which"
            " transformers requires of a Llama"
        )
    with folders.complete_folder(destination) as folder:
        _write_configuration(folder, workdir, config, arch, dtype)
        shapes = Blueprint(arch, config.compute, "cpu").shapes
        tensor_shapes = {
            name: shape
            for row in mapping.rows(arch)
            for name, _, shape in mapping.tensors(row, mapping.at(shapes, row).shape)
        }
        with Checkpoints(workdir) as checkpoints:
            arrays = _tensors(checkpoints, step, programs, arch, shapes, dtype)
            safetensors_files.write(folder, tensor_shapes, dtype, arrays)
    return Exported(step, config, arch)


def _without_padding(
    checkpoints: Checkpoints, step: int, programs: Programs, workdir: Path
) -> Architecture:
    """The architecture to export: without what an import added, where that is zero still.

    Where p < 1, shards own equal parts of everything, and the padding belongs to the function.
    """
    arch = programs.config.model
    carried = workdir / carried_tokenizer.IMPORTED_FOLDER
    if not arch.is_dense:
        return arch
    real = dataclasses.replace(arch, vocab_size=arch.vocab_size - arch.vocab_padding)
    real = dataclasses.replace(real, vocab_padding=0)
    if not carried.is_dir():
        return real
    came = llama_config.model_fields(llama_config.read(carried), carried / llama_config.FILE)
    for parameter, names in (("output", ("heads", "kv_heads")), ("down", ("mlp_dim",))):
        smaller = dataclasses.replace(real, **{name: came[name] for name in names})
        (row,) = (row for row in mapping.TABLE if row.parameter[-1] == parameter)
        if smaller == real:
            continue
        layers = _read(checkpoints, step, programs, row)
        if all(
            np.count_nonzero(layer)
            == np.count_nonzero(padding.real_part(layer, row, smaller, arch))
            for layer in layers
        ):
            real = smaller
    return real


def _read(checkpoints: Checkpoints, step: int, programs: Programs, row: mapping.Row) -> np.ndarray:
    wanted = mapping.nested(row, mapping.at(programs.state_shapes.parameters, row))
    return np.asarray(mapping.at(checkpoints.restore_parameters(step, wanted), row))


def _tensors(
    checkpoints: Checkpoints,
    step: int,
    programs: Programs,
    arch: Architecture,
    shapes: Any,
    dtype: str,
) -> Iterator[np.ndarray]:
    """The tensors of `arch` in the table's order, read parameter by parameter."""
    for row in mapping.rows(arch):
        parameter = _read(checkpoints, step, programs, row)
        if dtype == "float16" and np.abs(parameter).max() > np.finfo(np.float16).max:
            raise InputError(
                f"--dtype=float16 is too narrow for {'.'.join(row.parameter)}; use bfloat16"
            )
        shape = mapping.at(shapes, row).shape
        for _, layer, _ in mapping.tensors(row, shape):
            whole = parameter if layer is None else parameter[layer]
            part = padding.real_part(whole, row, arch, programs.config.model)
            yield mapping.as_tensor(row, part.reshape(shape if layer is None else shape[1:]))


def _write_configuration(
    folder: Path, workdir: Path, config: Config, arch: Architecture, dtype: str
) -> None:
    """Writes everything but the weights: what was imported with them, or else the run's own."""
    carried = workdir / carried_tokenizer.IMPORTED_FOLDER
    if carried.is_dir():
        came = llama_config.read(carried)
        length = llama_config.max_length(came, carried / llama_config.FILE)
        token_ids = {key: came[key] for key in _TOKEN_IDS if key in came}
        folders.copy_files(folders.CARRIED, carried, folder)
    else:
        length = config.data.sequence_length
        tokenizer = carried_tokenizer.load(config.data.tokenizer, workdir)
        token_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        _copy_tokenizer(folder, carried_tokenizer.find(config.data.tokenizer, workdir), tokenizer)
        _write_json(folder / "generation_config.json", token_ids)
    fields = llama_config.to_fields(arch, dtype=dtype, max_length=length) | token_ids
    _write_json(folder / llama_config.FILE, fields)
    if not arch.is_dense:
        shutil.copyfile(CODE, folder / CODE.name)


def _copy_tokenizer(folder: Path, name: str, tokenizer: Tokenizer) -> None:
    if name == "bytes":  # has no file
        return
    path = user_paths.expanded("data.tokenizer", name)
    shutil.copyfile(path, folder / f"tokenizer{path.suffix}")
    # Without it `transformers` applies the rules of Llama's own tokeniser to any other.
    kind = {".json": "PreTrainedTokenizerFast", ".model": "LlamaTokenizer"}[path.suffix]
    roles = {
        "bos_token": tokenizer.token(tokenizer.bos_id),
        "eos_token": tokenizer.token(tokenizer.eos_id),
    }
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": kind, **roles})


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
