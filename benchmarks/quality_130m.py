"""Quality and step time of the paper's 130M model on one device: p = 1 against p = 0.5.

    python -m benchmarks.quality_130m --config=configs/llama_130m.py --workdir=DIR --minutes=20 \\
        --config.data.own_text=False

All shards are on that device; the text is that of data.files, or the source of Python's library.
Trains a tokeniser on the corpus, measures one training step of both in turn, works out how many
steps N both can take in the time, and trains both for N steps from the same seed on the same
batches.  DIR gets

    tokenizer.json                      reused if it exists
    plan.json                           N, the step times, and the configuration they belong to
    p_1.0, p_0.5                        the two runs, as train.py would leave them
    quality_130m.json, quality_130m.png

The same command resumes where it was stopped, with the N of plan.json.  While they are measured,
both models are on the device at once.  N sets `train.steps` and `optimizer.decay_steps`, and
shortens the warm-up and the intervals of evaluations and checkpoints where they are long for N
steps.  The configuration's synchronisation factors are not used.

This has been run at small sizes on a CPU, not yet at full size.
"""

import dataclasses
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from caat_jax import command_line, files
from caat_jax.checkpoints import workdir as workdir_lib
from caat_jax.config import field_checks, user_paths
from caat_jax.config.resolve import resolve_mesh
from caat_jax.config.sections import Config
from caat_jax.config.stored import difference, from_json, to_json
from caat_jax.data import train_tokenizer
from caat_jax.data.loader import train_batches
from caat_jax.data.token_cache import TokenSequences, open_cache
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.devices import memory, sharding
from caat_jax.errors import InputError
from caat_jax.evaluation import report
from caat_jax.model import attention
from caat_jax.plot import report as plot_report
from caat_jax.training import loop, metrics
from caat_jax.training.step import Programs

_CONFIG = command_line.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.", required=True)
_MINUTES = flags.DEFINE_float("minutes", 20.0, "Time for both runs together.")
_STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "N, instead of as many as --minutes allows.",
    lower_bound=1,
    upper_bound=field_checks.LARGEST_INTEGER,
)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    32_000,
    "The most ids of the tokeniser; a small corpus may not yield as many.",
    lower_bound=train_tokenizer.SMALLEST,
)

SYNC_FACTORS = (1.0, 0.5)
_WARM_UP_STEPS, _ROUNDS = 2, 9
# The rest of --minutes is for compiling, evaluating and saving.
_TRAINING_SHARE = 0.85
_EVALUATIONS, _CHECKPOINTS = 10, 4  # at least, in a run with enough steps


def main(config: Config) -> None:
    workdir = user_paths.expanded("--workdir", _WORKDIR.value).absolute()
    command_line.simulate_devices(config.mesh)
    _check(config, workdir)
    # Later calls are compared with this: the configuration without what this benchmark sets.
    given = config.with_sync_factor(SYNC_FACTORS[0])
    plan = _stored_plan(workdir / "plan.json", given)
    path = _tokenizer(workdir, config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(path)))
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = config.with_vocabulary(tokenizer.size)
    sequences = open_cache(config.data, tokenizer).train
    if plan is None:
        milliseconds = _measure(config, sequences)
        plan = {
            "steps": _STEPS.value or _steps_within(_MINUTES.value, milliseconds),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "milliseconds": milliseconds,
            "config": to_json(given),
        }
        _write(workdir / "plan.json", json.dumps(plan))
    runs = [_run(config, p, plan, workdir / _name(p)) for p in SYNC_FACTORS]
    result = _result(config, plan, runs, tokenizer.size, sequences)
    _write(workdir / "quality_130m.json", json.dumps(result, indent=1))
    plot_report.plot_runs(
        [
            (f"p = {p:g}", metrics.read_metrics(workdir / _name(p) / metrics.METRICS_FILE))
            for p in SYNC_FACTORS
        ],
        workdir / "quality_130m.png",
    )
    _print_table(result)


