"""The time of one training step: this project, the plain dense model, and other systems.

    python -m benchmarks.step_time [--rounds=9] [--devices=8] [--output=step_time.json]
        [--wire=int8] [--peers] [--peer_python=PATH ...] [--nanodo=PATH]

Forward, backward, clipping and AdamW in float32 at the size in `workers.py`: caat_jax with S = 8
shards, on simulated CPU devices and on one device; the dense baseline on one device; and with
--peers the systems of `peers.py`.  Each system runs in its own process.  Every round measures one
step of each, in random order, so that other load on the machine affects all of them; ratios are
taken within a round.  Takes one and a half minutes on two idle cores, three with --peers.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from benchmarks import workers as sizes
from benchmarks.workers import Worker
from caat_jax import command_line
from caat_jax.config.resolve import FORWARD_WIRE_DTYPES
from caat_jax.errors import InputError

ROUNDS = flags.DEFINE_integer("rounds", 9, "How often each system is measured.", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 8, "Simulated CPU devices; divides 8.", lower_bound=2)
WIRES = flags.DEFINE_multi_enum(
    "wire", [], FORWARD_WIRE_DTYPES, "Also p = 0.5 with reductions of this type both ways."
)
OUTPUT = flags.DEFINE_string("output", "", "A JSON file to write; empty: none.")
PEERS = flags.DEFINE_bool("peers", False, "Measure transformers and nanodo too.")
PEER_PYTHONS = flags.DEFINE_multi_string(
    "peer_python", [sys.executable], "A Python that has the peers; the first one runs nanodo too."
)
NANODO = flags.DEFINE_string("nanodo", "", "A checkout of google-deepmind/nanodo.")

SYNC_FACTORS = (1.0, 0.5, 0.25)
DENSE = "dense baseline, 1 device"
# If the first losses differ by more (relative), the baseline is not the same model.
LOSS_TOLERANCE = 1e-4
# Threads of the previous step may spin this long before they sleep.
PAUSE_SECONDS = 0.05


class System(NamedTuple):
    """A system to measure; `base` names the system whose time its own is divided by."""

    name: str
    base: str
    command: list[str]


def main() -> None:
    if sizes.SHARDS % DEVICES.value:
        raise InputError(f"--devices={DEVICES.value} does not divide the {sizes.SHARDS} shards")
    running = _start(_systems())
    try:
        _check_same_model(running)
        milliseconds, processor = _measure(running)
    finally:
        for _, worker in running:
            worker.close()
    rows = _rows([system for system, _ in running], milliseconds, processor)
    _print_table(rows)
    if OUTPUT.value:
        result = {
            "machine": _machine(),
            "sizes": _sizes(),
            "rows": rows,
            "milliseconds": milliseconds,
            "processor_milliseconds": processor,
            "versions": {system.name: worker.first["versions"] for system, worker in running},
        }
        Path(OUTPUT.value).write_text(json.dumps(result, indent=1) + "\n")


def _systems() -> list[System]:
    ours = [sys.executable, "-m", "benchmarks.our_systems"]
    several = f"{DEVICES.value} devices"
    systems = []
    for devices in (DEVICES.value, 1):
        for p in SYNC_FACTORS:
            base = DENSE if (devices, p) == (1, 1.0) else _name(devices, 1.0)
            systems.append(System(_name(devices, p), base, [*ours, "caat", f"{devices}", f"{p}"]))
    for wire in WIRES.value:
        base = _name(DEVICES.value, 0.5)
        command = [*ours, "caat", f"{DEVICES.value}", "0.5", wire]
        systems.append(System(f"{base}, {wire}", base, command))
    systems.append(System(DENSE, DENSE, [*ours, "dense"]))
    if PEERS.value:
        base = _name(1, 1.0)
        for python in PEER_PYTHONS.value:
            for mode, attention in (("compile", "eager"), ("compile", "sdpa"), ("eager", "sdpa")):
                name = f"transformers, torch {_torch(python)}, {mode}, {attention}"
                command = [python, "-m", "benchmarks.peers", "torch", mode, attention]
                systems.append(System(name, base, command))
        if NANODO.value:
            checkout = str(Path(NANODO.value).expanduser().absolute())
            peer = [PEER_PYTHONS.value[0], "-m", "benchmarks.peers"]
            systems.append(System("nanodo, 1 device", base, [*peer, "nanodo", "1", checkout]))
            systems.append(
                System(
                    f"nanodo, {several}, FSDP",
                    _name(DEVICES.value, 1.0),
                    [*peer, "nanodo", f"{DEVICES.value}", checkout],
                )
            )
        else:
            print("nanodo: skipped: no --nanodo=CHECKOUT")
    return systems


def _torch(python: str) -> str:
    """The release of torch that a Python has, "missing" if none."""
    script = "from importlib import metadata; print(metadata.version('torch'))"
    found = subprocess.run([python, "-c", script], capture_output=True, text=True)
    return found.stdout.strip() or "missing"


def _name(devices: int, p: float) -> str:
    return f"caat_jax, {devices} device{'s' * (devices > 1)}, p = {p:g}"


def _start(systems: list[System]) -> list[tuple[System, Worker]]:
    """Starts the systems one after the other; prints and leaves out those that cannot run."""
    running = []
    for system in systems:
        worker = Worker(system.command)
        if reason := worker.first.get("skipped"):
            if "benchmarks.our_systems" in system.command:
                raise RuntimeError(f"{system.name}: {reason}")
            print(f"{system.name}: skipped: {reason}")
            worker.close()
        else:
            running.append((system, worker))
    return running


def _check_same_model(running: list[tuple[System, Worker]]) -> None:
    losses = {system.name: worker.first["first_loss"] for system, worker in running}
    dense = losses.pop(DENSE)
    for devices in (DEVICES.value, 1):
        loss = losses[_name(devices, 1.0)]
        if not abs(loss - dense) <= LOSS_TOLERANCE * abs(dense):
            raise RuntimeError(f"the dense baseline's loss is {dense}, caat_jax's is {loss}")


def _measure(
    running: list[tuple[System, Worker]],
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Each system's milliseconds by round: by the clock, and of processor time."""
    clock, processor = ({system.name: [] for system, _ in running} for _ in range(2))
    order = random.Random(0)
    for _ in range(ROUNDS.value):
        for system, worker in order.sample(running, len(running)):
            time.sleep(PAUSE_SECONDS)
            elapsed, used = worker.step()
            clock[system.name].append(elapsed)
            processor[system.name].append(used)
    return clock, processor


