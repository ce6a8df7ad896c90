"""What the compiled training step communicates over the `model` axis, read from its HLO."""

import functools
import math
import re

import pytest

from tests import models

LAYERS, B, T, D, S = 3, 4, 16, 32, 8


@functools.cache
def layer_loop_collectives(config) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """For each loop body of the compiled step: its collectives as (kind, type, shape)."""
    programs = models.programs(config)
    text = programs.compile_train_step().as_text()
    bodies = set(re.findall(r" while\(.*body=%?([\w.\-]+)", text))
    found, body = {}, None
    for line in text.splitlines():
        if begin := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            body = begin[1]
        operation = re.match(
            r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) "
            r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(",
            line,
        )
        if operation and body in bodies:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", operation[1]):
                sizes = tuple(int(size) for size in shape.split(",") if size)
                found.setdefault(body, []).append((operation[2], dtype, sizes))
    return list(found.values())


def step_config(p, *, remat, dtype="float32", mesh=None, **model):
    return models.small_config(
        model=dict(layers=LAYERS, kv_heads=8, tp_shards=S, sync_factor=p, **model),
        compute=dict(remat=remat, dtype=dtype),
        mesh=mesh or dict(model=8),
    )


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("p", [0.25, 0.5, 1.0])
def test_layer_loop_holds_two_partial_reduces_forward_and_two_backward(p, remat):
    reduced = ("all-reduce", "f32", (B, T, int(D * p)))
    assert layer_loop_collectives(step_config(p, remat=remat)) == [[reduced] * 2, [reduced] * 2]


@pytest.mark.parametrize("remat", [False, True])
def test_bytes_are_the_shared_fraction(remat):
    def total(p):
        loops = layer_loop_collectives(step_config(p, remat=remat))
        return sum(math.prod(shape) for loop in loops for _, _, shape in loop)

    full = total(1.0)
    assert [total(p) / full for p in (0.25, 0.5)] == [0.25, 0.5]


def test_nothing_is_reduced_where_nothing_is_shared():
    assert layer_loop_collectives(step_config(0.0, remat=True)) == []


def test_one_device_communicates_nothing():
    assert layer_loop_collectives(step_config(0.5, remat=False, mesh=dict(model=1))) == []


def test_factors_per_sublayer():
    config = step_config(1.0, remat=False, sync_factor_per_layer=((0.25, 0.75),) * LAYERS)
    forward, backward = layer_loop_collectives(config)
    attention, mlp = (("all-reduce", "f32", (B, T, width)) for width in (D // 4, D * 3 // 4))
    assert forward == [attention, mlp]
    assert backward == [mlp, attention]


@pytest.mark.parametrize("remat", [False, True])
def test_fsdp_gathers_each_layer_inside_the_loop(remat):
    config = step_config(0.5, remat=remat, mesh=dict(data=2, fsdp=2, model=2))
    loops = layer_loop_collectives(config)
    kinds = [[kind for kind, _, _ in loop] for loop in loops]
    matrices = 7
    forward, backward = kinds
    assert forward.count("all-gather") == matrices
    assert backward.count("reduce-scatter") == matrices
    assert backward.count("all-gather") == (matrices if remat else 0)
    for loop in loops:
        reduced = [shape for kind, _, shape in loop if kind == "all-reduce"]
        assert reduced == [(B // 4, T, D // 2)] * 2
