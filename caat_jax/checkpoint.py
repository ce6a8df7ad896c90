"""Checkpoints: state, position in the data, configuration; saved while training goes on."""

import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from caat_jax import config as config_lib
from caat_jax.config import Config
from caat_jax.errors import InputError
from caat_jax.train_step import Programs, TrainState

FOLDER = "checkpoints"
_JSON_RESTORE = ocp.args.JsonRestore()


def newest_config(workdir: Path) -> tuple[int, Config]:
    """The step and the configuration of a run's newest checkpoint.

    Reads files only: JAX is not asked for its devices, since the configuration may say how many
    to simulate.

    Raises:
      InputError: there is none.
    """
    folder = workdir / FOLDER
    # Orbax renames a folder to its step's number when it is complete.
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    if not steps:
        raise InputError(
            f"--workdir={workdir} has no checkpoint; python train.py --config=FILE"
            f" --workdir={workdir} writes one"
        )
    return max(steps), stored_config(folder, max(steps))


def stored_config(folder: Path, step: int) -> Config:
    """The configuration that a checkpoint carries."""
    return config_lib.from_json(json.loads((folder / str(step) / "config/metadata").read_text()))


class Checkpoints:
    """The checkpoints of one workdir, `WORKDIR/checkpoints/STEP`; a context manager.

    A step is the number of updates done.  Leaving the context waits for a save under way.
    """

    def __init__(self, workdir: Path, *, to_keep: int | None = None):
        """Opens them; writes nothing before the first save.

        Args:
          workdir: the run's folder.
          to_keep: older ones are deleted when there are more; None keeps all.
        """
        for folder in (workdir, *workdir.parents):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"--workdir={workdir}: {folder} is a file; give a folder")
        self.folder = workdir.absolute() / FOLDER
        self._to_keep = to_keep
        self._opened: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._opened:
            self._opened.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None."""
        return self._manager().latest_step() if self.folder.exists() else None

    def check_architecture(self, step: int, config: Config) -> None:
        """Refuses a configuration whose function is not the checkpoint's.

        Raises:
          InputError: naming the fields that differ.
        """
        stored = stored_config(self.folder, step).model
        differing = config_lib.difference(stored, config.model)
        if differing:
            raise InputError(
                f"{self.folder} holds another architecture ({'; '.join(differing)}); give another"
                " --workdir or the configuration that it was trained with"
            )

    def save(self, state: TrainState, step: int, config: Config, data_state: dict) -> None:
        """Starts saving; the next save, or leaving the context, waits for it."""
        self._manager().save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data_state),
                config=ocp.args.JsonSave(config_lib.to_json(config)),
            ),
        )

    def restore_parameters(self, step: int, programs: Programs) -> Any:
        """The parameters alone, laid out for these programs' mesh."""
        return self.restore_some_parameters(step, programs.state_shapes.parameters)

    def restore_some_parameters(self, step: int, shapes: Any) -> Any:
        """The parameters in `shapes`, a part of the nested dictionary of all, laid out as there."""
        wanted = {"parameters": shapes}
        restored = self._manager().restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                )
            ),
        )
        return restored["state"]["parameters"]

    def restore(self, step: int, programs: Programs) -> tuple[TrainState, dict[str, Any]]:
        """The state, laid out for these programs' mesh, and the state of the batches."""
        restored = self._manager().restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(programs.state_shapes), data=_JSON_RESTORE
            ),
        )
        return restored["state"], restored["data"]

    def _manager(self) -> ocp.CheckpointManager:
        if not self._opened:
            options = ocp.CheckpointManagerOptions(max_to_keep=self._to_keep, create=True)
            self._opened = ocp.CheckpointManager(self.folder, options=options)
        return self._opened
