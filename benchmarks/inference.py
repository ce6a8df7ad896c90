"""Time to first token and decode tokens/s: p = 1 against p < 1, on one device and on several.

    python -m benchmarks.inference [--rounds=7] [--devices=8] [--batches=1,8] [--lengths=64,192]
        [--new_tokens=65] [--output=inference.json] [--peer_python=PATH]

Float32 at the size in `workers.py`, S = 8, greedy.  Each system runs in its own process, started
for one batch size and prompt length at a time; every round measures each system once, in random
order.  Decode time is the time for --new_tokens minus that of the first token.  With --peer_python,
a Python that has torch and transformers, a Llama of transformers is measured too: with its growing
cache, and compiled with a static cache, which needs a C++ compiler.
"""

import json
import random
import statistics
import sys
import time
from pathlib import Path

from absl import flags

from benchmarks import workers as sizes
from benchmarks.workers import Worker
from caat_jax import command_line
from caat_jax.errors import InputError

ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each system is measured.", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices", 8, "Simulated CPU devices; divides 8.", lower_bound=2)
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Numbers of prompts in a batch.")
LENGTHS = flags.DEFINE_list("lengths", ["64", "192"], "Tokens in each prompt.")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 65, "Generated per prompt.", lower_bound=2)
OUTPUT = flags.DEFINE_string("output", "", "A JSON file to write; empty: none.")
PEER_PYTHON = flags.DEFINE_string("peer_python", "", "A Python with torch and transformers.")

SYNC_FACTORS = (1.0, 0.5)
PEERS = {
    "dynamic": "transformers, torch",
    "static": "transformers, torch, static cache, compiled",
}


def main() -> None:
    if sizes.SHARDS % DEVICES.value:
        raise InputError(f"--devices={DEVICES.value} does not divide the {sizes.SHARDS} shards")
    batches, lengths = _numbers(BATCHES), _numbers(LENGTHS)
    rows = []
    for batch in batches:
        for length in lengths:
            print(f"batch {batch}, prompts of {length} tokens, {NEW_TOKENS.value} new tokens each")
            print(f"{'system':43} {'first, ms':>9} {'ratio':>6} {'tokens/s':>9} {'ratio':>6}  base")
            rows += _measure(batch, length)
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(json.dumps(rows, indent=1) + "\n")


def _numbers(flag: flags.FlagHolder) -> list[int]:
    if not all(text.isdecimal() and int(text) for text in flag.value):
        raise InputError(f"--{flag.name}={','.join(flag.value)} must be whole numbers above 0")
    return [int(text) for text in flag.value]


def _systems() -> dict[str, tuple[str, list[str]]]:
    """By name: the system that it is compared with, and the command of its worker."""
    ours = [sys.executable, "-m", "benchmarks.inference_workers", "caat"]
    systems = {
        _name(devices, p): (_name(devices, 1.0), [*ours, f"{devices}", f"{p}"])
        for devices in (1, DEVICES.value)
        for p in SYNC_FACTORS
    }
    if PEER_PYTHON.value:
        peer = [PEER_PYTHON.value, "-m", "benchmarks.inference_workers", "torch"]
        systems |= {name: (_name(1, 1.0), [*peer, cache]) for cache, name in PEERS.items()}
    return systems


def _name(devices: int, p: float) -> str:
    return f"caat_jax, {devices} device{'s' * (devices > 1)}, p = {p:g}"


def _measure(batch: int, length: int) -> list[dict]:
    systems, workers = _systems(), {}
    try:
        for name, (_, command) in systems.items():
            for tokens in (1, NEW_TOKENS.value):
                worker = Worker([*command, f"{batch}", f"{length}", f"{tokens}"])
                workers[name, tokens] = worker
                if reason := worker.first.get("skipped"):
                    raise InputError(f"{name}: {reason}")
        milliseconds = {key: [] for key in workers}
        order = random.Random(0)
        for _ in range(ROUNDS.value):
            for key in order.sample(list(workers), len(workers)):
                time.sleep(0.05)  # the previous system's threads may still spin
                milliseconds[key].append(workers[key].step()[0])
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    for name, (base, _) in systems.items():
        first, base_first = milliseconds[name, 1], milliseconds[base, 1]
        decode, base_decode = _decode(milliseconds, name), _decode(milliseconds, base)
        row = {
            "system": name,
            "base": base,
            "batch": batch,
            "prompt": length,
            "first_token_ms": statistics.median(first),
            "first_token_ratio": _ratio(first, base_first),
            "decode_tokens_per_second": batch * 1000 / statistics.median(decode),
            "decode_time_ratio": _ratio(decode, base_decode),
        }
        print(
            f"{name:43} {row['first_token_ms']:9.1f} {row['first_token_ratio']:6.2f}"
            f" {row['decode_tokens_per_second']:9,.0f} {row['decode_time_ratio']:6.2f}  {base}",
            flush=True,
        )
        rows.append(row)
    return rows


def _decode(milliseconds: dict, name: str) -> list[float]:
    """Milliseconds of one token after the first, by round."""
    pairs = zip(milliseconds[name, NEW_TOKENS.value], milliseconds[name, 1], strict=True)
    return [(both - first) / (NEW_TOKENS.value - 1) for both, first in pairs]


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


if __name__ == "__main__":
    command_line.run(main)
