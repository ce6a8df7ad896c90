"""Worker processes that run one training step when asked and report how long it took.

Every system of a comparison runs in its own process, with its own Python, number of simulated
devices and memory.  An idle worker waits for a line on its standard input and uses no processor, so
that systems can be measured in turn.  This module uses the standard library only, since the peers'
Python need not have this project's dependencies.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# The model and batch of every system, float32.
LAYERS = 4
EMBED_DIM = 256
HEADS = 8
MLP_DIM = 768
VOCAB_SIZE = 512
BATCH = 16
LENGTH = 256
SHARDS = 8
# Shared by all AdamW configurations; the values do not influence the time.
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


class Worker:
    """A running system, seen from the process that measures it."""

    def __init__(self, command: list[str], root: Path = ROOT):
        """Starts a worker, and returns when it has compiled and warmed up."""
        with tempfile.TemporaryFile("w+") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=root,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            line = self._process.stdout.readline()
            if line:
                self.first: dict[str, Any] = json.loads(line)
            else:
                errors.seek(0)
                said = errors.read().strip().splitlines() or ["no output"]
                self.first = {"skipped": f"ended with code {self._process.wait()}: {said[-1]}"}

    def step(self) -> tuple[float, float]:
        """Runs a step: milliseconds by the clock, and of processor time over all threads."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with code {self._process.wait()}")
        return tuple(json.loads(line))

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def serve(build: Callable[[], tuple[Callable[[], float], str]]) -> None:
    """Runs a worker: reports what was built, then runs one step for every line read.

    Args:
      build: returns (step, versions); `step()` runs one whole training step, waits for it and
        returns its loss.
    """
    # Replies go to what was standard output; whatever libraries print goes to standard error.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        step, versions = build()
    except ImportError as error:
        print(json.dumps({"skipped": f"no {error.name}"}), file=replies)
        return
    losses = [step() for _ in range(3)]
    print(json.dumps({"first_loss": losses[0], "versions": versions}), file=replies)
    for _ in sys.stdin:
        begin, processor_begin = time.perf_counter(), time.process_time()
        step()
        seconds = time.perf_counter() - begin, time.process_time() - processor_begin
        print(json.dumps([1000 * s for s in seconds]), file=replies)
