"""`train.sync_schedule`: which synchronisation factors a step has, in training and after it."""

import itertools
import re
import shlex
import shutil
import time

import jax
import numpy as np
import pytest

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.config.sections import MeshConfig
from caat_jax.data.loader import train_batches
from caat_jax.data.token_cache import open_cache
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.devices import sharding
from caat_jax.devices.processes import StopRequest
from caat_jax.errors import InputError, Interrupted
from caat_jax.evaluation import report
from caat_jax.training import loop
from caat_jax.training.step import Programs
from configs import base
from tests import models, reference
from tests.command_line import REPOSITORY, flags_of, run_forked
from tests.huggingface.folders_by_hand import do, llama_by_hand
from tests.huggingface.test_import_export import write_tokenizer
from tests.runs import SMALL, corpus, series

WIDTH, STEPS = SMALL["model.embed_dim"], 6
ALL, MIXED, HALF = ((1.0, 1.0),) * 2, ((1.0, 1.0), (0.5, 0.0)), ((0.5, 0.5),) * 2
SCHEDULE = ((2, 1.0), (4, (1.0, (0.5, 0.0))))
FACTORS = {0: ALL, 1: ALL, 2: ALL, 3: MIXED, 4: MIXED, 5: HALF, 6: HALF, 7: HALF}  # by step
FIELDS = {
    "model.sync_factor": 0.5,
    "train.sync_schedule": SCHEDULE,
    "train.steps": STEPS,
    "train.eval_every": 1,
    "train.checkpoint_every": 1,
    "train.checkpoints_to_keep": STEPS,
}
METRICS = ("train/loss", "train/grad_norm", "learning_rate", "eval/loss")


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """A function of fields that differ from the run's."""
    given = corpus(tmp_path_factory.mktemp("data"))

    def make(fields=None):
        config = base.get_config()
        config.update_from_flattened_dict(SMALL | given | FIELDS | (fields or {}))
        return resolve(config)

    return make


class Compiling:
    """The factors of each training step that a run has compiled, and the seconds it took."""

    def __init__(self, monkeypatch):
        self.factors, self.seconds = factors, seconds = [], []

        class CountedPrograms(Programs):
            def compile_train_step(self):
                start = time.perf_counter()
                compiled = super().compile_train_step()
                seconds.append(time.perf_counter() - start)
                factors.append(self.config.model.sync_factors)
                return compiled

        monkeypatch.setattr(loop, "Programs", CountedPrograms)


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """The workdir of a run that nothing interrupted, and what it compiled."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        compiling = Compiling(monkeypatch)
        loop.train(make_config({"train.profile_step": 4}), workdir)
    return workdir, compiling


def as_of(step, workdir, copy):
    """A copy of the run as it was when it had just saved a step."""
    shutil.copytree(workdir, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return copy


def programs_of(config):
    config = config.with_vocabulary(258)
    return Programs(config, sharding.create_mesh(resolve_mesh(config, len(jax.devices()))))


def state_after(step, workdir, programs):
    with Checkpoints(workdir) as checkpoints:
        return jax.device_get(checkpoints.restore(step, programs.state_shapes))


def assert_same_run(workdir, expected, programs):
    """Metrics and final state, bit for bit."""
    for name in METRICS:
        assert series(workdir, name) == series(expected, name), name
    (state, data), (expected_state, expected_data) = (
        state_after(STEPS, folder, programs) for folder in (workdir, expected)
    )
    assert data == expected_data
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


def reference_loss(config, parameters, rows, factors):
    """In float64, with these factors whatever the configuration says."""
    settings = models.method(config)
    settings["sync_widths"] = [tuple(int(WIDTH * p) for p in pair) for pair in factors]
    return reference.loss(parameters, np.maximum(rows[:, :-1], 0), rows[:, 1:], **settings)


def corpus_of(config, is_imported=False):
    """`is_imported`: documents begin as the imported model's tokeniser begins them."""
    tokenizer = load_tokenizer(config.data.tokenizer, is_imported=is_imported)
    return open_cache(config.data, tokenizer)


