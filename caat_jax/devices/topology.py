"""Devices of TPU pods and GPU hosts that are not there: real compilers, nothing to run on."""

import importlib.util
import os
import re
from pathlib import Path

import jax
from jax.experimental import topologies

from caat_jax.errors import InputError

EXAMPLES = "v5e:2x4, v5p:4x4x4, v6e:16x16 or h100:1x1x8"

# What XLA must know of a GPU that it cannot ask, a file for each.
_GPU_TARGETS = Path(__file__).with_name("gpu_targets")


def devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a topology, for compiling only.

    Args:
      name: a TPU generation and the chips along each axis of its torus, such as "v5p:4x4x4"; or a
        GPU, then partitions x hosts x devices of a host, such as "h100:1x1x8".
      slices: how many such pods, joined by the data-centre network; TPUs only.

    Raises:
      InputError: there is no such topology, or its compiler is not installed.
    """
    match = re.fullmatch(r"(\w+):\d+(x\d+){1,2}", name)
    if not match:
        raise InputError(f"--topology={name} is not a topology; write it as in {EXAMPLES}")
    if slices < 1:
        raise InputError(f"--slices={slices} must be at least 1")
    target = _GPU_TARGETS / f"{match[1]}.txtpb"
    try:
        return _gpu_devices(name, target, slices) if target.exists() else _tpu_devices(name, slices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise InputError(
            f"--topology={name}: {reason}; there are, for example, {EXAMPLES}"
        ) from None


def _tpu_devices(name: str, slices: int) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={name} needs the TPU compiler, libtpu: pip install -r requirements-tpu.txt"
        )
    # libtpu would ask the machine which TPU it is a part of; any answer will do.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    # Nor does a compiler need a TPU for itself alone.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    several = {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(name, "tpu", **several).devices)


def _gpu_devices(name: str, target: Path, slices: int) -> list[jax.Device]:
    if slices > 1:
        raise InputError(f"--slices={slices} is for TPUs; in {name} the first number is partitions")
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (13, 12)):
        raise InputError(
            f"--topology={name} needs XLA's compiler for NVIDIA GPUs: pip install -r"
            " requirements-gpu.txt"
        )
    text = target.read_text(encoding="utf-8")
    _assume_cudnn(text)
    shape = name.partition(":")[2]
    found = topologies.get_topology_desc(platform="cuda", target_config=text, topology=shape)
    return list(found.devices)


def _assume_cudnn(text: str) -> None:
    """Lets JAX trace cuDNN's attention where there is no cuDNN to ask for its version.

    JAX has no public way to say it: the target's own version answers for it.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    try:
        fused_attention_stablehlo.check_cudnn_version()
    except RuntimeError:
        major, minor = re.search(r"dnn_version_info \{ major: (\d+) minor: (\d+)", text).groups()
        version = 10_000 * int(major) + 100 * int(minor)
        fused_attention_stablehlo.check_cudnn_version = lambda: version
