"""What is counted in programs whose counts are known."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from caat_jax.communication import traced_programs
from caat_jax.communication.traced_programs import MatrixProduct
from caat_jax.devices import sharding
from caat_jax.training.step import Programs
from tests import models

A, B = jnp.ones((4, 8)), jnp.ones((8, 8))
ONCE = 2 * 4 * 8 * 8  # FLOPs of A @ B


def count(function, *arguments):
    return traced_programs.count(jax.jit(function).trace(*arguments).jaxpr)


# ---- Products and control flow ----------------------------------------------------------------


def test_product():
    bfloat16 = [jnp.ones(shape, jnp.bfloat16) for shape in ((3, 4, 5), (3, 5, 6))]

    def function(x, y):
        return jnp.einsum("bij,bjk->bik", x, y, preferred_element_type=jnp.float32)

    moved = 2 * 3 * 4 * 5 + 2 * 3 * 5 * 6 + 4 * 3 * 4 * 6
    product = MatrixProduct(2 * 3 * 4 * 5 * 6, moved, 1, name="bij,bjk->bik")
    assert count(function, *bfloat16).products == (product,)


def test_nested_loops():
    def inner(x, _):
        return x @ B, None

    def outer(x, _):
        x, _ = lax.scan(inner, x, length=5)
        return lax.fori_loop(0, 2, lambda _, y: y @ B, x), None

    counted = count(lambda x: lax.scan(outer, x, length=3)[0] @ B, A)
    assert sorted(product.times for product in counted.products) == [1, 6, 15]
    assert counted.flops == (1 + 6 + 15) * ONCE
    assert counted.unrecognised == ()


def test_rounds_that_are_not_known_are_reported():
    def function(x, rounds):
        with jax.named_scope("here"):
            return lax.fori_loop(0, rounds, lambda _, y: y @ B, x)

    counted = count(function, A, 3)
    assert counted.flops == ONCE
    (reason,) = counted.unrecognised
    assert "while" in reason and "here" in reason
    assert count(lambda x, n: lax.fori_loop(0, n, lambda _, y: 2 * y, x), A, 3).unrecognised == ()


def test_of_branches_the_costlier():
    def function(x, which):
        def twice(x):
            return x @ B @ B

        return lax.scan(
            lambda x, _: (lax.switch(which, (jnp.sin, twice, lambda x: x @ B), x), None),
            x,
            length=3,
        )[0]

    assert count(function, A, 0).flops == 3 * 2 * ONCE


def test_derivatives():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

    def loss(w, apply=product):
        return jnp.sum(jnp.tanh(apply(apply(A, w), w)))

    assert count(loss, B).flops == 2 * ONCE
    # Two products forward; backward two for the weight and one for the activations, and one more
    # that computes the gradient of A for the custom rule.
    assert count(jax.grad(loss), B).flops == (2 + 4) * ONCE
    assert count(jax.grad(functools.partial(loss, apply=jnp.matmul)), B).flops == (2 + 3) * ONCE
    recomputed = jax.checkpoint(functools.partial(loss, apply=jnp.matmul))
    assert count(jax.grad(recomputed), B).flops == (2 + 2 + 3) * ONCE


def test_kernels_state_their_cost_or_are_reported():
    def kernel(x, result):
        result[...] = jnp.dot(x[...], x[...])

    def call(x, **options):
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct((8, 8), jnp.float32), **options)(x)

    cost = pl.CostEstimate(flops=100, transcendentals=0, bytes_accessed=30)
    known = count(lambda x: lax.scan(lambda x, _: (call(x, cost_estimate=cost), 0), x, length=7), B)
    assert known.products == (MatrixProduct(100, 30, 7, ""),) and known.unrecognised == ()
    unknown = count(call, B)
    assert unknown.products == ()
    assert "pallas_call" in unknown.unrecognised[0]


def test_other_products_are_reported():
    image, filters = jnp.ones((1, 1, 8, 8)), jnp.ones((1, 1, 3, 3))
    (reason,) = count(lambda x: lax.conv(x, filters, (1, 1), "SAME"), image).unrecognised
    assert "conv_general_dilated" in reason


# ---- Collectives ------------------------------------------------------------------------------


def collectives(function, shape, axes=("a",)):
    """Of a function of float32 [*shape] on each device of a mesh a = 4, b = 2, one = 1."""
    mesh = AbstractMesh((4, 2, 1), ("a", "b", "one"), axis_types=(AxisType.Auto,) * 3)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(axes), out_specs=P(axes))
    return count(mapped, jnp.ones((shape[0] * 8, *shape[1:])))


VARYING = ("a", "b")


@pytest.mark.parametrize(
    ("function", "kind", "axes", "size", "payload", "wire"),
    [
        (lambda x: x + lax.psum(x, "a"), "all-reduce", ("a",), 4, 96, 2 * 96 * 3 / 4),
        (lambda x: x + lax.psum(x, VARYING), "all-reduce", VARYING, 8, 96, 2 * 96 * 7 / 8),
        (lambda x: x + lax.pmax(x, "b"), "all-reduce", ("b",), 2, 96, 96),
        (lambda x: x + lax.pmin(x, "b"), "all-reduce", ("b",), 2, 96, 96),
        (
            lambda x: lax.all_gather(x, "a", tiled=True),
            "all-gather", ("a",), 4, 4 * 96, 96 * 3,
        ),
        (
            lambda x: lax.psum_scatter(x, "a", tiled=True),
            "reduce-scatter", ("a",), 4, 96, 96 * 3 / 4,
        ),
        (
            lambda x: lax.all_to_all(x, "a", 0, 0, tiled=True),
            "all-to-all", ("a",), 4, 96, 96 * 3 / 4,
        ),
        (
            lambda x: lax.ppermute(x, "b", [(0, 1), (1, 0)]),
            "collective-permute", ("b",), 2, 96, 96,
        ),
    ],
    ids=lambda value: "function" if callable(value) else str(value),
)  # fmt: skip
def test_collective(function, kind, axes, size, payload, wire):
    (found,) = collectives(function, (8, 3), axes=VARYING).collectives
    assert (found.kind, found.axes, found.group_size, found.times) == (kind, axes, size, 1)
    assert (found.payload_bytes, found.wire_bytes) == (payload, wire)


def test_an_axis_of_one_communicates_nothing():
    counted = collectives(lambda x: x + lax.psum(x, "one"), (8, 3), axes=VARYING)
    assert (counted.collectives, counted.unrecognised) == ((), ())


def test_rounds_and_places_of_loops():
    def function(x):
        def body(x, _):
            gathered = lax.all_gather(x, "a", tiled=True)
            return x + lax.psum(gathered[:8], "b"), None

        with jax.named_scope("layers"):
            return lax.scan(body, x, length=6)[0]

    found = collectives(function, (8, 3), axes=VARYING).collectives
    assert [(c.kind, c.place, c.times) for c in found] == [
        ("all-gather", "parameter gather", 6),
        ("all-reduce", "gradient reduction", 6),
    ]


def test_an_unknown_operation_over_a_mesh_axis_is_reported():
    counted = collectives(lambda x: lax.pbroadcast(x, "a", 0), (8, 3), axes=VARYING)
    assert "pbroadcast" in counted.unrecognised[0]


# ---- The training step ------------------------------------------------------------------------

LAYERS, ROWS, T, D, HEADS, KV, H, F, V = 2, 4, 16, 32, 16, 8, 4, 48, 64
TOKENS = ROWS * T
INPUTS = LAYERS * D * ((HEADS + 2 * KV) * H + 2 * F)  # of input projections
OUTPUTS = LAYERS * D * (HEADS * H + F)
# The scores and their product with the values, of whole squares: T is below attention's block.
ATTENTION = 2 * LAYERS * HEADS * H * T


def step(p=1.0, *, mesh, remat=False, scan=True, accumulation=1, **model):
    config = models.small_config(
        model=dict(sync_factor=p, **model),
        compute=dict(remat=remat, scan_layers=scan),
        mesh=mesh,
        accumulation_steps=accumulation,
    )
    programs = Programs(config, sharding.abstract_mesh(config.mesh))
    return traced_programs.count(programs.trace_train_step().jaxpr)


@pytest.mark.parametrize("mesh", [dict(), dict(model=8), dict(fsdp=2, model=4)], ids=str)
@pytest.mark.parametrize("p", [1.0, 0.5])
@pytest.mark.parametrize("options", [dict(), dict(scan=False), dict(accumulation=2)], ids=str)
def test_flops_of_a_step(p, mesh, options):
    counted = step(p, mesh=mesh, **options)
    forward = 2 * (INPUTS + OUTPUTS + D * V + ATTENTION)
    assert counted.flops * math.prod(mesh.values()) == 3 * forward * TOKENS
    assert counted.unrecognised == ()


@pytest.mark.parametrize(("p", "again"), [(1.0, 0), (0.5, LAYERS * HEADS * H * D / 2)])
def test_rematerialisation_computes_the_layers_again_but_what_was_reduced(p, again):
    """The private half of attention's output projection, which no reduction keeps, as well."""
    more = step(p, mesh=dict(model=8), remat=True).flops - step(p, mesh=dict(model=8)).flops
    assert more * 8 == 2 * (INPUTS + ATTENTION + again) * TOKENS


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("p", [1.0, 0.5, 0.25])
def test_reductions_over_model_in_the_layers(p, remat):
    counted = step(p, mesh=dict(fsdp=2, model=4), remat=remat, accumulation=2)
    per_microbatch = (ROWS // 2 // 2, T, int(D * p))
    reduction = ("all-reduce", ("model",), 4, (("float32", per_microbatch),), 2 * LAYERS)
    for place in ("layer forward", "layer backward"):
        found = [c for c in counted.collectives if c.place == place]
        assert [(c.kind, c.axes, c.group_size, c.arrays, c.times) for c in found] == [reduction] * 2


def test_gathers_and_gradient_sums():
    counted = step(mesh=dict(data=2, fsdp=2, model=2), remat=True)
    matrices = 4 * (INPUTS + OUTPUTS + 2 * D * V) / 2  # bytes of one `model` part
    by_place = {}
    for c in counted.collectives:
        by_place.setdefault((c.place, c.kind), []).append(c)

    def wire(*key):
        return sum(c.times * c.wire_bytes for c in by_place[key])

    layers = 4 * (INPUTS + OUTPUTS) / 2
    # The layers are gathered twice, since they are computed twice.
    assert wire("parameter gather", "all-gather") == (matrices + layers) / 2
    assert wire("gradient reduction", "reduce-scatter") == matrices / 2
    norms = 4 * (2 * LAYERS + 1) * D
    assert wire("gradient reduction", "all-reduce") == 2 * (matrices / 2 / 2) + 2 * norms * 7 / 8


def test_nothing_shared_nothing_reduced():
    counted = step(0.0, mesh=dict(model=8))
    assert [c for c in counted.collectives if c.place.startswith("layer")] == []
