"""Training, stopping, going on and evaluating: one very small model on eight simulated devices."""

import dataclasses
import hashlib
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.devices import sharding
from caat_jax.errors import InputError
from caat_jax.evaluation import report
from caat_jax.training import loop
from caat_jax.training.metrics import MetricsWriter
from caat_jax.training.step import Programs
from configs import base
from tests import reference
from tests.command_line import FORK_SERVER, run_forked
from tests.runs import (
    BATCH,
    CHECKPOINT_EVERY,
    HOLDOUT,
    LENGTH,
    SMALL,
    STEPS,
    WORDS,
    corpus,
    lines_of,
    series,
    write_texts,
)
from tests.training.test_optimizer import closed_form

KILLED_AT, PROFILED = 13, 3
BOS, EOS, PADDING = 256, 257, -1


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """A function of fields, such as {"train.steps": 10}, that differ from `SMALL`."""
    given = corpus(tmp_path_factory.mktemp("data"))

    def make(fields=None):
        config = base.get_config()
        config.update_from_flattened_dict(SMALL | given | (fields or {}))
        return resolve(config)

    return make


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """The workdir of a run that nothing interrupted, and the loss that it returned."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    steps, loss = loop.train(make_config({"train.profile_step": PROFILED}), workdir)
    assert steps == STEPS
    return workdir, loss


@pytest.fixture(scope="module")
def resumed(make_config, finished, tmp_path_factory):
    """The workdir of a run that was killed and started again."""
    # After `finished`, which prepares the corpus: two processes share the cache here.
    workdir = tmp_path_factory.mktemp("resumed") / "run"
    process = FORK_SERVER.Process(target=train_until_killed, args=(make_config(), workdir))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [line["step"] for line in lines_of(workdir)][-1] == KILLED_AT
    newest, _ = checkpoint.newest_config(workdir)
    assert CHECKPOINT_EVERY <= newest < KILLED_AT  # there are steps to go back over
    loop.train(make_config(), workdir)
    return workdir


def train_until_killed(config, workdir):
    """Runs in a process of its own, which does not live to close anything."""
    jax.config.update("jax_num_cpu_devices", 8)
    write = MetricsWriter.write

    def write_and_die(writer, step, values):
        write(writer, step, values)
        if step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsWriter.write = write_and_die
    loop.train(config, workdir)


def content(folder):
    """Every file below a folder, with its bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def programs_of(config, tokenizer_size=258):
    config = config.with_vocabulary(tokenizer_size)
    mesh = sharding.create_mesh(resolve_mesh(config, len(jax.devices())))
    return Programs(config, mesh)


def reference_settings(config):
    model = config.model
    return {
        "tp_shards": model.tp_shards,
        "sync_widths": model.sync_widths,
        "rope_base": model.rope_base,
        "norm_epsilon": model.norm_epsilon,
    }


# ---- Stopping and going on --------------------------------------------------------------------


def test_killed_run_goes_on_bit_for_bit(make_config, finished, resumed):
    for name in ("train/loss", "train/grad_norm", "learning_rate", "eval/loss"):
        assert series(resumed, name) == series(finished[0], name), name

    programs = programs_of(make_config())
    states = []
    for workdir in (finished[0], resumed):
        with Checkpoints(workdir) as checkpoints:
            states.append(checkpoints.restore(STEPS, programs.state_shapes))
    (expected, expected_data), (state, data) = states
    assert data == expected_data
    for leaf, expected_leaf in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf, expected_leaf)


