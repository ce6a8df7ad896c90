"""What the caches under `data.cache_dir` have in common: keys, and one builder at a time."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caat_jax import files
from caat_jax.errors import InputError


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits that identify JSON-able parts."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


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
