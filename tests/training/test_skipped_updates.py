"""Updates whose loss or gradient is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caat_jax.model import loss
from tests import models, runs
from tests.training.test_optimizer import closed_form

MARK = 63  # a token that the batches do not have, but for the bad one


def batches(programs, number):
    train, data = programs.config.train, programs.config.data
    random = np.random.default_rng(0)
    shape = (train.global_batch, data.sequence_length + 1)
    return [random.integers(MARK, size=shape, dtype=np.int32) for _ in range(number)]


def train(programs, rows):
    """The state after these batches, and the metrics of each."""
    state, metrics = programs.initial_state(), []
    for batch in rows:
        batch = jax.device_put(batch, programs.batch_sharding)
        state, values = jax.block_until_ready(programs.train_step(state, batch))
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_as_if_it_had_not_been(monkeypatch, bad):
    """Parameters, moments, the schedule: all go on where they were."""
    cross_entropy = loss.cross_entropy

    def bad_where_marked(logits, targets):
        factor = jnp.where(jnp.any(targets == MARK), bad, 1.0)
        return cross_entropy(logits, targets) * factor

    monkeypatch.setattr(loss, "cross_entropy", bad_where_marked)
    programs = models.programs(models.small_config(mesh={"data": 2, "fsdp": 2, "model": 2}))
    good = batches(programs, 4)
    marked = good[0].copy()
    marked[1, 5] = MARK  # on one device of eight
    expected, expected_metrics = train(programs, good)
    state, metrics = train(programs, [*good[:2], marked, marked, *good[2:]])

    for field in ("parameters", "optimizer_state"):
        leaves = zip(*(jax.tree.leaves(getattr(s, field)) for s in (state, expected)), strict=True)
        for leaf, expected_leaf in leaves:
            np.testing.assert_array_equal(leaf, expected_leaf)
    assert (int(state.step), int(expected.step)) == (6, 4)
    assert [m["train/skipped_updates"] for m in metrics] == [0, 0, 1, 2, 2, 2]
    assert [m["train/skipped_in_a_row"] for m in metrics] == [0, 0, 1, 2, 0, 0]
    rates = [closed_form(programs.config.optimizer, update) for update in (0, 1, 2, 2, 2, 3)]
    assert [m["learning_rate"] for m in metrics] == pytest.approx(rates, rel=1e-5)
    assert not np.isfinite([m["train/loss"] for m in metrics[2:4]]).any()
    assert metrics[4]["train/loss"] == expected_metrics[2]["train/loss"]


def test_too_many_in_a_row_end_the_run(tmp_path):
    """The first update makes every later loss infinite."""
    fields = runs.corpus(tmp_path) | {
        "optimizer.peak_learning_rate": 1e30,
        "optimizer.warmup_steps": 0,
        "train.skipped_updates_allowed": 3,
        "train.log_every": 10,
        "train.checkpoint_every": 2,
    }
    run = runs.Run(tmp_path / "run", fields, devices=1)
    assert run.wait() == 3
    (line,) = [line for line in run.said() if line.startswith("error")]
    assert "not finite at 4 steps in a row, the last being step 5" in line
    assert runs.lines_of(tmp_path / "run")[-1]["train/skipped_updates"] == 4
    assert runs.checkpoint_steps(tmp_path / "run") == [2, 4]
