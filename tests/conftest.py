"""Every test sees eight simulated CPU devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# The tests compile hundreds of small programs and run each for milliseconds.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    + os.environ.get("XLA_FLAGS", "")
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
