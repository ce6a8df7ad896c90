"""Everything that an accelerator can tell about this project, in one command and a given time.

    python -m benchmarks.accelerator --output=DIR --minutes=25
    python -m benchmarks.accelerator --output=DIR --rehearse

For one GPU or TPU, without a network: the text is the source of Python's library.  Stages run in
order of worth, each in a process of its own, and every result is a line of DIR/results.jsonl as
soon as it is there, so that being cut off loses one stage.  A stage that fails is a line with its
error, and the next begins; DIR/log.txt has what they printed.  DIR/report.md has all results as
tables.  The same command again runs what has no result yet.  --rehearse runs every stage with tiny
models on any machine, in a few minutes.

    device      versions, the chip, its memory
    reference   logits, loss and gradients against the float64 emulation: float32 and bfloat16;
                wires of fewer bits; the fused attention against the plain one
    train_130m, train_1b    step time, MFU and memory at p = 1 and 0.5, S = 8 on the one device,
                layers rematerialised or not, interleaved; a plain dense model in JAX
    torch_train             a Llama of `transformers` of the same size, where torch is installed
    generate                time to the first token and decode speed of the 1.1B model at p = 1, 0.5
    torch_generate          `transformers`' `generate` on a Llama of the same size
    schedule                on a GPU: the program of 8 GPUs, compiled with its autotuner
    quality                 p = 1 against p = 0.5 at 25 M parameters, four pairs, to the end of time
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.accelerator_results import STAGES, as_tables, read
from benchmarks.workers import ROOT
from caat_jax import command_line

_OUTPUT = flags.DEFINE_string("output", None, "The folder to write.", required=True)
_MINUTES = flags.DEFINE_float("minutes", 25.0, "For all stages together.", lower_bound=0.1)
_REHEARSE = flags.DEFINE_bool("rehearse", False, "Tiny models, on any machine.")


def main() -> None:
    folder = Path(_OUTPUT.value).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    end = time.monotonic() + 60 * _MINUTES.value
    for stage in STAGES:
        if stage in {record["stage"] for record in read(results) if "error" not in record}:
            continue
        left = end - time.monotonic()
        print(f"{stage}: {max(left, 0) / 60:.1f} minutes are left", flush=True)
        if left <= 0:
            break
        error = _run(stage, left, results, folder)
        if error:
            print(f"{stage}: {error}", flush=True)
            _append(results, {"stage": stage, "error": error})
    report = as_tables(read(results))
    (folder / "report.md").write_text(report)
    print(f"\n{report}\nWritten: {folder}/results.jsonl, report.md")


def _run(stage: str, seconds: float, results: Path, folder: Path) -> str | None:
    """Runs one stage, keeps its results as they come, and says what went wrong."""
    command = [sys.executable, "-m", "benchmarks.accelerator_stages", stage, str(folder)]
    if _REHEARSE.value:
        command.append("--rehearse")
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            ["timeout", f"{seconds:.0f}", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        for line in process.stdout:
            _append(results, {"stage": stage, **json.loads(line)})
    if process.wait() == 124:
        return "the time was over"
    if process.returncode:
        last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        return f"ended with code {process.returncode}: {''.join(last)[:300]}"
    return None


def _append(results: Path, record: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    command_line.run(main)
