"""A corpus as two flat files of tokens, written once and memory-mapped by everybody.

Letters: T, the sequence length.

A file holds `BOS document EOS` for one document after the other (of an imported model, what its
tokeniser puts there instead of BOS).  Sequence i is its tokens
[i·T, i·T + T + 1): neighbours share one token, so that every token but the first is a target once.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from caat_jax import files
from caat_jax.config import user_paths
from caat_jax.config.sections import DataConfig
from caat_jax.data import cache_folder, corpora
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.errors import InputError

PADDING = -1

# Goes up when the files' content would change for the same corpus and tokeniser.
_FORMAT = 1
_SPLITS = ("train", "validation")
# A batch of documents ends at whichever comes first; progress is recorded after each.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4_000_000


class TokenSequences:
    """Sequences of T + 1 tokens: inputs [:-1], targets [1:].  A Grain random-access source.

    Args:
      tokens: unsigned integers [tokens], the flat file.
      sequence_length: T.
      keep_partial: whether the tokens left over at the end make one more sequence, filled up with
        `PADDING`.
      fingerprint: identifies corpus and tokeniser.
    """

    def __init__(
        self, tokens: np.ndarray, sequence_length: int, keep_partial: bool, fingerprint: str
    ):
        self._tokens = tokens
        self.sequence_length = sequence_length
        self.fingerprint = fingerprint
        left_over = sequence_length - 1 if keep_partial else 0
        self._length = (len(tokens) - 1 + left_over) // sequence_length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """Sequence `index`, int32 [T+1]; `PADDING`, which is negative, is no target."""
        if not 0 <= index < self._length:
            raise IndexError(f"sequence {index} of {self._length}")
        start = index * self.sequence_length
        tokens = self._tokens[start : start + self.sequence_length + 1].astype(np.int32)
        missing = self.sequence_length + 1 - len(tokens)
        return np.pad(tokens, (0, missing), constant_values=PADDING) if missing else tokens


class TokenCache(NamedTuple):
    """The sequences to train on, without a partial one, and all of those to validate on."""

    train: TokenSequences
    validation: TokenSequences


def open_cache(data: DataConfig, tokenizer: Tokenizer) -> TokenCache:
    """The configured corpus in tokens; tokenises it at first, or goes on where that was stopped.

    Several processes may call it at a time: one works, the others wait.

    Raises:
      InputError: the corpus cannot serve, or is too short for one sequence.
    """
    corpus = corpora.open_corpus(data)
    # T is no part of the key: the files hold no sequences yet.
    fingerprint = cache_folder.key_of(_FORMAT, corpus.fingerprint, tokenizer.fingerprint)
    folder = user_paths.expanded("data.cache_dir", data.cache_dir) / "tokens" / fingerprint
    if not _finished(folder):
        with cache_folder.locked(folder):
            if not _finished(folder):
                _build(folder, corpus, tokenizer)
    length = data.sequence_length
    train, validation = (
        TokenSequences(
            np.memmap(folder / f"{split}.bin", _dtype(tokenizer), mode="r"),
            length,
            keep_partial=split == "validation",
            fingerprint=fingerprint,
        )
        for split in _SPLITS
    )
    if not len(train):
        tokens = _read_manifest(folder)["train"]["tokens"]
        raise InputError(
            f"the training documents have {tokens} tokens, too few for one sequence of"
            f" data.sequence_length={length} and its last target; give more text, or a"
            f" data.sequence_length of at most {tokens - 1}"
        )
    return TokenCache(train, validation)


def _build(folder: Path, corpus: corpora.Corpus, tokenizer: Tokenizer) -> None:
    documents = {split: corpus.documents(split) for split in _SPLITS}
    manifest = _read_manifest(folder)
    for split in _SPLITS:
        _tokenize(folder, split, documents[split], tokenizer, manifest)
    _write_manifest(folder, {**manifest, "finished": True})
    counts = ", ".join(
        f"{manifest[split]['tokens']:,} tokens of {manifest[split]['documents']:,} documents for"
        f" {split}"
        for split in _SPLITS
    )
    print(f"tokenised {counts}: {folder}", file=sys.stderr)


def _tokenize(
    folder: Path,
    split: str,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    manifest: dict[str, Any],
) -> None:
    """Appends to one file what is missing, keeping `manifest`, on disk too, up to date."""
    done, dtype = manifest[split], _dtype(tokenizer)
    path = folder / f"{split}.bin"
    path.touch()
    with (
        open(path, "r+b") as file,
        tqdm.tqdm(
            desc=f"tokenising {split} documents",
            initial=done["documents"],
            total=len(documents),
            disable=None,
        ) as progress,
    ):
        # What was written after the manifest was may not be complete.
        file.truncate(done["tokens"] * dtype.itemsize)
        file.seek(0, os.SEEK_END)
        for texts in _batches(documents, done["documents"]):
            for ids in tokenizer.encode_batch(texts):
                document = np.array([*tokenizer.prefix, *ids, tokenizer.eos_id], dtype)
                file.write(document.tobytes())
                done["tokens"] += len(document)
            done["documents"] += len(texts)
            file.flush()
            os.fsync(file.fileno())
            _write_manifest(folder, manifest)
            progress.update(len(texts))


def _batches(documents: Sequence[str], start: int) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for number in range(start, len(documents)):
        texts.append(documents[number])
        characters += len(texts[-1])
        if len(texts) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")


def _finished(folder: Path) -> bool:
    return _read_manifest(folder)["finished"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What is done: documents and tokens of each split, and whether that is all."""
    try:
        return files.read_json(folder / "manifest.json", dict)
    except FileNotFoundError:
        return {"finished": False} | {split: {"documents": 0, "tokens": 0} for split in _SPLITS}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files.write(folder / "manifest.json", json.dumps(manifest))
