"""Prefill, decode and sampling against the float64 emulation of METHOD in `reference.py`."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from caat_jax.communication import compiled_programs, traced_programs
from caat_jax.communication.audit import audit_program
from caat_jax.communication.collectives import LAYER_LOOP
from caat_jax.devices import sharding, topology
from caat_jax.errors import InputError
from caat_jax.inference import generator as decoding
from caat_jax.inference import programs as inference_step
from caat_jax.inference import sampling
from caat_jax.inference.generator import Generator
from caat_jax.inference.programs import InferencePrograms
from caat_jax.inference.sampling import Sampling
from caat_jax.training.step import DATA_AXES, Programs
from tests import models, reference
from tests.model.test_quantised_wires import wire as quantised_wire

TOLERANCE = 1e-4  # of the largest logit
LENGTHS = (3, 7, 1, 12)  # of the prompts
GROUPED = dict(data=2, fsdp=2, model=2)


def reference_logits(config, tokens_BT, wire=reference.exact):
    arch = config.model
    return reference.forward(
        models.random_parameters(config),
        tokens_BT,
        tp_shards=arch.tp_shards,
        sync_widths=arch.sync_widths,
        rope_base=arch.rope_base,
        norm_epsilon=arch.norm_epsilon,
        wire=wire,
    ).logits


@functools.cache
def generator_of(config):
    programs = models.programs(config)
    return Generator(
        config, programs.mesh, models.on_mesh(programs, models.random_parameters(config))
    )


def config_of(M=8, mesh=None, tied_head=False, scan_layers=True, batch_parts=0, **model):
    return models.small_config(
        model=dict(tp_shards=8, tied_head=tied_head, **model),
        mesh=mesh or dict(model=M),
        compute=dict(scan_layers=scan_layers, batch_parts=batch_parts),
    )


def prompts_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, models.SMALL["vocab_size"], n).tolist() for n in lengths]


def greedy_without_cache(config, prompt, new_tokens):
    row = list(prompt)
    for _ in range(min(new_tokens, config.data.sequence_length - len(prompt))):
        row.append(int(reference_logits(config, np.array([row]))[0, -1].argmax()))
    return row[len(prompt) :]


# ---- The cache --------------------------------------------------------------------------------

CASES = [
    dict(M=1, sync_factor=1.0),
    dict(M=1, sync_factor=0.5, scan_layers=False),
    dict(M=1, sync_factor=0.0),
    dict(M=2, sync_factor=1.0, tied_head=True),
    dict(M=2, sync_factor=0.5),
    dict(M=2, sync_factor=0.0, tied_head=True, scan_layers=False),
    dict(M=8, sync_factor=1.0, scan_layers=False),
    dict(M=8, sync_factor=0.5, tied_head=True, batch_parts=2),
    dict(M=8, sync_factor=0.0),
    dict(M=1, layers=3, sync_factor_per_layer=((0.25, 0.75), (1.0, 0.5), 0.5)),
    dict(M=8, layers=3, sync_factor_per_layer=(1.0, 1.0, (0.0, 0.5)), scan_layers=False),
    dict(mesh=GROUPED, sync_factor=0.5, kv_heads=16),
    dict(M=4, sync_factor=0.5, kv_heads=2, scan_layers=False),
    dict(mesh=GROUPED, sync_factor_per_layer=(1.0, (0.25, 0.5)), tied_head=True),
]


def forced_logits(config, rows, lengths):
    """Logits [B, 1 + steps, V] of the last prompt positions and those that follow in `rows`."""
    generator = generator_of(config)
    programs, weights = generator.programs, generator._weights
    parts = P("model", DATA_AXES)

    def prefill(weights, prompts, lengths):
        stream, cache = programs._through_prompts(weights, prompts, lengths, 32)
        return programs._logits(weights, stream), cache

    def decode(weights, cache, state):
        stream, cache = programs._one_position(weights, cache, state)
        return programs._logits(weights, stream), cache

    specs, caches, states = programs._layout.specs, programs._cache_specs, inference_step._STATE
    prefill = jax.jit(
        programs._over_mesh(
            prefill, (specs, inference_step._TOKENS, inference_step._BATCH), (parts, caches)
        )
    )
    decode = jax.jit(programs._over_mesh(decode, (specs, caches, states), (parts, caches)))
    lengths = np.array(lengths, np.int32)
    filled = np.where(np.arange(16) < lengths[:, None], rows[:, :16], 63)  # 63: not to be seen
    logits, cache = jax.block_until_ready(prefill(weights, filled, lengths))
    all_logits = [logits]
    for step in range(rows.shape[1] - max(lengths)):
        tokens = rows[np.arange(len(rows)), lengths + step]
        state = inference_step.State(tokens, lengths, np.int32(16), np.int32(step + 1))
        logits, cache = jax.block_until_ready(decode(weights, cache, state))
        all_logits.append(logits)
    stacked = np.stack(all_logits)  # [steps, groups, B, v]
    return np.moveaxis(stacked, (2, 0), (0, 1)).reshape(len(rows), len(stacked), -1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_the_whole_sequence(case):
    config = config_of(**case)
    rows = np.random.default_rng(1).integers(0, 60, (4, 16), dtype=np.int32)
    expected = reference_logits(config, rows)
    logits = forced_logits(config, rows, LENGTHS)
    for row, length in enumerate(LENGTHS):
        positions = slice(length - 1, length - 1 + logits.shape[1])
        assert models.relative_error(logits[row], expected[row, positions]) < TOLERANCE


@pytest.mark.parametrize("M", [1, 8])
def test_every_position_after_a_prompt_of_one_token(M):
    config = config_of(M=M, sync_factor=0.5)
    rows = np.random.default_rng(2).integers(0, 60, (4, 16), dtype=np.int32)
    logits = forced_logits(config, rows, (1, 1, 1, 1))
    assert logits.shape[1] == 16
    assert models.relative_error(logits, reference_logits(config, rows)) < TOLERANCE


@pytest.mark.parametrize("case", CASES[1::4], ids=str)
def test_greedy_is_greedy_without_cache(case):
    """More steps than one call of the program has, and up to the end of the context."""
    config = config_of(**case)
    prompts = prompts_of(LENGTHS)
    new = generator_of(config).generate(prompts, max_new_tokens=decoding.STEPS_PER_CALL + 3)
    assert [len(tokens) for tokens in new] == [11, 9, 11, 4]
    assert new == [greedy_without_cache(config, p, decoding.STEPS_PER_CALL + 3) for p in prompts]


@pytest.mark.parametrize("M", [1, 8])
def test_wires_of_8_bits(M):
    """Tokens are rounded each on its own: a prompt's all at once, a new one's alone."""
    config = models.small_config(
        model=dict(tp_shards=8, sync_factor=0.5),
        mesh=dict(model=M),
        compute=dict(forward_wire_dtype="int8", wire_block=12, emulate_wires=M == 1),
    )
    rows = np.random.default_rng(1).integers(0, 60, (4, 16), dtype=np.int32)
    logits = forced_logits(config, rows, (4, 4, 4, 4))
    exact = reference_logits(config, rows)[:, 3:]
    rounded = reference_logits(config, rows, quantised_wire("int8", 12))[:, 3:]
    assert np.linalg.norm(logits - rounded) < 0.25 * np.linalg.norm(rounded - exact)


def test_bfloat16_runs_close_to_float32():
    """In bfloat16 the cache is too; the likeliest token is mostly the same."""
    config = models.small_config(
        model=dict(tp_shards=8, sync_factor=0.5), mesh=dict(model=8), compute=dict(dtype="bfloat16")
    )
    rows = np.random.default_rng(1).integers(0, 60, (4, 16), dtype=np.int32)
    logits = forced_logits(config, rows, (4, 4, 4, 4))
    assert models.relative_error(logits, reference_logits(config, rows)[:, 3:]) < 0.15


# ---- The ends of a sequence -------------------------------------------------------------------


def test_stop_ids_end_a_sequence_and_are_left_out():
    config = config_of(M=1, sync_factor=0.5)
    generator, prompts = generator_of(config), prompts_of((3, 5))
    free = generator.generate(prompts, max_new_tokens=8)
    stop = free[0][2]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generator.generate(prompts, max_new_tokens=8, stop_ids=[stop]) == expected
    assert len(expected[0]) <= 2


def test_stream_gives_a_token_of_every_unfinished_prompt():
    config = config_of(M=1, sync_factor=0.5)
    generator, prompts = generator_of(config), prompts_of((3, 13, 16))
    steps = list(generator.stream(prompts, max_new_tokens=9))
    assert [sorted(tokens) for tokens in steps] == [[0, 1]] * 3 + [[0]] * 6
    assert generator.generate([], max_new_tokens=3) == []
    assert generator.generate(prompts[2:], max_new_tokens=3) == [[]]


@pytest.mark.parametrize(
    "prompts, arguments, said",
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1] * 17], {}, "prompt 1 has 17 tokens, .*data.sequence_length=16"),
        ([[64]], {}, r"outside \[0, 64\)"),
        ([[-1]], {}, r"outside \[0, 64\)"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_the_first_step(prompts, arguments, said):
    generator = generator_of(config_of(M=1, sync_factor=0.5))
    with pytest.raises(InputError, match=said):
        generator.stream(prompts, **(dict(max_new_tokens=1) | arguments))


# ---- Sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=math.nan), "temperature=nan"),
        (dict(temperature=math.inf), "temperature=inf"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(seed=-1), "seed=-1"),
    ],
    ids=str,
)
def test_impossible_sampling_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Sampling(**settings)


def test_sampling_from_one_token_is_greedy():
    generator, prompts = generator_of(config_of(M=8, sync_factor=0.5)), prompts_of(LENGTHS)
    greedy = generator.generate(prompts, max_new_tokens=6)
    for choice in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-30)):
        chosen = Sampling(**dict(temperature=1.0) | choice)
        assert generator.generate(prompts, max_new_tokens=6, sampling=chosen) == greedy, choice


def test_the_seed_decides_not_the_mesh():
    prompts = prompts_of(LENGTHS)
    meshes = [dict(model=8), dict(model=1), GROUPED]
    texts = [
        generator_of(config_of(mesh=mesh, sync_factor=0.5)).generate(
            prompts, max_new_tokens=6, sampling=Sampling(1.5, top_k=20, top_p=0.9, seed=seed)
        )
        for mesh in meshes
        for seed in (0, 1)
    ]
    assert texts[0::2] == texts[:1] * 3 and texts[1::2] == texts[1:2] * 3
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    "settings, remaining",
    [
        (dict(temperature=2.0), 64),
        (dict(temperature=2.0, top_k=5), 5),
        (dict(temperature=2.0, top_p=0.5), None),
        (dict(temperature=2.0, top_k=5, top_p=0.7), None),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution(settings, remaining):
    """4,096 draws from given logits against the closed form."""
    logits = 3 * np.random.default_rng(0).standard_normal(64).astype(np.float32)
    draws = draw(logits, rows=4096, **settings)
    probabilities = np.exp(logits / settings["temperature"])
    order = np.argsort(-probabilities)
    probabilities[order[settings.get("top_k", 64) :]] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= settings.get("top_p", 1.0)]] = 0
    probabilities /= probabilities.sum()
    if remaining:
        assert np.count_nonzero(probabilities) == remaining
    found = np.bincount(draws, minlength=64) / len(draws)
    assert not found[probabilities == 0].any()
    error = np.abs(found - probabilities) / np.sqrt(probabilities / len(draws) + 1e-12)
    assert error[probabilities > 0].max() < 4.5  # standard deviations, the largest of 64
    # Rows are independent: neighbours are equal as often as two draws are.
    equal = np.mean(draws[1:] == draws[:-1])
    assert abs(equal - np.sum(probabilities**2)) < 0.04


def draw(logits_V, rows, vocabulary=64, **settings):
    """One draw of each row, all of these logits, with the vocabulary over 8 devices."""
    chosen = Sampling(**dict(temperature=1.0) | settings)
    logits = np.tile(logits_V, (1, rows, 1))
    return np.asarray(chooser(chosen.kind)(logits, chosen.numbers(vocabulary)))


def chooser(kind):
    local = functools.partial(sampling.next_tokens, kind=kind)
    return jax.jit(
        jax.shard_map(
            lambda logits, numbers: local(logits, jnp.int32(3), numbers),
            mesh=models.programs(config_of(M=8)).mesh,
            in_specs=(P(None, None, "model"), P()),
            out_specs=P(DATA_AXES),
        )
    )


@pytest.mark.parametrize("kind", [sampling.GREEDY, sampling.FULL, sampling.TRUNCATED])
def test_a_choice_takes_one_collective(kind):
    arguments = jax.ShapeDtypeStruct((1, 2, 64), np.float32), Sampling().numbers(64)
    counted = traced_programs.count(chooser(kind).trace(*arguments).jaxpr)
    assert [(c.kind, c.times) for c in counted.collectives] == [("all-gather", 1)]


def test_of_equal_logits_the_lowest_id_is_greedy():
    logits = np.zeros(64, np.float32)
    logits[[9, 41]] = 2
    assert (draw(logits, rows=2, temperature=0.0) == 9).all()
    assert (draw(logits, rows=2, top_k=1) == 9).all()


@pytest.mark.parametrize("settings", [dict(temperature=0.0), {}, dict(top_k=8)], ids=str)
def test_ids_that_pad_the_vocabulary_are_never_chosen(settings):
    logits = np.zeros(64, np.float32)
    logits[61:] = 9  # over two devices' parts
    draws = draw(logits, rows=512, vocabulary=61, **settings)
    assert draws.max() < 61
    if not settings:
        assert set(draws) == set(range(61))


# ---- Programs ---------------------------------------------------------------------------------


def test_a_bucket_of_prompts_is_compiled_once():
    config = models.small_config(
        model=dict(tp_shards=8, sync_factor=0.5), mesh=dict(model=8), global_batch=8
    )
    generator = generator_of(config)
    programs = generator.programs

    def compiled_after(*batches):
        for lengths in batches:
            for temperature in (0.5, 2.0):
                chosen = Sampling(temperature, seed=lengths[0])
                generator.generate(prompts_of(lengths), max_new_tokens=15, sampling=chosen)
        return programs.prefill._cache_size(), programs.decode._cache_size()

    assert compiled_after((3, 9), (16, 1), (12, 13)) == (1, 1)
    # Prompts of up to 8 tokens are another bucket; the cache of 64 positions is the same.
    assert compiled_after((1, 2), (8, 8)) == (2, 1)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
def test_a_layer_sends_two_reductions_of_the_shared_channels(p, scan_layers):
    config = config_of(M=8, sync_factor=p, layers=3, scan_layers=scan_layers)
    for slots, trace in ((1, "trace_decode"), (64, "trace_prefill")):
        found = audit_program(
            lambda mesh, trace=trace: getattr(InferencePrograms(config, mesh), trace)(4, 64),
            models.programs(config).mesh,
        )
        assert found.unrecognised == ()
        in_layers = [c for c in found.collectives if c.place.startswith("layer")]
        shared = int(32 * p)
        if not shared:
            assert in_layers == []
        else:
            (reduction,) = in_layers
            assert (reduction.kind, reduction.axes) == ("all-reduce", ("model",))
            assert reduction.arrays == (("float32", (4, slots, shared)),)
            assert reduction.times == 2 * 3
        others = sorted((c.place, c.kind, c.times) for c in found.collectives if c not in in_layers)
        assert others == [("embedding", "all-gather", 1), ("head and loss", "all-gather", 1)]


def test_factors_per_sublayer_are_what_is_sent():
    config = config_of(M=8, layers=3, sync_factor_per_layer=((0.25, 0.75),) * 3)
    found = audit_program(
        lambda mesh: InferencePrograms(config, mesh).trace_decode(1, 64),
        models.programs(config).mesh,
    )
    layers = [c for c in found.collectives if c.place == "layer forward"]
    assert sorted((c.arrays[0][1], c.times) for c in layers) == [((1, 1, 8), 3), ((1, 1, 24), 3)]


PLAN = (1.0, 0.0, 0.0, (0.5, 0.0), (0.0, 0.25))  # a factor a layer, or its attention's and MLP's


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("trace", ["trace_decode", "trace_prefill"])
def test_a_plan_with_zeros_sends_what_it_says(trace, scan_layers):
    """Sublayers at 0 send nothing; at M = S no channel is common to all shards then."""
    config = config_of(M=8, layers=len(PLAN), sync_factor_per_layer=PLAN, scan_layers=scan_layers)
    found = audit_program(
        lambda mesh: getattr(InferencePrograms(config, mesh), trace)(1, 64),
        models.programs(config).mesh,
    )
    sent = collections.Counter()
    for c in found.over("model", LAYER_LOOP):
        assert c.kind == "all-reduce" and c.place == "layer forward"
        for _, shape in c.arrays:
            sent[shape[-1]] += c.times
    assert sent == {32: 2, 16: 1, 8: 1}


@pytest.mark.parametrize("program", ["decode", "train"])
def test_layers_that_send_nothing_run_as_one_loop(program):
    """However many there are, the program has the same matrix products."""

    def products(layers_at_0):
        factors = (1.0, *[0.0] * layers_at_0)
        config = config_of(M=8, layers=1 + layers_at_0, sync_factor_per_layer=factors)
        mesh = models.programs(config).mesh
        if program == "decode":
            traced = InferencePrograms(config, mesh).trace_decode(1, 64)
        else:
            traced = Programs(config, mesh).trace_train_step()
        return len(re.findall(r"\bdot_general\b", str(traced.jaxpr)))

    assert products(2) == products(5) > 0


def test_nothing_is_sent_over_the_data_axes():
    config = config_of(mesh=GROUPED, sync_factor=0.5)
    found = audit_program(
        lambda mesh: InferencePrograms(config, mesh).trace_decode(4, 64),
        models.programs(config).mesh,
    )
    assert {c.axes for c in found.collectives} == {("model",)}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("M", [1, 8])
def test_the_cache_is_updated_in_place(M, scan_layers):
    """No instruction copies a whole cache, and what is returned lies where the argument did."""
    config = config_of(M=M, sync_factor=0.5, kv_heads=16, scan_layers=scan_layers)
    compiled = generator_of(config).programs.trace_decode(4, 64).lower().compile()
    rows = 16 * 4 // M
    whole = rf"f32\[(?:2,)?{rows},64,4\]"
    assert re.search(rf"{whole}\S* (fusion|dynamic-update-slice)\(", compiled.as_text())
    assert not re.search(rf"= {whole}\S* copy\(", compiled.as_text())
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 2 * rows * 64 * 4 * 4


@models.needs_libtpu
def test_the_cache_is_updated_in_place_on_a_tpu_pod():
    """It comes in the order in memory that its steps want: none is brought into it, or back.

    Of three layers the last two send nothing, and run as one loop.
    """
    plan = ((0.5, 0.25), 0.0, 0.0)
    config = models.small_config(
        model=dict(layers=3, tp_shards=8, sync_factor_per_layer=plan, head_dim=128),
        mesh=dict(model=8),
        compute=dict(dtype="bfloat16"),
    )
    mesh = sharding.create_mesh(config.mesh, topology.devices("v5e:2x4"))
    compiled = InferencePrograms(config, mesh).trace_decode(8, 1024).lower().compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * 3 * 8 * 1024 * 128 * 2
    around_the_steps = compiled.as_text().partition("\nENTRY ")[2]
    for layers in (1, 2):
        cache = rf"bf16\[{layers},8,1024,128\]\S*"
        assert re.search(rf"{cache} parameter\(", around_the_steps)
        assert not re.search(rf"= {cache} copy\(", around_the_steps)
    reading = compiled_programs.read(compiled.as_text())
    assert reading.unrecognised == ()
    sent = sorted((c.kind, math.prod(c.arrays[0][1]), c.times) for c in reading.collectives)
    # Of 8 sequences: the two sublayers at 0.5 and 0.25, the choice, the embedding.
    assert sent == [
        ("all-gather", 8 * 8 * 2, 1),
        ("all-gather", 8 * 32, 1),
        ("all-reduce", 8 * 8, 1),
        ("all-reduce", 8 * 16, 1),
    ]


@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
def test_no_matrix_is_rearranged_for_a_token(p):
    """On one device with all shards, none goes into an instruction that transposes or copies."""
    config = config_of(M=1, sync_factor=p, scan_layers=False)
    compiled = generator_of(config).programs.trace_decode(4, 64).lower().compile().as_text()
    assert re.search(r" fusion\(.*%weights_spans_1__mlp_inputs_", compiled)
    assert not re.search(r"%\S*(?:copy|transpose)\S* = .*\(.*%weights_(?:runs|head)", compiled)


def test_buckets():
    assert [decoding.bucket(n, 64) for n in (1, 64, 65, 128, 1000)] == [64, 64, 128, 128, 1024]
