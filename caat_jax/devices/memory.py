"""Refuses what cannot fit into memory before anything is compiled or allocated.

The compiler and the allocator end the process when sizes are far too large.  What is counted here
is less than any training step takes; a model that passes may still be too large.
"""

import contextlib
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


def check_training(config: Config, mesh: Mesh) -> None:
    """Compares what a device must hold with what it has.

    Args:
      config: with its vocabulary.
      mesh: the one to train on.

    Raises:
      InputError: naming what takes the memory.
    """
    needed, available = least_training_bytes(config, mesh), _available_bytes(mesh)
    if needed > available:
        model, train = config.model, config.train
        raise InputError(
            f"a training step takes at least {needed / 1e9:,.1f} GB on each of {mesh.size}"
            f" devices, which have {available / 1e9:,.1f} GB: the model has"
            f" {parameter_count(model):,} parameters, train.global_batch={train.global_batch}"
            f" sequences have data.sequence_length={config.data.sequence_length} tokens, in"
            f" train.accumulation_steps={train.accumulation_steps} parts"
        )


def parameter_count(model: Architecture) -> int:
    """Exact, in integers of any size, so that it does not fail where arrays would."""
    heads = 2 * (model.heads + model.kv_heads) * model.head_dim
    layer = model.embed_dim * (heads + 3 * model.mlp_dim + 2)
    tables = 1 if model.tied_head else 2
    return model.layers * layer + model.embed_dim * (tables * model.vocab_size + 1)


def least_training_bytes(config: Config, mesh: Mesh) -> int:
    """Of one device: the state, the batch, and what is largest of the rest."""
    train, length = config.train, config.data.sequence_length
    parts = sharding.batch_parts(mesh)
    batch = _INT32_BYTES * train.global_batch * (length + 1) // parts
    split = mesh.shape["fsdp"] * mesh.shape["model"]
    parameters = _FLOAT32_BYTES * parameter_count(config.model) // split
    logits = _FLOAT32_BYTES * train.global_batch * length * config.model.vocab_size
    logits //= train.accumulation_steps * mesh.size
    # Parameters and AdamW's two moments; the gradient is whole when there are no logits any more.
    return 3 * parameters + batch + max(parameters, logits)


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
