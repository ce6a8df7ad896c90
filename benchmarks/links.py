"""What partial synchronisation gains on links of limited bandwidth: training, prefill, decode.

    python -m benchmarks.links [--hosts=4] [--rate=100mbit --rate=400mbit] [--p=1 --p=0.5 --p=0.25]
        [--workload=train --workload=prefill --workload=decode] [--rounds=7] [--output=links]
        [--peer_python=PATH] [--no_baselines]

Hosts are network namespaces of this machine (`network.py`) with one process each, and links of the
given rate in both directions; S = M = the number of hosts.  Every system is measured without a
limit and at every rate, once a round, in a random order.  Writes OUTPUT.json, OUTPUT.csv and
OUTPUT.png.

The bound: at a rate, a system needs at least its time without a limit and the time that its bytes
take on the link, T(p) >= T(p; no limit) + bytes(p) / rate.  The bytes are counted in the program
(`caat_jax.operations`); "reached" is the measured speed-up over p = 1 as a part of the bound's.
"""

import csv
import dataclasses
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import tqdm
from absl import flags

from benchmarks import network
from benchmarks.link_workers import Sizes
from benchmarks.workers import ROOT
from caat_jax import command_line
from caat_jax.errors import InputError

WORKLOADS = ("train", "prefill", "decode")

HOSTS = flags.DEFINE_integer("hosts", 4, "How many; also S and M.", 2)
RATES = flags.DEFINE_multi_string(
    "rate", ["100mbit", "400mbit"], "Of each link and direction, as tc writes it: 100mbit, 2gbit."
)
FACTORS = flags.DEFINE_multi_float("p", [1.0, 0.5, 0.25], "Synchronisation factors; 1 is added.")
WORKLOAD = flags.DEFINE_multi_enum("workload", WORKLOADS, WORKLOADS, "What to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each is measured at each rate.", 1)
OUTPUT = flags.DEFINE_string("output", "links", "Where to write, without .json, .csv, .png.")
PEER_PYTHON = flags.DEFINE_string(
    "peer_python", "", "A Python with torch, transformers and accelerate, to measure them too."
)
NO_BASELINES = flags.DEFINE_bool("no_baselines", False, "Leave out the dense model under jit.")
LAYERS = flags.DEFINE_integer("layers", 4, "Of the model.", 1)
EMBED_DIM = flags.DEFINE_integer("embed_dim", 512, "Of the model; the MLP has three times that.", 8)
TRAIN_BATCH = flags.DEFINE_integer("train_batch", 4, "Sequences of a training step.", 1)
LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a training sequence.", 8)
PROMPTS = flags.DEFINE_list("prompts", ["1", "64"], "How many prompts at once; several cases.")
PROMPT_LENGTH = flags.DEFINE_integer("prompt_length", 64, "Tokens of a prompt.", 1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 17, "Of each prompt.", 2)

NO_LIMIT = "none"
FIRST_PORT = 12345
DENSE = ("dense jit, residual replicated", "dense jit, residual by sequence")
TORCH = "transformers, torch, tp_plan"


def main() -> None:
    sizes, rates, factors = _sizes(), _rates(), sorted({1.0, *FACTORS.value}, reverse=True)
    if bad := [p for p in factors if not 0 <= p <= 1]:
        raise InputError(f"--p={bad[0]} must be in [0, 1]")
    network.isolate("benchmarks.links")
    hosts = network.Hosts(HOSTS.value)
    systems = []
    try:
        for name, kind, variant, python in _system_names(factors):
            print(f"starting {name}", file=sys.stderr)
            port = FIRST_PORT + len(systems)
            systems.append(System(name, hosts, python, kind, variant, port, sizes))
        times: Times = {}
        for rate, megabits in rates.items():
            hosts.set_rate(megabits)
            _measure(times, rate, systems)
            rows = _rows(times, systems, rates)
            _print([row for row in rows if row["rate"] == rate])
            _write(rows, systems, sizes)  # what there is: a run may be cut off
    finally:
        for system in systems:
            system.close()