def training_rows(config, step, is_imported=False):
    """int32 [B, T + 1], the batch of a step."""
    one_device = sharding.create_mesh(MeshConfig(1, 1, 1, 0), jax.devices()[:1])
    batches = train_batches(
        corpus_of(config, is_imported).train,
        global_batch=config.train.global_batch,
        seed=config.seed,
        sharding=sharding.batch_sharding(one_device),
        first_batch=step - 1,
    )
    return np.asarray(next(batches))


# ---- The function of each step ----------------------------------------------------------------


def test_each_step_and_its_validation_have_the_factors_of_its_stage(make_config, finished):
    config, (workdir, _) = make_config(), finished
    programs = programs_of(config)
    sequences = corpus_of(config).validation
    validation_rows = np.stack([sequences[n] for n in range(len(sequences))])
    trained, validated = series(workdir, "train/loss"), series(workdir, "eval/loss")
    parameters = jax.device_get(programs.initial_state().parameters)
    for step in range(1, STEPS + 1):
        rows = training_rows(config, step)
        losses = {f: reference_loss(config, parameters, rows, f) for f in (ALL, MIXED, HALF)}
        right = losses.pop(FACTORS[step])
        assert trained[step] == pytest.approx(right, abs=2e-6), step
        # What the other factors give is another loss, so that the line above tells them apart.
        assert min(abs(wrong - right) for wrong in losses.values()) > 1e-4
        parameters = state_after(step, workdir, programs)[0].parameters
        right = reference_loss(config, parameters, validation_rows, FACTORS[step])
        assert validated[step] == pytest.approx(right, abs=2e-6), step


def test_synchronised_run_gone_on_with_is_the_same(make_config, finished, tmp_path):
    """Two steps of an ordinary p = 1 run, then the schedule, which says what its factors were."""
    full = make_config({"model.sync_factor": 1.0, "train.sync_schedule": (), "train.steps": 2})
    loop.train(full, tmp_path)
    loop.train(make_config(), tmp_path)
    assert_same_run(tmp_path, finished[0], programs_of(full))


# ---- Stopping and going on --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "described"),
    [
        pytest.param(
            1,
            "1.0 to step 2, then 1.0 in 1 layer, (0.5, 0.0) in 1 layer to step 4, then 0.5",
            marks=pytest.mark.slow,
        ),
        (3, "p=1.0 in 1 layer, (0.5, 0.0) in 1 layer to step 4, then 0.5"),
        (4, "p=0.5"),
        pytest.param(5, "p=0.5", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_run_goes_on_bit_for_bit(
    make_config, finished, tmp_path, monkeypatch, capsys, step, described
):
    """Inside of each stage and where one ends; each of the later ones is compiled once.

    For step 2 see `test_synchronised_run_gone_on_with_is_the_same`.
    """
    workdir = as_of(step, finished[0], tmp_path / "run")
    compiling = Compiling(monkeypatch)
    loop.train(make_config(), workdir)
    assert_same_run(workdir, finished[0], programs_of(make_config()))
    later = [FACTORS[n] for n in range(step + 1, STEPS + 1)]
    assert compiling.factors == list(dict.fromkeys(later))
    assert f"{described}\n8 cpu" in capsys.readouterr().err


def test_run_stopped_at_the_end_of_a_stage(make_config, tmp_path, monkeypatch):
    """It saves that stage's factors, also where no checkpoint was due."""
    asked = itertools.count(1)  # after each step
    monkeypatch.setattr(StopRequest, "reached", lambda self: next(asked) == 2)
    fields = {"train.checkpoint_every": 100, "train.eval_every": 100}
    with pytest.raises(Interrupted, match="after step 2"):
        loop.train(make_config(fields), tmp_path)
    step, stored = checkpoint.newest_config(tmp_path)
    assert (step, stored.model.sync_factors) == (2, ALL)


def test_finished_run_started_again_validates_its_last_function(make_config, finished, tmp_path):
    workdir = as_of(2, finished[0], tmp_path / "run")
    loss = series(finished[0], "eval/loss")[2]
    assert loop.train(make_config({"train.steps": 2}), workdir) == (2, loss)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train.sync_schedule": ()}, "model.sync_factors: stored 1.0, requested 0.5"),
        ({"train.sync_schedule": ((1, 1.0),)}, "stored 1.0, requested 0.5"),
        ({"train.sync_schedule": ((2, 0.75),)}, "stored 1.0, requested 0.75"),
    ],
    ids=str,
)
def test_run_cannot_go_on_with_other_factors(make_config, finished, tmp_path, fields, said):
    workdir = as_of(2, finished[0], tmp_path / "run")
    hint = "train.sync_schedule change model.sync_factors after step 2"
    with pytest.raises(InputError, match=f"{re.escape(said)}.*{re.escape(hint)}"):
        loop.train(make_config(fields), workdir)


