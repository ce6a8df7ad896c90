"""Logits, loss and every gradient against the float64 emulation of METHOD in `reference.py`."""

import itertools

import jax
import numpy as np
import pytest

from caat_jax.model import transformer
from caat_jax.model.reductions import wire_of
from tests import models, reference

TOLERANCE = 1e-5  # of a tensor's largest magnitude

OPTIONS = [
    dict(zip(("tied_head", "remat", "scan_layers"), values, strict=True))
    for values in itertools.product((False, True), repeat=3)
]
SHARDS = [(S, M) for S in (2, 4, 8) for M in (1, 2, 4, 8) if S % M == 0]
ALL_CASES = [
    dict(S=S, M=M, p=p, **options)
    for p, (S, M), options in itertools.product((0.0, 0.3, 0.5, 0.75, 1.0), SHARDS, OPTIONS)
]


def covering_pairs(cases):
    """A few of the cases that together have every pair of values that any of them has."""

    def pairs(case):
        return set(itertools.combinations(case.items(), 2))

    left, chosen = set().union(*map(pairs, cases)), []
    while left:
        chosen.append(max(cases, key=lambda case: len(left & pairs(case))))
        left -= pairs(chosen[-1])
    return chosen


def check(config, sequences=4, length=10, seed=0, tolerance=TOLERANCE):
    found = errors(config, sequences, length, seed)
    assert not {name: error for name, error in found.items() if not error <= tolerance}


def errors(config, sequences=4, length=10, seed=0):
    """Of loss, logits and every gradient, of each tensor's largest magnitude."""
    arch = config.model
    parameters = models.random_parameters(config, seed)
    random = np.random.default_rng(seed)
    rows = random.integers(0, arch.vocab_size, (sequences, length + 1), dtype=np.int32)
    rows[1, -3:] = -1  # padding is no target
    method = dict(
        tp_shards=arch.tp_shards,
        sync_widths=arch.sync_widths,
        rope_base=arch.rope_base,
        rope_scaling=None if arch.rope_scaling_factor == 1 else rope_scaling(arch),
        norm_epsilon=arch.norm_epsilon,
    )
    inputs = np.maximum(rows[:, :-1], 0)
    expected_loss, expected = reference.loss_and_gradients(
        parameters, inputs, rows[:, 1:], **method
    )
    loss, gradients, logits = models.loss_gradients_and_logits(
        models.programs(config), parameters, rows
    )
    expected_logits = reference.forward(parameters, inputs, **method).logits
    found = jax.tree.map(models.relative_error, gradients, expected)
    found["loss"] = abs(loss - expected_loss) / expected_loss
    found["logits"] = models.relative_error(logits, expected_logits)
    return {
        jax.tree_util.keystr(path): error
        for path, error in jax.tree_util.tree_leaves_with_path(found)
    }


def rope_scaling(arch):
    return (
        arch.rope_scaling_factor,
        arch.rope_scaling_low_turns,
        arch.rope_scaling_high_turns,
        arch.rope_scaling_original_length,
    )


def config_of(S, M, options, mesh=None, **model):
    tied_head, remat, scan_layers = options["tied_head"], options["remat"], options["scan_layers"]
    return models.small_config(
        model=dict(tp_shards=S, tied_head=tied_head, **model),
        compute=dict(remat=remat, scan_layers=scan_layers),
        mesh=dict(model=M) | (mesh or {}),
    )


def check_one_factor(S, M, p, **options):
    check(config_of(S, M, options, sync_factor=p))


@pytest.mark.parametrize("case", covering_pairs(ALL_CASES), ids=str)
def test_one_factor(case):
    check_one_factor(**case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_one_factor_with_every_option(case):
    check_one_factor(**case)


FACTORS = (
    ((0.25, 0.75), (1.0, 0.5), 0.5),  # rises and falls: a private channel is summed again
    (1.0, 1.0, (0.0, 0.5)),
)
SUBLAYER_CASES = [
    dict(M=M, factors=factors, scanned=scanned)
    for M, factors, scanned in itertools.product((1, 2, 8), FACTORS, (False, True))
]


def check_factor_per_sublayer(M, factors, scanned):
    options = dict(tied_head=False, remat=scanned, scan_layers=scanned)
    check(config_of(8, M, options, layers=3, sync_factor_per_layer=factors))


@pytest.mark.parametrize("case", covering_pairs(SUBLAYER_CASES), ids=str)
def test_factor_per_sublayer(case):
    check_factor_per_sublayer(**case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SUBLAYER_CASES, ids=str)
def test_factor_per_sublayer_with_every_option(case):
    check_factor_per_sublayer(**case)


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, model=2), dict(data=1, fsdp=4, model=2)])
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[7]])
def test_data_and_fsdp(mesh, options):
    check(config_of(4, 2, options, mesh=mesh, sync_factor=0.5))


