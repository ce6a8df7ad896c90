"""A run in a bucket has a mirror: a folder on a local disk that everything else reads and writes.

It begins with the run's small files; checkpoints are fetched when they are asked for.  What was
written there goes to the bucket at the program's end, and with every checkpoint of a training run.
"""

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caat_jax import files
from caat_jax.config import user_paths
from caat_jax.devices import processes
from caat_jax.errors import InputError
from caat_jax.storage.lease import Lease

if TYPE_CHECKING:
    from caat_jax.storage.bucket import Bucket

# Each holds an object, and what is read back of it, in memory.
THREADS = 4
_PREFIX = "caat_jax_mirror_"
# What a mirror begins with: small files that resuming a run, or using it, may need.  Whatever
# else a URL leads to, such as a folder of many runs, stays there.
_FETCHED = re.compile(r"(?!lock$|tensorboard/)([^/]+/)?[^/]+")
# Locks, files that are being written, and checkpoints, which have a way of their own.
_NOT_PUSHED = re.compile(r"lock$|(.*/)?\.|checkpoints/")

_mirrors: dict[Path, "Mirror"] = {}


class Mirror:
    """A folder of this process alone for the objects below a URL."""

    def __init__(self, bucket: "Bucket", folder: Path):
        self.bucket, self.folder = bucket, folder
        self._lease: Lease | None = None
        self._states: dict[str, tuple[int, int]] = {}  # of files that are the same in the bucket

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads objects; raises as `Bucket.read` does."""

        def fetch_one(name: str) -> None:
            content, _ = self.bucket.read(name)
            if content is not None:  # it was there when it was listed
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                self._states[name] = _state(path)

        _in_threads(fetch_one, names)

    def fetch_files(self) -> None:
        """Downloads the run's own small files as they are now; raises as `Bucket.read` does."""
        self.fetch(name for name in self.bucket.names() if _FETCHED.fullmatch(name))

    def upload(self, names: Iterable[str], below: str = "", to: str = "") -> dict[str, list[int]]:
        """Uploads files; all names are relative to `below` in the folder, and `to` in the bucket.

        Returns:
          Size and CRC-32 of each.

        Raises:
          InputError: one cannot be written, or another run has taken over.
        """

        def upload_one(name: str) -> list[int]:
            if self._lease:
                self._lease.check()
            path = self.folder / below / name
            state, content = _state(path), path.read_bytes()
            self.bucket.write(f"{to}{name}", content)
            self._states[f"{to}{name}"] = state
            return size_and_crc32(content)

        names = list(names)
        return dict(zip(names, _in_threads(upload_one, names), strict=True))

    def push(self) -> None:
        """Uploads the files that are new or have changed, but for checkpoints; the first process.

        Raises:
          InputError: as `upload`.
        """
        if not processes.is_first():
            return
        paths = {name: self.folder / name for name in files.names_below(self.folder)}
        changed = [
            name
            for name, path in paths.items()
            if not _NOT_PUSHED.match(name)
            and not path.is_symlink()
            and self._states.get(name) != _state(path)
        ]
        self.upload(changed)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs from training there; pushes at the end.

        Raises:
          InputError: another run trains there.
        """
        with Lease(self.bucket) as self._lease:
            try:
                with _pushing([self]):
                    self.fetch_files()  # again: the run before may have ended in the meantime
                    yield
            finally:
                self._lease = None


def folder(name: str, path: str) -> Path:
    """The folder that the user gives; for a URL, its mirror, which lasts until the program's end.

    Args:
      name: what it is, such as "--workdir", for errors.
      path: as given.

    Raises:
      InputError: it is no path, or the bucket cannot be read.
    """
    if not path.startswith(("gs://", "s3://")):
        return user_paths.expanded(name, path)
    from caat_jax.storage.bucket import Bucket  # TensorStore, which folders need not wait for

    with _no_stderr():
        bucket = Bucket(name, path)
        mirror = Mirror(bucket, _scratch_folder() / Path(bucket.url).name)
        mirror.folder.mkdir()
        mirror.fetch_files()
    _mirrors[mirror.folder] = mirror
    return mirror.folder


def of(folder: Path) -> Mirror | None:
    """The mirror that this folder is, if it is one."""
    return _mirrors.get(folder)


def size_and_crc32(content: bytes) -> list[int]:
    """What identifies an object's content, as in a checkpoint's `digests.json`."""
    return [len(content), zlib.crc32(content)]


def with_urls(text: str) -> str:
    """A message with the URLs instead of their mirrors."""
    for mirror in _mirrors.values():
        text = text.replace(str(mirror.folder), mirror.bucket.url)
    return text


@contextlib.contextmanager
def pushed() -> Iterator[None]:
    """For a whole program: all mirrors are pushed at the end, and removed.

    Raises:
      InputError: what was written cannot be uploaded.
    """
    try:
        with _pushing(_mirrors.values()):
            yield
    finally:
        for mirror in _mirrors.values():
            shutil.rmtree(mirror.folder, ignore_errors=True)


@contextlib.contextmanager
def _pushing(mirrors: Iterable[Mirror]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # What ended the program is more to the point than what its end could not write.
        with contextlib.suppress(InputError):
            for mirror in mirrors:
                mirror.push()
        raise
    for mirror in mirrors:
        mirror.push()


def _in_threads(function: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
    """The results for all names, a few at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, names))


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """For the first requests: TensorStore prints an error for each place without credentials."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _scratch_folder() -> Path:
    """A new one where TMPDIR says, removed at the end; those of killed programs are removed now."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        descriptor = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        _locked(path, fcntl.LOCK_EX)  # waits for a program that is removing it
        if path.exists():
            atexit.register(shutil.rmtree, path, ignore_errors=True)
            return path


def _locked(folder: Path, how: int) -> int | None:
    """A descriptor that locks it until this process ends; None where that cannot be."""
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(descriptor, how)
        return descriptor
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