def _check(config: Config, workdir: Path) -> None:
    """Refuses input that cannot work, before anything is written."""
    if not 0 < _MINUTES.value < math.inf:
        raise InputError(f"--minutes={_MINUTES.value} must be above 0 and finite")
    if config.data.tokenizer != "bytes":
        raise InputError(
            f"data.tokenizer={config.data.tokenizer} is not used here: put a tokenizer.json into"
            " --workdir, or leave it to this benchmark to train one"
        )
    if config.model.vocab_size != -1 and _VOCAB_SIZE.value > config.model.vocab_size:
        raise InputError(
            f"--vocab_size={_VOCAB_SIZE.value} must be at most"
            f" model.vocab_size={config.model.vocab_size}"
        )
    if len(jax.devices()) != 1:
        raise InputError(
            f"there are {len(jax.devices())} devices, and all shards must be on 1; hide the others"
            " (mesh.simulated_devices=0, CUDA_VISIBLE_DEVICES=0)"
        )
    resolve_mesh(config, devices=1)
    workdir_lib.check_writable(workdir)


def _stored_plan(path: Path, given: Config) -> dict[str, Any] | None:
    """The plan of the first call with this workdir, if there was one.

    Raises:
      InputError: that call had a different configuration or different --steps.
    """
    if not path.exists():
        return None
    try:
        plan = files.read_json(path, dict)
        stored, steps = from_json(plan["config"]), plan["steps"]
    except (InputError, KeyError):
        raise InputError(f"{path} is not a plan of this benchmark; move it away") from None
    if _STEPS.value not in (None, steps):
        raise InputError(f"--steps={_STEPS.value} must be {steps}, as in {path}, or left out")
    differing = difference(stored, given)
    if differing:
        raise InputError(
            f"{path} has a different configuration ({'; '.join(differing)}); give another --workdir"
        )
    print(f"resuming the {steps:,} steps of {path}", file=sys.stderr)
    return plan


def _tokenizer(workdir: Path, config: Config) -> Path:
    """The path of the workdir's tokeniser, which is trained if it does not exist."""
    path = workdir / "tokenizer.json"
    if path.exists():
        print(f"{path} exists and is reused", file=sys.stderr)
        return path
    # Elsewhere first, so that a corpus that cannot be used leaves no workdir behind.
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder, path.name)
        size = train_tokenizer.train(config.data, _VOCAB_SIZE.value, str(trained))
        _write(path, trained.read_text(encoding="utf-8"))
    print(f"{path}: trained, {size:,} ids", file=sys.stderr)
    return path


def _measure(config: Config, sequences: TokenSequences) -> dict[str, list[float]]:
    """Milliseconds of one training step, by run and round.

    Each round takes one step of each in random order, so that other load affects both.
    """
    mesh = sharding.create_mesh(resolve_mesh(config, devices=1))
    kernel = attention.choose(config.model, config.compute, mesh.devices.flat[0].platform)
    memory.check_training(config, mesh, kernel)
    print("compiling and measuring the training steps", file=sys.stderr)
    programs = {p: Programs(config.with_sync_factor(p), mesh) for p in SYNC_FACTORS}
    steps = {p: programs[p].compile_train_step() for p in SYNC_FACTORS}
    states = {p: programs[p].initial_state() for p in SYNC_FACTORS}
    batch = next(
        train_batches(
            sequences,
            global_batch=config.train.global_batch,
            seed=config.seed,
            sharding=programs[1.0].batch_sharding,
        )
    )
    milliseconds = {_name(p): [] for p in SYNC_FACTORS}
    order = random.Random(0)
    for number in range(_WARM_UP_STEPS + _ROUNDS):
        for p in order.sample(SYNC_FACTORS, len(SYNC_FACTORS)):
            start = time.perf_counter()
            states[p], values = steps[p](states[p], batch)
            jax.block_until_ready((states[p], values))
            if number >= _WARM_UP_STEPS:
                milliseconds[_name(p)].append(1000 * (time.perf_counter() - start))
    return milliseconds


def _steps_within(minutes: float, milliseconds: dict[str, list[float]]) -> int:
    """The number of steps that each run has time for."""
    both = sum(statistics.median(times) for times in milliseconds.values()) / 1000
    steps = int(60 * minutes * _TRAINING_SHARE / both)
    if not steps:
        raise InputError(
            f"--minutes={minutes} must be more: a step of both takes {both / 60:.2g} minutes, and"
            f" {_TRAINING_SHARE:.0%} of the time is for steps"
        )
    return min(steps, field_checks.LARGEST_INTEGER)


