import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from caat_jax.data import loader, token_cache
from caat_jax.errors import InputError

T, SEQUENCES, BATCH = 6, 22, 8


@pytest.fixture
def sequences():
    """Sequence i begins with 6·i."""
    tokens = np.arange(SEQUENCES * T + 1, dtype=np.uint16)
    return token_cache.TokenSequences(
        tokens, T, keep_partial=True, fingerprint="test", text_bytes=0
    )


def _sharding(data=2, fsdp=2, model=2):
    shape = (data, fsdp, model)
    assert len(jax.devices()) == 8, "tests/conftest.py simulates eight devices"
    devices = np.array(jax.devices()[: data * fsdp * model]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def _train(sequences, sharding=None, **overrides):
    options = {"global_batch": BATCH, "seed": 3, "sharding": sharding or _sharding(), **overrides}
    return loader.train_batches(sequences, **options)


def _take(batches, count):
    return np.stack([np.asarray(batch) for batch in itertools.islice(batches, count)])


def test_batches_are_laid_out_by_the_sharding(sequences):
    with jax.transfer_guard("disallow"):
        batch = next(_train(sequences, _sharding(2, 2, 2)))
    assert batch.shape == (BATCH, T + 1) and batch.dtype == np.int32
    assert batch.sharding == _sharding(2, 2, 2)
    whole = np.asarray(batch)
    for shard in batch.addressable_shards:
        assert shard.data.shape == (2, T + 1)
        assert np.array_equal(shard.data, whole[shard.index])


@pytest.mark.parametrize("mesh", [(2, 1, 1), (2, 2, 1), (8, 1, 1), (1, 4, 2), (1, 1, 8)])
def test_same_batches_on_any_mesh(sequences, mesh):
    expected = _take(_train(sequences, _sharding(1, 1, 1)), 7)
    assert np.array_equal(_take(_train(sequences, _sharding(*mesh)), 7), expected)


@dataclasses.dataclass
class _OneProcess:
    """The sharding as a process sees it that has some of the devices."""

    sharding: NamedSharding
    first: int
    last: int

    def addressable_devices_indices_map(self, shape):
        rows = self.sharding.addressable_devices_indices_map(shape).items()
        return {device: index for device, index in rows if self.first <= device.id < self.last}


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_a_process_reads_its_rows_only(processes, mesh):
    sharding, each, batches = _sharding(*mesh), 8 // processes, 5
    wanted = {}
    for first in range(0, 8, each):
        read = []

        def sequence(i, read=read):
            read.append(i)
            return np.full(T + 1, i, np.int32)

        layout = loader._Layout(_OneProcess(sharding, first, first + each), BATCH, T)
        for k, rows in enumerate(layout.read(sequence, batches)):
            assert rows[:, 0].tolist() == [k * BATCH + r for r in layout.rows]
        assert len(read) == batches * len(layout.rows)
        wanted[first] = layout.rows.tolist()
    assert set().union(*wanted.values()) == set(range(BATCH))
    shards = mesh[0] * mesh[1]
    assert {len(rows) for rows in wanted.values()} == {max(BATCH // shards, BATCH // processes)}


def test_each_epoch_is_another_order_of_all(sequences):
    first = _take(_train(sequences), 3 * SEQUENCES // BATCH)[:, :, 0].ravel() // T
    epochs = first[: 2 * SEQUENCES].reshape(2, SEQUENCES)
    for epoch in epochs:
        assert sorted(epoch) == list(range(SEQUENCES))
        assert epoch.tolist() != list(range(SEQUENCES))
    assert epochs[0].tolist() != epochs[1].tolist()
    other_seed = _take(_train(sequences, seed=4), 3)[:, :, 0].ravel() // T
    assert other_seed.tolist() != first[: 3 * BATCH].tolist()


@pytest.mark.parametrize("stop", [0, 1, 5, 30])
def test_state_goes_on_exactly_on_another_mesh(sequences, stop):
    expected = _take(_train(sequences), stop + 3)[stop:]
    batches = _train(sequences, _sharding(4, 2, 1))
    for _ in range(stop):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    resumed = _train(sequences, _sharding(1, 2, 1))
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert np.array_equal(_take(resumed, 3), expected)
    assert np.array_equal(_take(_train(sequences, first_batch=stop), 3), expected)


def test_state_of_other_batches_is_refused(sequences):
    state = _train(sequences).get_state()
    with pytest.raises(InputError, match="global_batch was 8 and is now 16"):
        _train(sequences, global_batch=16).set_state(state)
    with pytest.raises(InputError, match="seed was 3 and is now 4"):
        _train(sequences, seed=4).set_state(state)
    sequences.fingerprint = "other text"
    with pytest.raises(InputError, match="tokens was test and is now other text"):
        _train(sequences).set_state(state)


@pytest.mark.parametrize(("limit", "count"), [(-1, 22), (3, 3), (8, 8), (9, 9), (16, 16), (99, 22)])
def test_validation_reads_each_sequence_once_in_order(sequences, limit, count):
    with jax.transfer_guard("disallow"):
        batches = list(
            loader.validation_batches(sequences, batch=8, limit=limit, sharding=_sharding())
        )
    assert len(batches) == -(-count // 8)
    assert all(batch.shape == (8, T + 1) for batch in batches)
    rows = np.concatenate([np.asarray(batch) for batch in batches])
    assert np.array_equal(rows[:count], np.stack([sequences[i] for i in range(count)]))
    assert (rows[count:] == token_cache.PADDING).all()


_PROCESS = """
import json, sys
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from caat_jax.data import loader, token_cache

jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
# The processes take turns along the data axis: their rows do not lie together.
devices = np.array(jax.devices()).reshape(2, 2, 2).transpose(1, 0, 2).reshape(4, 2)
mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
tokens = np.arange(22 * 6 + 1, dtype=np.uint16)
sequences = token_cache.TokenSequences(tokens, 6, True, fingerprint="test", text_bytes=0)
batches = loader.train_batches(
    sequences, global_batch=8, seed=3, sharding=NamedSharding(mesh, PartitionSpec("data"))
)
rows = {}
for k in range(5):
    for shard in next(batches).addressable_shards:
        for row, tokens in zip(range(8)[shard.index[0]], np.asarray(shard.data).tolist()):
            rows[f"{k}, {row}"] = tokens
print(json.dumps([rows, batches.get_state()]))
"""


def test_two_processes_hold_the_batches_of_one(sequences):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, address, str(number)],
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for number in range(2)
    ]
    outputs = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert outputs[0][0].keys() == {f"{k}, {r}" for k in range(5) for r in (0, 1, 4, 5)}
    assert outputs[1][0].keys() == {f"{k}, {r}" for k in range(5) for r in (2, 3, 6, 7)}
    single = _train(sequences)
    expected = _take(single, 5)
    together = {**outputs[0][0], **outputs[1][0]}
    assert together == {f"{k}, {r}": expected[k, r].tolist() for k in range(5) for r in range(8)}
    assert outputs[0][1] == outputs[1][1] == single.get_state()