def _sizes() -> Sizes:
    if EMBED_DIM.value % (8 * HOSTS.value):
        raise InputError(
            f"--embed_dim={EMBED_DIM.value} must be a multiple of 8 times --hosts={HOSTS.value}"
        )
    if not all(text.isdecimal() and int(text) for text in PROMPTS.value):
        raise InputError(f"--prompts={','.join(PROMPTS.value)} must be numbers above 0")
    return Sizes(
        layers=LAYERS.value,
        embed_dim=EMBED_DIM.value,
        heads=2 * HOSTS.value,
        mlp_dim=3 * EMBED_DIM.value,
        vocab_size=512,
        train_batch=TRAIN_BATCH.value,
        train_length=LENGTH.value,
        prompts=tuple(map(int, PROMPTS.value)),
        prompt_length=PROMPT_LENGTH.value,
        new_tokens=NEW_TOKENS.value,
    )


def _rates() -> dict[str, float | None]:
    """By name: Mbit/s, and first of all no limit."""
    rates: dict[str, float | None] = {NO_LIMIT: None}
    for text in RATES.value:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(mbit|gbit)", text)
        if not match or not float(match[1]):
            raise InputError(f"--rate={text} must be a number with mbit or gbit, such as 100mbit")
        rates[text] = float(match[1]) * (1000 if match[2] == "gbit" else 1)
    return rates


def _system_names(factors: list[float]) -> list[tuple[str, str, str, str]]:
    """Name, kind and variant for the worker, Python."""
    systems = [(f"caat_jax, p = {p:g}", "ours", f"{p}", sys.executable) for p in factors]
    if not NO_BASELINES.value:
        for name, variant in zip(DENSE, ("replicated", "sequence"), strict=True):
            systems.append((name, "dense", variant, sys.executable))
    if PEER_PYTHON.value:
        systems.append((TORCH, "torch", "-", PEER_PYTHON.value))
    return systems


class System:
    """One process on each host, which work together when asked."""

    def __init__(
        self,
        name: str,
        hosts: network.Hosts,
        python: str,
        kind: str,
        variant: str,
        port: int,
        sizes: Sizes,
    ):
        """Starts them; returns when they have compiled."""
        self.name, self.p = name, float(variant) if kind == "ours" else None
        number = len(hosts.names)
        self._errors = [tempfile.TemporaryFile("w+") for _ in range(number)]
        self._processes = []
        for host in range(number):
            command = [python, "-m", "benchmarks.link_workers", kind, variant]
            command += [f"{number}", f"{host}", f"{port}", json.dumps(dataclasses.asdict(sizes))]
            self._processes.append(
                subprocess.Popen(
                    hosts.command(host, command),
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors[host],
                    text=True,
                )
            )
        about = self._answers()[0]
        self.workloads: list[str] = about["workloads"]
        self.versions: str = about["versions"]
        self.wire_bytes: dict[str, float] = about.get("wire_bytes", {})

    def run(self, workload: str) -> dict[str, float]:
        """Milliseconds of each of its parts, on the slowest host."""
        for process in self._processes:
            process.stdin.write(workload + "\n")
            process.stdin.flush()
        answers = self._answers()
        return {part: max(answer[part] for answer in answers) for part in answers[0]}

    def _answers(self) -> list[dict[str, Any]]:
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):
            for line, errors in zip(lines, self._errors, strict=True):
                if not line:
                    errors.seek(0)
                    print(errors.read(), file=sys.stderr)
            raise InputError(f"a worker of {self.name} ended; what it said is above")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.wait()


Times = dict[tuple[str, str, str], list[float]]  # (rate, system, part) -> milliseconds


def _measure(times: Times, rate: str, systems: list[System]) -> None:
    """Adds those at the rate that the links have now."""
    asked = []
    for system in systems:
        for workload in system.workloads:
            trains = workload == "train"
            if ("train" in WORKLOAD.value) if trains else (set(WORKLOAD.value) - {"train"}):
                asked.append((system, workload))
    order = random.Random(rate)
    with tqdm.tqdm(total=(ROUNDS.value + 1) * len(asked), disable=None, leave=False) as bar:
        for number in range(ROUNDS.value + 1):
            for system, workload in order.sample(asked, len(asked)):
                bar.set_description(f"{rate}, {system.name}, {workload}")
                for part, milliseconds in system.run(workload).items():
                    # The first round fills the shapers' buckets and TCP's windows.
                    if number and part.split()[0] in WORKLOAD.value:
                        times.setdefault((rate, system.name, part), []).append(milliseconds)
                bar.update()