# ---- What a run writes, and what it compiles ----------------------------------------------------


def test_each_stage_is_compiled_once_and_outside_of_the_step_times(finished):
    workdir, compiling = finished
    assert compiling.factors == [ALL, MIXED, HALF]
    times = series(workdir, "step_time_ms")
    for step, seconds in zip((3, 5), compiling.seconds[1:], strict=True):
        assert times[step] / 1000 < seconds


def test_later_stage_is_profiled(finished):
    assert len(list((finished[0] / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_checkpoint_has_the_factors_of_its_step(finished, step):
    stored = checkpoint.stored_config(finished[0] / "checkpoints", step)
    assert stored.model.sync_factors == FACTORS[step]
    over = stored.train.sync_schedule
    assert over == (((2, ALL), (4, MIXED))[: (step - 1) // 2])


@pytest.mark.parametrize("step", [2, 4])
def test_evaluation_repeats_the_loss_of_the_stage(finished, tmp_path, step):
    workdir = as_of(step, finished[0], tmp_path / "run")
    newest, config = checkpoint.newest_config(workdir)
    assert newest == step
    loss = report.evaluate_checkpoint(workdir, newest, config).loss
    assert loss == series(finished[0], "eval/loss")[step]


def test_configuration_at_a_step(make_config):
    config = make_config()
    for step, factors in FACTORS.items():
        assert config.at_step(step).model.sync_factors == factors, step
        for later in range(step, STEPS + 2):
            assert config.at_step(later).at_step(step) == config.at_step(step)
            # Nothing is said of steps to come: the factors stay.
            assert config.at_step(step).at_step(later).model.sync_factors == factors
    assert config.at_step(5) == config
    plain = make_config({"train.sync_schedule": ()})
    assert plain.at_step(0) == plain.at_step(100) == plain


# ---- From a dense Llama -------------------------------------------------------------------------


def test_imported_llama_becomes_a_caat_net(tmp_path, capsys):
    """With what the import prints, and the two flags of docs/huggingface.md."""
    dense = llama_by_hand(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama/tokenizer.json")
    workdir = tmp_path / "run"
    said = do(capsys, "import", tmp_path / "llama", workdir, "--tp_shards=4")
    (printed,) = [line for line in said.splitlines() if "train.py" in line]
    document = (REPOSITORY / "docs/huggingface.md").read_text()
    documented = re.search(r"--config\.model\.sync_factor=.* --config\.train\.sync.*", document)
    fields = corpus(tmp_path) | {
        "data.holdout_every": 3,
        "data.sequence_length": 16,
        "optimizer.warmup_steps": 0,
        "train.steps": 2,
        "train.global_batch": 2,
    }
    _, *command = shlex.split(printed)
    flags = [*flags_of(fields), *shlex.split(documented[0])]
    code, trained, stderr = run_forked([*command, *flags], tmp_path)
    assert code == 0 and "S=4, p=0.5\n" in stderr, stderr

    step, config = checkpoint.newest_config(workdir)
    assert (step, config.model.sync_factors) == (2, HALF)
    rows = training_rows(config, 1, is_imported=True)
    expected = reference_loss(config, dense, rows, HALF)
    assert series(workdir, "train/loss")[1] == pytest.approx(expected, rel=1e-5)
    code, evaluated, stderr = run_forked(["eval.py", f"--workdir={workdir}"], tmp_path)
    assert code == 0 and evaluated.startswith("step 2, S=4, p=0.5\n"), stderr
    losses = [
        float(re.search(r"validation loss +(\d+\.\d+)", text)[1]) for text in (trained, evaluated)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=6e-5)  # the first has four digits
