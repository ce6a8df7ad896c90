"""A CRC-32 of every file of a checkpoint, so that damage is noticed before anything is loaded.

Orbax checks the structure of what it reads, but a flipped byte of a value loads as another value.
CRC-32 misses no damage within 32 successive bits, and of any other kind one in 2^32.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from caat_jax import files
from caat_jax.errors import InputError

FILE = "digests.json"

_THREADS = 8  # zlib leaves the interpreter's lock; more would only fight over the disk
_CHUNK_BYTES = 1 << 22

# At a checkpoint's top Orbax notes the moment of the commit, after the digests are taken.
_METADATA_FILE = "_CHECKPOINT_METADATA"
_COMMIT_TIME = "commit_timestamp_nsecs"


def write(folder: Path) -> None:
    """Writes `folder/digests.json` about all files below the folder, a finished checkpoint."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda path: _digest(folder, path), paths))
    names = [str(path.relative_to(folder)) for path in paths]
    content = json.dumps(dict(zip(names, digests, strict=True)), indent=0)
    files.write(folder / FILE, content + "\n")


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where its files are as written."""
    try:
        digests = files.read_json(folder / FILE, dict)
    except OSError as error:
        return f"{FILE}: {error.strerror}"
    except InputError:
        return f"{FILE} is damaged"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: _difference(folder, *item), digests.items())
        return next((difference for difference in found if difference), None)


def _difference(folder: Path, name: str, digest: int) -> str | None:
    try:
        return None if _digest(folder, folder / name) == digest else f"{name} is damaged"
    except OSError as error:
        return f"{name}: {error.strerror}"
    except ValueError:
        return f"{name} is damaged"


def _digest(folder: Path, path: Path) -> int:
    if path == folder / _METADATA_FILE:
        content = files.read_json(path, dict)
        content.pop(_COMMIT_TIME, None)
        return zlib.crc32(json.dumps(content).encode())
    digest = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest = zlib.crc32(chunk, digest)
    return digest
