"""Devices of TPU pods that are not there: real compilers, nothing to run on."""

import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from caat_jax.errors import InputError

EXAMPLES = "v5e:2x4, v5p:4x4x4 or v6e:16x16"


def tpu_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a TPU topology, for compiling only.

    Args:
      name: the generation and the chips along each axis of its torus, such as "v5p:4x4x4".
      slices: how many such pods, joined by the data-centre network.

    Raises:
      InputError: there is no such topology, or libtpu, which knows them, is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={name} needs the TPU compiler, libtpu: pip install -r requirements-tpu.txt"
        )
    if not re.fullmatch(r"v\d\w*:\d+(x\d+){1,2}", name):
        raise InputError(f"--topology={name} is no topology; write it as in {EXAMPLES}")
    if slices < 1:
        raise InputError(f"--slices={slices} must be at least 1")
    # libtpu would ask the machine which TPU it is a part of; any answer will do.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    # Nor does a compiler need a TPU for itself alone.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **several).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise InputError(
            f"--topology={name}: {reason}; there are, for example, {EXAMPLES}"
        ) from None
