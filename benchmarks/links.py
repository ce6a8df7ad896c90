"""What partial synchronisation gains on links of limited bandwidth: training, prefill, decode.

    python -m benchmarks.links [--hosts=4] [--rate=25mbit --rate=400mbit] [--p=1 --p=0.5 --p=0.25]
        [--also=1:bfloat16 --also=0.5:int8] [--plan="12x(0,1)"] [--latency=1]
        [--workload=train --workload=prefill --workload=decode] [--rounds=5] [--output=links]
        [--generate=1x64+17,64x8+9] [--peer_python=PATH] [--no_baselines]

Hosts are network namespaces of this machine (`network.py`), whose links have the given rate in both
directions; S = M = the number of hosts.  On each host one process runs every p, in random order,
because even identical processes differ by 5 % in how they share the cores and the network.  Every
system is measured without a limit and at every rate, once per round; `--rate=none` measures only
without a limit.  Then each of this project's workloads runs once more under JAX's profiler.  Writes
OUTPUT.json, OUTPUT.csv, OUTPUT.md and OUTPUT.png.

The bound: at a given rate, a system needs at least its time without a limit plus the time that its
bytes take on the link, T(p) >= T(p; no limit) + bytes(p) / rate.  The bytes are counted in the
program (`caat_jax.communication.traced_programs`); "reached" is the measured speed-up over p = 1 as
a fraction of the bound's.

With --latency, every frame arrives so much later.  "Predicted" times are those of
`caat_jax.step_time`, with one hop's time as measured with an all-reduce of a few numbers.
"""

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tqdm
from absl import flags

from benchmarks import links_report, network
from benchmarks.link_sizes import Generation, Sizes, config_of
from benchmarks.link_workers import HOP
from benchmarks.links_report import NO_LIMIT, WORKLOADS, Measurements, workload_of
from benchmarks.workers import ROOT
from caat_jax import command_line
from caat_jax.config.resolve import FORWARD_WIRE_DTYPES
from caat_jax.errors import InputError
from caat_jax.step_time import model, own_chip
from caat_jax.step_time.model import Workload

HOSTS = flags.DEFINE_integer("hosts", 4, "Number of hosts; also S and M.", 2)
RATES = flags.DEFINE_multi_string(
    "rate",
    ["25mbit", "100mbit", "400mbit"],
    "Rate of each link in each direction, as tc writes it: 100mbit, 2gbit; or none.",
)
FACTORS = flags.DEFINE_multi_float("p", [1.0, 0.5, 0.25], "Synchronisation factors; 1 is added.")
ALSO = flags.DEFINE_multi_string(
    "also", [], "Further systems, p:T with reductions of type T in both directions: 0.5:int8."
)
PLANS = flags.DEFINE_multi_string(
    "plan",
    [],
    "Further systems: layers x (attention's factor, the MLP's), such as 2x(1,1)+10x(0,0.5); a turn"
    " of several layers is repeated as a whole: 6x(1,1)(0,0).",
)
LATENCY = flags.DEFINE_float("latency", 0.0, "Milliseconds from one host to another.", 0.0)
FLOPS = flags.DEFINE_float("flops", 2e10, "A host's FLOP/s, for predictions.", 1.0)
MEMORY_RATE = flags.DEFINE_float("memory_rate", 5e9, "A host's bytes/s, for predictions.", 1.0)
WORKLOAD = flags.DEFINE_multi_enum("workload", WORKLOADS, WORKLOADS, "What to measure.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each is measured at each rate.", 1)
OUTPUT = flags.DEFINE_string("output", "links", "Where to write, without .json, .csv, .png.")
PEER_PYTHON = flags.DEFINE_string(
    "peer_python", "", "A Python with torch, transformers and accelerate, to measure them too."
)
NO_BASELINES = flags.DEFINE_bool("no_baselines", False, "Leave out the dense model under jit.")
LAYERS = flags.DEFINE_integer("layers", 12, "Layers of the model.", 1)
SCAN_LAYERS = flags.DEFINE_bool("scan_layers", False, "Compile equal layers as one loop: sooner.")
EMBED_DIM = flags.DEFINE_integer("embed_dim", 256, "Width; the MLP is three times as wide.", 8)
TRAIN_BATCH = flags.DEFINE_integer("train_batch", 2, "Sequences in a training step.", 1)
LENGTH = flags.DEFINE_integer("length", 128, "Tokens in a training sequence.", 8)
GENERATE = flags.DEFINE_list(
    "generate",
    ["1x64+17", "64x8+9"],
    "Cases: prompts in a batch x tokens in each + new tokens for each.  The generator pads prompts"
    " to 8 * 2**k tokens and makes 1 + 8 k new ones; other numbers are slower than necessary.",
)

FIRST_PORT = 12345
DENSE = {
    "replicated": "dense jit, residual replicated",
    "sequence": "dense jit, residual by sequence",
}
TORCH = "transformers, torch, tp_plan"


