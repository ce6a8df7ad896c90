"""The stages of `accelerator.py`: each yields its results as dictionaries.

    python -m benchmarks.accelerator_stages STAGE FOLDER [--rehearse]

prints them as JSON, a line each.
"""

import importlib
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accelerator_peers, dense_baseline
from benchmarks.accelerator_results import STAGES
from caat_jax.communication import exposure
from caat_jax.communication.audit import audit
from caat_jax.communication.collectives import LAYER_LOOP
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.devices import chips, sharding
from caat_jax.inference.generator import Generator
from caat_jax.model import attention
from caat_jax.training import metrics
from caat_jax.training import optimizer as optimizer_lib
from caat_jax.training.step import Programs
from configs import llama_1b, llama_7b, llama_130m
from tests import models
from tests.model.test_partial_sync import errors as emulation_errors

Results = Iterator[dict[str, Any]]

ONE_DEVICE = MeshConfig(data=1, fsdp=1, model=1, simulated_devices=0)
SYNC_FACTORS = (1.0, 0.5)
ROUNDS, NEW_TOKENS, PROMPT = 15, 128, 512
TINY = dict(layers=2, embed_dim=64, heads=8, kv_heads=8, mlp_dim=128, vocab_size=256)
SMALL_STUDY = dict(layers=1, embed_dim=32, mlp_dim=64)


def device(folder: Path, rehearse: bool) -> Results:
    first = jax.devices()[0]
    chip = chips.by_device_kind(first.device_kind)
    versions = {
        name: importlib.import_module(name).__version__ for name in ("jax", "jaxlib", "flax")
    }
    yield versions | {
        "python": platform.python_version(),
        "backend": first.client.platform_version.replace("\n", " "),
        "device": first.device_kind,
        "devices": len(jax.devices()),
        "chip": chip.name if chip else "not in chips.toml",
        "memory_bytes": (first.memory_stats() or {}).get("bytes_limit", ""),
    }


def reference(folder: Path, rehearse: bool) -> Results:
    """The largest error of each case, of the largest magnitude of the tensor that has it."""
    cases = [
        ("float32, p = 1", dict(sync_factor=1.0), {}, 1e-5),
        ("float32, p = 0.5", dict(sync_factor=0.5), {}, 1e-5),
        (
            "float32, p by sublayer",
            dict(sync_factor_per_layer=((0.25, 0.75), (1.0, 0.5))),
            {},
            1e-5,
        ),
        ("bfloat16, p = 0.5", dict(sync_factor=0.5), dict(dtype="bfloat16", remat=True), 0.15),
    ]
    for name, model, compute, tolerance in cases:
        config = models.small_config(model=dict(tp_shards=8) | model, compute=compute)
        worst = max(emulation_errors(config).values())
        yield {"case": name, "error": worst, "allowed": tolerance, "ok": bool(worst <= tolerance)}
    # A wire that is emulated rounds what it sends: the model's loss moves, but hardly.
    losses = {}
    rows = np.random.default_rng(0).integers(0, models.SMALL["vocab_size"], (4, 17), dtype=np.int32)
    for wire in ("float32", "bfloat16", "int8", "float8_e4m3fn"):
        config = models.small_config(
            model=dict(tp_shards=8, sync_factor=0.5),
            compute=dict(forward_wire_dtype=wire, emulate_wires=True),
        )
        programs = Programs(config, sharding.create_mesh(ONE_DEVICE, jax.devices()[:1]))
        total, count = programs.eval_step(programs.initial_state().parameters, rows)
        losses[wire] = float(total / count)
        moved = abs(losses[wire] / losses["float32"] - 1)
        yield {"case": f"wire {wire}", "error": moved, "allowed": 1e-2, "ok": moved <= 1e-2}
    kind = jax.devices()[0].platform
    if kind in ("gpu", "tpu"):
        fused = attention.kernel("cudnn" if kind == "gpu" else "splash", kind)
        for width in (64, 128):
            worst = _attention_error(fused, width)
            yield {
                "case": f"fused attention, heads of {width}, bfloat16",
                "error": worst,
                "allowed": 2e-2,
                "ok": bool(worst <= 2e-2),
            }


