"""Options of XLA that programs are compiled with, by platform; the one place for them.

docs/communication.md has what they change in the compiled 7B step and prefill.
"""

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from caat_jax.devices import chips

_FUSE_ALL_REDUCE = "xla_tpu_enable_async_collective_fusion_fuse_all_reduce"

OPTIONS: dict[str, dict[str, bool]] = {
    # Runs a collective in steps beside matrix products that do not need it: the partial
    # channel-reduce beside the product of the private channels (forward) and those of weight
    # gradients (backward), gathers over `fsdp` beside what comes before their use.  All six are
    # needed: without one of the first three, or of the last two, the reductions wait.
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        _FUSE_ALL_REDUCE: True,
        "xla_tpu_async_collective_fusion_fuse_multiple_collectives": True,
        "xla_enable_async_all_gather": True,
        "xla_enable_async_all_reduce": True,
    },
}

# Instead, a TPU's SparseCores can run reductions, beside whatever does not need them; XLA fuses one
# with two products at most.  Where fusing is allowed, it is what XLA does.
_OFFLOAD = {
    _FUSE_ALL_REDUCE: False,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_all_reduce_offload_tracing": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
}


def options(platform: str, *, offload_reductions: bool = False) -> dict[str, bool]:
    """For `jax.jit(compiler_options=…)`; none for platforms where none were found to help."""
    chosen = OPTIONS.get(platform, {})
    return chosen | _OFFLOAD if offload_reductions else chosen


def can_offload_reductions(mesh: Mesh | AbstractMesh, dtype: jnp.dtype) -> bool:
    """Whether all-reduces of this type can run on cores of their own: bfloat16 on some TPUs.

    With other types, whole programs have not been compiled so.
    """
    if not isinstance(mesh, Mesh) or dtype != jnp.bfloat16:
        return False
    chip = chips.by_device_kind(mesh.devices.flat[0].device_kind)
    return chip is not None and chip.sparse_cores
