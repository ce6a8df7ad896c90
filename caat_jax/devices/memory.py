"""Refuses what cannot fit into memory before anything is compiled or allocated.

The compiler and the allocator end the process when sizes are far too large.  What is counted here
is less than any training step takes (0.26 to 0.76 of what XLA's compiler for CPUs takes at D = 256,
4 layers, T = 256 and 1,024); a model that passes may still be too large.
"""

import contextlib
import dataclasses
import math
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from caat_jax.config.architecture import Architecture
from caat_jax.config.sections import Config
from caat_jax.devices import sharding
from caat_jax.errors import InputError

_FLOAT32_BYTES = _INT32_BYTES = 4


def check_training(config: Config, mesh: Mesh, attention: str) -> None:
    """Compares what a device must hold with what it has.

    Args:
      config: with its vocabulary.
      mesh: the one to train on.
      attention: the kernel, as `caat_jax.model.attention.choose` names it.

    Raises:
      InputError: naming what takes the memory, and what of it can be changed.
    """
    needed, available = least_training_bytes(config, mesh, attention), _available_bytes(mesh)
    if needed > available:
        model, train = config.model, config.train
        raise InputError(
            f"a training step takes at least {needed / 1e9:,.1f} GB on each of {mesh.size}"
            f" devices, which have {available / 1e9:,.1f} GB: the model has"
            f" {parameter_count(model):,} parameters, train.global_batch={train.global_batch}"
            f" sequences have data.sequence_length={config.data.sequence_length} tokens, in"
            f" train.accumulation_steps={train.accumulation_steps} parts;"
            f" {_remedy(config, mesh, attention, available)}"
        )


def _remedy(config: Config, mesh: Mesh, attention: str, available: float) -> str:
    """The first of some changes that leave the function as it is and make a step fit, or may."""
    train, compute = config.train, config.compute
    most = train.global_batch // sharding.data_parallel_size(mesh)
    parts = [train.accumulation_steps]
    while most % (2 * parts[-1]) == 0:
        parts.append(2 * parts[-1])
    for remat in (compute.remat, True):
        for accumulation_steps in parts:
            changed = dataclasses.replace(
                config,
                compute=dataclasses.replace(compute, remat=remat),
                train=dataclasses.replace(train, accumulation_steps=accumulation_steps),
            )
            if least_training_bytes(changed, mesh, attention) < available / 2:
                flags = f"--config.train.accumulation_steps={accumulation_steps}"
                return f"try {flags}" + " --config.compute.remat=True" * remat
    return (
        "try more devices, over which mesh.model and mesh.fsdp divide the parameters, a smaller"
        " model or shorter sequences"
    )


def parameter_count(model: Architecture) -> int:
    """Exact, in integers of any size, so that it does not fail where arrays would."""
    heads = 2 * (model.heads + model.kv_heads) * model.head_dim
    layer = model.embed_dim * (heads + 3 * model.mlp_dim + 2)
    tables = 1 if model.tied_head else 2
    return model.layers * layer + model.embed_dim * (tables * model.vocab_size + 1)


def least_training_bytes(config: Config, mesh: Mesh, attention: str) -> int:
    """Of one device: the state, the batch, and what is largest of the rest."""
    train, length = config.train, config.data.sequence_length
    parts = sharding.data_parallel_size(mesh)
    batch = _INT32_BYTES * train.global_batch * (length + 1) // parts
    split = mesh.shape["fsdp"] * mesh.shape["model"]
    parameters = _FLOAT32_BYTES * parameter_count(config.model) // split
    logits = _FLOAT32_BYTES * train.global_batch * length * config.model.vocab_size
    logits //= train.accumulation_steps * mesh.size
    tokens = train.global_batch * length // (parts * train.accumulation_steps)
    saved = tokens * _saved_bytes(config, mesh.shape["model"], attention)
    # Parameters and AdamW's two moments; the gradient is whole when the rest is no longer there.
    return 3 * parameters + batch + max(parameters, logits + saved)


def _saved_bytes(config: Config, model_size: int, attention: str) -> int:
    """What the layers leave of a token for the backward pass, on one device."""
    model, itemsize = config.model, 2 if config.compute.dtype == "bfloat16" else 4
    heads = 2 * (model.heads + model.kv_heads) * model.head_dim  # queries, keys, values, attended
    within = itemsize * (heads + 2 * model.mlp_dim) // model_size
    if attention == "plain":  # half of the scores are computed
        scores = model.heads * config.data.sequence_length // 2
        within += _FLOAT32_BYTES * scores // model_size
    local_shards, shared, channels = model.tp_shards // model_size, model.embed_dim, 0
    for widths in model.sync_widths:
        streams = []  # as each sublayer leaves them
        for width in widths:
            shared = min(shared, width)
            streams.append(shared + local_shards * (model.embed_dim - shared))
        # With remat the layer's own and the reduced channels, which are not sent again.
        channels += streams[-1] + sum(widths) if config.compute.remat else sum(streams)
    return itemsize * channels + within * (1 if config.compute.remat else model.layers)


def _available_bytes(mesh: Mesh) -> float:
    """Of one device; simulated ones share the machine's.  Some allocators set no limit."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(physical, container_bytes()) // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def container_bytes(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float:
    """The smallest memory limit of the control groups that this process is in; infinite: none."""
    limits = [math.inf]
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top, name = root, "memory.max"
            elif "memory" in controllers.split(","):
                top, name = root / "memory", "memory.limit_in_bytes"
            else:
                continue
            # In a container its own group is the top one, whatever its path is outside.
            parts = Path(path).parts[1:]
            for depth in range(len(parts) + 1):
                with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                    limits.append(int(top.joinpath(*parts[:depth], name).read_text()))
    return min(limits)