def _attention_error(fused: attention.Attend, width: int) -> float:
    """Of the outputs and all gradients, on this device."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, 4, 1024, heads, width) for heads in (4, 2, 2, 4)]
    arrays = [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]
    mesh = sharding.create_mesh(ONE_DEVICE, jax.devices()[:1])

    def outputs(attend: attention.Attend) -> list[np.ndarray]:
        def both(query, key, value, weights):
            attended, pullback = jax.vjp(attend, query, key, value)
            return attended, *pullback(weights)

        spec = jax.sharding.PartitionSpec("model", ("data", "fsdp"))
        mapped = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec)
        return [np.asarray(x, np.float32) for x in jax.jit(mapped)(*arrays)]

    return max(map(models.relative_error, outputs(fused), outputs(attention.plain)))


def train_130m(folder: Path, rehearse: bool) -> Results:
    yield from _train(llama_130m.get_config(), 32, rehearse, with_dense=True)


def train_1b(folder: Path, rehearse: bool) -> Results:
    yield from _train(llama_1b.get_config(), 8, rehearse, with_dense=False)


def _train(fields: Any, batch: int, rehearse: bool, with_dense: bool) -> Results:
    """All variants in turn, round by round; they share one state where they can."""
    steps, described = {}, {}
    for remat in (False, True):
        for p in SYNC_FACTORS:
            config = _one_device(fields, batch, rehearse, p=p, remat=remat)
            name = f"caat_jax, p = {p:g}{', remat' * remat}"
            mesh = sharding.create_mesh(ONE_DEVICE, jax.devices()[:1])
            programs = Programs(config, mesh)
            try:
                compiled = programs.compile_train_step()
            except jax.errors.JaxRuntimeError as error:
                yield {"system": name, "note": str(error).splitlines()[0][:200]}
                continue
            memory = compiled.memory_analysis()
            described[name] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
            steps[name] = compiled
    shape = config.train.global_batch, config.data.sequence_length + 1
    rows = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    state = [programs.initial_state()]
    placed = jax.device_put(rows, programs.batch_sharding)

    def ours(compiled: jax.stages.Compiled) -> Callable[[], None]:
        def step() -> None:
            state[0], values = compiled(state[0], placed)
            jax.block_until_ready(values)

        return step

    runs = {name: ours(compiled) for name, compiled in steps.items()}
    if with_dense:
        runs["plain dense JAX"] = _dense_step(config, programs, rows)
    yield from _timed(runs, config, described)


def _dense_step(config: Config, programs: Programs, rows: np.ndarray) -> Callable[[], None]:
    """The dense baseline with bfloat16 products."""
    parameters = dense_baseline.from_stacked(programs.initial_state().parameters)
    optimizer = optimizer_lib.create(
        config.optimizer, jax.tree.map(lambda w: ("axis",) * w.ndim, parameters)
    )
    train_step = dense_baseline.make_train_step(
        optimizer,
        dtype=config.compute.dtype,
        rope_base=config.model.rope_base,
        norm_epsilon=config.model.norm_epsilon,
    )
    state = [parameters, optimizer.init(parameters)]

    def step() -> None:
        *state[:], loss = train_step(*state, rows)
        jax.block_until_ready(loss)

    return step


def _timed(runs: dict[str, Callable[[], None]], config: Config, memory: dict[str, int]) -> Results:
    """Medians over rounds in random order; ratios within a round to the first system."""
    for name, run in list(runs.items()):
        try:
            run(), run()
        except jax.errors.JaxRuntimeError as error:  # out of memory
            yield {"system": name, "note": str(error).splitlines()[0][:200]}
            if memory.get(name):
                return  # the state went with it
            del runs[name]
    order, times = random.Random(0), {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name in order.sample(list(runs), len(runs)):
            begin = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begin)
    first = next(iter(times.values()))
    tokens = config.train.global_batch * config.data.sequence_length
    flops = metrics.model_flops_per_token(config.model, config.data.sequence_length) * tokens
    kind = jax.devices()[0].device_kind
    peak = metrics.peak_flops(kind, config.compute.dtype)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        yield {
            "system": name,
            "step_ms": 1e3 * median,
            "ratio": statistics.median(a / b for a, b in zip(seconds, first, strict=True)),
            "tokens_per_second": tokens / median,
            "mfu": flops / median / peak if peak else "",
            "memory_gib": memory[name] / 2**30 if name in memory else "",
        }


def _one_device(fields: Any, batch: int, rehearse: bool, *, p: float, remat: bool) -> Config:
    fields = fields.copy_and_resolve_references()
    fields.mesh.update(data=1, fsdp=1, model=1)
    fields.train.update(global_batch=batch, accumulation_steps=1)
    fields.compute.remat = remat
    if rehearse:
        fields.model.update(TINY)
        fields.data.sequence_length = 64
        fields.train.global_batch = 4
    return resolve(fields).with_sync_factor(p)


def torch_train(folder: Path, rehearse: bool) -> Results:
    """The 130M's size."""
    if note := accelerator_peers.missing():
        yield {"system": "transformers", "note": note}
        return
    config = _one_device(llama_130m.get_config(), 32, rehearse, p=1.0, remat=False)
    yield from _timed(accelerator_peers.training_steps(config, compiled=not rehearse), config, {})


