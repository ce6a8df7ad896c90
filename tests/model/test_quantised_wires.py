"""Wires of few bits: against a quantiser written here, in NumPy and from the docs alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from caat_jax.model import reductions
from caat_jax.model.reductions import Wire
from tests import models, reference
from tests.model.test_partial_sync import TOLERANCE

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
# The largest step of a grid, in units of the largest number of a block.
STEP = {"int8": 1 / 127, "float8_e4m3fn": 1 / 14, "float8_e5m2": 1 / 7}


def blocks_of(width, block):
    """The bounds of equal blocks, the last one perhaps shorter."""
    count = -(-width // block)
    size = -(-width // count)
    return [(start, min(start + size, width)) for start in range(0, width, size)]


def quantised(x, name, block):
    """x [..., d] as it arrives, float64."""
    x, out = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for start, stop in blocks_of(x.shape[-1], block):
        part = x[..., start:stop]
        scale = np.abs(part).max(axis=-1, keepdims=True) / LARGEST[name]
        scale = scale.astype(jnp.bfloat16).astype(np.float64)
        grid = np.divide(part, scale, out=np.zeros_like(part), where=scale > 0)
        if name == "int8":
            grid = np.rint(grid)
        else:
            grid = grid.astype(np.float32).astype(jnp.dtype(name)).astype(np.float64)
        out[..., start:stop] = grid * scale
    return out


def wire(name, block):
    if name == "float32":
        return reference.exact
    if name == "bfloat16":
        return lambda x: x.astype(jnp.bfloat16).astype(np.float64)
    return functools.partial(quantised, name=name, block=block)


def on_devices(function, *arrays):
    """`function` of the slices of each array along its first axis, one a device; all results."""
    devices = len(arrays[0])
    mesh = jax.make_mesh((devices,), ("model",), (jax.sharding.AxisType.Auto,))

    def local(*parts):
        return jax.tree.map(lambda x: x[None], function(*(part[0] for part in parts)))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("model"), out_specs=P("model"))
    return jax.tree.map(np.asarray, jax.jit(mapped)(*arrays))


def numbers(*shape, seed=0):
    """Tokens of very different sizes."""
    random = np.random.default_rng(seed)
    sizes = 10.0 ** random.integers(-3, 3, (*shape[:-1], 1))
    return (random.standard_normal(shape) * sizes).astype(np.float32)


def check_within_a_step(actual, sent, name, block):
    """The sum over the first axis of what was sent: but for ties, the emulation's very number."""
    expected = wire(name, block)(sum(map(wire(name, block), sent)))
    for start, stop in blocks_of(expected.shape[-1], block):
        found, wanted = actual[..., start:stop], expected[..., start:stop]
        largest = np.abs(sent[..., start:stop]).max(axis=(0, -1)) * len(sent)
        assert np.all(np.abs(found - wanted) <= 1.01 * STEP[name] * largest[..., None])
    assert np.mean(np.abs(actual - expected) > 1e-6 * np.abs(expected)) < 0.01


@pytest.mark.parametrize("name", LARGEST)
@pytest.mark.parametrize(
    ("devices", "shape", "block"),
    [(8, (2, 5, 40), 16), (4, (1, 1, 7), 128), (2, (3, 4, 33), 16), (8, (2, 8, 32), 32)],
)
def test_sum_and_its_derivative(name, devices, shape, block):
    """One token, widths and numbers of blocks that nothing divides; equal bits everywhere."""
    partials, gradients = numbers(devices, *shape), numbers(devices, *shape, seed=1)
    kind = Wire(jnp.dtype("int8"), jnp.dtype(name), block=block)
    if name != "float8_e5m2":
        kind = kind._replace(forward=jnp.dtype(name))

    def both(partial, gradient):
        total, derivative = jax.vjp(lambda x: reductions.all_reduce(x, kind), partial)
        return total, derivative(gradient)[0]

    total, gradient = on_devices(both, partials, gradients)
    for found, sent, dtype in ((total, partials, kind.forward), (gradient, gradients, name)):
        np.testing.assert_array_equal(found, np.broadcast_to(found[0], found.shape))
        check_within_a_step(found[0], sent, str(dtype), block)


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn"])
def test_what_is_special_stays_in_its_block(name):
    x = np.random.default_rng(0).standard_normal((4, 1, 6, 32)).astype(np.float32)
    x[:, 0, 0, :16] = 0
    x[1, 0, 1, 3] = 1e4
    x[2, 0, 2, 5], x[3, 0, 3, 20], x[0, 0, 4, 1] = np.nan, np.inf, -np.inf
    x[:, 0, 5, 16:] = 1e-38
    kind = Wire(jnp.dtype(name), jnp.dtype("float32"), block=16)
    total = on_devices(lambda part: reductions.all_reduce(part, kind), x)[0, 0]
    touched = np.zeros((6, 2), bool)
    touched[2, 0] = touched[3, 1] = touched[4, 0] = True
    finite = np.isfinite(total).reshape(6, 2, 16)
    assert not finite[touched].any() and finite[~touched].all()
    assert (total[0, :16] == 0).all() and (total[5, 16:] == 0).all()
    assert abs(total[1, 3] / x[:, 0, 1, 3].sum() - 1) < STEP[name]
    others = np.delete(x[:, 0, 1].sum(axis=0), 3)
    assert np.abs(np.delete(total[1], 3) - others)[16:].max() < 0.2  # the outlier's block is lost