def main() -> None:
    sizes, rates, factors = _sizes(), _rates(), sorted({1.0, *FACTORS.value}, reverse=True)
    if bad := [p for p in factors if not 0 <= p <= 1]:
        raise InputError(f"--p={bad[0]} must be in [0, 1]")
    kinds = _kinds(factors)
    network.isolate("benchmarks.links")
    hosts = network.Hosts(HOSTS.value, LATENCY.value / 1000)
    workers: list[Workers] = []
    systems: list[System] = []
    try:
        for kind, variants, python in kinds:
            print(f"starting {', '.join(variants.values())}", file=sys.stderr)
            port = FIRST_PORT + len(systems)
            workers.append(Workers(hosts, python, kind, list(variants), port, sizes))
            systems += [
                System(name, workers[-1], variant, is_ours=kind == "ours")
                for variant, name in variants.items()
            ]
        measured = Measurements(rates, {system.name: system.wire_bytes for system in systems})
        about = {
            "hosts": HOSTS.value,
            "latency_ms": LATENCY.value,
            "rounds": ROUNDS.value,
            "sizes": dataclasses.asdict(sizes),
            "versions": {system.name: system.versions for system in systems},
        }
        works = _works(kinds[0][1], sizes)
        for rate, megabits in rates.items():
            hosts.set_rate(megabits)
            _measure(measured, rate, systems)
            for system_and_part, work in works.items():
                time = _predicted(work, megabits, measured.hop(rate))
                measured.predictions[rate, *system_and_part] = time
            links_report.print_rate(measured, rate)
            # After every rate, since a run may be cut off.
            links_report.write(measured, about, Path(OUTPUT.value))
    finally:
        for each in workers:
            each.close()


def _sizes() -> Sizes:
    if EMBED_DIM.value % (8 * HOSTS.value):
        raise InputError(
            f"--embed_dim={EMBED_DIM.value} must be a multiple of 8 times --hosts={HOSTS.value}"
        )
    return Sizes(
        layers=LAYERS.value,
        embed_dim=EMBED_DIM.value,
        heads=2 * HOSTS.value,
        mlp_dim=3 * EMBED_DIM.value,
        vocab_size=512,
        train_batch=TRAIN_BATCH.value if "train" in WORKLOAD.value else 0,
        train_length=LENGTH.value,
        generations=tuple(map(_generation, GENERATE.value))
        if set(WORKLOAD.value) - {"train"}
        else (),
        scan_layers=SCAN_LAYERS.value,
    )


def _generation(text: str) -> Generation:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", text)
    if not match or int(match[3]) < 2:
        raise InputError(
            f"--generate={text} must be prompts x tokens of each + new tokens, 2 or more:"
            " such as 16x32+17"
        )
    return Generation(*map(int, match.groups()))


def _rates() -> dict[str, float | None]:
    """Mbit/s by name; the first is no limit."""
    rates: dict[str, float | None] = {NO_LIMIT: None}
    for text in RATES.value:
        if text == NO_LIMIT:
            continue
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(mbit|gbit)", text)
        if not match or not float(match[1]):
            raise InputError(
                f"--rate={text} must be a number with mbit or gbit, such as 100mbit, or none"
            )
        rates[text] = float(match[1]) * (1000 if match[2] == "gbit" else 1)
    return rates


def _kinds(factors: list[float]) -> list[tuple[str, dict[str, str], str]]:
    """For each kind of worker: its name, its variants and their systems' names, its Python."""
    chosen = [(p, "float32") for p in factors] + list(map(_factor_and_wire, ALSO.value))
    ours = {f"{p}:{wire}": links_report.our_name(p, wire) for p, wire in chosen}
    ours |= {f"{_plan(text)}:float32": f"caat_jax, {text}" for text in PLANS.value}
    kinds = [("ours", ours, sys.executable)]
    if not NO_BASELINES.value:
        kinds.append(("dense", DENSE, sys.executable))
    if PEER_PYTHON.value:
        kinds.append(("torch", {"-": TORCH}, PEER_PYTHON.value))
    return kinds


def _factor_and_wire(text: str) -> tuple[float, str]:
    p, _, wire = text.partition(":")
    if not re.fullmatch(r"0?\.\d+|[01](\.0)?", p) or wire not in FORWARD_WIRE_DTYPES:
        raise InputError(
            f"--also={text} must be a p from 0 to 1, a colon, and one of:"
            f" {', '.join(FORWARD_WIRE_DTYPES)}"
        )
    return float(p), wire


def _plan(text: str) -> str:
    """The factors of every layer, as a literal."""
    pair = r"\(([01](?:\.\d+)?),([01](?:\.\d+)?)\)"
    pairs: list[tuple[float, ...]] = []
    for part in text.split("+"):
        match = re.fullmatch(rf"([1-9]\d*)x((?:{pair})+)", part)
        if not match:
            raise InputError(
                f"--plan={text} must be layers x (attention's factor, the MLP's), such as"
                " 2x(1,1)+10x(0,0.5) or 6x(1,1)(0,0)"
            )
        pairs += [tuple(map(float, each)) for each in re.findall(pair, match[2])] * int(match[1])
    if len(pairs) != LAYERS.value:
        raise InputError(f"--plan={text} has {len(pairs)} layers, not --layers={LAYERS.value}")
    return str(tuple(pairs))


