"""Folders that appear only when complete, and the files that a model carries along."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from caat_jax.data import token_roles
from caat_jax.errors import InputError

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# What belongs to a model besides its weights.
CARRIED = (*TOKENIZERS, *token_roles.FILES)


def check_new(path: Path) -> None:
    """Refuses a path that is in use.

    Raises:
      InputError: it is a file, below a file, or a folder that is not empty.
    """
    for above in path.absolute().parents:
        if above.exists() and not above.is_dir():
            raise InputError(f"{path}: {above} is a file")
    if path.is_dir():
        if any(path.iterdir()):
            raise InputError(f"{path} is not empty; give a folder that is new or empty")
    elif path.exists():
        raise InputError(f"{path} is a file; give a folder that is new or empty")


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A folder to write to; it becomes `path` at the end, and is removed after an exception.

    Raises:
      InputError: it cannot be made.
    """
    check_new(path)
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        # Beside it, on the same file system.
        unfinished = tempfile.TemporaryDirectory(
            dir=path.absolute().parent, prefix=f".{path.name}.", suffix=".unfinished"
        )
    except OSError as error:
        raise InputError(f"{path} cannot be made ({error.strerror})") from None
    with unfinished:
        folder = Path(unfinished.name) / "complete"
        folder.mkdir()
        yield folder
        os.rename(folder, path)


def copy_files(names: tuple[str, ...], source: Path, destination: Path) -> None:
    """Copies those of the files that are there."""
    destination.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
