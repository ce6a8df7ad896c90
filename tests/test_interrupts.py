"""Ctrl-C and SIGTERM at any moment of any command: one line, exit code 75, no traceback."""

import ast
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caat_jax.devices.processes import StopRequest
from tests.command_line import (
    LONGEST_SECONDS,
    REPOSITORY,
    SMALL,
    TINY,
    flags_of,
    run_forked,
    start_forked,
    write_texts,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NEW = "new"  # what a command writes, in a folder of its own for each moment

COMMANDS = {
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.py", "caat_jax/**/*.py")
    for path in REPOSITORY.glob(pattern)
    if "    command_line.run(" in path.read_text()
}
INTERRUPTS = "from caat_jax import interrupts\ninterrupts.end_at_once()\n"
# What a command does when the signal arrives, after it has printed a line.
DOING = {
    "waits": "time.sleep(60)",
    "computes": "while True: pass",
    # Until the C function returns, the interpreter handles no signal.
    "is in compiled code": "import ctypes; [ctypes.CDLL(None).usleep(10**6) for _ in range(60)]",
    "catches what it can": "try: time.sleep(60)\nexcept BaseException: time.sleep(60)",
    "handles an end": "import atexit; atexit.register(time.sleep, 60); raise SystemExit",
}


def start(*command, folder=REPOSITORY):
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("doing", DOING.values(), ids=DOING)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_process_in_one_line(doing, number):
    script = "import time\nfrom caat_jax import interrupts\ninterrupts.end_at_once()\n"
    process = start("-c", script + f"print('doing', flush=True)\n{doing}")
    assert process.stdout.readline() == "doing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert (process.returncode, stderr) == (
        75,
        f"stopped by {name}; the same command starts again\n",
    )


def test_a_signal_after_all_is_done():
    """When the interpreter has taken down what it had of signals, and not yet ended."""
    ends = "class Ends:\n  def __del__(self): print('ends', flush=True); sleep(0.2)\n"
    keep = "import builtins; from time import sleep; builtins.kept = Ends()"
    process = start("-c", INTERRUPTS + ends + keep)
    assert process.stdout.readline() == "ends\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "")


STOP_REQUEST = """
import time
from caat_jax.devices.processes import StopRequest
with StopRequest() as request:
    print("inside", flush=True)
    while not request.reached():
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


def test_a_stop_request_waits_for_the_first_signal_alone():
    process = start("-c", INTERRUPTS + STOP_REQUEST)
    for said in ("inside\n", "asked\n"):
        assert process.stdout.readline() == said
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75
    assert stderr.splitlines()[1:] == ["stopped by Ctrl-C; the same command starts again"]


def test_the_second_signal_is_left_to_the_handler_before(capfd):
    """Which may return, while another thread ends the process."""
    received = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        with StopRequest() as request:
            signal.raise_signal(signal.SIGINT)
            assert request.reached() and not received
            signal.raise_signal(signal.SIGINT)
            assert received == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err.count("stopping as soon as") == 1


@pytest.mark.parametrize("script", sorted(COMMANDS))
def test_commands_are_ready_for_signals_before_their_imports(script):
    _, *body = ast.parse((REPOSITORY / script).read_text()).body
    assert [ast.unparse(node) for node in body[:2]] == [
        "from caat_jax import interrupts",
        "if __name__ == '__main__':\n    interrupts.end_at_once()",
    ]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Each command with arguments with which it works, by its script."""
    place = tmp_path_factory.mktemp("commands")
    texts = write_texts(place / "texts")
    fields = {**SMALL, "data.files": f"{texts}/*.txt", "data.cache_dir": "cache"}
    short = {"data.cache_dir": place / "cache", "model.sync_factor": 1}
    run, train = place / "run", [TINY, *flags_of(fields)]
    code, _, stderr = run_forked(
        ["train.py", TINY, *flags_of(fields | short), f"--workdir={run}"], place
    )
    assert code == 0, stderr
    small = [*train, "--config.model.vocab_size=264"]
    one_run = {f"run.{name}": value for name, value in (fields | {"train.steps": 2}).items()}
    one_run |= {"grid.seed": "(0,)", "grid.model.sync_factor": "(1.0,)"}
    one_run |= {"grid.model.tp_shards": "(4,)"}
    return {
        "train.py": [*train, f"--workdir={NEW}", "--config.train.steps=60"],
        "eval.py": [f"--workdir={run}"],
        "generate.py": [f"--workdir={run}", "--prompt=a", "--max_new_tokens=8"],
        "caat_jax/communication/__main__.py": small,
        "caat_jax/conversion/__main__.py": [
            f"--workdir={run}",
            f"--output={NEW}",
            "--sync_factor=0.5",
        ],
        "caat_jax/data/train_tokenizer.py": [
            *train,
            "--vocab_size=270",
            f"--output={NEW}.json",
        ],
        "caat_jax/huggingface/__main__.py": ["export", str(run), NEW],
        "caat_jax/plot/__main__.py": [str(run), f"--output={NEW}.png"],
        "caat_jax/sensitivity/__main__.py": [f"--workdir={run}", "--cut_to=0"],
        "caat_jax/step_time/__main__.py": [
            *small,
            "--config.compute.dtype=bfloat16",
            "--devices=8",
            "--chip=v5p",
            "--output=",
        ],
        "caat_jax/sweep/__main__.py": [
            f"--config={REPOSITORY / 'configs/sweep.py'}",
            f"--workdir={NEW}",
            *flags_of(one_run),
        ],
    }


