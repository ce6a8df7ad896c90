"""Checkpoints: state, position in the data, configuration; saved while training continues.

`WORKDIR/checkpoints/STEP` is one.  Orbax writes it under another name; it gets that one when all of
it, with its digests, is on the disk.  Older ones are deleted after that, when its files have been
compared with the digests.  Before anything is read from a checkpoint the same comparison is made,
by the first process.  A damaged one is named and left alone, or, where training is about to write
the same step again, moved to `WORKDIR/checkpoints_set_aside`.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from caat_jax import files
from caat_jax.checkpoints import checkpointer, digests, in_bucket
from caat_jax.config.sections import Config
from caat_jax.config.stored import difference, from_json, to_json
from caat_jax.devices import processes
from caat_jax.errors import InputError, Stop
from caat_jax.storage import mirrors

FOLDER = "checkpoints"
SET_ASIDE_FOLDER = "checkpoints_set_aside"
SET_ASIDE_KEPT = 3

UNFINISHED = ".saving"  # after the step, in a folder's name; Orbax adds to that
_DELETED = ".deleting"
_CUT_OFF = re.compile(rf"\d+(\{UNFINISHED}|{re.escape(ocp.utils.TMP_DIR_SUFFIX)}).*", re.ASCII)
_STEP = re.compile("0|[1-9][0-9]*")


def newest_config(workdir: Path) -> tuple[int, Config]:
    """The step and the configuration of a run's newest undamaged checkpoint.

    Every process of a run calls it, the first one chooses.  JAX is not asked for its devices, since
    the configuration may say how many to simulate.

    Raises:
      InputError: there is none.
    """

    def choose() -> tuple[int, dict[str, Any]]:
        folder = workdir / FOLDER
        step, damaged = _newest_undamaged(folder)
        if step is None:
            raise InputError(
                f"--workdir={workdir} has no checkpoint; python train.py --config=FILE"
                f" --workdir={workdir} writes one"
            )
        for number, damage in damaged.items():
            _warn(f"{folder / str(number)} is damaged ({damage}); using that of step {step}")
        return step, to_json(stored_config(folder, step))

    step, config = processes.on_first(choose)
    return step, from_json(config)


def _steps(folder: Path) -> list[int]:
    """Of all that have got their final name, or are complete in a bucket, in ascending order."""
    if mirror := mirrors.of(folder.parent):
        found = in_bucket.completed(mirror, FOLDER)
        names = [name for name, is_complete in found.items() if is_complete]
    else:
        names = [path.name for path in folder.glob("*")]
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def _newest_undamaged(folder: Path) -> tuple[int | None, dict[int, str]]:
    """A step, None where no checkpoint was ever completed; what is wrong with those after it.

    Raises:
      InputError: all checkpoints are damaged.
    """
    damaged = {}
    for step in reversed(_steps(folder)):
        damage = _damage(folder, step)
        if damage is None:
            return step, damaged
        damaged[step] = damage
    if damaged:
        found = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
        raise InputError(
            f"{folder} has no undamaged checkpoint ({found}); move it away to start anew"
        )
    return None, {}


def _damage(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint; None: it is what was written as that of the step."""
    path = _here(folder, step)
    damage = digests.damage(path)
    if damage is None:
        try:
            written = files.read_json(path / "data/metadata", dict).get("next_batch")
        except (FileNotFoundError, InputError):
            return "data/metadata is damaged"
        if written != step:
            return f"it is the checkpoint of step {written}"
    return damage


def _here(folder: Path, step: int) -> Path:
    """A checkpoint's folder, downloaded where it is in a bucket."""
    path = folder / str(step)
    mirror = mirrors.of(folder.parent)
    if mirror and not path.exists():
        in_bucket.fetch(mirror, f"{FOLDER}/{step}")
        # The first process, which compares before it chooses, has chosen an undamaged one.
        if not processes.is_first() and (damage := digests.damage(path)):
            raise InputError(f"{path} did not arrive as it was written ({damage})")
    return path


def _warn(message: str) -> None:
    print(mirrors.with_urls(f"warning: {message}"), file=sys.stderr)


def stored_config(folder: Path, step: int) -> Config:
    """The configuration that a checkpoint carries."""
    return from_json(files.read_json(_here(folder, step) / "config/metadata", dict))


