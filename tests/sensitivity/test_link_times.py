"""Predicted times of plans against closed forms, and the plans that a time allows."""

import math

import pytest

from caat_jax.devices import chips
from caat_jax.errors import InputError
from caat_jax.sensitivity import plans
from caat_jax.sensitivity.cuts import Cut, Sensitivity
from caat_jax.sensitivity.link_times import LinkTimes
from caat_jax.step_time import own_chip
from tests import models

S, D, LAYERS, BATCH = 4, 32, 3, 2
CONFIG = models.small_config(model=dict(layers=LAYERS, tp_shards=S, vocab_size=64))
PLAN = ((1.0, 0.0), (0.5, 0.25), (0.0, 0.0))


def times(workload="decode", config=CONFIG, devices=S, latency=1e-3, bandwidth=1e6, batch=BATCH):
    """On chips that compute in no time."""
    chip = own_chip.of(1e30, 1e30, bandwidth, latency, devices)
    return LinkTimes(config, workload, batch, 16, devices, chip)


@pytest.mark.parametrize("devices", [2, S])
@pytest.mark.parametrize(("workload", "tokens"), [("decode", 1), ("prefill", 16)])
def test_seconds_of_a_plan(workload, tokens, devices):
    """Float32; hops and bytes by the ring algorithm, by hand."""
    others = devices - 1
    expected = 0.0
    for p in (p for pair in PLAN for p in pair if p):
        sent = 2 * others / devices * BATCH * tokens * D * p * 4
        expected += 2 * others * 1e-3 + sent / 1e6
    embedding = BATCH * tokens * D * 4
    choice = devices * 2 * BATCH * 4
    expected += 2 * others * 1e-3 + (embedding + choice) * others / devices / 1e6
    assert times(workload, devices=devices).seconds(PLAN) == pytest.approx(expected)


def test_training_pays_forward_and_backward():
    found = times("train", bandwidth=1e30)
    everywhere = ((1.0, 1.0),) * LAYERS
    saved = found.seconds(everywhere) - found.seconds(PLAN)
    assert saved == pytest.approx(3 * 2 * 2 * (S - 1) * 1e-3)


def sensitivity(rises):
    """All sublayers alike, but for the first layer's, which cost ten times as much."""
    cuts = {
        Cut(layer, sublayer, factor): 2.0 + rise * (1 if layer else 10)
        for layer in range(LAYERS)
        for sublayer in ("attention", "mlp")
        for factor, rise in rises.items()
    }
    return Sensitivity(30, CONFIG.with_sync_factor(1.0), 2.0, cuts)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        # 6 reductions of 6 hops and 2 gathers of 3 take 42 ms: 24 are left for 3 reductions.
        (dict(latency=1e-3, bandwidth=1e30), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
        # 6 · 384 bytes for the reductions and 240 for the gathers: 509 of them are to go.
        (dict(latency=0.0, bandwidth=1e6), [0.5] * 3 + [1.0] * 3),
    ],
    ids=["latency", "bandwidth"],
)
def test_what_a_link_calls_for(link, expected):
    """Where latency is all, only zeros help; where bytes are all, halves are the cheaper."""
    found = times(**link)
    measured = sensitivity({0.5: 0.125, 0.0: 1.0})
    limit = found.limit(1.75 if link["latency"] else 1.25, [0.5, 0.0])
    plan = plans.find(measured, limit, lambda _: 2.0, swaps=0)
    assert sorted(p for pair in plan.sync_factors for p in pair) == expected
    assert plan.sync_factors[0] == (1.0, 1.0)
    assert found.speed_up(plan.sync_factors) >= float(limit.flag.removeprefix("speedup="))


def test_a_speed_up_out_of_reach_is_refused_with_what_can_be_had():
    """42 hops at p = 1; 6 where nothing but two gathers is sent."""
    found = times(bandwidth=1e30)
    for factors, most in (([0.5, 0.0], "7"), ([0.5], "1")):
        with pytest.raises(InputError, match=rf"--speedup=8\.0 is out of reach; .* give {most}$"):
            found.limit(8.0, factors)


def test_a_chip_of_the_table_computes_in_its_type():
    """Half of the bytes of float32, over 8 devices two of which hold a model each."""
    found = LinkTimes(CONFIG, "decode", 2, 16, 8, chips.by_name("h100-infiniband"))
    everywhere, nowhere = ((1.0, 1.0),) * LAYERS, ((0.0, 0.0),) * LAYERS
    link = chips.by_name("h100-infiniband").link
    each = 2 * (S - 1) * link.latency + 2 * (S - 1) / S * D * 2 / link.bandwidth
    # What is sent, and a little of products that read the channels in two parts.
    saved = found.seconds(everywhere) - found.seconds(nowhere)
    assert saved == pytest.approx(2 * LAYERS * each, rel=1e-3)
    assert math.isclose(found.cost(1.0), 1000)
