"""Workers of this project: `caat_jax` on simulated devices or one device, and the dense baseline.

python -m benchmarks.our_systems caat DEVICES P [WIRE]
python -m benchmarks.our_systems dense

Started by `step_time.py`.  Both use the same parameters, batch and optimizer, so that their first
losses can be compared.
"""

import sys
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import dense_baseline
from benchmarks import workers as sizes
from caat_jax.config.resolve import resolve
from caat_jax.devices import sharding
from caat_jax.training import optimizer as optimizer_lib
from caat_jax.training.step import Programs
from configs import base


def build_caat(devices: int, p: float, wire: str = "float32") -> tuple[Callable[[], float], str]:
    """The project's own training step on a mesh of `model` = `devices`."""
    programs, batch = programs_and_batch(devices, p, wire=wire)
    batch = jax.device_put(batch, programs.batch_sharding)
    state = programs.initial_state()

    def step() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(programs.train_step(state, batch))
        return float(metrics["train/loss"])

    return step, _versions()


def build_dense() -> tuple[Callable[[], float], str]:
    """The same model, parameters and optimizer in plain JAX."""
    programs, batch = programs_and_batch(devices=1, p=1.0)
    model = programs.config.model
    parameters = dense_baseline.from_stacked(programs.initial_state().parameters)
    # Layers are no longer stacked, so every array that is not a vector is a matrix.
    optimizer = optimizer_lib.create(
        programs.config.optimizer, jax.tree.map(lambda w: ("axis",) * w.ndim, parameters)
    )
    train_step = dense_baseline.make_train_step(
        optimizer, rope_base=model.rope_base, norm_epsilon=model.norm_epsilon
    )
    state = parameters, optimizer.init(parameters)

    def step() -> float:
        nonlocal state
        *state, loss = jax.block_until_ready(train_step(*state, batch))
        return float(loss)

    return step, _versions()


def programs_and_batch(
    devices: int, p: float, sequence_length: int = sizes.LENGTH, wire: str = "float32"
) -> tuple[Programs, np.ndarray]:
    """The programs on a mesh of `model` = `devices`, and a training batch for them."""
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    config = base.get_config()
    config.model.update(
        layers=sizes.LAYERS,
        embed_dim=sizes.EMBED_DIM,
        heads=sizes.HEADS,
        kv_heads=sizes.HEADS,
        mlp_dim=sizes.MLP_DIM,
        vocab_size=sizes.VOCAB_SIZE,
        tp_shards=sizes.SHARDS,
        sync_factor=p,
    )
    config.compute.update(scan_layers=False, forward_wire_dtype=wire, backward_wire_dtype=wire)
    config.mesh.update(data=1, fsdp=1, model=devices)
    config.optimizer.update(
        peak_learning_rate=sizes.LEARNING_RATE,
        beta1=sizes.BETAS[0],
        beta2=sizes.BETAS[1],
        epsilon=sizes.EPSILON,
        weight_decay=sizes.WEIGHT_DECAY,
        gradient_clip_norm=sizes.CLIP_NORM,
    )
    config.train.global_batch = sizes.BATCH
    config.data.sequence_length = sequence_length
    resolved = resolve(config)
    programs = Programs(resolved, sharding.create_mesh(resolved.mesh, jax.devices()[:devices]))
    shape = sizes.BATCH, sequence_length + 1
    batch = np.random.default_rng(0).integers(sizes.VOCAB_SIZE, size=shape, dtype=np.int32)
    return programs, batch


def _versions() -> str:
    return f"jax {jax.__version__}"


if __name__ == "__main__":
    if sys.argv[1] == "dense":
        sizes.serve(build_dense)
    else:
        sizes.serve(lambda: build_caat(int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]))
