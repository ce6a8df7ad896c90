"""Log-likelihoods of many sequences of any lengths, by few programs.

Letters: B, the rows of a batch; T, the longest input, `data.sequence_length`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from caat_jax.data.token_cache import PADDING
from caat_jax.devices import sharding
from caat_jax.devices.dispatch import wait_if_simulated
from caat_jax.errors import InputError
from caat_jax.training.step import Programs

# Shorter inputs are padded to this: one more program would save little time there.
_SHORTEST_BUCKET = 32


class Scored(NamedTuple):
    """Up to T + 1 tokens; the last `targets` of them, at most all but the first, are scored."""

    tokens: Sequence[int]
    targets: int


class Score(NamedTuple):
    """Of a sequence's scored tokens together."""

    log_likelihood: float  # nats
    is_greedy: bool  # each is the most likely one, the lowest id of equals


class Scorer:
    """Scores sequences with one model's parameters, those of similar lengths together."""

    def __init__(self, programs: Programs, parameters: Any, rows: int):
        """Compiles nothing yet.

        Args:
          programs: for their `score_step`.
          parameters: laid out for the programs' mesh.
          rows: B, over all devices.

        Raises:
          InputError: the rows do not divide over the mesh.
        """
        ways = sharding.data_parallel_size(programs.mesh)
        if rows < 1 or rows % ways:
            raise InputError(
                f"--batch_size={rows} must be a multiple of {ways}, the parts that mesh.data times"
                " mesh.fsdp make of a batch"
            )
        self.rows = rows
        self.sequence_length = programs.config.data.sequence_length
        self._programs, self._parameters = programs, parameters

    def score(self, sequences: Sequence[Scored]) -> list[Score]:
        """The scores, in the order of the sequences, whatever the batches are."""
        scores: dict[int, Score] = {}
        with tqdm.tqdm(total=len(sequences), desc="scoring", disable=None) as progress:
            pending: tuple[list[int], Any] | None = None
            for numbers, length in self._batches(sequences):
                started = self._start([sequences[n] for n in numbers], length)
                # Read one batch late: the next is then already under way.
                if pending:
                    scores |= _read(sequences, *pending)
                    progress.update(len(pending[0]))
                pending = numbers, started
            if pending:
                scores |= _read(sequences, *pending)
                progress.update(len(pending[0]))
        return [scores[number] for number in range(len(sequences))]

    def _batches(self, sequences: Sequence[Scored]) -> Iterator[tuple[list[int], int]]:
        """Numbers of sequences, B or fewer, and the length to which their inputs are padded."""
        buckets = bucket_lengths(self.sequence_length)
        members: dict[int, list[int]] = {length: [] for length in reversed(buckets)}
        for number, sequence in enumerate(sequences):
            inputs = len(sequence.tokens) - 1
            members[next(length for length in buckets if inputs <= length)].append(number)
        # The longest first, so that too little memory shows at once.
        for length, numbers in members.items():
            for first in range(0, len(numbers), self.rows):
                yield numbers[first : first + self.rows], length

    def _start(self, sequences: Sequence[Scored], length: int) -> tuple[jax.Array, jax.Array]:
        batch = np.full((self.rows, length + 1), PADDING, np.int32)
        for row, sequence in zip(batch, sequences, strict=False):
            row[: len(sequence.tokens)] = sequence.tokens
        on_devices = jax.device_put(batch, self._programs.batch_sharding)
        return wait_if_simulated(self._programs.score_step(self._parameters, on_devices))


def bucket_lengths(longest: int) -> list[int]:
    """The lengths that inputs are padded to, ascending: `longest`, its half, its quarter, …"""
    lengths = [longest]
    while lengths[0] // 2 >= _SHORTEST_BUCKET:
        lengths.insert(0, lengths[0] // 2)
    return lengths


def _read(
    sequences: Sequence[Scored], numbers: list[int], outputs: tuple[jax.Array, jax.Array]
) -> dict[int, Score]:
    log_likelihoods, is_greedy = jax.device_get(outputs)
    scores = {}
    for row, number in enumerate(numbers):
        end = len(sequences[number].tokens) - 1  # the target of input i is token i + 1
        scored = slice(end - sequences[number].targets, end)
        scores[number] = Score(
            float(log_likelihoods[row, scored].sum(dtype=np.float64)),
            bool(is_greedy[row, scored].all()),
        )
    return scores
