"""Paths that the user gives."""

import os
import re
from pathlib import Path

from caat_jax.errors import InputError


def expanded(name: str, path: str) -> Path:
    """The path with the home folder for a leading ~ or ~user, which shells leave in flags.

    Args:
      name: what the path is, such as "data.cache_dir", for the error.
      path: as given.

    Raises:
      InputError: it is empty, there is no such user, a character is not allowed in paths, or it is
        a URL.
    """
    if not path:
        raise InputError(f"{name} is empty; give a path")
    refuse_url(name, path)
    try:
        os.fsencode(path)
        if "\0" in path:
            raise ValueError
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}={path}: there is no user {Path(path).parts[0][1:]}") from error
    except ValueError:
        raise InputError(f"{name}={path!r} has a character that no path has") from None


def refuse_url(name: str, path: str) -> None:
    """Refuses what looks like a URL, which would otherwise be the name of a folder, such as gs:.

    Raises:
      InputError: naming it.
    """
    if re.match(r"[A-Za-z][\w+.-]*:/", path):
        raise InputError(
            f"{name}={path} is a URL; give a path, such as that where the bucket is mounted"
            " (docs/scale_out.md)"
        )
