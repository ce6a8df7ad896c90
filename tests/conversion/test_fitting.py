"""The fitted weights against least squares in float64, over plain loops."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from caat_jax.conversion import basis, converting, fitting
from caat_jax.conversion.fitting import INPUT_RIDGE, PRIVATE_RIDGE, SHARED_RIDGE, Fitter
from caat_jax.conversion.texts import Texts
from caat_jax.data.token_cache import TokenSequences
from caat_jax.devices import sharding
from tests import models, reference

S = 4
WIDTHS = ((16, 8), (32, 16))  # D = 32; one sublayer without a private channel
MODEL = dict(tp_shards=S, sync_factor_per_layer=((0.5, 0.25), (1.0, 0.5)))


def numpy_parameters(config, seed=0):
    parameters = models.random_parameters(config, seed)
    return reference.map_arrays(lambda array: array.astype(np.float32), parameters)


def least_squares(inputs, outputs, prior, strength, weight=1.0):
    """Of rows [tokens, n] and [tokens, m]: the penalty as rows of their own, and no moments."""
    root = np.sqrt(weight)
    inputs, outputs = root * inputs, root * outputs
    penalty = np.sqrt(strength * np.sum(inputs**2) / inputs.shape[1])
    left = np.vstack([inputs, penalty * np.eye(inputs.shape[1])])
    return np.linalg.lstsq(left, np.vstack([outputs, penalty * prior]))[0]


def before_output(kind, hidden, weights, rope):
    """What the output projection of a shard multiplies: its product with the identity."""
    name = {"attention": "output", "mlp": "down"}[kind]
    rows = int(np.prod(weights[name].shape[:-1]))
    identity = np.eye(rows).reshape(*weights[name].shape[:-1], rows)
    function = {"attention": reference.attention, "mlp": reference.mlp}[kind]
    return function(hidden, weights | {name: identity}, rope)[0]


def fitted_by_loops(parameters, tokens, config):
    """The fitted weights of every sublayer, and the head; float64, all tokens at once."""
    parameters = reference.map_arrays(reference.to_float64, parameters)
    epsilon, rope = config.model.norm_epsilon, (config.model.rope_base, None)
    D = config.model.embed_dim
    x = parameters["embedding"][tokens]
    streams = [x] * S

    def normalised(x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)

    def estimator(stream):
        flat = (normalised(v).reshape(-1, D) for v in (stream, x))
        return least_squares(*flat, np.eye(D), INPUT_RIDGE)

    fitted, private_yet = {}, False
    for layer, (kind, place) in itertools.product(range(2), (("attention", 0), ("mlp", 1))):
        width = WIDTHS[layer][place]
        dense = [
            reference.weights_of_shard(parameters["layers"][kind], layer, j, S) for j in range(S)
        ]
        shards = [dict(weights) for weights in dense]
        output = {"attention": "output", "mlp": "down"}[kind]
        if private_yet:
            for stream, weights in zip(streams, shards, strict=True):
                estimate = estimator(stream)
                for name in set(weights) - {"norm", output}:
                    flat = weights[name].reshape(D, -1)
                    weights[name] = (estimate @ flat).reshape(weights[name].shape)
        rows = [weights[output].reshape(-1, D) for weights in dense]
        after = x + sum(
            before_output(kind, normalised(x), weights, rope) @ own
            for weights, own in zip(dense, rows, strict=True)
        )
        private_yet |= width < D
        a = [
            before_output(kind, normalised(stream), weights, rope).reshape(tokens.size, -1)
            for stream, weights in zip(streams, shards, strict=True)
        ]
        weight = 1 / (np.mean(after.reshape(-1, D) ** 2, axis=-1, keepdims=True) + epsilon)
        missing = [(after - stream).reshape(-1, D) for stream in streams]
        shared = least_squares(
            np.hstack(a),
            np.mean(missing, axis=0)[:, :width],
            np.vstack(rows)[:, :width],
            SHARED_RIDGE,
            weight,
        )
        new = []
        for j in range(S):
            private = least_squares(
                a[j], missing[j][:, width:], rows[j][:, width:], PRIVATE_RIDGE, weight
            )
            new.append(np.hstack([np.split(shared, S)[j], private / np.sqrt(S)]))
        y = np.stack([(a_j @ own).reshape(x.shape) for a_j, own in zip(a, new, strict=True)])
        streams = list(np.stack(streams) + reference.partial_channel_reduce(y, width))
        x = after
        axes = reference.SHARDED_AXIS
        whole = {
            name: np.concatenate([weights[name] for weights in shards], axis=axes[name])
            for name in set(dense[0]) - {"norm", output}
        }
        whole[output] = np.concatenate(new).reshape(parameters["layers"][kind][output][0].shape)
        fitted[layer, kind] = whole
    heads = np.split(parameters["head"], S, axis=1)
    head = [estimator(stream) @ own for stream, own in zip(streams, heads, strict=True)]
    return fitted, np.hstack(head)


@pytest.fixture(scope="module")
def dense():
    return models.small_config(model=dict(tp_shards=S))


@pytest.fixture(scope="module")
def folded(dense):
    parameters = numpy_parameters(dense)
    basis.fold_norms(parameters)
    basis.fold_final_norm(parameters)
    return parameters


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 64, size=(12, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def expected(dense, folded, tokens):
    return fitted_by_loops(folded, tokens, dense)


@pytest.mark.parametrize("data, model", [(1, 1), (1, S), (2, 2)])
def test_fitted_weights_are_the_least_squares_solution(
    dense, folded, tokens, expected, data, model
):
    config = models.small_config(model=MODEL)
    sizes = dataclasses.replace(dense.mesh, data=data, fsdp=1, model=model)
    mesh = sharding.create_mesh(sizes, jax.devices()[: data * model])
    fitter = Fitter(dense, config.model, mesh, np.split(tokens, 3), folded["embedding"])
    for layer, kind in fitting.bar(config.model, "fitting"):
        weights = fitting.layer_weights(folded, layer, kind)
        fitted, error = fitter.fit(layer, kind, weights)
        assert error.fitted < error.cut
        for name, wanted in expected[0][layer, kind].items():
            assert models.relative_error(fitted[name], wanted) < 1e-4, (layer, kind, name)
    assert models.relative_error(fitter.fit_head(folded["head"]), expected[1]) < 1e-4


def test_nothing_changes_at_p_1(dense):
    parameters = numpy_parameters(dense)
    before = reference.map_arrays(np.copy, parameters)
    texts = Texts(
        [], TokenSequences(np.arange(33), 16, keep_partial=False, fingerprint="", text_bytes=0)
    )
    mesh = sharding.create_mesh(dense.mesh, jax.devices()[:1])
    converted = converting.convert(
        parameters, dense, dense, mesh, texts, progress=None, new_basis="rotation"
    )
    jax.tree.map(np.testing.assert_array_equal, converted.parameters, before)
    assert converted.loss == converted.dense_loss == converted.cut_loss


def test_shards_that_share_a_head_have_one_estimate():
    """Two key heads on four shards: one regression over the tokens of both shards of a head."""
    random = np.random.default_rng(0)
    h = random.standard_normal((50, 6))
    streams = h + 0.3 * random.standard_normal((4, 50, 6))
    moments = fitting.InputMoments(
        np.stack([stream.T @ stream for stream in streams]),
        np.stack([stream.T @ h for stream in streams]),
    )
    weight = random.standard_normal((6, 2, 3))
    fitted = fitting.by_estimate(weight, moments)
    for head in range(2):
        pair = np.concatenate(streams[2 * head : 2 * head + 2])
        estimate = least_squares(pair, np.concatenate([h, h]), np.eye(6), INPUT_RIDGE)
        np.testing.assert_allclose(fitted[:, head], estimate @ weight[:, head], atol=1e-6)
