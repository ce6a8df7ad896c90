"""Another basis of the stream is the same function, and finds what is worth sharing."""

import numpy as np
import pytest

from caat_jax.conversion import basis
from tests import reference

SIZES = dict(layers=2, embed_dim=24, heads=6, kv_heads=3, head_dim=4, mlp_dim=36, vocab_size=48)
TOKENS = np.arange(36).reshape(3, 12) % 48


def parameters(tied_head):
    return reference.random_parameters(0, **SIZES, tied_head=tied_head)


def logits(parameters):
    return reference.dense_forward(parameters, TOKENS, rope_base=1e4, norm_epsilon=1e-5)


def shapes(parameters):
    return reference.map_arrays(np.shape, parameters)


@pytest.mark.parametrize("tied_head", [True, False])
def test_reordering_is_exact_and_keeps_shapes(tied_head):
    given = parameters(tied_head)
    before, shapes_before = logits(given), shapes(given)
    basis.reorder(given, np.random.default_rng(0).permutation(24))
    np.testing.assert_allclose(logits(given), before, rtol=1e-9, atol=1e-9)
    assert shapes(given) == shapes_before


@pytest.mark.parametrize("tied_head", [True, False])
def test_turning_is_exact(tied_head):
    given = parameters(tied_head)
    before = logits(given)
    basis.fold_norms(given)
    np.testing.assert_allclose(logits(given), before, rtol=1e-9, atol=1e-9)
    basis.fold_final_norm(given)
    np.testing.assert_allclose(logits(given), before, rtol=1e-9, atol=1e-9)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    basis.turn(given, turn)
    assert np.abs(logits(given) - before).max() < 1e-5 * np.abs(before).max()
    assert shapes(given) == shapes(parameters(False))


def test_directions_that_are_lost_and_read_come_first():
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.standard_normal((6, 6)))[0]
    lost, read = np.array([1, 8, 4, 1e-3, 2, 2]), np.array([1, 2, 5, 1, 1e-3, 4])
    measured = basis.Importance(6)
    measured.loss += turn * lost @ turn.T
    measured.add_read(turn * np.sqrt(read))
    found = np.abs(turn.T @ measured.directions())
    np.testing.assert_allclose(found, np.eye(6)[:, [2, 1, 5, 0, 4, 3]], atol=1e-9)


def test_what_the_shard_knows_is_not_lost():
    """Of o = a·W + r, with r not correlated with a, the loss is the covariance of r."""
    random = np.random.default_rng(0)
    a = random.standard_normal((500, 3))
    unknown = random.standard_normal((500, 5))
    unknown -= a @ np.linalg.lstsq(a, unknown)[0]
    others = a @ random.standard_normal((3, 5)) + unknown
    measured = basis.Importance(5)
    moments = (a.T @ a, a.T @ others, others.T @ others)
    measured.add_written(basis.DenseMoments(*(m[None] for m in moments)))
    expected = unknown.T @ unknown
    assert np.abs(measured.loss - expected).max() < 1e-2 * np.abs(expected).max()
