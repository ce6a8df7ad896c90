"""What the caches under `data.cache_dir` have in common: keys, and one builder at a time."""

import contextlib
import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caat_jax.errors import InputError


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits that identify JSON-able parts."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds it against other processes; waits while another one holds it.

    The lock ends with its process, however that ends.

    Raises:
      InputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); choose another data.cache_dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that is preparing {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
