"""Options of XLA that programs are compiled with, by platform; the one place for them.

docs/communication.md has what each changes in the compiled 7B step.
"""

OPTIONS: dict[str, dict[str, bool]] = {
    # Collectives in steps beside matrix products, instead of one after the other: the partial
    # channel-reduce beside the product of the private channels (forward) and of the weight's
    # gradient (backward), `fsdp` gathers beside the layer's other products.
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        "xla_enable_async_all_reduce": True,
    },
}


def options(platform: str) -> dict[str, bool]:
    """For `jax.jit(compiler_options=…)`; empty for platforms that are compiled for as they are."""
    return OPTIONS.get(platform, {})
