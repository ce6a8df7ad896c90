"""Log-likelihoods and greedy matches against the float64 emulation, in any batches."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from caat_jax.communication import traced_programs
from caat_jax.errors import InputError
from caat_jax.evaluation import scoring
from caat_jax.evaluation.scoring import Scored, Scorer
from caat_jax.model import loss
from tests import models, reference

LENGTH = 70  # buckets of 35 and 70
MESHES = {"M=1": dict(model=1), "M=8": dict(model=8), "2x2x2": dict(data=2, fsdp=2, model=2)}


@functools.cache
def programs_on(mesh):
    config = models.small_config(model=dict(sync_factor=0.5), mesh=MESHES[mesh])
    data = dataclasses.replace(config.data, sequence_length=LENGTH)
    return models.programs(dataclasses.replace(config, data=data))


@functools.cache
def parameters():
    return reference.random_parameters(5, **models.SMALL, tied_head=False)


@functools.cache
def scorer_on(mesh, rows):
    programs = programs_on(mesh)
    return Scorer(programs, models.on_mesh(programs, parameters()), rows)


def expected_logits(tokens):
    """float64 [T, V] of one sequence."""
    method = models.method(programs_on("M=1").config)
    return reference.forward(parameters(), np.array([tokens]), **method).logits[0]


def expected_score(sequence):
    logits = expected_logits(sequence.tokens[:-1])[-sequence.targets :]
    targets = np.array(sequence.tokens[-sequence.targets :])
    normaliser = np.log(np.exp(logits).sum(axis=-1))
    chosen = np.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (chosen - normaliser).sum(), bool((logits.argmax(axis=-1) == targets).all())


@functools.cache
def sequences():
    """Of all lengths, also the shortest and the longest; every third continues greedily."""
    random = np.random.default_rng(6)
    made = []
    for number, length in enumerate([2, 36, 71, 35, 37, *random.integers(3, 72, 10)]):
        tokens = random.integers(0, 64, length).tolist()
        targets = int(random.integers(1, length))
        if number % 3 == 0:
            targets = min(targets, 3)
            for place in range(length - targets, length):
                tokens[place] = int(expected_logits(tokens[:place])[-1].argmax())
        made.append(Scored(tokens, targets))
    return made


@pytest.mark.parametrize("mesh", MESHES)
def test_scores_are_those_of_the_reference(mesh):
    expected = [expected_score(sequence) for sequence in sequences()]
    assert {greedy for _, greedy in expected} == {True, False}
    scores = scorer_on(mesh, 4).score(sequences())
    for (log_likelihood, is_greedy), score in zip(expected, scores, strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert score.is_greedy is is_greedy


def test_order_and_batches_change_nothing():
    expected = scorer_on("2x2x2", 4).score(sequences())
    order = np.random.default_rng(7).permutation(len(sequences()))
    scores = scorer_on("2x2x2", 8).score([sequences()[n] for n in order])
    for number, score in zip(order, scores, strict=True):
        assert score.log_likelihood == pytest.approx(expected[number].log_likelihood, abs=1e-5)
        assert score.is_greedy == expected[number].is_greedy
    assert scorer_on("2x2x2", 8).score([]) == []


def test_few_programs_are_compiled():
    assert scoring.bucket_lengths(LENGTH) == [35, 70]
    assert scoring.bucket_lengths(1024) == [32, 64, 128, 256, 512, 1024]
    assert scoring.bucket_lengths(63) == [63]
    programs = models.programs(programs_on("M=8").config)
    Scorer(programs, models.on_mesh(programs, parameters()), 2).score(sequences())
    assert programs.score_step._cache_size() == 2


def test_one_program_at_a_time(monkeypatch):
    """On simulated devices a second program could hang both."""
    programs, running, overlaps = programs_on("M=8"), [], []
    score_step = programs.score_step

    def watched(*arguments):
        overlaps.extend(output for output in running if not output.is_ready())
        running[:] = score_step(*arguments)
        return tuple(running)

    monkeypatch.setattr(programs, "score_step", watched)
    scorer_on("M=8", 4).score(sequences() * 3)
    assert running and overlaps == []


def test_rows_must_divide_over_the_mesh():
    with pytest.raises(InputError, match=re.escape("--batch_size=6 must be a multiple of 4")):
        scorer_on("2x2x2", 6)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_most_likely_takes_the_lowest_of_equals(devices):
    """Whole numbers, so few that most tokens have equals: within a group, a device, and beyond."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("model",))
    logits_GBTv = np.random.default_rng(8).integers(0, 4, (8, 3, 5, 2)).astype(np.float32)
    program = jax.shard_map(loss.most_likely, mesh=mesh, in_specs=P("model"), out_specs=P())
    ids = np.asarray(jax.jit(program)(jnp.asarray(logits_GBTv)))
    expected = np.moveaxis(logits_GBTv, 0, 2).reshape(3, 5, 16).argmax(axis=-1)
    np.testing.assert_array_equal(ids, expected)


def test_no_device_sees_the_logits_of_another():
    """After the layers, a few numbers a token are sent: a maximum, two sums, the likeliest ids."""
    programs = programs_on("M=8")
    batch = jax.ShapeDtypeStruct((4, LENGTH + 1), jnp.int32, sharding=programs.batch_sharding)
    traced = programs.score_step.trace(programs.state_shapes.parameters, batch)
    counted = traced_programs.count(traced.jaxpr)
    assert counted.unrecognised == ()
    sent = [c for c in counted.collectives if c.place == "head and loss"]
    tokens = 4 * LENGTH
    sizes = [(c.kind, np.prod(shape)) for c in sent for _, shape in c.arrays]
    assert sorted(sizes) == [
        ("all-gather", 8 * 2 * tokens),
        ("all-reduce", tokens),
        ("all-reduce", 2 * tokens),
    ]