def has_signals(process):
    """Whether a process handles them itself, and has not ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16)
    return all(caught >> (number - 1) & 1 for number in SIGNALS)


def assert_stopped_or_done(code, stderr, moment):
    """Whichever the command was faster to be."""
    assert code in (75, 0), (moment, code, stderr)
    assert "Traceback" not in stderr and "Fatal" not in stderr, (moment, stderr)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(COMMANDS))
def test_a_signal_while_it_imports(commands, script, tmp_path):
    """Five moments, so many seconds after it has taken the signals."""
    module = script.removesuffix("/__main__.py").removesuffix(".py").replace("/", ".")
    command = ["-m", module] if "/" in script else [REPOSITORY / script]
    for seconds, number in zip((0, 0.2, 0.5, 0.9, 1.4), itertools.cycle(SIGNALS)):
        process = start(*command, *commands[script], folder=tmp_path)
        while process.poll() is None and not has_signals(process.pid):
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        assert_stopped_or_done(process.returncode, stderr, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(COMMANDS))
def test_a_signal_while_it_works(commands, script, tmp_path):
    """Fifteen moments, evenly over what it does when all is imported."""
    began = time.monotonic()
    code, stderr = signalled(script, commands[script], tmp_path / "whole", LONGEST_SECONDS)
    assert code == 0, stderr
    whole = time.monotonic() - began
    for n, number in zip(range(15), itertools.cycle(SIGNALS)):
        seconds = (n + 0.5) / 15 * whole
        code, stderr = signalled(script, commands[script], tmp_path / str(n), seconds, number)
        assert_stopped_or_done(code, stderr, seconds)


def signalled(script, arguments, folder, seconds, number=signal.SIGKILL):
    """Exit code and stderr of a command that is sent a signal so long after it has taken them."""
    folder.mkdir()
    outputs = [folder / "stdout", folder / "stderr"]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    process = start_forked([script, *arguments], folder, outputs, environment, compiled=False)
    while process.is_alive() and not has_signals(process.pid):
        time.sleep(0.005)
    process.join(seconds)
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):  # it ends at this moment
            os.kill(process.pid, number)
        process.join(LONGEST_SECONDS)
    return process.exitcode, outputs[1].read_text()
