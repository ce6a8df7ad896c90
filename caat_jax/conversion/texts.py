"""Calibration and held-out sequences: evenly spaced over the two splits of a corpus."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from caat_jax.config.sections import DataConfig
from caat_jax.data.token_cache import TokenSequences, open_cache
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.errors import InputError


class Texts(NamedTuple):
    """Sequences to calibrate on, and others, of other documents, to measure the loss on."""

    calibration: list[np.ndarray]  # inputs, int32 [B, T] each
    held_out: Sequence[np.ndarray]

    @property
    def tokens(self) -> int:
        """Of the calibration."""
        return sum(batch.size for batch in self.calibration)


class _Some:
    """Some sequences of a split, as a split of their own."""

    def __init__(self, sequences: TokenSequences, count: int):
        self._sequences = sequences
        self.sequence_length = sequences.sequence_length
        self._chosen = np.linspace(0, len(sequences) - 1, min(count, len(sequences))).astype(int)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._sequences[int(self._chosen[index])]


def open_texts(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    calibration_tokens: int,
    held_out_tokens: int,
    batch_tokens: int,
    parts: int,
    prepare: bool,
) -> Texts:
    """Reads as many tokens as there are, up to those asked for.

    Args:
      data: the corpus and T.
      tokenizer: the model's.
      calibration_tokens: in whole batches.
      held_out_tokens: in whole sequences.
      batch_tokens: so many at a time at most, where one sequence for each part is not more.
      parts: the mesh splits a batch into these.
      prepare: as for `open_cache`.

    Raises:
      InputError: there is no corpus, or fewer sequences in it than parts.
    """
    cache = open_cache(data, tokenizer, prepare)
    length = data.sequence_length
    wanted = min(calibration_tokens // length, len(cache.train))
    if wanted < parts:
        raise InputError(
            f"the text to calibrate on makes {wanted} sequences of data.sequence_length={length},"
            f" and the mesh splits a batch into {parts} parts; give more text or a larger"
            " --calibration_tokens"
        )
    count = min(math.ceil(wanted * length / batch_tokens), wanted // parts)
    batch = parts * (wanted // (count * parts))
    sequences = _Some(cache.train, count * batch)
    rows = [sequences[number][:-1] for number in range(len(sequences))]
    batches = [np.stack(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    held_out = _Some(cache.validation, max(1, held_out_tokens // length))
    return Texts(batches, held_out)