def _run(config: Config, p: float, plan: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """Trains or resumes one of the two runs; returns its entry in the result."""
    steps, train, optimizer = plan["steps"], config.train, config.optimizer
    config = dataclasses.replace(
        config.with_sync_factor(p),
        train=dataclasses.replace(
            train,
            steps=steps,
            eval_every=min(train.eval_every, max(1, steps // _EVALUATIONS)),
            checkpoint_every=min(train.checkpoint_every, max(1, steps // _CHECKPOINTS)),
        ),
        optimizer=dataclasses.replace(
            optimizer, decay_steps=steps, warmup_steps=min(optimizer.warmup_steps, steps // 10)
        ),
    )
    print(f"p = {p:g}: {steps:,} steps", file=sys.stderr)
    loop.train(config, workdir)
    written = metrics.read_metrics(workdir / metrics.METRICS_FILE)
    times, base = plan["milliseconds"][_name(p)], plan["milliseconds"][_name(1.0)]
    length = config.data.sequence_length
    tokens_per_second = train.global_batch * length / statistics.median(times) * 1000
    flops = metrics.model_flops_per_token(config.model, length)
    peak = metrics.peak_flops(plan["device"], config.compute.dtype)
    return {
        "p": p,
        "train_loss": metrics.json_number(float(written["train/loss"][1][-1])),
        "validation_loss": metrics.json_number(float(written["eval/loss"][1][-1])),
        "whole_validation_split": report.evaluate_checkpoint(workdir, steps, config).figures(),
        "step_ms": {
            "median": statistics.median(times),
            "least": min(times),
            "most": max(times),
        },
        # Within a round, so that disturbances of both cancel out.
        "step_time_ratio": statistics.median(a / b for a, b in zip(times, base, strict=True)),
        "tokens_per_second": tokens_per_second,
        "mfu": peak and tokens_per_second * flops / peak,
    }


def _result(
    config: Config,
    plan: dict[str, Any],
    runs: list[dict[str, Any]],
    tokenizer_ids: int,
    sequences: TokenSequences,
) -> dict[str, Any]:
    trained_on = plan["steps"] * config.train.global_batch
    length = config.data.sequence_length
    return {
        "device": plan["device"],
        "jax": plan["jax"],
        "dtype": config.compute.dtype,
        "parameters": memory.parameter_count(config.model),
        "tp_shards": config.model.tp_shards,
        "vocabulary": {"tokenizer": tokenizer_ids, "model": config.model.vocab_size},
        "steps": plan["steps"],
        "global_batch": config.train.global_batch,
        "sequence_length": length,
        "tokens": trained_on * length,
        "corpus_tokens": len(sequences) * length,
        "epochs": trained_on / len(sequences),
        "runs": runs,
    }


def _print_table(result: dict[str, Any]) -> None:
    runs = result["runs"]
    print(f"{result['device']}, jax {result['jax']}, {result['dtype']}")
    print(
        f"{result['parameters'] / 1e6:,.1f} M parameters, S = {result['tp_shards']};"
        f" {result['vocabulary']['tokenizer']:,} ids"
    )
    print(
        f"{result['steps']:,} steps of {result['global_batch']} x {result['sequence_length']}:"
        f" {result['tokens']:,} tokens, {result['epochs']:.3g} epochs"
        f" of {result['corpus_tokens']:,}"
    )
    whole = [run["whole_validation_split"] for run in runs]
    times = [run["step_ms"] for run in runs]
    for name, values in (
        ("", [f"p = {run['p']:g}" for run in runs]),
        ("last training loss, nats/token", [f"{float(r['train_loss']):.4f}" for r in runs]),
        ("last validation loss", [f"{float(r['validation_loss']):.4f}" for r in runs]),
        ("loss on the whole validation split", [f"{float(w['loss']):.4f}" for w in whole]),
        ("bits per byte on it", [f"{float(w['bits_per_byte']):.4f}" for w in whole]),
        ("step time, ms: median", [f"{t['median']:,.1f}" for t in times]),
        ("least to most", [f"{t['least']:,.1f} to {t['most']:,.1f}" for t in times]),
        ("over that of p = 1", [f"{run['step_time_ratio']:.3f}" for run in runs]),
        ("tokens per second", [f"{run['tokens_per_second']:,.0f}" for run in runs]),
        ("MFU", ["unknown" if r["mfu"] is None else f"{r['mfu']:.1%}" for r in runs]),
    ):
        print(f"{name:36}" + "".join(f"{value:>22}" for value in values))


def _name(p: float) -> str:
    return f"p_{p}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text + "\n")


if __name__ == "__main__":
    command_line.run(main, _CONFIG)
