"""The folder of a run, or its mirror: it can be written, and one run at a time writes it."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from caat_jax import files
from caat_jax.devices import processes
from caat_jax.errors import InputError
from caat_jax.storage import mirrors


def check_writable(workdir: Path) -> None:
    """Refuses one that cannot be written, before there is anything to lose.

    Raises:
      InputError: it, or where it would be made, is a file or not writable; or a link in it leads to
        where a run would write then.
    """
    existing = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(f"--workdir={workdir}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--workdir={workdir}: {existing} cannot be written; give another folder")
    for path in workdir.glob("*"):
        if path.is_symlink():
            raise InputError(
                f"--workdir={workdir}: {path} is a link to {os.readlink(path)}, and a run writes"
                " into its own folder only; remove the link, or give the folder elsewhere itself"
            )


@contextlib.contextmanager
def sole_run(workdir: Path) -> Iterator[None]:
    """Holds the folder, made where it is missing, for this run alone; the first process does so.

    A folder that was made here and that nothing was written to is removed.

    Raises:
      InputError: another run holds it, or it cannot be locked.
    """
    if not processes.is_first():
        yield
        return
    is_new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    files.sync(workdir.absolute().parent)

    def refuse() -> None:
        raise InputError(
            f"--workdir={workdir}: another run is training there; wait for its end, or give"
            " another folder"
        )

    try:
        mirror = mirrors.of(workdir)
        with files.held(workdir / "lock", refuse), mirror.held() if mirror else nullcontext():
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # there is something in it
                workdir.rmdir()
