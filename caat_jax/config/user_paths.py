"""Paths that the user gives."""

from pathlib import Path

from caat_jax.errors import InputError


def expanded(name: str, path: str) -> Path:
    """The path with the home folder for a leading ~ or ~user, which shells leave in flags.

    Args:
      name: what the path is, such as "data.cache_dir", for the error.
      path: as given.

    Raises:
      InputError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise InputError(f"{name}={path}: {user} is nobody's home folder here") from error