class Checkpoints:
    """The checkpoints of one workdir; a context manager.

    A step is the number of batches used.  Leaving the context waits for a save under way.
    """

    def __init__(self, workdir: Path, *, to_keep: int | None = None):
        """Opens them; writes nothing before the first save.

        Args:
          workdir: the run's folder.
          to_keep: older ones are deleted when there are more; None keeps all.
        """
        self.folder = workdir.absolute() / FOLDER
        self._mirror = mirrors.of(self.folder.parent)
        self._to_keep = to_keep
        self._opened: ocp.AsyncCheckpointer | None = None
        self._finisher = ThreadPoolExecutor(1, "checkpoint")
        self._finishing: Future[None] | None = None  # of the last save
        self._saving: int | None = None  # its step

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if exception is None:
            self.wait()
        elif processes.number() == 1:  # else it could wait for processes that are gone
            with contextlib.suppress(Exception):
                self.wait()
        else:
            return
        if self._opened:
            self._opened.close()

    def resume_step(self) -> int | None:
        """The newest undamaged checkpoint; None: there is none, training begins.

        To be called before anything else, by all processes.  Makes way for what will be saved:
        newer checkpoints, which are damaged, and saves that were cut off are set aside.

        Raises:
          InputError: all checkpoints are damaged; nothing was moved.
        """
        return processes.on_first(self._set_damaged_aside)

    def _set_damaged_aside(self) -> int | None:
        step, damaged = _newest_undamaged(self.folder)
        damages = {str(number): f"is damaged ({what})" for number, what in damaged.items()}
        resumes = "starts anew" if step is None else f"resumes from step {step}"
        if self._mirror:
            self._make_way_in_bucket(damages, resumes)
            return step
        for path in sorted(self.folder.glob("*")):
            if _CUT_OFF.fullmatch(path.name):
                damages[path.name] = "was not completed"
        for name, damage in damages.items():
            aside = _free_name(self.folder.parent / SET_ASIDE_FOLDER, name)
            aside.parent.mkdir(exist_ok=True)
            files.rename(self.folder / name, aside)
            os.utime(aside)
            _warn(f"{self.folder / name} {damage}, is now {aside}; training {resumes}")
        aside = (self.folder.parent / SET_ASIDE_FOLDER).glob("*")
        for path in sorted(aside, key=lambda path: path.lstat().st_mtime)[:-SET_ASIDE_KEPT]:
            shutil.rmtree(path, ignore_errors=True)
            _warn(f"{path} is deleted: the last {SET_ASIDE_KEPT} that were set aside are kept")
        for path in self.folder.glob(f"*{_DELETED}"):
            shutil.rmtree(path, ignore_errors=True)
        return step

    def _make_way_in_bucket(self, damages: dict[str, str], resumes: str) -> None:
        for name, is_complete in sorted(in_bucket.completed(self._mirror, FOLDER).items()):
            if name in damages:
                aside = f"{SET_ASIDE_FOLDER}/{name}"
                in_bucket.set_aside(self._mirror, f"{FOLDER}/{name}", aside)
                now = f"{damages[name]}, is now {self._mirror.folder / aside}"
            elif not is_complete and _STEP.fullmatch(name):
                in_bucket.delete(self._mirror, f"{FOLDER}/{name}")
                now = "was not completed, is deleted"
            else:
                continue
            _warn(f"{self.folder / name} {now}; training {resumes}")

    def check_architecture(self, step: int, config: Config) -> None:
        """Refuses a configuration whose function is not the checkpoint's.

        Raises:
          InputError: naming the fields that differ.
        """
        stored = stored_config(self.folder, step).model
        differing = difference(stored, config.model, "model.")
        if differing:
            same_but_for_p = dataclasses.replace(stored, sync_factors=config.model.sync_factors)
            hint = f", or let train.sync_schedule change model.sync_factors after step {step}"
            raise InputError(
                f"{self.folder} holds another architecture ({'; '.join(differing)}); give another"
                " --workdir or the configuration that it was trained with"
                f"{hint * (same_but_for_p == config.model)}"
            )

    def save(self, state: Any, step: int, config: Config, data_state: dict) -> None:
        """Starts saving; the next save, or leaving the context, waits for it.

        Raises:
          InputError: a file of this checkpoint, or of the one before, could not be written.
        """
        self.wait()
        self._saving = step
        with self._save_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._checkpointer().save(
                self.folder / f"{step}{UNFINISHED}",
                args=ocp.args.Composite(
                    state=checkpointer.save_args(state, shared=self._mirror is None),
                    data=ocp.args.JsonSave(data_state),
                    config=ocp.args.JsonSave(to_json(config)),
                ),
            )
        self._finishing = self._finisher.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        """Waits until Orbax writes no more, then makes a checkpoint of what it has written."""
        unfinished, final = self.folder / f"{step}{UNFINISHED}", self.folder / str(step)
        if self._mirror:
            with self._save_errors():
                in_bucket.upload(self._mirror, unfinished, f"{FOLDER}/{step}", self._wait_for_orbax)
                self._delete_older_in_bucket()
            return

        def commit() -> None:
            with self._save_errors():
                self._wait_for_orbax()
                digests.write(unfinished)
                files.rename(unfinished, final)
                files.sync(self.folder.parent)
                self._delete_older(step)

        if not processes.is_first():
            self._wait_for_orbax()
        processes.on_first(commit, f"checkpoint/{step}")

    def _wait_for_orbax(self) -> None:
        with self._save_errors():
            self._checkpointer().wait_until_finished()

    def _delete_older(self, step: int) -> None:
        older = _steps(self.folder)[: -self._to_keep] if self._to_keep else []
        if older and (damage := _damage(self.folder, step)):
            raise InputError(
                f"{self.folder / str(step)} is not as it was written ({damage}); the checkpoints"
                " before it are kept"
            )
        for number in older:
            deleted = self.folder / f"{number}{_DELETED}"
            files.rename(self.folder / str(number), deleted)
            shutil.rmtree(deleted)

    def _delete_older_in_bucket(self) -> None:
        if self._to_keep and processes.is_first():
            for step in _steps(self.folder)[: -self._to_keep]:
                in_bucket.delete(self._mirror, f"{FOLDER}/{step}")
        for path in self.folder.glob("*"):  # the one that the run went on from
            shutil.rmtree(path)

    def check(self) -> None:
        """Notices that the save under way has failed, without waiting for it.

        Raises:
          InputError: a file could not be written.
        """
        if self._finishing and self._finishing.done():
            self.wait()

    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._finishing is not None and not self._finishing.done()

    def wait(self) -> None:
        """Until the save under way is complete.

        Raises:
          InputError: a file could not be written.
        """
        if self._finishing:
            finishing, self._finishing = self._finishing, None
            finishing.result()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
        except Stop:
            raise
        # What Orbax and TensorStore raise has no type in common.
        except Exception as error:
            # As Python's own errors have it, and TensorStore's.
            number = re.search(r"\[Errno (\d+)\]|os_error_code='(\d+)'", str(error))
            if number:
                reason = os.strerror(int(number[1] or number[2]))
            else:
                reason = " ".join(str(error).split())
            raise InputError(
                f"{self.folder / str(self._saving)} could not be written ({reason}); the"
                " checkpoints before it are whole"
            ) from error

    def restore_parameters(self, step: int, shapes: Any) -> Any:
        """The parameters in `shapes`, all of their dictionary or a part, laid out as there."""
        return self._restore(step, {"parameters": shapes}, partial_restore=True)["parameters"]

    def restore(self, step: int, shapes: Any) -> tuple[Any, dict[str, Any]]:
        """The training state, laid out as in `shapes`, and the state of the batches."""
        return self._restore(step, shapes), self.batches_state(step)

    def batches_state(self, step: int) -> dict[str, Any]:
        """What was saved as `data_state`."""
        return files.read_json(_here(self.folder, step) / "data/metadata", dict)

    def _restore(self, step: int, shapes: Any, **options: Any) -> Any:
        layouts = ocp.checkpoint_utils.construct_restore_args(shapes)
        args = ocp.args.PyTreeRestore(shapes, restore_args=layouts, **options)
        restored = self._checkpointer().restore(
            _here(self.folder, step), args=ocp.args.Composite(state=args)
        )
        return restored["state"]

    def _checkpointer(self) -> ocp.AsyncCheckpointer:
        if not self._opened:
            self._opened = checkpointer.opened(shared=self._mirror is None)
        return self._opened


def _free_name(folder: Path, name: str) -> Path:
    """A path in `folder` that does not exist yet: the name, or with a number after it."""
    names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(1)))
    return next(folder / name for name in names if not (folder / name).exists())