def generate(folder: Path, rehearse: bool) -> Results:
    config = _one_device(llama_1b.get_config(), 8, rehearse, p=1.0, remat=False)
    prompt, new_tokens = (16, 8) if rehearse else (PROMPT, NEW_TOKENS)
    mesh = sharding.create_mesh(ONE_DEVICE, jax.devices()[:1])
    parameters = Programs(config, mesh).initial_state().parameters
    generators = {p: Generator(config.with_sync_factor(p), mesh, parameters) for p in SYNC_FACTORS}
    for batch in (1, 8):
        prompts = [[1] * prompt] * batch
        runs = {
            f"caat_jax, p = {p:g}": lambda n, g=generator, prompts=prompts: g.generate(
                prompts, max_new_tokens=n
            )
            for p, generator in generators.items()
        }
        yield from _generated(runs, batch, new_tokens)


def _generated(runs: dict[str, Callable[[int], Any]], batch: int, new_tokens: int) -> Results:
    for run in runs.values():
        run(1), run(new_tokens)
    times = {(name, n): [] for name in runs for n in (1, new_tokens)}
    for _ in range(5):
        for name, n in times:
            begin = time.perf_counter()
            runs[name](n)
            times[name, n].append(time.perf_counter() - begin)
    for name in runs:
        first, all_of_it = (statistics.median(times[name, n]) for n in (1, new_tokens))
        yield {
            "system": name,
            "batch": batch,
            "first_token_ms": 1e3 * first,
            "tokens_per_second": batch * (new_tokens - 1) / (all_of_it - first),
        }


def torch_generate(folder: Path, rehearse: bool) -> Results:
    """The 1.1B's size."""
    if note := accelerator_peers.missing():
        yield {"system": "transformers", "note": note}
        return
    config = _one_device(llama_1b.get_config(), 8, rehearse, p=1.0, remat=False)
    prompt, new_tokens = (16, 8) if rehearse else (PROMPT, NEW_TOKENS)
    generators = accelerator_peers.generators(config, compiled=not rehearse)
    for batch in (1, 8):
        runs = {
            name: lambda n, generate=generate, batch=batch: generate(batch, prompt, n)
            for name, generate in generators.items()
        }
        yield from _generated(runs, batch, new_tokens)


def schedule(folder: Path, rehearse: bool) -> Results:
    """What of the layers' transfers 8 GPUs would leave exposed, autotuned kernels included."""
    if rehearse:
        jax.config.update("jax_num_cpu_devices", 8)
    else:
        jax.config.update("jax_mock_gpu_topology", "1x1x8")
    if jax.devices()[0].platform != "gpu" and not rehearse:
        yield {"program": "7B, 8 GPUs", "note": "needs a GPU"}
        return
    fields = llama_7b.get_config()
    fields.mesh.update(data=1, fsdp=1, model=8)
    fields.train.update(global_batch=128, accumulation_steps=16)
    if rehearse:
        fields.model.update(TINY)
        fields.data.sequence_length = 64
    for p in SYNC_FACTORS:
        config = resolve(fields).with_sync_factor(p)
        mesh = sharding.create_mesh(resolve_mesh(config, 8), jax.devices()[:8])
        found = audit(Programs(config, mesh))
        chip = chips.by_device_kind(jax.devices()[0].device_kind) or chips.by_name("h100-nvlink")
        time_of_all = exposure.of_all(found.over("model", LAYER_LOOP), chip, mesh.shape)
        yield {
            "program": f"training step at p = {p:g}",
            "transfer_ms": 1e3 * time_of_all.transfer,
            "exposed_ms": 1e3 * time_of_all.exposed,
            "exposed_share": time_of_all.exposed / time_of_all.transfer,
            "compile_seconds": found.compile_seconds,
        }


def quality(folder: Path, rehearse: bool) -> Results:
    """`caat_jax.sweep` with `configs/equivalence_25m.py`; its own report goes to the log."""
    command = [sys.executable, "-m", "caat_jax.sweep", "--config=configs/equivalence_25m.py"]
    command += [f"--workdir={folder / 'quality'}", "--jobs=1"]
    if rehearse:
        command += [
            *(f"--config.run.model.{name}={size}" for name, size in SMALL_STUDY.items()),
            "--config.run.data.sequence_length=32",
            "--config.run.train.steps=8",
            "--config.run.train.eval_every=4",
            "--config.run.optimizer.warmup_steps=2",
            "--config.run.compute.dtype=float32",
            "--config.grid.seed=(0, 1)",
        ]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    yield {"report": finished.stdout.strip()}


BY_NAME = {name: globals()[name] for name in STAGES}


if __name__ == "__main__":
    for result in BY_NAME[sys.argv[1]](Path(sys.argv[2]), "--rehearse" in sys.argv):
        print(json.dumps(result), flush=True)