def _works(variants: dict[str, str], sizes: Sizes) -> dict[tuple[str, str], Workload]:
    """What each of this project's systems does in each part, by the system's name and the part."""
    works = {}
    for variant, name in variants.items():
        factors, wire = variant.split(":")
        config = config_of(factors, HOSTS.value, sizes, wire)
        if sizes.train_batch:
            works[name, "train"] = model.workload(config)
        for case in sizes.generations:
            for program in ("prefill", "decode"):
                sized = dataclasses.replace(
                    config,
                    data=dataclasses.replace(config.data, sequence_length=case.prompt_length),
                    train=dataclasses.replace(config.train, global_batch=case.batch),
                )
                part = f"{program} {case.prompts}"
                works[name, part] = model.inference_workload(sized, program)
    return works


def _predicted(work: Workload, megabits: float | None, hop: float) -> float:
    """Milliseconds, where a hop takes `hop` milliseconds; without a limit bytes take no time."""
    bandwidth = math.inf if megabits is None else megabits * 1e6 / 8
    chip = own_chip.of(FLOPS.value, MEMORY_RATE.value, bandwidth, hop / 1000, HOSTS.value)
    return 1000 * model.predict(work, chip).step(overlap=True)


class Workers:
    """One process on each host; they run a workload together when asked."""

    def __init__(
        self,
        hosts: network.Hosts,
        python: str,
        kind: str,
        variants: list[str],
        port: int,
        sizes: Sizes,
    ):
        """Starts the processes, and returns when they have compiled."""
        number = len(hosts.names)
        self._kind = kind
        self._errors = [tempfile.TemporaryFile("w+") for _ in range(number)]
        self._processes = []
        for host in range(number):
            command = [python, "-m", "benchmarks.link_workers", kind, json.dumps(variants)]
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
        self.has: dict[str, dict[str, Any]] = self._answers()[0]

    def ask(self, variant: str, workload: str, wanted: str) -> list[dict[str, Any]]:
        """The answers of all processes to a request."""
        for process in self._processes:
            process.stdin.write(json.dumps([variant, workload, wanted]) + "\n")
            process.stdin.flush()
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):
            for line, errors in zip(lines, self._errors, strict=True):
                if not line:
                    errors.seek(0)
                    print(errors.read(), file=sys.stderr)
            raise InputError(f"a {self._kind} worker ended; its output is above")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.wait()


class System:
    """A variant of a kind of workers."""

    def __init__(self, name: str, workers: Workers, variant: str, *, is_ours: bool):
        self.name, self.is_ours = name, is_ours
        self._workers, self._variant = workers, variant
        about = workers.has[variant]
        self.workloads: list[str] = about["workloads"]
        self.versions: str = about["versions"]
        self.wire_bytes: dict[str, float] = about.get("wire_bytes", {})

    def run(self, workload: str) -> dict[str, float]:
        """For each part of the workload, the milliseconds of a step on the slowest host."""
        answers = self._workers.ask(self._variant, workload, "time")
        return {part: max(answer[part] for answer in answers) for part in answers[0]}

    def profile(self, workload: str) -> dict[str, dict[str, float]]:
        """For each part of the workload, what `link_profile` finds on the first host."""
        return self._workers.ask(self._variant, workload, "profile")[0]


def _measure(measured: Measurements, rate: str, systems: list[System]) -> None:
    """Adds the times at the links' present rate."""
    training = {"train"} & set(WORKLOAD.value)
    generating = {"generate"} if set(WORKLOAD.value) - {"train"} else set()
    asked = [
        (system, workload)
        for system in systems
        for workload in system.workloads
        if workload.split()[0] in training | generating
    ]
    profiled = [(system, workload) for system, workload in asked if system.is_ours]
    order = random.Random(rate)
    total = (ROUNDS.value + 1) * len(asked) + len(profiled)
    with tqdm.tqdm(total=total, disable=None, leave=False) as bar:
        for number in range(ROUNDS.value + 1):
            measured.hops.setdefault(rate, []).append(systems[0].run(HOP)[HOP])
            for system, workload in order.sample(asked, len(asked)):
                bar.set_description(f"{rate}, {system.name}, {workload}")
                for part, milliseconds in system.run(workload).items():
                    # The first round fills the shapers' buckets and TCP's windows.
                    if number and workload_of(part) in WORKLOAD.value:
                        measured.add_time(rate, system.name, part, milliseconds)
                bar.update()
        for system, workload in profiled:
            bar.set_description(f"{rate}, {system.name}, profile of {workload}")
            for part, profile in system.profile(workload).items():
                if workload_of(part) in WORKLOAD.value:
                    measured.profiles[rate, system.name, part] = profile
            bar.update()


if __name__ == "__main__":
    command_line.run(main)
