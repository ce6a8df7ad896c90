"""The processes of one run: how they find each other, agree, and end.

JAX's distributed runtime connects them; see `jax.distributed.initialize`.  They tell each other
values through its key-value store, which needs no devices.  A process that is lost ends the others:
CPU processes notice when they next communicate, and any within `TIMEOUT_SECONDS`.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jaxlib
from absl import flags

# Private to JAX: `jax.process_index` would start the devices before their number is known, and the
# key-value store and the launchers that are recognised have no public names.
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from caat_jax.errors import InputError, Interrupted, Stop, about_file

TIMEOUT_SECONDS = 60

# What the first process does for all, such as comparing a checkpoint's files with their digests,
# may take hours; the runtime notices sooner when that process is gone.
_LONGEST_WAIT_MS = 24 * 3600 * 1000

_FLAGS = ("coordinator_address", "num_processes", "process_id")

# By launcher: the number of processes, and what JAX finds the others by.
_LAUNCHERS = {
    "SLURM_NTASKS": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
    "OMPI_COMM_WORLD_SIZE": (
        "OMPI_MCA_orte_hnp_uri",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
}

# What errors say that come from another process being gone, on any transport.
_PEER_LOST = re.compile(
    "gloo|nccl|connection|peer|socket|heartbeat|coordination|barrier"
    "|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED",
    re.IGNORECASE,
)

# Number the calls of `on_first` and `check_same`, which are the same in all processes.
_firsts, _sames = itertools.count(), itertools.count()


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
      InputError: the flags are not complete or do not fit, the processes do not meet, or one of
        them was started with another command or another version.
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
    if not given and _is_alone():
        return
    try:
        join(**given)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes did not find each other ({_one_line(error)});"
            " --num_processes=1 runs this one alone"
        ) from error
    _keep_stdout_for_results()
    check_same(_command() | _versions())


def _is_alone() -> bool:
    """Whether no launcher started this process as one of several.

    Raises:
      InputError: one did, but not all variables that it sets are there.
    """
    for number, others in _LAUNCHERS.items():
        missing = [name for name in others if name not in os.environ]
        if os.environ.get(number, "1") == "1" or len(missing) == len(others):
            continue
        if missing:
            raise InputError(
                f"{number}={os.environ[number]}, but {', '.join(missing)} missing: start the"
                " processes by the launcher, or this one alone with --num_processes=1"
            )
        return False
    found = (
        kind.is_env_present()
        for kind in clusters.ClusterEnv._cluster_types
        if not kind.opt_in_only_method
    )
    return not any(found) and "JAX_COORDINATOR_ADDRESS" not in os.environ


def _command() -> dict[str, Any]:
    """All flags and fields of the configuration, but for what tells processes apart."""
    values = {k: v for k, v in flags.FLAGS.flag_values_dict().items() if k not in _FLAGS}
    config = values.pop("config", None)
    fields = {} if config is None else _flattened("config", config)
    return {f"--{name}": value for name, value in (values | fields).items()}


def _flattened(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        key = f"{name}.{key}"
        flat |= _flattened(key, value) if isinstance(value, Mapping) else {key: value}
    return flat


def _versions() -> dict[str, str]:
    sources = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    return {
        "the version of jax": jax.__version__,
        "the version of jaxlib": jaxlib.__version__,
        "the digest of caat_jax": sources.hexdigest(),
    }


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


def number() -> int:
    """Of the run's processes."""
    return distributed.global_state.num_processes


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return distributed.global_state.process_id == 0


@contextlib.contextmanager
def silent_unless_first() -> Iterator[None]:
    """What is printed inside comes out of the first process only."""
    with open(os.devnull, "w") as nowhere:
        with contextlib.nullcontext() if is_first() else contextlib.redirect_stdout(nowhere):
            yield


def on_first(function: Callable[[], Any], name: str = "") -> Any:
    """Calls a function in the first process; all get its JSON-able result, or raise its `Stop`.

    Args:
      function: what to call.
      name: identifies the call; without one, all processes make such calls in the same order, in
        the main thread.
    """
    key = f"caat_jax/first/{name or next(_firsts)}"
    if number() == 1:
        return function()
    return _sent(key, function) if is_first() else _received(key)


