"""Paths that the user gives."""

import os
from pathlib import Path

from caat_jax.errors import InputError


def expanded(name: str, path: str) -> Path:
    """The path with the home folder for a leading ~ or ~user, which shells leave in flags.

    Args:
      name: what the path is, such as "data.cache_dir", for the error.
      path: as given.

    Raises:
      InputError: there is no such user, or a character is not allowed in paths.
    """
    try:
        os.fsencode(path)
        if "\0" in path:
            raise ValueError
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}={path}: there is no user {Path(path).parts[0][1:]}") from error
    except ValueError:
        raise InputError(f"{name}={path!r} has a character that no path has") from None
