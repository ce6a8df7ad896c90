"""Short runs of a very small model: its configuration and corpus, train.py started, metrics read.

`Run` is train.py in a process of its own, which tests signal while it runs.
"""

import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.command_line import TINY, flags_of, start_forked

PYTHON = shlex.quote(sys.executable)
WORDS = "the shard sums shared channels and keeps private ones while layers add their part".split()
STEPS, CHECKPOINT_EVERY, BATCH, LENGTH, HOLDOUT = 20, 5, 8, 32, 3

SMALL = {
    "model.layers": 2,
    "model.embed_dim": 32,
    "model.mlp_dim": 64,
    "model.sync_factor": 0.5,
    "data.sequence_length": LENGTH,
    "data.holdout_every": HOLDOUT,
    "optimizer.peak_learning_rate": 1e-2,
    "optimizer.final_learning_rate": 1e-3,
    "optimizer.warmup_steps": 4,
    "optimizer.decay_steps": STEPS,
    "train.steps": STEPS,
    "train.global_batch": BATCH,
    "train.eval_every": 10,
    "train.eval_sequences": -1,
    "train.checkpoint_every": CHECKPOINT_EVERY,
}

# What gloo writes piece by piece, several threads at once: lines end anywhere.
_GLOO = re.compile(
    r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\s|\d"
)


def write_texts(folder: Path, texts: list[str]) -> None:
    """One file a text."""
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_text(text)


def corpus(folder: Path) -> dict[str, str]:
    """Writes twelve texts; the fields that make a configuration use them."""
    random = np.random.default_rng(0)
    write_texts(folder / "texts", [" ".join(random.choice(WORDS, 60)) for _ in range(12)])
    return {"data.files": f"{folder}/texts/*.txt", "data.cache_dir": f"{folder}/cache"}


class Run:
    """train.py with `SMALL` and these fields, on `devices` simulated ones, in its own process."""

    def __init__(
        self,
        workdir: Path,
        fields: dict,
        *flags: str,
        devices: int = 8,
        environment: dict[str, str] | None = None,
        constants: dict[str, Any] | None = None,
    ):
        fields = SMALL | {"mesh.simulated_devices": devices} | fields
        command = [
            "train.py",
            TINY,
            f"--workdir={workdir}",
            *flags_of(fields),
            *flags,
        ]
        self.workdir = workdir
        workdir.parent.mkdir(exist_ok=True)
        self._output = workdir.with_name(f"{workdir.name}.{time.monotonic_ns()}.log")
        outputs = [self._output] * 2
        self._process = start_forked(command, workdir.parent, outputs, environment, constants)

    @property
    def output(self) -> str:
        """Of stdout and stderr, so far."""
        return self._output.read_text() if self._output.exists() else ""

    def said(self) -> list[str]:
        """The lines of the output that are this project's, not those of the CPU's transport."""
        return [line for line in self.output.splitlines() if _GLOO.sub("", line)]

    def signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Until something holds, or the process has ended."""
        end = time.monotonic() + seconds
        while not condition() and self._process.is_alive():
            assert time.monotonic() < end, self.output
            time.sleep(0.002)

    def wait(self, seconds: float = 240) -> int:
        """The exit code; the number of the signal that ended it, negative."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"did not end within {seconds} s; it said:\n{self.output}")
        return self._process.exitcode


def start_processes(
    number: int,
    workdir: Path,
    fields: dict,
    devices: int = 2,
    constants: dict[str, Any] | None = None,
) -> list[Run]:
    """One run of so many processes on this machine, with `devices` each."""
    return [
        Run(workdir, fields, *flags, devices=devices, constants=constants)
        for flags in processes_flags(number)
    ]


def processes_flags(number: int) -> list[list[str]]:
    """Of each process of a run of so many on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", f"--num_processes={number}"]
    return [[*flags, f"--process_id={process}"] for process in range(number)]


def lines_of(workdir: Path) -> list[dict]:
    """The metrics' lines; one that is being written, or was cut off, is left out."""
    *lines, _ = (workdir / "metrics.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines]


def series(workdir: Path, name: str) -> dict[int, float]:
    """One metric by step."""
    return {line["step"]: line[name] for line in lines_of(workdir) if name in line}


def last_step(workdir: Path) -> int:
    """The last one in the metrics; 0: there is none."""
    return lines_of(workdir)[-1]["step"] if has_metrics(workdir) else 0


def has_metrics(workdir: Path) -> bool:
    """Whether there is a line yet."""
    path = workdir / "metrics.jsonl"
    return path.exists() and b"\n" in path.read_bytes()


def checkpoint_steps(workdir: Path) -> list[int]:
    """Of the checkpoints that have got their final name."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
