"""The command: a dense run becomes a CAAT-Net's workdir, resumed where it stopped, or one line."""

import csv
import json
import runpy
import shutil

import jax
import numpy as np
import pytest

from caat_jax.checkpoints import checkpoints
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.resolve import resolve
from caat_jax.config.sections import MeshConfig
from caat_jax.conversion.progress import Progress
from caat_jax.conversion.texts import open_texts
from caat_jax.data.loader import NOTHING_READ
from caat_jax.data.token_cache import open_cache
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.devices import sharding
from caat_jax.training import loop
from caat_jax.training.step import Programs
from configs import base
from tests import models, runs
from tests.command_line import assert_refused, run_here

COMMAND = "caat_jax/conversion/__main__.py"
TEXTS = [f"text number {n} of those that {'a shard ' * (n % 5)} reads" for n in range(24)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The workdir of a model that has not been trained, its head tied."""
    folder = tmp_path_factory.mktemp("dense")
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text)
    fields = base.get_config()
    fields.model.update(models.SMALL | dict(tied_head=True, vocab_size=264))
    fields.data.update(
        files=f"{folder}/*.txt", cache_dir=f"{folder}/cache", holdout_every=2, sequence_length=64
    )
    config = resolve(fields)
    open_cache(config.data, load_tokenizer("bytes"))  # which says so, the first time
    programs = Programs(config, sharding.create_mesh(MeshConfig(1, 1, 1, 0), jax.devices()[:1]))
    with Checkpoints(folder / "run") as saved:
        saved.save(programs.initial_state(), 0, config, NOTHING_READ)
    return folder / "run"


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    command = [COMMAND, f"--workdir={dense}", "--output=half", "--sync_factor=0.5"]
    code, printed, errors = run_here([*command, "--tp_shards=4"], folder)
    assert code == 0, errors
    return folder / "half", printed


def parameters(workdir):
    step, config = checkpoints.newest_config(workdir)
    mesh = sharding.create_mesh(MeshConfig(1, 1, 1, 0), jax.devices()[:1])
    programs = Programs(config, mesh)
    with Checkpoints(workdir) as saved:
        return config, programs, saved.restore_parameters(step, programs.state_shapes.parameters)


@pytest.mark.slow
def test_output_is_an_ordinary_workdir_with_a_report(dense, converted):
    workdir, printed = converted
    config, programs, values = parameters(workdir)
    assert config.model.sync_factors == ((0.5, 0.5),) * 2
    assert (config.model.tp_shards, config.model.tied_head) == (4, False)
    rows = list(csv.DictReader((workdir / "conversion.csv").open()))
    assert [(row["layer"], row["sublayer"]) for row in rows] == [
        ("0", "attention"), ("0", "mlp"), ("1", "attention"), ("1", "mlp")
    ]  # fmt: skip
    report = json.loads((workdir / "conversion.json").read_text())
    assert f"{report['dense_loss']:.4f}" in printed and f"{report['loss']:.4f}" in printed
    # Any program of these factors: nothing of a converted model is its own.
    batch = np.zeros((8, config.data.sequence_length + 1), np.int32)
    fresh = Programs(config, programs.mesh)
    state = fresh.initial_state()
    texts = [
        p.eval_step.lower(v, batch).as_text() for p, v in ((programs, values), (fresh, state[1]))
    ]
    assert texts[0] == texts[1]
    assert not list(workdir.parent.glob(".*unfinished"))


@pytest.mark.slow
def test_training_goes_on_with_the_dense_model_as_its_teacher(dense, converted, tmp_path):
    workdir = shutil.copytree(converted[0], tmp_path / "half")
    fields = runpy.run_path(str(workdir / "config.py"))["get_config"]()
    stored = checkpoints.newest_config(workdir)[1]
    assert (resolve(fields).model, resolve(fields).data) == (stored.model, stored.data)
    fields.train.update(steps=2, global_batch=8, teacher=str(dense))
    loop.train(resolve(fields), workdir)
    losses = runs.series(workdir, "train/loss")
    assert 0 < losses[1] < 1e-3 < runs.series(workdir, "eval/loss")[2]


@pytest.mark.slow
def test_interrupted_conversion_resumes_to_the_same_weights(
    dense, converted, tmp_path, monkeypatch
):
    """The folder of a conversion that has done the first layer only."""
    command = [COMMAND, f"--workdir={dense}", "--output=half", "--sync_factor=0.5", "--tp_shards=4"]
    saved = []
    monkeypatch.setattr(Progress, "remove", lambda self: saved.append(self._folder))
    code, _, errors = run_here(command, tmp_path)
    assert code == 0, errors
    for path in saved[0].glob("layer_1_*"):
        path.unlink()
    shutil.rmtree(tmp_path / "half")
    code, _, errors = run_here(command, tmp_path)
    assert code == 0, errors
    expected, resumed = (parameters(folder)[2] for folder in (converted[0], tmp_path / "half"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), resumed, expected)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--sync_factor=1.5"], ["sync_factor", "1.5", "[0, 1]"]),
        ([], ["--sync_factor", "--sync_factor_per_layer"]),
        (["--sync_factor_per_layer=(1, 0.5, 0.5)"], ["3 entries", "2"]),
        (["--sync_factor_per_layer=half"], ["--sync_factor_per_layer=half", "tuple"]),
        (["--sync_factor=0.5", "--tp_shards=3"], ["heads", "tp_shards=3"]),
        (["--sync_factor=0.5", "--files=none/*.txt"], ["none/*.txt", "no file"]),
        (["--sync_factor=0.5", "--calibration_tokens=20"], ["0 sequences", "=64"]),
        (["--sync_factor=0.5", "--basis=other"], ["--basis", "rotation"]),
        (["--sync_factor=0.5", "--calibration_tokens=0"], ["calibration_tokens"]),
    ],
)
def test_bad_input(dense, tmp_path, flags, said):
    result = run_here([COMMAND, f"--workdir={dense}", "--output=new", *flags], tmp_path)
    assert_refused(result, *said)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_only_a_dense_model_is_taken(converted, tmp_path):
    command = [COMMAND, f"--workdir={converted[0]}", "--output=new", "--sync_factor=0.25"]
    assert_refused(run_here(command, tmp_path), "p=0.5", "dense")


def test_batches_use_nearly_all_sequences(dense):
    """Of 12 training sequences, in as few batches as the tokens at a time and the mesh allow."""
    config = checkpoints.newest_config(dense)[1]
    expected = {(1000, 1): [12], (300, 1): [4, 4, 4], (300, 4): [4, 4, 4], (64, 8): [8]}
    for (batch_tokens, parts), sizes in expected.items():
        texts = open_texts(
            config.data,
            load_tokenizer("bytes"),
            calibration_tokens=12 * 64 + 1,
            held_out_tokens=64,
            batch_tokens=batch_tokens,
            parts=parts,
            prepare=True,
        )
        assert [len(batch) for batch in texts.calibration] == sizes
        assert len(texts.held_out) == 1
