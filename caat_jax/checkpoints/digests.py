"""The size and CRC-32 of every file of a checkpoint, so that damage is noticed before it is loaded.

Orbax checks the structure of what it reads, but a flipped byte of a value loads as another value.
CRC-32 misses no damage within 32 successive bits, and of any other kind one in 2^32.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from caat_jax import files
from caat_jax.errors import InputError

FILE = "digests.json"

_THREADS = 8  # zlib leaves the interpreter's lock; more would only fight over the disk

# The first checkpoints had `{NAME: CRC-32}`.  They counted these, which Orbax wrote to after the
# digests had been taken, and which nothing needs.
_UNRELIABLE = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def write(folder: Path) -> None:
    """Writes `folder/digests.json` about all files below the folder, and all of it to the disk."""
    names = sorted(files.names_below(folder) - {FILE})
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _synchronised(folder / name), names))
    for path in folder.rglob("*"):
        if path.is_dir():
            files.sync(path)
    files.write(folder / FILE, file_content(dict(zip(names, digests, strict=True))))


def file_content(entries: dict[str, list[int]]) -> bytes:
    """Of a `digests.json`: size and CRC-32 of each file, by its name relative to the folder."""
    return (json.dumps({"files": entries}, indent=0) + "\n").encode()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where its files are as written."""
    try:
        content = files.read_json(folder / FILE, dict)
    except FileNotFoundError as error:
        return f"{FILE}: {error.strerror}"
    except InputError:
        return f"{FILE} is damaged"
    names = files.names_below(folder) - {FILE}
    digests = content.get("files")
    if digests is None:
        digests = {name: [None, digest] for name, digest in content.items()}
        names -= _UNRELIABLE
        digests = {name: digest for name, digest in digests.items() if name not in _UNRELIABLE}
    if not isinstance(digests, dict) or not digests:
        return f"{FILE} is damaged"
    for name in sorted(names ^ digests.keys()):
        return f"{name}: not in {FILE}" if name in names else f"{name}: No such file or directory"
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: _difference(folder / item[0], *item), digests.items())
        return next((difference for difference in found if difference), None)


def _difference(path: Path, name: str, expected: object) -> str | None:
    if path.is_symlink():
        return f"{name} is a link"
    try:
        size = path.stat().st_size
        known = isinstance(expected, list) and len(expected) == 2 and expected[0] in (None, size)
        return None if known and files.crc32(path) == expected[1] else f"{name} is damaged"
    except OSError as error:
        return f"{name}: {error.strerror}"
    except InputError:
        return f"{name} is not a regular file"


def _synchronised(path: Path) -> list[int]:
    files.sync(path)
    return [path.stat().st_size, files.crc32(path)]
