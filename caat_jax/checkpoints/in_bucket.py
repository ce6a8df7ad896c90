"""Checkpoints in a bucket: saved by Orbax to the mirror, uploaded object by object.

One is complete when its `digests.json` is there, which comes last: nothing can be renamed in one
go.  Each process of a run has a mirror, and uploads what it has written.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from caat_jax import files
from caat_jax.checkpoints import digests
from caat_jax.devices import processes
from caat_jax.storage.mirrors import Mirror, size_and_crc32

# Orbax writes the arrays of each process to a database of its own, state/ocdbt.process_I, then
# merges them into these; from here that can be done only when all are in the bucket.
_ARRAYS = "state"
_MERGED = (f"{_ARRAYS}/d/", f"{_ARRAYS}/manifest.ocdbt")
_OF_ONE_PROCESS = re.compile(rf"{_ARRAYS}/(.*/)?(ocdbt\.)?process_\d+(/|$)")


def completed(mirror: Mirror, folder: str) -> dict[str, bool]:
    """Names of the checkpoints in a folder of the bucket, and whether all of each is there."""
    names = set(mirror.bucket.names(f"{folder}/"))
    found = {name.split("/")[1] for name in names}
    last = {name: f"{folder}/{name}/{digests.FILE}" for name in found}
    # What a listing lacks is asked for, since what is not complete may be deleted.
    return {
        name: last[name] in names or mirror.bucket.read(last[name])[0] is not None for name in found
    }


def fetch(mirror: Mirror, name: str) -> None:
    """Downloads a checkpoint, such as "checkpoints/5"."""
    mirror.fetch(mirror.bucket.names(f"{name}/"))


def set_aside(mirror: Mirror, name: str, aside: str) -> None:
    """Gives a checkpoint's objects other names, in place of those that have them."""
    mirror.bucket.delete(f"{aside}/")
    for old in mirror.bucket.names(f"{name}/"):
        content, _ = mirror.bucket.read(old)
        if content is not None:
            mirror.bucket.write(f"{aside}{old.removeprefix(name)}", content)
    delete(mirror, name)


def delete(mirror: Mirror, name: str) -> None:
    """Deletes a checkpoint, first what makes it complete; from the mirror too."""
    mirror.bucket.delete(f"{name}/{digests.FILE}")
    mirror.bucket.delete(f"{name}/")
    shutil.rmtree(mirror.folder / name, ignore_errors=True)


def upload(mirror: Mirror, saved: Path, name: str, wait: Callable[[], None]) -> None:
    """Makes the checkpoint `name` of what Orbax writes to a folder, and removes the folder.

    Called by all processes; `wait` returns when Orbax writes no more.  Every object is read back
    and compared.  The run's other files, such as its metrics, come before the checkpoint is whole.

    Raises:
      InputError: something cannot be written, or another run has taken over.
    """
    below = f"{saved.relative_to(mirror.folder)}/"

    def upload_own() -> dict[str, list[int]]:
        wait()
        names = [found for found in files.names_below(saved) if _is_own(found)]
        return mirror.upload(names, below, to=f"{name}/")

    def complete() -> None:
        entries = upload_own()
        for others in processes.told(name):
            entries |= others
        if processes.number() > 1:
            entries |= _merge(mirror, name, entries)
        mirror.push()
        (saved / digests.FILE).write_bytes(digests.file_content(entries))
        mirror.upload([digests.FILE], below, to=f"{name}/")

    if not processes.is_first():
        processes.tell_first(upload_own, name)
    processes.on_first(complete, name)
    shutil.rmtree(saved)


def _is_own(name: str) -> bool:
    """Whether this process uploads a file of its mirror's checkpoint."""
    if not processes.is_first():
        return bool(_OF_ONE_PROCESS.match(name))
    return processes.number() == 1 or not name.startswith(_MERGED)


def _merge(mirror: Mirror, name: str, entries: dict[str, list[int]]) -> dict[str, list[int]]:
    """Merges the databases of all processes; size and CRC-32 of what that adds."""
    parts = {found.split("/")[1] for found in entries if found.startswith(f"{_ARRAYS}/ocdbt.")}
    mirror.bucket.merge_databases(f"{name}/{_ARRAYS}", sorted(parts))
    added = {}
    for start in _MERGED:
        for found in mirror.bucket.names(f"{name}/{start}"):
            content, _ = mirror.bucket.read(found)
            added[found.removeprefix(f"{name}/")] = size_and_crc32(content)
    return added