def test_each_step_is_in_the_metrics_once(resumed):
    steps = [line["step"] for line in lines_of(resumed) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert list(series(resumed, "eval/loss")) == [10, 20]


def test_another_decay_is_said(make_config, finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    loop.train(make_config({"train.steps": 22, "optimizer.decay_steps": 99}), workdir)
    said = capsys.readouterr().err
    assert "optimizer.decay_steps was 20 and is now 99: at step 20 the learning rate" in said
    assert "--config.optimizer.decay_steps=20 keeps its course" in said


def test_finished_run_started_again_changes_nothing(make_config, finished):
    workdir, loss = finished
    metrics, saved = lines_of(workdir), content(workdir / "checkpoints")
    assert loop.train(make_config(), workdir) == (STEPS, loss)
    assert lines_of(workdir) == metrics
    assert content(workdir / "checkpoints") == saved


def test_old_checkpoints_are_deleted(make_config, finished):
    kept = make_config().train.checkpoints_to_keep
    assert kept == 2
    names = {path.name for path in (finished[0] / "checkpoints").iterdir()}
    assert names == {"15", "20"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        (
            {"train.global_batch": 16},
            "is now 16; the batch of a run stays the same",
        ),
        ({"data.sequence_length": 16}, "sequence_length was 32 and is now 16"),
        ({"data.holdout_every": 2}, "the text is no longer that with which the run began"),
        ({"model.sync_factor": 1.0}, "model.sync_factors: stored 0.5, requested 1.0"),
        ({"model.heads": 16, "model.kv_heads": 16}, "model.heads: stored 8, requested 16"),
        ({"model.vocab_size": 272}, "model.vocab_size: stored 264, requested 272"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_run_cannot_go_on_with_something_else(make_config, finished, fields, said):
    before = content(finished[0])
    with pytest.raises(InputError, match=re.escape(said)):
        loop.train(make_config({"train.steps": 40} | fields), finished[0])
    assert content(finished[0]) == before


# ---- What a run writes ------------------------------------------------------------------------


def test_metrics(make_config, finished):
    lines, config = lines_of(finished[0]), make_config()
    assert {frozenset(line) for line in lines} == {
        frozenset(
            (
                "step",
                "train/loss",
                "train/grad_norm",
                "train/skipped_updates",
                "learning_rate",
                "step_time_ms",
                "tokens_per_second",
            )
        ),
        frozenset(("step", "eval/loss")),
    }
    assert lines[-1] == {"step": STEPS, "eval/loss": finished[1]}
    rates, times = series(finished[0], "learning_rate"), series(finished[0], "step_time_ms")
    for step, speed in series(finished[0], "tokens_per_second").items():
        assert rates[step] == pytest.approx(closed_form(config.optimizer, step - 1), rel=1e-5)
        assert speed * times[step] / 1000 == pytest.approx(BATCH * LENGTH)


def test_every_step_has_its_time(finished):
    """That the clock stops around evaluations and saves is the throughput's (`test_metrics.py`)."""
    times = series(finished[0], "step_time_ms")
    assert sorted(times) == sorted(series(finished[0], "train/loss"))
    assert all(0 < time < np.inf for time in times.values())


def test_one_program_at_a_time(make_config, tmp_path, monkeypatch):
    """On simulated devices a second program could hang both; see `one_program_at_a_time`."""
    latest, overlaps = [], []

    def watched(program):
        def run(first, batch):
            overlaps.extend(output for output in latest if not output.is_ready())
            outputs = program(first, batch)
            latest[:] = jax.tree.leaves(outputs[1])
            return outputs

        return run

    class WatchedPrograms(Programs):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.eval_step = watched(self.eval_step)

        def compile_train_step(self):
            return watched(super().compile_train_step())

    monkeypatch.setattr(loop, "Programs", WatchedPrograms)
    config = make_config({"train.steps": 12, "train.log_every": 12, "train.global_batch": 16})
    loop.train(config, tmp_path)
    assert latest and overlaps == []


def test_profile_is_written(finished):
    assert [path.suffix for path in (finished[0] / "profile").rglob("*.xplane.pb")] == [".pb"]


# ---- Loss -------------------------------------------------------------------------------------


def test_loss_decreases(finished):
    losses = series(finished[0], "train/loss")
    assert losses[1] == pytest.approx(np.log(264), abs=0.1)
    assert losses[STEPS] < losses[1] - 2


def test_bfloat16_overfits_a_few_sentences(make_config, tmp_path):
    """And metrics are logged every so often, also at the last step."""
    write_texts(tmp_path / "texts", [" ".join(WORDS), " ".join(WORDS[::-1]), "private ones"])
    fields = {
        "compute.dtype": "bfloat16",
        "data.files": f"{tmp_path}/texts/*.txt",
        "data.holdout_every": 2,
        "train.steps": 80,
        "train.log_every": 9,
        "train.eval_every": 80,
        "train.checkpoint_every": 80,
        "optimizer.decay_steps": 80,
    }
    loop.train(make_config(fields), tmp_path / "run")
    losses, times = series(tmp_path / "run", "train/loss"), series(tmp_path / "run", "step_time_ms")
    assert losses[80] < 0.1
    assert list(losses) == list(times) == [*range(9, 80, 9), 80]
    for step, speed in series(tmp_path / "run", "tokens_per_second").items():
        assert speed * times[step] / 1000 == pytest.approx(BATCH * LENGTH)


@pytest.mark.parametrize(
    "fields",
    [
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.model": 2},
        pytest.param({"mesh.data": 8, "mesh.model": 1}, marks=pytest.mark.slow),
        {"train.accumulation_steps": 4, "mesh.data": 2, "mesh.model": 4},
    ],
    ids=str,
)
def test_losses_do_not_depend_on_mesh_or_accumulation(make_config, finished, tmp_path, fields):
    loop.train(make_config({"train.steps": 10} | fields), tmp_path)
    # AdamW forgives gradients that are too large everywhere; their norm does not.
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        expected = series(finished[0], name)
        for step, value in series(tmp_path, name).items():
            assert value == pytest.approx(expected[step], abs=1e-5), (name, step)


def validation_sequences(config):
    """By hand: documents whose digest is a multiple of 3, in one row, every T + 1 tokens."""
    tokens = []
    for path in sorted(Path(config.data.files).parent.glob("*.txt")):
        text = path.read_bytes()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        if int.from_bytes(digest, "big") % HOLDOUT == 0:
            tokens += [BOS, *text, EOS]
    starts = range(0, len(tokens) - 1, LENGTH)
    rows = [tokens[start : start + LENGTH + 1] for start in starts]
    rows[-1] += [PADDING] * (LENGTH + 1 - len(rows[-1]))
    return np.array(rows)


def test_validation_loss_is_the_mean_over_all_tokens(make_config, finished):
    config = make_config()
    rows = validation_sequences(config)
    assert rows[-1, -1] == PADDING and len(rows) % BATCH  # both kinds of padding are in play
    programs = programs_of(config)
    with Checkpoints(finished[0]) as checkpoints:
        parameters = jax.device_get(
            checkpoints.restore_parameters(STEPS, programs.state_shapes.parameters)
        )
    expected = reference.loss(
        parameters, np.maximum(rows[:, :-1], 0), rows[:, 1:], **reference_settings(config)
    )
    assert finished[1] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 1, 8),
        (2, 2, 2),
        *(pytest.param(m, marks=pytest.mark.slow) for m in [(8, 1, 1), (2, 1, 4), (1, 4, 2)]),
    ],
    ids=str,
)
def test_evaluation_repeats_the_loss_on_any_mesh(finished, mesh):
    workdir, loss = finished
    step, config = checkpoint.newest_config(workdir)
    assert step == STEPS
    sizes = dataclasses.replace(config.mesh, data=mesh[0], fsdp=mesh[1], model=mesh[2])
    config = dataclasses.replace(config, mesh=sizes)
    evaluated = report.evaluate_checkpoint(workdir, step, config).loss
    assert evaluated == pytest.approx(loss, abs=1e-6 if mesh == (1, 1, 8) else 1e-5)


def test_eval_py_repeats_the_loss_on_one_device(finished, tmp_path):
    """The run left its mesh to be worked out, so eval.py takes what it finds: one CPU."""
    workdir, loss = finished
    code, stdout, stderr = run_forked(["eval.py", f"--workdir={workdir}"], tmp_path)
    assert code == 0, stderr
    (printed,) = re.findall(r"^validation loss +(\d+\.\d+) +nats per token", stdout, re.M)
    assert stdout.startswith("step 20, S=8, p=0.5\n")
    assert float(printed) == pytest.approx(loss, abs=1e-5)


def test_evaluation_leaves_the_run_alone(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    step, config = checkpoint.newest_config(tmp_path / "run")
    report.evaluate_checkpoint(tmp_path / "run", step, config)
    assert content(tmp_path / "run") == content(finished[0])


def test_padding_is_not_counted(make_config):
    """Rows of very different lengths: a mean over microbatches' means would be another number."""
    config = make_config({"train.accumulation_steps": 4, "mesh.data": 2, "mesh.model": 4})
    random = np.random.default_rng(1)
    rows = random.integers(0, 258, (BATCH, LENGTH + 1), dtype=np.int32)
    for row, length in zip(rows, (33, 2, 30, 1, 5, 33, 17, 9), strict=True):
        row[length:] = PADDING
    programs = programs_of(config)
    state = programs.initial_state()
    parameters = jax.device_get(state.parameters)
    batch = jax.device_put(rows, programs.batch_sharding)
    _, metrics = jax.block_until_ready(programs.train_step(state, batch))

    expected, gradients = reference.loss_and_gradients(
        parameters, np.maximum(rows[:, :-1], 0), rows[:, 1:], **reference_settings(config)
    )
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
    assert float(metrics["train/loss"]) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["train/grad_norm"]) == pytest.approx(norm, rel=1e-5)
