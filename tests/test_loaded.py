"""`caat_jax.load`: the model of a run, against the float64 emulation and the compiled commands."""

import numpy as np
import pytest

import caat_jax
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.data.loader import NOTHING_READ
from caat_jax.errors import InputError
from caat_jax.huggingface import importing
from caat_jax.inference.generator import Generator
from caat_jax.inference.sampling import Sampling
from tests import models, reference
from tests.huggingface.folders_by_hand import llama_by_hand

TOKENS = np.random.default_rng(0).integers(0, 64, size=(3, 9))  # no multiple of any mesh
MESHES = [dict(model=1), dict(data=2, fsdp=2, model=2), None]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with random weights, its configuration, and the weights."""
    config = models.small_config(model=dict(sync_factor=0.5))
    programs = models.programs(config)
    parameters = models.random_parameters(config, 7)
    workdir = tmp_path_factory.mktemp("loaded") / "run"
    with Checkpoints(workdir) as checkpoints:
        state = programs.fresh_state(models.on_mesh(programs, parameters))
        checkpoints.save(state, 0, config, NOTHING_READ)
    return workdir, config, parameters


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_logits_loss_and_streams(run, mesh):
    workdir, config, parameters = run
    model = caat_jax.load(workdir, mesh=mesh)
    method = models.method(config)
    expected = reference.forward(parameters, TOKENS, **method)
    np.testing.assert_allclose(model.logits(TOKENS), expected.logits, atol=1e-5)
    loss = reference.loss(parameters, TOKENS[:, :-1], TOKENS[:, 1:], **method)
    assert model.loss(TOKENS) == pytest.approx(loss, abs=1e-5)
    common, private = model.streams(TOKENS)
    streams_SBTD = expected.streams
    width = common.shape[-1]
    assert width == 16
    for stream_BTD in streams_SBTD:
        np.testing.assert_allclose(common, stream_BTD[..., :width], atol=1e-5)
    np.testing.assert_allclose(private, streams_SBTD[..., width:], atol=1e-5)


def test_another_sync_factor_is_another_function(run):
    workdir, config, parameters = run
    model = caat_jax.load(workdir, mesh=dict(model=2), sync_factor=1.0)
    method = models.method(config.with_sync_factor(1.0))
    expected = reference.forward(parameters, TOKENS, **method)
    common, private = model.streams(TOKENS)
    assert private.size == 0
    np.testing.assert_allclose(common, expected.streams[0], atol=1e-5)
    np.testing.assert_allclose(model.logits(TOKENS), expected.logits, atol=1e-5)


def test_another_sync_factor_in_one_layer(run):
    workdir, config, parameters = run
    model = caat_jax.load(workdir, mesh=dict(model=1), sync_factor=[0.5, (1, 0)])
    method = models.method(config.with_sync_factors(((0.5, 0.5), (1.0, 0.0))))
    expected = reference.forward(parameters, TOKENS, **method)
    np.testing.assert_allclose(model.logits(TOKENS), expected.logits, atol=1e-5)


def test_llama_in_hugging_face_format(tmp_path):
    """At p = 1 the same function, whatever S; at p < 1 the one that an import is."""
    parameters = llama_by_hand(tmp_path / "llama")
    for shards, mesh in ((1, dict(model=1)), (4, dict(data=2, model=4))):
        model = caat_jax.load(tmp_path / "llama", mesh=mesh, tp_shards=shards)
        method = models.method(model.config)
        assert method["tp_shards"] == shards
        expected = reference.forward(parameters, TOKENS, **method).logits
        np.testing.assert_allclose(model.logits(TOKENS), expected, atol=1e-5)
    importing.import_llama(tmp_path / "llama", tmp_path / "run", tp_shards=4, sync_factor=0.5)
    half = caat_jax.load(tmp_path / "llama", tp_shards=4, sync_factor=0.5)
    imported = caat_jax.load(tmp_path / "run")
    np.testing.assert_array_equal(half.logits(TOKENS), imported.logits(TOKENS))


def test_a_padded_llama_is_the_same_function(tmp_path):
    """Three shards divide neither its heads nor its MLP and vocabulary."""
    parameters = llama_by_hand(tmp_path / "llama")
    padded = caat_jax.load(tmp_path / "llama", mesh=dict(model=1), tp_shards=3, pad=True)
    real = models.method(caat_jax.load(tmp_path / "llama", mesh=dict(model=1)).config)
    logits = padded.logits(TOKENS)
    expected = reference.forward(parameters, TOKENS, **real).logits
    np.testing.assert_allclose(logits[..., :64], expected, atol=1e-5)
    assert logits.shape[-1] == 66 and np.all(np.isneginf(logits[..., 64:]))
    importing.import_llama(
        tmp_path / "llama", tmp_path / "run", tp_shards=3, sync_factor=1.0, pad=True
    )
    imported = caat_jax.load(tmp_path / "run", mesh=dict(model=1))
    np.testing.assert_array_equal(logits, imported.logits(TOKENS))
    with pytest.raises(InputError, match=r"tokens must lie within \[0, 64\)"):
        padded.logits([[64]])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(sync_factor=1.5), "sync_factor=1.5 is outside"),
        (dict(sync_factor=[1, 0.5, 0]), "sync_factor has 3 entries"),
        (dict(tp_shards=4), "the run in .* has its own"),
        (dict(pad=True), "pad=True: the run in .* has its own"),
        (dict(mesh=dict(models=8)), "mesh has no axis 'models'"),
        (dict(mesh=dict(model=3)), "mesh.model=3 does not divide model.tp_shards=8"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(run, arguments, said):
    with pytest.raises(InputError, match=said):
        caat_jax.load(run[0], **arguments)


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no checkpoint"):
        caat_jax.load(tmp_path)


@pytest.mark.parametrize("tokens", [[1, 2], [[0.5]], [[64]], [[-1]]], ids=str)
def test_what_are_not_tokens_is_refused(run, tokens):
    with pytest.raises(InputError, match="tokens"):
        caat_jax.load(run[0], mesh=dict(model=1)).logits(tokens)


def test_text(tmp_path):
    """The same text as from token ids, and none of the ids that only pad the vocabulary."""
    workdir = models.small_run(
        tmp_path, [f"text number {n} of some words" for n in range(12)], {"train.steps": 3}
    )
    model = caat_jax.load(workdir)
    sampling = Sampling(temperature=5.0, seed=3)
    texts = model.generate(["some", "wor"], max_new_tokens=12, sampling=sampling)
    tokenizer = model.tokenizer
    generator = Generator(model.config, model.mesh, model.parameters, tokenizer.size)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text).tolist()] for text in ("some", "wor")]
    ids = generator.generate(
        prompts, max_new_tokens=12, sampling=sampling, stop_ids=[tokenizer.eos_id]
    )
    assert texts == [tokenizer.decode(new) for new in ids]
    assert max(map(max, ids)) < tokenizer.size
