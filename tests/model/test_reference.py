"""The oracle itself: its gradients against complex-step differentiation, its values against a
dense Llama and against what METHOD.md lets one work out by hand. Axis letters: `reference.py`."""

import numpy as np
import pytest

from tests import reference

SETTINGS = {"rope_base": 100.0, "norm_epsilon": 1e-5}
LAYERS, EMBED_DIM, VOCAB_SIZE = 2, 12, 16
SIZES = {
    "layers": LAYERS,
    "embed_dim": EMBED_DIM,
    "heads": 8,
    "kv_heads": 4,  # grouped-query attention, and still one kv head per shard at S = 4
    "head_dim": 4,
    "mlp_dim": 16,
    "vocab_size": VOCAB_SIZE,
}
COMPLEX_STEP = 1e-30  # no difference is taken, so nothing cancels however small the step

DENSE = [(EMBED_DIM, EMBED_DIM)] * LAYERS  # p = 1
PRIVATE = [(0, 0)] * LAYERS  # p = 0
HALF = [(6, 6)] * LAYERS  # p = 0.5
PER_LAYER = [(9, 9), (3, 3)]
PER_SUBLAYER = [(3, 12), (0, 7)]  # a later sublayer syncs channels that are private by then


def make_case(*, tied_head=False, seed=0, **sizes):
    """-> params, inputs [2, 7], targets [2, 7], three of which are ignored."""
    params = reference.random_parameters(seed, **SIZES | sizes, tied_head=tied_head)
    random = np.random.default_rng(seed + 1)
    inputs = random.integers(0, VOCAB_SIZE, (2, 7))
    targets = random.integers(0, VOCAB_SIZE, (2, 7))
    targets[0, :2], targets[1, 4] = -1, -100
    return params, inputs, targets


def leaves(tree, path=()):
    """(path, array) of every parameter."""
    for name, child in tree.items():
        if isinstance(child, dict):
            yield from leaves(child, (*path, name))
        else:
            yield (*path, name), child


def replace_leaf(tree, path, array):
    """A copy of the nested dict with another array at `path`."""
    name, *rest = path
    return tree | {name: replace_leaf(tree[name], rest, array) if rest else array}


def directions(shape, random):
    """Two random directions, which every entry takes part in, and two single entries."""
    for _ in range(2):
        yield random.standard_normal(shape)
    for entry in random.choice(np.prod(shape), 2, replace=False):
        one = np.zeros(shape)
        one.flat[entry] = 1.0
        yield one


@pytest.mark.parametrize(
    ("tp_shards", "sync_widths", "tied_head", "sizes"),
    [
        (1, PER_SUBLAYER, False, {}),
        (1, DENSE, True, {"kv_heads": 2}),
        (2, HALF, False, {"kv_heads": 2}),
        (2, PER_SUBLAYER, True, {}),
        (4, DENSE, False, {}),
        (4, PRIVATE, False, {}),
        (4, HALF, True, {"heads": 4}),  # as many kv heads as heads
        (4, PER_LAYER, False, {}),
        (4, PER_SUBLAYER, False, {}),
    ],
)
def test_every_gradient_is_the_complex_step_derivative(tp_shards, sync_widths, tied_head, sizes):
    params, inputs, targets = make_case(tied_head=tied_head, **sizes)
    architecture = {"tp_shards": tp_shards, "sync_widths": sync_widths} | SETTINGS
    loss, gradients = reference.loss_and_gradients(params, inputs, targets, **architecture)
    assert loss == reference.loss(params, inputs, targets, **architecture)
    assert [path for path, _ in leaves(gradients)] == [path for path, _ in leaves(params)]

    random = np.random.default_rng(7)
    gradient_at = dict(leaves(gradients))
    for path, weight in leaves(params):
        gradient = gradient_at[path]
        assert gradient.shape == weight.shape and gradient.dtype == np.float64
        assert np.linalg.norm(gradient) > 1e-3, f"{path}: too small for the test to mean much"
        for direction in directions(weight.shape, random):
            stepped = replace_leaf(params, path, weight + 1j * COMPLEX_STEP * direction)
            derivative = (
                reference.loss(stepped, inputs, targets, **architecture).imag / COMPLEX_STEP
            )
            np.testing.assert_allclose(
                np.sum(gradient * direction),
                derivative,
                rtol=1e-11,
                atol=1e-13 * np.linalg.norm(gradient) * np.linalg.norm(direction),
                err_msg=f"{path}",
            )


