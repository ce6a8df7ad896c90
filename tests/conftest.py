"""Every test sees eight simulated CPU devices."""

import os
from pathlib import Path

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


TESTS = Path(__file__).parent
# A file is run by one process: the longest come first, so that both end at about the same time.
LONGEST_FILES = (
    "devices/test_processes.py",
    "test_any_configuration.py",
    "training/test_train_loop.py",
    "training/test_sync_schedule.py",
    "sweep/test_sweep.py",
    "sensitivity/test_sensitivity.py",
    "evaluation/test_harness.py",
    "model/test_partial_sync.py",
    "inference/test_generator.py",
    "communication/test_communication.py",
    "huggingface/test_transformers.py",
    "test_untrusted.py",
)


def pytest_collection_modifyitems(items):
    ranks = {TESTS / name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