@pytest.mark.parametrize("name", LARGEST)
def test_channels_are_gathered_and_their_gradients_scattered(name):
    parts, gradients = numbers(4, 2, 3, 10), numbers(4, 2, 3, 40, seed=1)
    forward = "int8" if name == "float8_e5m2" else name
    kind = Wire(jnp.dtype(forward), jnp.dtype(name), block=8)

    def both(part, gradient):
        whole, derivative = jax.vjp(lambda x: reductions.gather_channels(x, kind), part)
        return whole, derivative(gradient)[0]

    whole, gradient = on_devices(both, parts, gradients)
    expected = np.concatenate([quantised(part, forward, 8) for part in parts], axis=-1)
    assert np.mean(whole[1] != expected) < 0.01
    sums = sum(np.stack([quantised(p, name, 8) for p in np.split(g, 4, -1)]) for g in gradients)
    assert np.mean(np.abs(gradient - sums) > 1e-6 * np.abs(sums)) < 0.01


WHOLE_MODELS = [
    # A wire that is one, M = S, or an emulated one on fewer devices.
    dict(M=4, forward="int8", backward="int8", sync_factor=0.5),
    dict(M=4, forward="float8_e4m3fn", backward="float8_e5m2", sync_factor=1.0, tied_head=True),
    dict(M=1, forward="int8", backward="int8", sync_factor_per_layer=((0.25, 0.75), (1.0, 0.0))),
    dict(M=2, forward="bfloat16", backward="int8", sync_factor=0.5),
    dict(M=1, forward="float8_e4m3fn", backward="bfloat16", sync_factor=1.0, tied_head=True),
    dict(M=1, forward="float32", backward="float32", sync_factor=0.5),
]
OTHER_SHARDS = [
    dict(S=8, M=8, forward="int8", backward="int8", sync_factor=0.5),
    dict(S=8, M=2, forward="float8_e4m3fn", backward="float8_e5m2", sync_factor=0.25),
    # One number on the other side of a tie changes what follows of its token.
    dict(
        S=8,
        M=1,
        forward="int8",
        backward="float8_e4m3fn",
        sync_factor=1.0,
        tied_head=True,
        of_rounding=0.5,
    ),
    dict(S=2, M=2, forward="int8", backward="float8_e4m3fn", sync_factor=0.5),
    dict(S=2, M=1, forward="float8_e4m3fn", backward="int8", sync_factor=0.0),
    dict(S=1, M=1, forward="int8", backward="int8", sync_factor=1.0),
    dict(S=8, M=8, forward="int8", backward="int8", sync_factor=0.5, dtype="bfloat16"),
    dict(S=8, M=1, forward="int8", backward="int8", sync_factor=0.5, dtype="bfloat16"),
]
BFLOAT16_TOLERANCE = 0.15  # as test_partial_sync's: rounding the activations outweighs the wires'


@pytest.mark.parametrize(
    "case",
    [*WHOLE_MODELS, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHER_SHARDS)],
    ids=str,
)
def test_model_is_the_emulation_with_rounding(case):
    """The float32 model rounds now and then to the other side: far less than rounding changes."""
    S, M, forward, backward = case.get("S", 4), case["M"], case["forward"], case["backward"]
    config = models.small_config(
        model=dict(tp_shards=S) | {k: v for k, v in case.items() if k not in NAMES},
        compute=dict(
            dtype=case.get("dtype", "float32"),
            forward_wire_dtype=forward,
            backward_wire_dtype=backward,
            wire_block=12,
            emulate_wires=M < S or S == 1,
        ),
        mesh=dict(model=M),
    )
    parameters = models.random_parameters(config)
    rows = np.random.default_rng(0).integers(0, 64, (2, 9), dtype=np.int32)
    found = models.loss_gradients_and_logits(models.programs(config), parameters, rows)
    method, wires = models.method(config), (wire(forward, 12), wire(backward, 12))

    def emulated(wires):
        inputs = rows[:, :-1]
        loss, gradients = reference.loss_and_gradients(
            parameters, inputs, rows[:, 1:], **method, wires=wires
        )
        logits = reference.forward(parameters, inputs, **method, wire=wires[0]).logits
        return loss, gradients, logits

    rounded, exact = emulated(wires), emulated((reference.exact, reference.exact))
    for ours, with_rounding, without in zip(
        *map(jax.tree.leaves, (found, rounded, exact)), strict=True
    ):
        tolerated = max(
            (BFLOAT16_TOLERANCE if "dtype" in case else TOLERANCE) * np.linalg.norm(with_rounding),
            case.get("of_rounding", 0.25) * np.linalg.norm(np.subtract(with_rounding, without)),
        )
        assert np.linalg.norm(np.subtract(ours, with_rounding)) <= tolerated


NAMES = ("S", "M", "forward", "backward", "dtype", "of_rounding")
