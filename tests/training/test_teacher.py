"""Learning from a dense model, `train.teacher`: exact, and in whole runs."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.devices import sharding
from caat_jax.errors import InputError
from caat_jax.model import loss
from caat_jax.training import loop, teacher
from caat_jax.training.step import Programs
from configs import base
from tests import models, reference, runs

MODEL = dict(tp_shards=8, sync_factor=0.5)
# Another model altogether: only the vocabulary is the same.
TEACHER = dict(tp_shards=8, layers=3, embed_dim=48, heads=8, mlp_dim=64, sync_factor=1.0)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ({}, 1),
        pytest.param({"model": 8}, 1, marks=pytest.mark.slow),
        ({"model": 2, "data": 2}, 2),
    ],
    ids=str,
)
def test_loss_and_gradients(mesh, parts):
    config = models.small_config(model=MODEL, mesh=mesh, accumulation_steps=parts)
    taught_by = models.small_config(model=TEACHER, mesh=mesh)
    parameters, theirs = models.random_parameters(config), models.random_parameters(taught_by, 1)
    rows = np.random.default_rng(0).integers(0, 64, (4, 11), dtype=np.int32)
    rows[1, -3:] = -1
    inputs = np.maximum(rows[:, :-1], 0)
    logits = reference.forward(theirs, inputs, **models.method(taught_by)).logits
    method = models.method(config)
    expected = reference.loss_and_gradients(
        parameters, inputs, rows[:, 1:], teacher=logits, **method
    )

    mesh = models.programs(config).mesh
    programs = Programs(config, mesh, taught_by.model)
    gradients_of = programs._shard_map(
        programs._loss_and_gradients, (P(), programs.blueprint.specs), programs.teacher.specs
    )
    found = jax.jit(gradients_of)(
        models.on_mesh(programs, parameters),
        rows,
        models.on_mesh(models.programs(taught_by), theirs),
    )
    assert float(found[0]) == pytest.approx(expected[0], rel=1e-5)
    errors = jax.tree.map(models.relative_error, jax.tree.map(np.asarray, found[1]), expected[1])
    assert max(jax.tree.leaves(errors)) < 1e-5


def test_ids_of_no_probability_count_nothing():
    random = np.random.default_rng(0)
    logits, taught = random.normal(size=(2, 1, 1, 3, 8)).astype(np.float32)
    padded = [np.where(np.arange(8) < 6, part, -np.inf) for part in (logits, taught)]

    @jax.jit
    def divergence(ours, theirs):
        on_one = jax.shard_map(
            loss.divergence,
            mesh=sharding.create_mesh(models.small_config().mesh, jax.devices()[:1]),
            in_specs=P(),
            out_specs=P(),
        )
        return jnp.sum(on_one(ours, theirs))

    expected = float(divergence(logits[..., :6], taught[..., :6]))
    value, gradient = jax.jit(jax.value_and_grad(divergence))(*padded)
    assert value == pytest.approx(expected, rel=1e-6)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[..., 6:])


THREE_SHARDS = {
    "model.tp_shards": 3,
    "model.heads": 9,
    "model.kv_heads": 9,
    "model.head_dim": 4,
    "model.mlp_dim": 66,
    "model.vocab_size": 264,
}


def config_with(folder, fields):
    config = base.get_config()
    config.update_from_flattened_dict(runs.SMALL | fields | {"data.cache_dir": f"{folder}/cache"})
    return resolve(config)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """A folder, the fields of a configuration, and the workdir of two steps at p = 1."""
    folder = tmp_path_factory.mktemp("teacher")
    fields = runs.corpus(folder) | {"train.steps": 2, "model.sync_factor": 1.0}
    loop.train(config_with(folder, fields), folder / "dense")
    return folder, fields, folder / "dense"


def test_what_equals_its_teacher_has_nothing_to_learn(dense_run, tmp_path):
    folder, fields, dense = dense_run
    shutil.copytree(dense, tmp_path / "run")
    fields = fields | {"train.steps": 4, "train.teacher": str(dense)}
    loop.train(config_with(folder, fields), tmp_path / "run")
    losses = runs.series(tmp_path / "run", "train/loss")
    assert losses[3] == pytest.approx(0, abs=1e-6)
    assert losses[4] > 1e-4  # Adam's step is as long, however small the gradient
    assert runs.series(tmp_path / "run", "eval/loss")[4] > 1  # of the text, as ever


@pytest.mark.parametrize(
    ("fields", "of_the_teacher", "words"),
    [
        ({}, "nowhere", "has no checkpoint"),
        ({"model.vocab_size": 512}, "dense", "model.vocab_size=264, and this run 512"),
        (THREE_SHARDS, "dense", "model.heads=8 does not divide over model.tp_shards=3"),
    ],
)
def test_refused(dense_run, fields, of_the_teacher, words):
    folder, common, _ = dense_run
    fields = common | {"train.teacher": f"{folder}/{of_the_teacher}"} | fields
    config = config_with(folder, fields)
    tokenizer = load_tokenizer("bytes")
    config = config.with_vocabulary(tokenizer.size)
    mesh = sharding.create_mesh(resolve_mesh(config, 8))
    with pytest.raises(InputError, match=words) as error:
        teacher.load(config, mesh, tokenizer)
    assert str(error.value).startswith(f"train.teacher={folder}/{of_the_teacher}")
