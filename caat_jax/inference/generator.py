"""Text generation from token ids: a batch of prompts in, their continuations out.

    generator = Generator(config, mesh, parameters)
    continuations = generator.generate([[256, 100, 101], [256, 102]], max_new_tokens=32)

Prompts are filled up to a few lengths, and caches have a few lengths, so that few programs are
compiled: one prefill for each pair of them and one decode for each length of the cache.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from caat_jax.config.sections import Config
from caat_jax.devices import sharding
from caat_jax.devices.dispatch import wait_if_simulated
from caat_jax.errors import InputError
from caat_jax.inference.programs import InferencePrograms
from caat_jax.inference.sampling import Sampling

# Every length has programs of its own.  A short cache costs little; a prompt's filling is computed
# and sent like the rest of it.
SHORTEST_PROMPTS, SHORTEST_CACHE = 8, 64
# Tokens of each sequence from one call of a program: the host waits for them together.  Tokens
# past the end of a sequence are wasted work.
STEPS_PER_CALL = 8

GREEDILY = Sampling()


class Generator:
    """Continues prompts with one model on one mesh.

    Several prompts run as one batch, split over the data axes of the mesh; the programs of earlier
    batches are used again.
    """

    def __init__(self, config: Config, mesh: Mesh, parameters: Any, vocabulary: int | None = None):
        """Lays out the weights for inference; the parameters are needed no more afterwards.

        Args:
          config: what the parameters were trained with, its vocabulary filled in.
          mesh: `model` divides S.  All processes whose devices it has do the same, together.
          parameters: a nested dictionary of arrays with any sharding, matrices in float32 or in
            the compute type.
          vocabulary: ids from here on only pad the vocabulary, and are never chosen; by default
            all ids may be.
        """
        self.config = config
        self.programs = InferencePrograms(config, mesh)
        ids = config.model.vocab_size - config.model.vocab_padding
        self._vocabulary = ids if vocabulary is None else vocabulary
        self._rows_multiple = sharding.data_parallel_size(mesh)
        self._weights = wait_if_simulated(self.programs.prepare(parameters))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDILY,
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """The new tokens of each prompt, without the stop id that ended them.

        Args:
          prompts: token ids, at least one and at most `data.sequence_length` each.
          max_new_tokens: of each prompt; prompt and new tokens together end at
            `data.sequence_length`.
          sampling: how each token is chosen.
          stop_ids: ids that end a sequence.

        Raises:
          InputError: naming the value and what is allowed.
        """
        new_tokens: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids
        ):
            for row, token in tokens.items():
                new_tokens[row].append(token)
        return new_tokens

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDILY,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[dict[int, int]]:
        """`generate`, step by step: each the new token of every prompt that has one, by its number.

        A prompt that is missing from a step has finished.  Bad arguments raise at once.
        """
        check_new_tokens(max_new_tokens)
        self._check_prompts(prompts)
        context = self.config.data.sequence_length
        limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        if not any(limits):
            return iter(())
        steps = self._all_steps(prompts, max(limits), sampling)
        return _until_ended(steps, limits, frozenset(stop_ids))

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        context, vocabulary = self.config.data.sequence_length, self.config.model.vocab_size
        for number, prompt in enumerate(prompts, start=1):
            if not len(prompt):
                raise InputError(f"prompt {number} is empty; give one token at least")
            if len(prompt) > context:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens, more than the context of"
                    f" data.sequence_length={context}"
                )
            if not all(0 <= token < vocabulary for token in prompt):
                raise InputError(f"prompt {number} has an id outside [0, {vocabulary})")

    def _on_mesh(self, rows: np.ndarray) -> jax.Array:
        """An array whose first axis is split as a batch is."""
        layout = sharding.batch_sharding(self.programs.mesh, rows.ndim)
        return jax.make_array_from_callback(rows.shape, layout, lambda index: rows[index])

    def _all_steps(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling
    ) -> Iterator[np.ndarray]:
        """int32 [rows] for each step, rows past the prompts' being meaningless."""
        numbers = sampling.numbers(self._vocabulary)
        calls = math.ceil((new_tokens - 1) / STEPS_PER_CALL)
        rows = math.ceil(len(prompts) / self._rows_multiple) * self._rows_multiple
        lengths = np.ones(rows, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        slots = bucket(int(lengths.max()), SHORTEST_PROMPTS)
        filled = np.zeros((rows, slots), np.int32)
        for row, prompt in zip(filled, prompts, strict=False):
            row[: len(prompt)] = prompt
        cache, state = wait_if_simulated(
            self.programs.prefill(
                self._weights,
                self._on_mesh(filled),
                self._on_mesh(lengths),
                numbers,
                cache_length=bucket(slots + calls * STEPS_PER_CALL, SHORTEST_CACHE),
                kind=sampling.kind,
            )
        )
        yield _on_host(state.tokens)
        for _ in range(calls):
            cache, state, tokens = wait_if_simulated(
                self.programs.decode(
                    self._weights,
                    cache,
                    state,
                    numbers,
                    steps=STEPS_PER_CALL,
                    kind=sampling.kind,
                )
            )
            yield from _on_host(tokens)


def _on_host(array: jax.Array) -> np.ndarray:
    """All of an array, on every process that has a part of it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def check_new_tokens(number: int) -> None:
    """Refuses what `Generator.generate` would, before there is one.

    Raises:
      InputError: there is no token to generate.
    """
    if number < 1:
        raise InputError(f"max_new_tokens={number} must be at least 1")


def bucket(length: int, shortest: int) -> int:
    """The first of `shortest`, its double, that one's double, … that is at least `length`."""
    return next(n for n in map(shortest.__lshift__, itertools.count()) if n >= length)


def _until_ended(
    steps: Iterator[np.ndarray], limits: Sequence[int], stop_ids: frozenset[int]
) -> Iterator[dict[int, int]]:
    """The steps' tokens of the sequences that neither stop id nor limit has ended."""
    going_on = [row for row, limit in enumerate(limits) if limit]
    for number, chosen in enumerate(steps, start=1):
        tokens = {row: int(chosen[row]) for row in going_on if int(chosen[row]) not in stop_ids}
        if tokens:
            yield tokens
        going_on = [row for row in tokens if number < limits[row]]
        if not going_on:
            return
