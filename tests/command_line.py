"""Commands as users run them, most of them without the seconds that their imports take.

A command runs in a process forked from one that has imported everything and done nothing yet
(`multiprocessing`'s fork server).
"""

import atexit
import contextlib
import functools
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import pytest
from absl import flags

from caat_jax import command_line, interrupts
from caat_jax.devices import processes

REPOSITORY = Path(command_line.__file__).parent.parent
TINY = f"--config={REPOSITORY / 'configs/tiny.py'}"
# A model that is cheap to run, on the one CPU that is there.
SMALL = {
    "model.layers": 1,
    "model.embed_dim": 16,
    "model.mlp_dim": 16,
    "mesh.simulated_devices": 0,
    "data.sequence_length": 16,
    "data.holdout_every": 2,
    "optimizer.warmup_steps": 0,
    "train.steps": 1,
    "train.global_batch": 2,
}
# No command of the tests takes nearly as long, on a busy machine either.
LONGEST_SECONDS = 300

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    [
        "caat_jax.command_line",
        "caat_jax.training.loop",
        "caat_jax.training.tensorboard",
        "caat_jax.evaluation.report",
        "caat_jax.inference.text",
        "caat_jax.step_time.report",
    ]
)


def start_forked(command, folder, outputs, environment=None, constants=None, compiled=True):
    """The process of a script and its arguments, run in `folder`, its ~ too.

    `outputs` are the files for its stdout and stderr, `environment` variables to set, `constants`
    values by the names of what they replace, such as "caat_jax.devices.processes.TIMEOUT_SECONDS";
    `compiled`: it takes what another of these processes has compiled.
    """
    settings = environment or {}, constants or {}, _compilation_cache().name if compiled else None
    arguments = (command, folder, outputs, *settings)
    process = FORK_SERVER.Process(target=_run_script, args=arguments)
    process.start()
    return process


def run_forked(command, folder, environment=None):
    """Exit code, stdout and stderr of a script and its arguments, run in `folder`, its ~ too."""
    outputs = [folder / "stdout", folder / "stderr"]
    for path in outputs:
        path.write_text("")
    process = start_forked(command, folder, outputs, environment)
    process.join(LONGEST_SECONDS)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    stdout, stderr = (path.read_text() for path in outputs)
    assert not hangs, f"{command} has not ended after {LONGEST_SECONDS} s: {stderr}"
    return process.exitcode, stdout, stderr


@functools.cache
def _compilation_cache():
    """What several of these processes compile is compiled once."""
    return tempfile.TemporaryDirectory(prefix="caat_jax_compiled_by_tests_")


def _run_script(command, folder, outputs, environment, constants, compilation_cache):
    """In the forked process: nothing relative, or below ~, is written to the repository."""
    jax.config.update("jax_compilation_cache_dir", compilation_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    for name, value in constants.items():
        pytest.MonkeyPatch().setattr(name, value)
    os.chdir(folder)
    os.environ.update({"HOME": str(folder), **environment})
    sys.argv = list(command)
    for path, stream in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    try:
        runpy.run_path(str(REPOSITORY / command[0]), run_name="__main__")
    finally:
        # An interpreter's last act, in which JAX waits for the run's other processes;
        # `multiprocessing` leaves it out.
        atexit._run_exitfuncs()


def run_here(command, folder, simulate_devices=lambda mesh: None):
    """As `run_forked`, in this process, with the devices that are there: for what compiles nothing.

    It costs a hundredth, but what a script leaves behind stays: settings of JAX and of loggers.
    """
    hidden = _hide_flags_of_commands()
    defined = set(flags.FLAGS)
    outputs = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(outputs[0]),
        contextlib.redirect_stderr(outputs[1]),
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as patch,
    ):
        warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)  # ml_collections
        patch.setenv("HOME", str(folder))
        patch.setattr(sys, "argv", list(command))
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setattr(command_line, "simulate_devices", simulate_devices)
        patch.setattr(processes, "join", _join_none)
        patch.setattr(interrupts, "end_at_once", lambda: None)
        try:
            runpy.run_path(str(REPOSITORY / command[0]), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            _delete_flags(command[0], defined)
            for module, flag in hidden:
                flags.FLAGS[flag.name] = flag
                flags.FLAGS.register_flag_by_module(module, flag)
            flags.FLAGS.unparse_flags()
    return code, *(output.getvalue() for output in outputs)


def _hide_flags_of_commands():
    """Takes away the flags of commands that a test has imported: another may have the same."""
    hidden = [
        (module, flag)
        for module, found in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith("caat_jax.") and module.endswith(".__main__")
        for flag in found
    ]
    for _, flag in hidden:
        delattr(flags.FLAGS, flag.name)
    return hidden


def _delete_flags(script, kept):
    """Those that a script defined; not those of libraries which it was the first to import."""
    scripts = (script, str(REPOSITORY / script))
    for module, found in list(flags.FLAGS.flags_by_module_dict().items()):
        for name in {flag.name for flag in found} - kept:
            if name.startswith("config.") or module in scripts or module.startswith("caat_jax"):
                delattr(flags.FLAGS, name)


def _join_none(**place):
    """What JAX says where no launcher started the process."""
    raise ValueError("coordinator_address should be defined.")


def run_as_users_do(*command):
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def assert_refused(result, *said):
    """Exit code 2 and one line on stderr, with every part of `said` in it."""
    code, stdout, stderr = result
    assert (code, stdout) == (2, ""), stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), (
        stderr
    )
    assert [part for part in said if part not in stderr] == [], stderr


def flags_of(fields):
    return [f"--config.{name}={value}" for name, value in fields.items()]


def write_texts(folder):
    """A small corpus, of which some documents are held out where `data.holdout_every` is 2."""
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"text number {number} is this one")
    return folder
