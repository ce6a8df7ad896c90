"""A dense model in another basis, exported: a plain Llama that computes what the first one did."""

import jax
import numpy as np
import pytest

from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.conversion import basis
from caat_jax.data.loader import NOTHING_READ
from caat_jax.devices import sharding
from caat_jax.huggingface.exporting import export
from caat_jax.training.step import Programs
from tests import models, reference

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.huggingface.exported_caat_net import load, logits_of  # noqa: E402  (imports both)

D = models.SMALL["embed_dim"]
TOKENS = np.random.default_rng(1).integers(0, models.SMALL["vocab_size"], (2, 12))


def turned(parameters, random):
    basis.fold_norms(parameters)
    basis.fold_final_norm(parameters)
    basis.turn(parameters, np.linalg.qr(random.standard_normal((D, D)))[0])


def reordered(parameters, random):
    basis.reorder(parameters, random.permutation(D))


@pytest.mark.parametrize(
    "change, tp_shards, tied_before, tied_after",
    [(reordered, 2, True, True), (reordered, 8, False, False), (turned, 4, True, False)],
)
def test_exported_in_another_basis(tmp_path, change, tp_shards, tied_before, tied_after):
    config = models.small_config(model=dict(tp_shards=tp_shards, tied_head=tied_after))
    given = reference.random_parameters(0, **models.SMALL, tied_head=tied_before)
    arch = config.model
    expected = reference.dense_forward(
        given, TOKENS, rope_base=arch.rope_base, norm_epsilon=arch.norm_epsilon
    )
    change(given, np.random.default_rng(0))
    programs = Programs(config, sharding.create_mesh(config.mesh, jax.devices()[:1]))
    parameters = jax.device_put(
        reference.map_arrays(lambda array: array.astype(np.float32), given),
        sharding.named_shardings(programs.mesh, programs.blueprint.specs),
    )
    with Checkpoints(tmp_path / "run") as saved:
        saved.save(programs.fresh_state(parameters), 0, config, NOTHING_READ)
    export(tmp_path / "run", tmp_path / "llama", dtype="float32")
    llama = load(tmp_path / "llama")
    assert type(llama) is transformers.LlamaForCausalLM
    assert llama.config.tie_word_embeddings == tied_after
    difference = np.abs(logits_of(llama, TOKENS) - expected).max()
    assert difference < 1e-5 * np.abs(expected).max()
