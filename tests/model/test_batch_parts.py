"""Into how many parts a batch goes; that the function stays the same is in `test_partial_sync`."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from caat_jax.model import batch_parts
from caat_jax.model.partial_sync import Stream
from tests import models


@pytest.mark.parametrize(
    "given, platform, offloaded, p, expected",
    [
        (0, "cpu", False, 1.0, 1),
        (0, "gpu", False, 1.0, 2),
        (0, "gpu", False, 0.5, 2),
        (0, "tpu", False, 1.0, 2),
        (0, "tpu", False, 0.5, 1),
        (0, "tpu", True, 0.5, 2),
        (1, "tpu", True, 0.5, 1),
        (3, "cpu", False, 0.5, 3),
        (1, "gpu", False, 0.5, 1),
    ],
)
def test_choice(given, platform, offloaded, p, expected):
    config = models.small_config(model=dict(tp_shards=8, sync_factor=p))
    compute = dataclasses.replace(config.compute, batch_parts=given)
    chosen = batch_parts.choose(config.model, compute, platform, offloaded=offloaded)
    assert chosen == expected


@pytest.mark.parametrize(
    "devices, sequences, parts, expected", [(2, 4, 2, 2), (2, 3, 2, 1), (1, 4, 2, 1), (4, 6, 3, 3)]
)
def test_only_a_batch_that_divides_is_split_and_only_where_something_is_sent(
    devices, sequences, parts, expected
):
    found = []

    def function(common, private):
        split = batch_parts.split(Stream(common, private), parts)
        found.append(len(split))
        return tuple(batch_parts.join(split))

    stream = Stream(
        jnp.arange(sequences * 12.0).reshape(sequences, 2, 6),
        jnp.arange(sequences * 16.0).reshape(2, sequences, 2, 4),
    )
    mesh = jax.make_mesh((devices,), ("model",), devices=jax.devices()[:devices])
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P())
    joined = jax.jit(mapped)(*stream)
    assert found == [expected]
    assert all((a == b).all() for a, b in zip(joined, stream, strict=True))