def tell_first(function: Callable[[], Any], name: str) -> None:
    """Calls a function, and sends its JSON-able result, or its `Stop`, to the first process."""
    _sent(f"caat_jax/told/{name}/{distributed.global_state.process_id}", function)


def told(name: str) -> Iterator[Any]:
    """What each of the others has told this one, the first; raises the `Stop` of one that had one.

    To be called where `on_first` calls a function, whose end they wait for.
    """
    for process in range(1, number()):
        yield _received(f"caat_jax/told/{name}/{process}")


def check_same(values: Mapping[str, Any]) -> None:
    """Refuses processes that would not do the same; called by all.

    Args:
      values: what must be equal, by name.

    Raises:
      InputError: in all processes; it names what differs and both values.  Or another process has
        stopped: its `Stop`.
    """
    key = f"caat_jax/same/{next(_sames)}"
    texts = {name: repr(value) for name, value in values.items()}

    def compare() -> None:
        for process in range(1, number()):
            others = _received(f"{key}/{process}")
            for name, text in texts.items():
                if others.get(name) != text:
                    raise InputError(
                        f"{name} is {text} in process 0 and {others.get(name)} in process"
                        f" {process}; start all processes with the same command, code and data"
                    )

    if not is_first():
        _send(f"{key}/{distributed.global_state.process_id}", texts)
    on_first(compare)


def announce(stop: Stop) -> None:
    """Tells the processes that wait for this one, or will, that it stops, and why."""
    if number() == 1:
        return
    key = f"caat_jax/first/{next(_firsts)}"
    if not is_first():
        key = f"caat_jax/same/{next(_sames)}/{distributed.global_state.process_id}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others may be gone
        _send(key, stop)


def _sent(key: str, function: Callable[[], Any]) -> Any:
    try:
        value = function()
    except Stop as stop:
        _send(key, stop)
        raise
    except OSError as error:
        stop = InputError(about_file(error))
        _send(key, stop)
        raise stop from error
    _send(key, value)
    return value


def _send(key: str, value: Any) -> None:
    if isinstance(value, Stop):
        content = {"stop": type(value).__name__, "message": str(value)}
    else:
        content = {"value": value}
    distributed.global_state.client.key_value_set(key, json.dumps(content))


def _received(key: str) -> Any:
    client = distributed.global_state.client
    content = json.loads(client.blocking_key_value_get(key, _LONGEST_WAIT_MS))
    if "stop" in content:
        kinds = {kind.__name__: kind for kind in Stop.__subclasses__()}
        raise kinds[content["stop"]](content["message"])
    return content["value"]


class StopRequest:
    """A request to stop, by SIGTERM or Ctrl-C, that waits for the end of a step.

    A context manager, in the main thread.  With several processes a SIGTERM to one of them counts
    for all, at the same step, and Ctrl-C ends them as ever.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._handlers = {}
        self._asked = 0

    def __enter__(self) -> "StopRequest":
        if not jax.distributed.is_initialized():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:  # a second one ends the process at once
            signal.signal(number, self._handlers[number])
            signal.raise_signal(number)
            return  # `interrupts` may be ending it in its own thread
        self._signal = signal.Signals(number).name
        line = f"{self._signal}: stopping as soon as all is saved; a second one stops at once\n"
        os.write(2, line.encode())  # the signal may have come in the middle of a `print`

    def reached(self) -> bool:
        """Whether to stop now; to be asked by all processes after each step."""
        if jax.distributed.is_initialized():
            # In this thread alone: a call with an older number, while a notice is on its way, would
            # let the processes agree on one that one of them has passed.  Not the step's number:
            # after a notice before the first call they agree on 1, which a resumed run would never
            # reach.
            self._asked += 1
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._signal is not None


@contextlib.contextmanager
def exit_when_peer_lost() -> Iterator[None]:
    """In a run of several processes, what fails on a device inside ends this one at once.

    Most often that is a collective which another process has left.  This one does not wait at its
    end for the others, as it would after an exception.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if number() == 1:
            raise
        if not _PEER_LOST.search(str(error)):
            traceback.print_exc()
            exit_now(1)
        print(
            f"another process of the run is gone ({_one_line(error)}); start the same command"
            " again, on all processes",
            file=sys.stderr,
        )
        exit_now(Interrupted.exit_code)


def exit_now(code: int) -> None:
    """Ends this process without waiting for the run's others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
