"""Folders of safetensors files: what tensors there are, and as many to a file as shall fit."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from caat_jax.errors import InputError
from caat_jax.files import read_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000

# The names of the types in the files, and NumPy's.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

Shape = tuple[int, ...]


class StoredTensor(NamedTuple):
    """One tensor of an open file."""

    path: Path
    file: safe_open
    name: str
    dtype: str
    shape: Shape

    def array(self) -> np.ndarray:
        """The tensor, read now."""
        return self.file.get_tensor(self.name)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `model.safetensors`, or of the files that an index names.

    Raises:
      InputError: there are none, or what is there cannot be read; the message names the file.
    """
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX, dict).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / INDEX} has no weight_map")
        paths = [folder / Path(name).name for name in sorted(set(map(str, weight_map.values())))]
    elif (folder / FILE).exists():
        paths = [folder / FILE]
    else:
        raise InputError(f"{folder} has no {FILE} and no {INDEX}")
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in _tensors(path).items():
            if name in tensors:
                raise InputError(f"{name} is both in {tensors[name].path} and in {path}")
            tensors[name] = tensor
    return tensors


def write(
    folder: Path, shapes: Mapping[str, Shape], dtype: str, arrays: Iterator[np.ndarray]
) -> None:
    """Writes tensors of one type as `model.safetensors`, or as several files and an index.

    Args:
      folder: where.
      shapes: of all tensors, in order.
      dtype: float32, bfloat16 or float16.
      arrays: their values in that order; one file's are in memory at a time.

    Raises:
      InputError: a file cannot be written, the disk being full, say.
    """
    files = _split(shapes, jnp.dtype(dtype).itemsize)
    paths = [
        folder / (FILE if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors")
        for i in range(1, len(files) + 1)
    ]
    if len(files) > 1:
        weight_map = {
            name: path.name for path, names in zip(paths, files, strict=True) for name in names
        }
        size = sum(map(math.prod, shapes.values())) * jnp.dtype(dtype).itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    for path, names in zip(paths, files, strict=True):
        tensors = {name: np.ascontiguousarray(next(arrays), jnp.dtype(dtype)) for name in names}
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise InputError(f"{path} cannot be written ({error})") from None


def _tensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, framework="np")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file, or is cut off ({error})") from None
    tensors = {}
    for name in file.keys():
        header = file.get_slice(name)
        kind = header.get_dtype()
        if kind not in DTYPES:
            raise InputError(f"{path}: {name} has type {kind}; allowed: {', '.join(DTYPES)}")
        shape = tuple(header.get_shape())
        tensors[name] = StoredTensor(path, file, name, DTYPES[kind], shape)
    return tensors


def _split(shapes: Mapping[str, Shape], item_bytes: int) -> list[list[str]]:
    """In order, as many tensors to a file as fit into `MAX_FILE_BYTES`, and at least one."""
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_bytes
        if files[-1] and used + size > MAX_FILE_BYTES:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    return files
