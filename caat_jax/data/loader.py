"""Batches of sequences as global arrays, laid out over the devices of all processes.

Letters: B, the global batch; T, the sequence length.

Which sequences make up batch k follows from the seed and the corpus alone.  A process reads the
rows of it that its own devices hold, and nothing else.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from caat_jax.data.token_cache import PADDING, TokenSequences
from caat_jax.errors import InputError

# The state of batches of which none has been read, whichever they will be.
NOTHING_READ = {"next_batch": 0}

_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


# What to do where a run's batches have changed.
_REMEDIES = {
    "global_batch": "; the batch of a run stays the same (train.accumulation_steps makes it fit"
    " into less memory): give back the old train.global_batch, or another --workdir",
}


class TrainBatches:
    """An endless iterator of int32 [B, T+1] global arrays; see `train_batches`."""

    def __init__(
        self, sequences: TokenSequences, global_batch: int, seed: int, sharding: NamedSharding
    ):
        self._identity = {
            "global_batch": global_batch,
            "seed": seed,
            "sequence_length": sequences.sequence_length,
            "tokens": sequences.fingerprint,
        }
        self._layout = _Layout(sharding, global_batch, sequences.sequence_length)
        # The shuffle takes another order in each epoch.
        shuffled = grain.MapDataset.source(sequences).seed(seed).shuffle().repeat()
        self._next = 0
        self._rows = self._layout.read(shuffled.__getitem__, batches=sys.maxsize // global_batch)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> jax.Array:
        """Batch `next_batch`."""
        batch = self._layout.global_array(next(self._rows))
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able; the same on all processes, however many there are."""
        return {"next_batch": self._next, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from `get_state`, or starts from `NOTHING_READ`.

        Raises:
          InputError: the state is that of other batches.
        """
        if state == NOTHING_READ:
            self.seek(0)
            return
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise InputError(
                    f"the batches cannot resume where they were: {name} was {state.get(name)} and"
                    f" is now {value}{_REMEDIES.get(name, '')}"
                )
        self.seek(state["next_batch"])

    def seek(self, batch: int) -> None:
        """Makes `batch` the next."""
        self._rows.set_state({"next_index": batch})
        self._next = batch


def train_batches(
    sequences: TokenSequences,
    *,
    global_batch: int,
    seed: int,
    sharding: NamedSharding,
    first_batch: int = 0,
) -> TrainBatches:
    """Goes through shuffled sequences epoch after epoch; a batch may span two.

    Args:
      sequences: at least one.
      global_batch: B.
      seed: of the order, 0 or more.
      sharding: of a [B, T+1] array; rows may be split, T must not be.
      first_batch: the number of the first batch.
    """
    batches = TrainBatches(sequences, global_batch, seed, sharding)
    batches.seek(first_batch)
    return batches


def validation_batches(
    sequences: TokenSequences, *, batch: int, limit: int, sharding: NamedSharding
) -> Iterator[jax.Array]:
    """The first `limit` sequences (-1: all) in order, as int32 [batch, T+1] global arrays.

    The last array is filled up with rows of `PADDING`.  `sharding` is as for `train_batches`.
    """
    length = sequences.sequence_length
    count = len(sequences) if limit == -1 else min(limit, len(sequences))
    layout = _Layout(sharding, batch, length)
    padding = np.full(length + 1, PADDING, np.int32)
    rows = layout.read(lambda i: sequences[i] if i < count else padding, batches=-(-count // batch))
    return map(layout.global_array, rows)


class _Layout:
    """Which rows of a batch [B, T+1] this process holds, and how to make the global array."""

    def __init__(self, sharding: NamedSharding, batch: int, sequence_length: int):
        self._sharding, self._batch = sharding, batch
        self._shape = (batch, sequence_length + 1)
        every_row = np.arange(batch)
        device_rows = {
            device: every_row[rows]
            for device, (rows, _) in sharding.addressable_devices_indices_map(self._shape).items()
        }
        self.rows = np.unique(np.concatenate(list(device_rows.values())))
        self._devices = list(device_rows)
        self._positions = [np.searchsorted(self.rows, rows) for rows in device_rows.values()]

    def read(
        self, sequence: Callable[[int], np.ndarray], batches: int
    ) -> grain.DatasetIterator[np.ndarray]:
        """int32 [local rows, T+1] of each batch, ahead of time; row r of batch k is k·B + r."""
        return iter(
            grain.MapDataset.range(batches)
            .map(lambda k: np.stack([sequence(k * self._batch + int(r)) for r in self.rows]))
            .to_iter_dataset(_READ_OPTIONS)
        )

    def global_array(self, local_rows: np.ndarray) -> jax.Array:
        # Not jax.make_array_from_callback: its transfers count as implicit, which the train loop's
        # transfer guard forbids.
        shards = jax.device_put([local_rows[p] for p in self._positions], self._devices)
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)