@pytest.mark.parametrize("tied_head", [False, True])
def test_one_shard_is_the_dense_model_at_any_p(tied_head):
    params, inputs, _ = make_case(tied_head=tied_head)
    dense = reference.dense_forward(params, inputs, **SETTINGS)
    for sync_widths in (PRIVATE, HALF, PER_SUBLAYER, DENSE):
        ours = reference.forward(params, inputs, tp_shards=1, sync_widths=sync_widths, **SETTINGS)
        np.testing.assert_allclose(ours.logits, dense, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tp_shards", [1, 2, 4])
@pytest.mark.parametrize("tied_head", [False, True])
def test_full_synchronisation_is_the_dense_model_on_any_number_of_shards(tp_shards, tied_head):
    params, inputs, _ = make_case(tied_head=tied_head)
    dense = reference.dense_forward(params, inputs, **SETTINGS)
    ours = reference.forward(params, inputs, tp_shards=tp_shards, sync_widths=DENSE, **SETTINGS)
    np.testing.assert_allclose(ours.logits, dense, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tp_shards", [2, 4])
@pytest.mark.parametrize("sync_widths", [PRIVATE, HALF, PER_LAYER, PER_SUBLAYER])
def test_partial_synchronisation_is_another_function_than_the_dense_model(tp_shards, sync_widths):
    params, inputs, _ = make_case()
    dense = reference.dense_forward(params, inputs, **SETTINGS)
    ours = reference.forward(
        params, inputs, tp_shards=tp_shards, sync_widths=sync_widths, **SETTINGS
    )
    assert np.abs(ours.logits - dense).max() > 0.1


@pytest.mark.parametrize("tp_shards", [2, 4])
def test_without_synchronisation_each_shard_is_a_small_dense_model(tp_shards):
    """p = 0: shard j is a dense Llama of its own heads, MLP columns and vocabulary rows, with its
    output projections times √S. Worked out here from the global arrays, not from the reference."""
    params, inputs, _ = make_case()
    ours = reference.forward(params, inputs, tp_shards=tp_shards, sync_widths=PRIVATE, **SETTINGS)
    for j in range(tp_shards):

        def mine(array, axis, scale=1.0, j=j):
            size = array.shape[axis] // tp_shards
            return scale * array.take(range(j * size, (j + 1) * size), axis)

        attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
        attention_part = {name: mine(attention[name], 2) for name in ("query", "key", "value")}
        attention_part["output"] = mine(attention["output"], 1, tp_shards**0.5)
        mlp_part = {name: mine(mlp[name], 2) for name in ("gate", "up")}
        mlp_part["down"] = mine(mlp["down"], 1, tp_shards**0.5)
        layers = {"attention": attention | attention_part, "mlp": mlp | mlp_part}
        dense = reference.dense_forward(params | {"layers": layers}, inputs, **SETTINGS)
        np.testing.assert_allclose(
            mine(ours.logits, 2), mine(dense, 2), rtol=1e-11, atol=1e-11, err_msg=f"shard {j}"
        )


def test_partial_channel_reduce_on_inputs_that_name_their_shard():
    y_SBTD = np.array([1.0, 10.0, 100.0, 1000.0])[:, None, None, None] * np.ones((1, 1, 1, 3))
    z_SBTD = reference.partial_channel_reduce(y_SBTD, 2)
    for j in range(4):
        np.testing.assert_array_equal(z_SBTD[j, 0, 0], [1111, 1111, 2 * 10**j])


def test_streams_are_shared_below_the_smallest_width_so_far_and_private_above():
    params, inputs, _ = make_case()
    sync_widths = [(9, 12), (12, 5)]
    ours = reference.forward(params, inputs, tp_shards=4, sync_widths=sync_widths, **SETTINGS)
    assert ours.streams_after_layer.shape == (LAYERS, 4, *inputs.shape, EMBED_DIM)
    np.testing.assert_array_equal(ours.streams, ours.streams_after_layer[-1])
    for x_SBTD, shared in zip(ours.streams_after_layer, (9, 5), strict=True):
        for j in range(1, 4):
            np.testing.assert_array_equal(x_SBTD[0, ..., :shared], x_SBTD[j, ..., :shared])
            assert np.abs(x_SBTD[0, ..., shared:] - x_SBTD[j, ..., shared:]).min() > 1e-6


def test_loss_is_the_mean_over_counted_targets():
    params, inputs, targets = make_case()
    architecture = {"tp_shards": 4, "sync_widths": HALF} | SETTINGS
    logits = reference.forward(params, inputs, **architecture).logits
    by_hand = [
        np.log(np.sum(np.exp(logits[b, t]))) - logits[b, t, targets[b, t]]
        for b, t in np.ndindex(targets.shape)
        if targets[b, t] >= 0
    ]
    assert len(by_hand) == targets.size - 3
    loss, _ = reference.loss_and_gradients(params, inputs, targets, **architecture)
    np.testing.assert_allclose(loss, np.mean(by_hand), rtol=1e-13)


def test_no_position_sees_a_later_token():
    params, inputs, _ = make_case()
    architecture = {"tp_shards": 2, "sync_widths": HALF} | SETTINGS
    changed = inputs.copy()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB_SIZE
    before = reference.forward(params, inputs, **architecture).logits
    after = reference.forward(params, changed, **architecture).logits
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1).min() > 1e-6


def test_random_parameters_survive_the_cast_to_float32():
    params, _, _ = make_case()
    for path, weight in leaves(params):
        assert weight.dtype == np.float64
        np.testing.assert_array_equal(weight, weight.astype(np.float32), err_msg=f"{path}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp_shards": 3}, "heads 8 is not a multiple of tp_shards 3"),
        ({"sync_widths": HALF[:1]}, "expected 2 pairs"),
        ({"sync_widths": [(6, 6), (6, EMBED_DIM + 1)]}, "expected 2 pairs within 0..12"),
    ],
)
def test_what_the_method_does_not_define_is_refused(changes, message):
    params, inputs, _ = make_case()
    architecture = {"tp_shards": 4, "sync_widths": HALF} | SETTINGS | changes
    with pytest.raises(ValueError, match=message):
        reference.forward(params, inputs, **architecture)
