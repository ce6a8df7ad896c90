"""Small configurations, and what a model computes on a mesh of the simulated devices."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from caat_jax.config.resolve import resolve
from caat_jax.config.sections import Config
from caat_jax.devices import sharding
from caat_jax.training import loop
from caat_jax.training.step import Programs
from configs import base
from tests import reference

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax-cuda13-plugin is not installed (requirements-gpu.txt)",
)
SMALL = dict(layers=2, embed_dim=32, heads=16, kv_heads=8, head_dim=4, mlp_dim=48, vocab_size=64)


def small_config(
    *,
    model: dict | None = None,
    compute: dict | None = None,
    mesh: dict | None = None,
    **train: Any,
) -> Config:
    """The base configuration with a model of 20,000 parameters, queries grouped in twos."""
    config = base.get_config()
    config.model.update(SMALL | (model or {}))
    config.compute.update(compute or {})
    config.mesh.update(dict(data=1, fsdp=1, model=1) | (mesh or {}))
    config.data.sequence_length = 16
    config.train.update(dict(global_batch=4) | train)
    return resolve(config)


def small_run(folder: Path, texts: list[str], fields: dict | None = None) -> Path:
    """The workdir of a short run on all 8 simulated devices: p = 0.5, T = 64, bytes of `texts`."""
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / f"texts/{number:02}.txt").write_bytes(text.encode())
    config = base.get_config()
    config.model.update(SMALL | dict(heads=8, head_dim=8, sync_factor=0.5, vocab_size=-1))
    config.data.update(
        files=f"{folder}/texts/*.txt",
        cache_dir=f"{folder}/cache",
        holdout_every=2,
        sequence_length=64,
    )
    config.optimizer.update(peak_learning_rate=1e-2, warmup_steps=2)
    config.train.update(steps=20, global_batch=8)
    config.update_from_flattened_dict(fields or {})
    loop.train(resolve(config), folder / "run")
    return folder / "run"


def method(config: Config) -> dict[str, Any]:
    """What the emulation in `reference.py` is to know of a model."""
    arch = config.model
    return dict(
        tp_shards=arch.tp_shards,
        sync_widths=arch.sync_widths,
        rope_base=arch.rope_base,
        norm_epsilon=arch.norm_epsilon,
    )


def random_parameters(config: Config, seed: int = 0) -> dict[str, Any]:
    """The emulation's, of a model's sizes."""
    sizes = {name: getattr(config.model, name) for name in (*SMALL, "tied_head")}
    return reference.random_parameters(seed, **sizes)


def programs(config: Config) -> Programs:
    """Programs on the first of the 8 simulated devices."""
    sizes = config.mesh
    devices = jax.devices()[: sizes.data * sizes.fsdp * sizes.model]
    assert len(devices) == sizes.data * sizes.fsdp * sizes.model, "needs 8 simulated devices"
    return Programs(config, sharding.create_mesh(sizes, devices))


def on_mesh(programs: Programs, parameters: Any) -> Any:
    """NumPy parameters as float32 arrays on the mesh."""
    shardings = sharding.named_shardings(programs.mesh, programs.blueprint.specs)
    return jax.device_put(jax.tree.map(lambda a: np.asarray(a, np.float32), parameters), shardings)


def loss_gradients_and_logits(
    programs: Programs, parameters: Any, rows: np.ndarray
) -> tuple[float, Any, np.ndarray]:
    """The training step's mean loss and gradients, before the optimizer, and logits [B, T, V].

    Rows are [B, T + 1] token sequences, padded with -1.
    """
    gradients_of = programs._shard_map(
        programs._loss_and_gradients, out_specs=(P(), programs.blueprint.specs)
    )

    @jax.jit  # one program of both: they share the forward pass, and compiling is what takes time
    def both(parameters: Any, rows: jax.Array) -> Any:
        return *gradients_of(parameters, rows), programs.logits_step(parameters, inputs(rows))

    loss, gradients, logits = jax.tree.map(np.asarray, both(on_mesh(programs, parameters), rows))
    return float(loss), gradients, logits


def loss_and_logits(
    programs: Programs, parameters: Any, rows: np.ndarray
) -> tuple[float, np.ndarray]:
    """The mean loss and the logits alone: a program that compiles sooner."""

    @jax.jit
    def both(parameters: Any, rows: jax.Array) -> Any:
        return (
            programs.eval_step(parameters, rows),
            programs.logits_step(parameters, inputs(rows)),
        )

    (loss_sum, count), logits = jax.tree.map(np.asarray, both(on_mesh(programs, parameters), rows))
    return float(loss_sum / count), logits


def inputs(rows: jax.Array) -> jax.Array:
    """Tokens [B, T] that rows [B, T + 1] are predicted from, padding replaced."""
    return jnp.maximum(rows[:, :-1], 0)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest error, in units of the expected tensor's largest magnitude."""
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))
