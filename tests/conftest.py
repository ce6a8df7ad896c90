"""Every test sees eight simulated CPU devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# The tests compile hundreds of small programs and run each for milliseconds: XLA does without
# optimisation, without MLIR's code generators, which take most of the time, and without dividing a
# program among threads, of which a machine with two busy processes has none to spare.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    + os.environ.get("XLA_FLAGS", "")
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
