"""Options of XLA that programs are compiled with, by platform; the one place for them.

docs/communication.md has what they change in the compiled 7B step.
"""

OPTIONS: dict[str, dict[str, bool]] = {
    # Runs a collective in steps beside matrix products that do not need it: the partial
    # channel-reduce beside the product of the private channels (forward) and those of weight
    # gradients (backward), gathers over `fsdp` beside what comes before their use.  All six are
    # needed: without one of the first three, or of the last two, the reductions wait.
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_tpu_async_collective_fusion_fuse_multiple_collectives": True,
        "xla_enable_async_all_gather": True,
        "xla_enable_async_all_reduce": True,
    },
}


def options(platform: str) -> dict[str, bool]:
    """For `jax.jit(compiler_options=…)`; none for platforms where none were found to help."""
    return OPTIONS.get(platform, {})