def _rows(
    times: Times, systems: list[System], rates: dict[str, float | None]
) -> list[dict[str, Any]]:
    """One for each rate, part of a workload and system."""
    base = next(system for system in systems if system.p == 1)
    rows = []
    for (rate, name, part), milliseconds in times.items():
        system = next(system for system in systems if system.name == name)
        base_times = times[rate, base.name, part]
        quartiles = statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else [0, 0, 0]
        row = {
            "part": part,
            "rate": rate,
            "system": name,
            "p": system.p,
            "ms": statistics.median(milliseconds),
            "ms_quartiles": [quartiles[0], quartiles[2]],
            "speed_up": statistics.median(
                b / ms for b, ms in zip(base_times, milliseconds, strict=True)
            ),
        }
        if system.p is not None:
            compute = statistics.median(times[NO_LIMIT, name, part])
            row["wire_bytes"] = system.wire_bytes[part]
            row["communication_to_compute"] = row["ms"] / compute - 1
            bounds = {
                s.name: statistics.median(times[NO_LIMIT, s.name, part])
                + _link_milliseconds(s.wire_bytes[part], rates[rate])
                for s in (system, base)
            }
            row["bound_ms"] = bounds[name]
            row["bound_speed_up"] = bounds[base.name] / bounds[name]
            row["reached"] = row["speed_up"] / row["bound_speed_up"]
        rows.append(row)
    return sorted(rows, key=lambda row: _part_order(row["part"]))


def _link_milliseconds(wire_bytes: float, megabits: float | None) -> float:
    return 0.0 if megabits is None else 1000 * wire_bytes * 8 / (megabits * 1e6)


def _print(rows: list[dict[str, Any]]) -> None:
    last = None
    for row in rows:
        if (row["part"], row["rate"]) != last:
            last = row["part"], row["rate"]
            print(f"\n{row['part']}, link {row['rate']}")
            print(f"{'':34} {'ms':>9} {'speed-up':>8} {'bound':>6} {'reached':>7} {'comm/comp':>9}")
        print(f"{row['system']:34} {row['ms']:9.1f} {row['speed_up']:8.2f}", end="")
        if row["p"] is not None:
            print(
                f" {row['bound_speed_up']:6.2f} {row['reached']:7.2f}"
                f" {row['communication_to_compute']:9.2f}",
                end="",
            )
        print()


def _write(rows: list[dict[str, Any]], systems: list[System], sizes: Sizes) -> None:
    output = Path(OUTPUT.value)
    about = {
        "hosts": HOSTS.value,
        "rounds": ROUNDS.value,
        "sizes": dataclasses.asdict(sizes),
        "versions": {system.name: system.versions for system in systems},
    }
    with_suffix = {suffix: output.with_name(output.name + suffix) for suffix in _SUFFIXES}
    with_suffix[".json"].write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    with with_suffix[".csv"].open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    _plot(rows, with_suffix[".png"])
    print(f"\nwritten: {', '.join(map(str, with_suffix.values()))}", flush=True)


_SUFFIXES = (".json", ".csv", ".png")


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over p = 1 against the rate of the link, with the bound."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = sorted({row["part"] for row in rows}, key=_part_order)
    rates = _rates()
    measured = {row["rate"] for row in rows}
    ticks = sorted(measured, key=lambda rate: rates[rate] or float("inf"))
    figure, axes = pyplot.subplots(1, len(parts), figsize=(3.2 * len(parts), 3.4), sharey=True)
    for axis, part in zip([axes] if len(parts) == 1 else axes, parts, strict=True):
        for p in sorted({row["p"] for row in rows if row["p"] is not None}, reverse=True):
            chosen = {row["rate"]: row for row in rows if (row["part"], row["p"]) == (part, p)}
            gains = [chosen[rate]["speed_up"] for rate in ticks]
            (line,) = axis.plot(ticks, gains, "o-", label=f"p = {p:g}")
            bound = [chosen[rate]["bound_speed_up"] for rate in ticks]
            axis.plot(ticks, bound, ":", color=line.get_color())
        axis.set_title(part, fontsize=10)
        axis.set_xlabel("link")
        axis.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel("times as fast as p = 1")
    first.plot([], [], ":", color="gray", label="bound")
    first.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _part_order(part: str) -> tuple[int, int]:
    """As in WORKLOADS, then by batch."""
    name, *batch = part.split()
    return WORKLOADS.index(name), int(batch[0]) if batch else 0


if __name__ == "__main__":
    command_line.run(main)
