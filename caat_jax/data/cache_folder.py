"""What the caches under `data.cache_dir` have in common: keys, seals, one builder at a time."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caat_jax import files
from caat_jax.errors import InputError

SEAL = "sealed.json"


def not_prepared(folder: Path) -> InputError:
    """For what a checkpoint's configuration names and must not be written."""
    return InputError(
        f"{folder} is not there, or damaged; --cache_dir=FOLDER prepares the checkpoint's documents"
        " in another data.cache_dir"
    )


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits that identify JSON-able parts."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def seal(folder: Path) -> None:
    """Notes the size, the time of change and the CRC-32 of every file below, on the disk."""
    entries = {}
    for name in files.names_below(folder) - {SEAL}:
        path = folder / name
        files.sync(path)
        status = path.stat()
        entries[name] = [status.st_size, status.st_mtime_ns, files.crc32(path)]
    files.write(folder / SEAL, json.dumps(entries, indent=0) + "\n")


def damage(folder: Path) -> str | None:
    """What has changed since `seal`, in a few words; None: nothing.

    A file's content is read only where its time of change is another.
    """
    try:
        entries = files.read_json(folder / SEAL, dict)
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except InputError:
        return f"{SEAL} is damaged"
    names = files.names_below(folder) - {SEAL}
    for name in sorted(names ^ entries.keys()):
        return f"{name} is {'too many' if name in names else 'missing'}"
    for name, entry in entries.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is not a regular file"
        status = path.stat()
        if entry != [status.st_size, status.st_mtime_ns, entry[-1]]:
            if entry != [status.st_size, entry[1], files.crc32(path)]:
                return f"{name} is damaged"
    return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds it against other processes; waits while another one holds it.

    Raises:
      InputError: the folder cannot be made, written or locked.
    """

    def say() -> None:
        print(f"waiting for the process that is preparing {folder}", file=sys.stderr)

    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.held(folder / "lock", say))
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}); choose another data.cache_dir"
            ) from error
        yield
