"""Runs of train.py on eight simulated devices: killed again and again, and long ones."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from caat_jax.training.metrics import read_metrics
from tests.command_line import REPOSITORY
from tests.soak import soak, stop_one_of_two


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    assert "all as it was" in soak(tmp_path, kills=30, seed=1)


@pytest.mark.slow
def test_a_stop_of_one_process_stops_both(tmp_path):
    assert "10 stops" in stop_one_of_two(tmp_path, stops=10, seed=1)


def train(workdir, cache, **fields):
    """Runs configs/tiny.py with fields such as `train__steps` replaced; the validation loss."""
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}"]
    command += [f"--config.data.cache_dir={cache}", *flags]
    # As a user's shell has it: conftest.py makes XLA compile fast, slow programs.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(re.search(r"validation loss (\S+) nats", done.stdout)[1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_two_thousand_steps_do_not_hang(tmp_path, cache, attempt):
    """Two programs in flight would hang within a few hundred steps, and XLA abort the process.

    Evaluations and asynchronous saves come in between; metrics are read so seldom that only the
    loop itself can be what waits.
    """
    steps = 2000
    loss = train(
        tmp_path,
        cache,
        model__layers=2,
        model__embed_dim=64,
        model__mlp_dim=128,
        compute__scan_layers=True,
        data__sequence_length=64,
        train__steps=steps,
        train__global_batch=8,
        train__log_every=250,
        train__eval_every=100,
        train__eval_sequences=64,
        train__checkpoint_every=150,
        seed=attempt,
    )
    logged, losses = read_metrics(tmp_path / "metrics.jsonl")["train/loss"]
    assert list(logged) == list(range(250, steps + 1, 250))
    assert np.isfinite(losses).all() and loss < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("sync_factor", [1.0, 0.5])
def test_make_train_learns_python(tmp_path, cache, sync_factor):
    assert train(tmp_path, cache, model__sync_factor=sync_factor) < 2.0
