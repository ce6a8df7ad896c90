"""Checkpoints: state, position in the data, configuration; saved while training goes on.

`WORKDIR/checkpoints/STEP` is one; it gets that name when it is complete, with its digests in it.
Before anything is read from a checkpoint its files are compared with them.  What cannot be used is
named and left alone, or, where training is about to write the same step again, moved to
`WORKDIR/checkpoints_set_aside`; nothing but a complete checkpoint that `checkpoints_to_keep` newer
ones follow is ever deleted.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from caat_jax import files
from caat_jax.checkpoints import digests
from caat_jax.config.sections import Config
from caat_jax.config.stored import difference, from_json, to_json
from caat_jax.devices import processes
from caat_jax.errors import InputError

FOLDER = "checkpoints"
SET_ASIDE_FOLDER = "checkpoints_set_aside"
_UNFINISHED = ocp.utils.TMP_DIR_SUFFIX  # after the step, in a folder's name


def newest_config(workdir: Path) -> tuple[int, Config]:
    """The step and the configuration of a run's newest undamaged checkpoint.

    Reads files only: JAX is not asked for its devices, since the configuration may say how many
    to simulate.

    Raises:
      InputError: there is none.
    """
    folder = workdir / FOLDER
    step, damaged = _newest_undamaged(folder)
    if step is None:
        raise InputError(
            f"--workdir={workdir} has no checkpoint; python train.py --config=FILE"
            f" --workdir={workdir} writes one"
        )
    for number, problem in damaged.items():
        _warn(f"{folder / str(number)} is damaged ({problem}); using that of step {step}")
    return step, stored_config(folder, step)


def _newest_undamaged(folder: Path) -> tuple[int | None, dict[int, str]]:
    """A step, None where no checkpoint was ever completed; what is wrong with those after it.

    Raises:
      InputError: all checkpoints are damaged.
    """
    # Orbax renames a folder to its step's number when it is complete.
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    damaged = {}
    for step in sorted(steps, reverse=True):
        problem = digests.problem(folder / str(step))
        if problem is None:
            return step, damaged
        damaged[step] = problem
    if damaged:
        found = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise InputError(
            f"{folder} has no undamaged checkpoint ({found}); move it away to start anew"
        )
    return None, {}


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def stored_config(folder: Path, step: int) -> Config:
    """The configuration that a checkpoint carries."""
    return from_json(files.read_json(folder / str(step) / "config/metadata", dict))


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
        self._to_keep = to_keep
        self._opened: ocp.CheckpointManager | None = None
        self._saving: int | None = None  # the step of the last save begun

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if not self._opened:
            return
        if exception is None:
            with self._save_errors():
                self._opened.close()
        elif jax.process_count() == 1:  # else it could wait for processes that are gone
            with contextlib.suppress(Exception):
                self._opened.close()

    def resume_step(self) -> int | None:
        """The newest undamaged checkpoint; None: there is none, training begins.

        To be called before anything else, by all processes.  Makes way for what will be saved:
        newer checkpoints, which are damaged, and saves that were cut off are set aside.

        Raises:
          InputError: all checkpoints are damaged; nothing was moved.
        """
        step = self._make_way() if processes.is_first() else None
        return processes.from_first(step)

    def _make_way(self) -> int | None:
        step, damaged = _newest_undamaged(self.folder)
        problems = {str(number): f"is damaged ({what})" for number, what in damaged.items()}
        for path in sorted(self.folder.glob(f"*{_UNFINISHED}*")):
            problems[path.name] = "was not completed"
        goes_on = "begins anew" if step is None else f"goes on from step {step}"
        for name, problem in problems.items():
            aside = _free_name(self.folder.parent / SET_ASIDE_FOLDER, name)
            aside.parent.mkdir(exist_ok=True)
            files.rename(self.folder / name, aside)
            _warn(f"{self.folder / name} {problem}, is now {aside}; training {goes_on}")
        return step

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
            self._manager().save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data=ocp.args.JsonSave(data_state),
                    config=ocp.args.JsonSave(to_json(config)),
                ),
            )

    def check(self) -> None:
        """Notices that the save under way has failed, without waiting for it.

        Raises:
          InputError: a file could not be written.
        """
        with self._save_errors():
            self._manager().check_for_errors()

    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._manager().is_saving_in_progress()

    def wait(self) -> None:
        """Until the save under way is complete.

        Raises:
          InputError: a file could not be written.
        """
        with self._save_errors():
            self._manager().wait_until_finished()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
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
        args = _restore_state({"parameters": shapes}, partial_restore=True)
        restored = self._manager().restore(step, args=ocp.args.Composite(state=args))
        return restored["state"]["parameters"]

    def restore(self, step: int, shapes: Any) -> tuple[Any, dict[str, Any]]:
        """The training state, laid out as in `shapes`, and the state of the batches."""
        state = _restore_state(shapes)
        args = ocp.args.Composite(state=state, data=ocp.args.JsonRestore())
        restored = self._manager().restore(step, args=args)
        return restored["state"], restored["data"]

    def _manager(self) -> ocp.CheckpointManager:
        if not self._opened:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._to_keep,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._digest),
            )
            handlers = {
                # Weights and moments shrink by a fifth, and compressing them takes processors that
                # a step on CPUs would use.
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            }
            self._opened = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        return self._opened

    def _digest(self) -> None:
        """Called by the first process, when all of a checkpoint is written but not its name."""
        # Where folders cannot be renamed, Orbax writes under the final name.
        final = self.folder / str(self._saving)
        unfinished = self.folder.glob(f"{final.name}{_UNFINISHED}*")
        digests.write(next(unfinished, final))


def _restore_state(shapes: Any, **options: Any) -> ocp.args.PyTreeRestore:
    """Of a tree of shapes, types and layouts."""
    layouts = ocp.checkpoint_utils.construct_restore_args(shapes)
    return ocp.args.PyTreeRestore(shapes, restore_args=layouts, **options)


def _free_name(folder: Path, name: str) -> Path:
    """A path in `folder` that does not exist yet: the name, or with a number after it."""
    names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(1)))
    return next(folder / name for name in names if not (folder / name).exists())
