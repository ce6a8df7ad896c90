"""The processes of one run: how they find each other, agree, and end.

JAX's distributed runtime connects them; see `jax.distributed.initialize`.  A process that is lost
ends the others: CPU processes notice when they next communicate, and any within
`TIMEOUT_SECONDS`.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from caat_jax.errors import InputError, Interrupted

TIMEOUT_SECONDS = 60

_FLAGS = ("coordinator_address", "num_processes", "process_id")


def define_flags() -> None:
    """`--coordinator_address`, `--num_processes` and `--process_id`, for `start`."""
    flags.DEFINE_string(
        "coordinator_address", None, "Host and port of process 0, where all processes meet."
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "Of the run; without it as Slurm, Open MPI, a Cloud TPU or Kubernetes says, or 1.",
        lower_bound=1,
    )
    flags.DEFINE_integer("process_id", None, "This process's, from 0.", lower_bound=0)


def start() -> None:
    """Joins the run's other processes, as the flags or the cluster's launcher say.

    To be called before anything asks JAX for its devices.

    Raises:
      InputError: the flags are not complete or do not fit, or the processes do not meet.
    """
    values = {name: flags.FLAGS[name].value for name in _FLAGS}
    given = {name: value for name, value in values.items() if value is not None}
    if given == {"num_processes": 1}:
        return
    if given and len(given) < len(_FLAGS):
        missing = ", ".join(f"--{name}" for name in _FLAGS if name not in given)
        raise InputError(f"{missing} missing: give all of {', '.join(f'--{n}' for n in _FLAGS)}")
    if given and not values["process_id"] < values["num_processes"]:
        raise InputError(
            f"--process_id={values['process_id']} must be below"
            f" --num_processes={values['num_processes']}"
        )
    try:
        join(**given)
    except (ValueError, RuntimeError) as error:
        if not given and "coordinator_address" in str(error):
            return  # no launcher: this process is alone
        raise InputError(
            f"the processes did not find each other ({_one_line(error)});"
            " --num_processes=1 runs this one alone"
        ) from error
    _keep_stdout_for_results()


def _keep_stdout_for_results() -> None:
    """gloo reports its connections on file descriptor 1; from now on that is stderr's file.

    What is printed in Python goes to where it went before.
    """
    sys.stdout.flush()
    results = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = open(
        results,
        "w",
        buffering=1 if os.isatty(results) else -1,
        encoding=sys.stdout.encoding,
        errors=sys.stdout.errors,
    )


def join(**place: str | int) -> None:
    """Joins the other processes, as arguments of `jax.distributed.initialize`, or a launcher, say.

    Raises:
      ValueError, RuntimeError: they are not complete, or the processes do not meet.
    """
    # CPU processes have no other way to communicate; other platforms do not read this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        **place,
        heartbeat_timeout_seconds=TIMEOUT_SECONDS,
        shutdown_timeout_seconds=TIMEOUT_SECONDS,
    )


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


@contextlib.contextmanager
def silent_unless_first() -> Iterator[None]:
    """What is printed inside comes out of the first process only."""
    with open(os.devnull, "w") as nowhere:
        with contextlib.nullcontext() if is_first() else contextlib.redirect_stdout(nowhere):
            yield


def from_first(number: int | None) -> int | None:
    """The first process's number, 0 or more, or None, on all processes."""
    if jax.process_count() == 1:
        return number
    sent = multihost_utils.broadcast_one_to_all(np.int32(-1 if number is None else number))
    return None if sent < 0 else int(sent)


class StopRequest:
    """A request to stop, by SIGTERM or Ctrl-C, that waits for the end of a step.

    A context manager, in the main thread.  With several processes a SIGTERM to one of them counts
    for all, at the same step, and Ctrl-C ends them as ever.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._handlers = {}

    def __enter__(self) -> "StopRequest":
        if not jax.distributed.is_initialized():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        signal.signal(number, self._handlers[number])  # a second one ends the process at once

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; to be asked by all processes after each."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None


@contextlib.contextmanager
def lost_ones_noticed() -> Iterator[None]:
    """In a run of several processes, what fails on a device inside ends this one at once.

    Most often that is a collective which another process has left.  This one does not wait at its
    end for the others, as it would after an exception.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(
            f"another process of the run is gone, or a device failed ({_one_line(error)});"
            " start the same command again, on all processes",
            file=sys.stderr,
            flush=True,
        )
        os._exit(Interrupted.exit_code)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
