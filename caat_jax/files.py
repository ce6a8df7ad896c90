"""Files that are replaced in one go, held against other processes, or made by others.

What has been written or renamed here survives a power failure: contents and names are on the disk
before the function returns.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from caat_jax.errors import InputError

_CHUNK_BYTES = 1 << 22
LARGEST_JSON_BYTES = 1 << 26
DEEPEST_JSON = 32  # objects and lists within each other

_Json = TypeVar("_Json", dict, list)
_JSON_KINDS = {dict: "a JSON object", list: "a JSON list"}


def write(path: Path, content: str | bytes) -> None:
    """Replaces a file, or a link, in one go: readers see the old content or the new.

    Raises:
      OSError: with the file's name; what was there is there still.
    """
    data = content.encode() if isinstance(content, str) else content
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with naming(path):
        new.unlink(missing_ok=True)  # of a process that had the same number and was killed
        try:
            with open(new, "xb") as file:  # x: never through a link
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            rename(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def rename(source: Path, destination: Path) -> None:
    """Gives a file or folder another name, in place of a file or an empty folder of that name."""
    os.replace(source, destination)
    for folder in {source.parent, destination.parent}:
        sync(folder)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems, which write names at once, have no fsync of folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            error.filename = str(path)
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds a name to the errors inside that have none, such as those of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def held(path: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Holds a lock file against other processes; it ends with this process, however that ends.

    Args:
      path: of the file, made here and removed at the end.
      busy: called where another process holds it; it raises, or returns in order to wait.

    Raises:
      InputError: the file system has no locks.
      OSError: the file cannot be made.
    """
    # For writing: NFS locks nothing else, so no folder either.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        with os.fdopen(os.open(path, flags, 0o666), "rb") as file:
            _lock(file, path, busy)
            if not _is_at(file, path):
                continue  # the process that held it has removed it
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def _lock(file: BinaryIO, path: Path, busy: Callable[[], None]) -> None:
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise InputError(
            f"{path} cannot be locked ({error.strerror}): two processes could write to"
            f" {path.parent} at a time; give a folder on a file system with locks"
        ) from error


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, and neither waits for a pipe nor reads a device.

    Raises:
      InputError: it is not a regular file.
      OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not a regular file")
    return open(descriptor, "rb")


def refuse_links_out(folder: Path) -> None:
    """Refuses a folder, made by others, with a link that leads out of it.

    Links within it are allowed, and those of the Hugging Face cache, whose files lie in `blobs`
    beside `snapshots/REVISION`.

    Raises:
      InputError: naming the link.
    """
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots":
        root = root.parents[1]
    for path in folder.glob("*"):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(root):
            raise InputError(f"{path} is a link to {target}, outside of {folder}; copy the file")


def read_json(path: Path, kind: type[_Json], what: str = "") -> _Json:
    """A file's JSON object (`kind` is dict) or list, which anybody may have written.

    Args:
      path: the file.
      kind: what its content must be.
      what: names that in the error, such as "a report of eval.py".

    Raises:
      FileNotFoundError: there is no file.
      InputError: it cannot be read, is larger than `LARGEST_JSON_BYTES`, or holds something else.
    """
    try:
        with open_regular(path) as file:
            text = file.read(LARGEST_JSON_BYTES + 1)
        return parse_json(text, kind)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not {what or _JSON_KINDS[kind]} ({error})") from error


def parse_json(text: str | bytes, kind: type[_Json]) -> _Json:
    """The JSON object or list of a text, at most `LARGEST_JSON_BYTES` long.

    Raises:
      ValueError: it is something else, has a number that JSON does not have, or objects and lists
        within each other more than `DEEPEST_JSON` times.
    """
    if len(text) > LARGEST_JSON_BYTES:
        raise ValueError(f"it has more than {LARGEST_JSON_BYTES:,} bytes")
    try:
        value = _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("its objects and lists are nested too deep") from None
    if type(value) is not kind:
        raise ValueError(f"it is not {_JSON_KINDS[kind]}")
    level: list[Any] = [value]
    for _ in range(DEEPEST_JSON):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return value
    raise ValueError("its objects and lists are nested too deep")


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def names_below(folder: Path) -> set[str]:
    """What lies below a folder and is not a folder itself, links included: names relative to it."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path.relative_to(folder)) for path in paths}


def crc32(path: Path) -> int:
    """The CRC-32 of a regular file's content; raises as `open_regular` does."""
    digest = 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest = zlib.crc32(chunk, digest)
    return digest
