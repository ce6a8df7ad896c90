"""Folders of safetensors files, read and written tensor by tensor.

A file is the length of a header (8 bytes, little-endian), the header (JSON: type, shape and place
of each tensor) and the tensors' bytes.  Reading maps files into memory, so that only what is used
is read, bfloat16 too; writing holds one tensor at a time, for which the safetensors library, which
takes a file's tensors all at once, has no way.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from caat_jax.errors import InputError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 5_000_000_000

# The names of the types in the files, and NumPy's.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class StoredTensor(NamedTuple):
    """One tensor in a file; `begin` is where its bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def array(self) -> np.ndarray:
        """A read-only array whose elements are read from the file when used."""
        dtype = jnp.dtype(self.dtype)
        return np.memmap(self.path, dtype, mode="r", offset=self.begin, shape=self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `model.safetensors`, or of the files that an index names.

    Raises:
      InputError: there are none, or what is there cannot be read; the message names the file.
    """
    if (folder / INDEX).exists():
        try:
            weight_map = dict(json.loads((folder / INDEX).read_text())["weight_map"])
            names = sorted(set(weight_map.values()))
            paths = [folder / Path(name).name for name in names]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{folder / INDEX} is no index of safetensors files") from None
    elif (folder / FILE).exists():
        paths = [folder / FILE]
    else:
        raise InputError(f"{folder} has no {FILE} and no {INDEX}")
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in _read_header(path).items():
            if name in tensors:
                raise InputError(f"{name} is both in {tensors[name].path} and in {path}")
            tensors[name] = tensor
    return tensors


def write(
    folder: Path, names_and_shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: str, arrays: Any
) -> None:
    """Writes tensors of one type as `model.safetensors`, or as several files and an index.

    Args:
      folder: where.
      names_and_shapes: of all tensors, in order.
      dtype: float32, bfloat16 or float16.
      arrays: an iterable of their values in that order; each is let go before the next.
    """
    files = _split(names_and_shapes, jnp.dtype(dtype).itemsize)
    paths = [
        folder / (FILE if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors")
        for i in range(1, len(files) + 1)
    ]
    if len(files) > 1:
        weight_map = {
            name: path.name
            for path, tensors in zip(paths, files, strict=True)
            for name, _ in tensors
        }
        size = sum(math.prod(shape) for _, shape in names_and_shapes) * jnp.dtype(dtype).itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    arrays = iter(arrays)
    for path, tensors in zip(paths, files, strict=True):
        _write_file(path, tensors, dtype, arrays)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 + length:
                raise InputError(f"{path} is cut off in its header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: _stored_tensor(path, name, entry, 8 + length, size)
            for name, entry in header.items()
        }
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no safetensors file") from None


def _stored_tensor(
    path: Path, name: str, entry: dict[str, Any], data: int, file_size: int
) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{path}: {name} has type {entry['dtype']}; allowed: {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * jnp.dtype(dtype).itemsize or begin < 0:
        raise InputError(f"{path}: {name} has {end - begin} bytes, which its shape does not have")
    if data + end > file_size:
        raise InputError(f"{path} is cut off: {name} lies beyond its end")
    return StoredTensor(path, dtype, shape, data + begin)


def _split(
    names_and_shapes: Sequence[tuple[str, tuple[int, ...]]], item_bytes: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """In order, as many tensors to a file as fit into `MAX_FILE_BYTES`, and at least one."""
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, shape in names_and_shapes:
        size = math.prod(shape) * item_bytes
        if files[-1] and used + size > MAX_FILE_BYTES:
            files.append([])
            used = 0
        files[-1].append((name, shape))
        used += size
    return files


def _write_file(
    path: Path,
    names_and_shapes: Sequence[tuple[str, tuple[int, ...]]],
    dtype: str,
    arrays: Iterable[np.ndarray],
) -> None:
    type_name = {name: key for key, name in DTYPES.items()}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in names_and_shapes:
        begin, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": type_name, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that tensors are aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, shape), array in zip(names_and_shapes, arrays, strict=False):
            assert array.shape == shape, (name, array.shape, shape)
            values = np.ascontiguousarray(array, jnp.dtype(dtype))
            # Not array.tofile: that does not know bfloat16.
            file.write(values.view(np.uint8).data)