def _rows(
    systems: list[System], milliseconds: dict[str, list[float]], processor: dict[str, list[float]]
) -> list[dict]:
    tokens = sizes.BATCH * sizes.LENGTH
    rows = []
    for system in systems:
        times, base = milliseconds[system.name], milliseconds[system.base]
        median = statistics.median(times)
        rows.append(
            {
                "system": system.name,
                "median_ms": median,
                "min_ms": min(times),
                "processor_ms": statistics.median(processor[system.name]),
                "tokens_per_second": tokens / median * 1000,
                "ratio": statistics.median(a / b for a, b in zip(times, base, strict=True)),
                "base": system.base,
            }
        )
    return rows


def _print_table(rows: list[dict]) -> None:
    print(f"{_machine()}\n{_sizes()}")
    print(f"{ROUNDS.value} rounds; ratio: median over the rounds of the time divided by [base]'s")
    print("cpu ms: processor time over all cores, which other programs disturb less")
    print()
    print(
        f"{'':4} {'system':50} {'median ms':>9} {'min ms':>7} {'cpu ms':>7} {'tokens/s':>9}"
        f" {'ratio':>6}  base"
    )
    numbers = {row["system"]: f"[{number}]" for number, row in enumerate(rows, start=1)}
    for row in rows:
        print(
            f"{numbers[row['system']]:>4} {row['system']:50} {row['median_ms']:9.0f}"
            f" {row['min_ms']:7.0f} {row['processor_ms']:7.0f} {row['tokens_per_second']:9,.0f}"
            f" {row['ratio']:6.3f}  {numbers[row['base']]}"
        )


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"


def _sizes() -> str:
    return (
        f"float32, {sizes.LAYERS} layers, D = {sizes.EMBED_DIM}, {sizes.HEADS} heads,"
        f" MLP {sizes.MLP_DIM}, vocabulary {sizes.VOCAB_SIZE},"
        f" batch {sizes.BATCH} x {sizes.LENGTH}, S = {sizes.SHARDS}"
    )


if __name__ == "__main__":
    command_line.run(main)