@pytest.mark.parametrize(("S", "M", "kv_heads"), [(8, 1, 2), (8, 8, 2), (6, 3, 2), (4, 2, 1)])
@pytest.mark.parametrize("p", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_shards_share_key_and_value_heads(S, M, kv_heads, p):
    """S is a multiple of the heads; with S = 6 on 3 devices, a device's two shards may differ."""
    sizes = dict(embed_dim=48, heads=24, kv_heads=kv_heads, vocab_size=48)
    check(config_of(S, M, OPTIONS[0], sync_factor=p, **sizes))


@pytest.mark.parametrize("M", [1, 4])
def test_attention_over_several_blocks(M):
    """150 positions are three blocks of queries, the last of them short."""
    check(config_of(4, M, OPTIONS[0], sync_factor=0.5), sequences=2, length=150)


@pytest.mark.parametrize("M", [2, 8])
def test_products_as_arranged_for_tpus(M, monkeypatch):
    """Another order, and backward one product of all channels; here on CPUs."""
    monkeypatch.setattr(
        transformer, "wire_of", lambda compute, for_tpu: wire_of(compute, for_tpu=True)
    )
    check(config_of(8, M, OPTIONS[0], sync_factor=0.5))


@pytest.mark.parametrize(("p", "M", "remat"), [(0.5, 4, True), (0.5, 2, False), (1.0, 8, False)])
def test_batch_in_parts(p, M, remat):
    """Two or four sequences a device, half of them after the other half."""
    config = models.small_config(
        model=dict(tp_shards=8, sync_factor=p),
        compute=dict(batch_parts=2, remat=remat, scan_layers=remat),
        mesh=dict(data=1 if M == 8 else 2, model=M),
    )
    check(config)


@pytest.mark.parametrize(
    ("M", "remat"), [(1, False), (2, True), pytest.param(8, True, marks=pytest.mark.slow)]
)
def test_splash_attention(M, remat):
    """The TPU's kernel, interpreted."""
    config = models.small_config(
        model=dict(tp_shards=8, sync_factor=0.5),
        compute=dict(attention="splash", remat=remat),
        mesh=dict(data=2 if M < 8 else 1, model=M),
    )
    check(config)


def test_accumulation_is_the_same_mean():
    """Microbatches count by their targets: the padded row's one weighs less."""
    config = models.small_config(
        model=dict(tp_shards=4, sync_factor=0.5), mesh=dict(data=2, model=2), accumulation_steps=2
    )
    check(config)


def test_heads_wider_than_the_model():
    check(models.small_config(model=dict(head_dim=6, tp_shards=8, sync_factor=0.5)))


def test_scaled_rotary_embedding():
    """Of the four pairs of channels one turns as before, two a little slower, one slower by 8."""
    scaling = dict(rope_scaling_factor=8.0, rope_scaling_original_length=64)
    config = config_of(4, 2, OPTIONS[0], head_dim=8, rope_base=100.0, **scaling)
    check(config)
    arch = config.model
    frequencies = [reference.rotary_frequency(i, 8, 100.0, rope_scaling(arch)) for i in range(4)]
    slower = 100.0 ** (-np.arange(4) / 4) / frequencies
    assert slower[0] == 1 and np.all((slower[1:3] > 1.1) & (slower[1:3] < 7.9))
    assert slower[3] == pytest.approx(8)


@pytest.mark.parametrize("M", [1, 8])
def test_full_synchronisation_is_the_dense_model(M):
    config = config_of(8, M, OPTIONS[0], sync_factor=1.0)
    sizes = {**models.SMALL, "tied_head": False}
    parameters = reference.random_parameters(3, **sizes)
    rows = np.random.default_rng(3).integers(0, 64, (4, 13), dtype=np.int32)
    dense = reference.dense_forward(
        parameters,
        rows[:, :-1],
        rope_base=config.model.rope_base,
        norm_epsilon=config.model.norm_epsilon,
    )
    logits = models.loss_gradients_and_logits(models.programs(config), parameters, rows)[2]
    assert models.relative_error(logits, dense) < TOLERANCE


@pytest.mark.parametrize("M", [1, 8])
def test_bfloat16(M):
    """One rounding is 2⁻⁹; some dozens of them follow each other here."""
    config = models.small_config(
        model=dict(tp_shards=8, sync_factor=0.5),
        compute=dict(dtype="bfloat16", remat=True),
        mesh=dict(model=M),
    )
    check(config, tolerance=0.15)


def test_initial_parameters_do_not_depend_on_the_mesh():
    meshes = [dict(), dict(model=8), dict(data=2, fsdp=2, model=2)]
    states = [
        models.programs(models.small_config(model=dict(tp_shards=8), mesh=mesh)).initial_state()
        for mesh in meshes
    ]
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0].parameters, other.parameters)


def test_initial_parameters_have_their_distribution():
    """METHOD.md: std 0.02, output projections 0.02/√(2·layers), γ = 1."""
    config = models.small_config(model=dict(embed_dim=256, mlp_dim=512, vocab_size=512))
    parameters = jax.tree.map(np.asarray, models.programs(config).initial_state().parameters)
    attention, mlp = parameters["layers"]["attention"], parameters["layers"]["mlp"]
    for scale in (attention["norm"], mlp["norm"], parameters["final_norm"]):
        assert (scale == 1).all()
    for name, weight in (
        [(n, attention[n]) for n in ("query", "key", "value", "output")]
        + [(n, mlp[n]) for n in ("gate", "up", "down")]
        + [("embedding", parameters["embedding"]), ("head", parameters["head"])]
    ):
        expected = 0.02 / (2 * 2) ** 0.5 if name in ("output", "down") else 0.02
        assert abs(weight.mean()) < 0.05 * expected, name
        assert abs(weight.std() / expected - 1) < 0.02, name
