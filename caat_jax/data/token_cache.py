"""A corpus as two flat files of tokens, written once and memory-mapped by every process.

Letters: T, the sequence length.

A file holds `BOS document EOS` for one document after the other (of an imported model, what its
tokeniser puts there instead of BOS).  Sequence i is its tokens
[i·T, i·T + T + 1): neighbours share one token, so that every token but the first is a target once.

`manifest.json` has the files' CRC-32.  They are compared with it when a file's size or time of
change is another than when it was written (`touch` it to have that done), and what is damaged is
made anew.
"""

import dataclasses
import json
import os
import sys
import zlib
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
from configs import base

PADDING = -1

CACHE_DIR_HELP = (
    "Prepares the run's documents there; default: its data.cache_dir, read only unless it is that"
    " of configs/base.py."
)

# Goes up when the files' content would change for the same corpus and tokeniser.
_FORMAT = 1
_SPLITS = ("train", "validation")
# A batch of documents ends at whichever comes first; progress is recorded after each.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4_000_000
_PIECE = 1 << 20  # tokens handled at a time, so that a long document takes little memory

# Of one split, in the manifest: integers of 0 or more.
_COUNTS = ("documents", "text_bytes", "tokens", "crc32")


class TokenSequences:
    """Sequences of T + 1 tokens: inputs [:-1], targets [1:].  A Grain random-access source.

    Args:
      tokens: unsigned integers [tokens], the flat file.
      sequence_length: T.
      keep_partial: whether the tokens left over at the end make one more sequence, filled up with
        `PADDING`.
      fingerprint: identifies corpus and tokeniser.
      text_bytes: UTF-8 of all documents.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        keep_partial: bool,
        fingerprint: str,
        text_bytes: int,
    ):
        self._tokens = tokens
        self.text_bytes = text_bytes
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


def stored_data(data: DataConfig, cache_dir: str | None) -> tuple[DataConfig, bool]:
    """What to give `open_cache` for a configuration out of a checkpoint: `data` and `prepare`.

    Anybody may have written that, so that nothing is written where it says, only to `cache_dir`,
    which the user gives, and to the folder that `configs/base.py` names.
    """
    if cache_dir is not None:
        data = dataclasses.replace(data, cache_dir=cache_dir)
    return data, cache_dir is not None or data.cache_dir == base.get_config().data.cache_dir


def open_cache(
    data: DataConfig,
    tokenizer: Tokenizer,
    prepare: bool = True,
    for_training: bool = True,
    begun_with: str | None = None,
) -> TokenCache:
    """The configured corpus in tokens; tokenises it first, or resumes where that was stopped.

    Several processes may call it at a time: one works, the others wait.

    Args:
      data: the configuration.
      tokenizer: the one that it names.
      prepare: whether what is missing may be written to `data.cache_dir`.
      for_training: whether there must be a sequence to train on.
      begun_with: the fingerprint of what a run that resumes has read, if any.

    Raises:
      InputError: the corpus cannot serve, is too short for one sequence, is not prepared, or is
        another than `begun_with`, which is found before anything is tokenised.
    """
    corpus = corpora.open_corpus(data, prepare)
    # T is no part of the key: the files hold no sequences yet.
    fingerprint = cache_folder.key_of(_FORMAT, corpus.fingerprint, tokenizer.fingerprint)
    if begun_with not in (None, fingerprint):
        raise InputError(
            f"the text is no longer that with which the run began; it is {data.describe()}. Bring"
            " back the files, the tokeniser and the rules for held-out documents (data.eval_split,"
            " data.holdout_every) of then, or give another --workdir"
        )
    folder = user_paths.expanded("data.cache_dir", data.cache_dir) / "tokens" / fingerprint
    if not _unchanged(folder, tokenizer, prepare):
        if not prepare:
            raise cache_folder.not_prepared(folder)
        with cache_folder.locked(folder):
            if not _unchanged(folder, tokenizer, prepare):
                _build(folder, corpus, tokenizer, data.describe())
    length, manifest = data.sequence_length, _read_manifest(folder)
    train, validation = (
        TokenSequences(
            _tokens(folder / f"{split}.bin", _dtype(tokenizer), manifest[split]["tokens"]),
            length,
            keep_partial=split == "validation",
            fingerprint=fingerprint,
            text_bytes=manifest[split]["text_bytes"],
        )
        for split in _SPLITS
    )
    if for_training and not len(train):
        tokens = manifest["train"]["tokens"]
        raise InputError(
            f"the training documents have {tokens} tokens, too few for one sequence of"
            f" data.sequence_length={length} and its last target; give more text, or a"
            f" data.sequence_length of at most {tokens - 1}"
        )
    return TokenCache(train, validation)


def _build(folder: Path, corpus: corpora.Corpus, tokenizer: Tokenizer, text: str) -> None:
    manifest = _read_manifest(folder, warn=True)
    for split in _SPLITS:
        done = manifest[split]
        damage = _damage(folder / f"{split}.bin", done, tokenizer)
        if damage:
            print(f"{folder}/{split}.bin is damaged ({damage}); it is made anew", file=sys.stderr)
            done.update(dict.fromkeys(_COUNTS, 0))
            manifest["finished"] = False
    if not manifest["finished"]:
        documents = {split: corpus.documents(split) for split in _SPLITS}
        print(f"tokenising {text}", file=sys.stderr)
        for split in _SPLITS:
            _tokenize(folder, split, documents[split], tokenizer, manifest)
        counts = ", ".join(
            f"{manifest[split]['tokens']:,} tokens of {manifest[split]['documents']:,} documents"
            f" for {split}"
            for split in _SPLITS
        )
        print(f"tokenised {counts}: {folder}", file=sys.stderr)
    changed = {split: (folder / f"{split}.bin").stat().st_mtime_ns for split in _SPLITS}
    _write_manifest(folder, {**manifest, "finished": True, "changed": changed})


def _unchanged(folder: Path, tokenizer: Tokenizer, prepare: bool) -> bool:
    """Whether the files are complete, and as they were when they were written or last compared."""
    manifest = _read_manifest(folder)
    if not manifest["finished"]:
        return False
    for split in _SPLITS:
        path = folder / f"{split}.bin"
        size = manifest[split]["tokens"] * _dtype(tokenizer).itemsize
        if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
            return False
        if path.stat().st_mtime_ns != manifest["changed"][split]:
            # One that cannot be written is compared every time.
            if (prepare and os.access(folder, os.W_OK)) or _damage(
                path, manifest[split], tokenizer
            ):
                return False
    return True


def _damage(path: Path, done: dict[str, int], tokenizer: Tokenizer) -> str | None:
    """What is wrong with the tokens that the manifest counts in a file; None: nothing."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.unlink()
        return "it is not a regular file"
    digest, left, dtype = 0, done["tokens"], _dtype(tokenizer)
    if left:
        if not path.exists():
            return "it is missing"
        if path.stat().st_size < left * dtype.itemsize:
            return f"{path.stat().st_size} bytes of {left * dtype.itemsize}"
        tokens = _tokens(path, dtype, left)
        for start in range(0, left, _PIECE):
            piece = np.ascontiguousarray(tokens[start : start + _PIECE])
            if piece.max() >= tokenizer.size:
                return f"id {piece.max()} of a vocabulary of {tokenizer.size}"
            digest = zlib.crc32(piece, digest)
    return None if digest == done["crc32"] else "its digest is another"


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
        files.naming(path),
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

        def write(ids: Sequence[int] | np.ndarray) -> None:
            content = np.asarray(ids, dtype).tobytes()
            done["crc32"] = zlib.crc32(content, done["crc32"])
            done["tokens"] += len(ids)
            file.write(content)

        for texts in _batches(documents, done["documents"]):
            for ids in tokenizer.encode_batch(texts):
                write(tokenizer.prefix)
                for start in range(0, len(ids), _PIECE):
                    write(ids[start : start + _PIECE])
                write([tokenizer.eos_id])
            done["documents"] += len(texts)
            done["text_bytes"] += sum(len(text.encode()) for text in texts)
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


def _tokens(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """The first `count` of a file; an empty file cannot be mapped."""
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.size <= 2**16 else "<u4")


def _read_manifest(folder: Path, warn: bool = False) -> dict[str, Any]:
    """What is done: `_COUNTS` of each split, and whether that is all."""
    nothing = {split: dict.fromkeys(_COUNTS, 0) for split in _SPLITS}
    path = folder / "manifest.json"
    try:
        manifest = files.read_json(path, dict)
        for split in _SPLITS:
            counts = [manifest[split][name] for name in _COUNTS]
            if any(type(count) is not int or count < 0 for count in counts):
                raise InputError(f"{path}: {split} is {manifest[split]}")
        if manifest["finished"] is True:
            manifest = manifest | {"changed": {s: manifest["changed"][s] for s in _SPLITS}}
        return manifest | {"finished": manifest["finished"] is True}
    except FileNotFoundError:
        pass
    # One of an earlier version, without some of the counts, too.
    except (InputError, KeyError, TypeError) as error:
        if warn:
            print(f"{path} is damaged ({error}); the tokens are made anew", file=sys.stderr)
    return {"finished": False} | nothing


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files.write(folder / "manifest.json", json.dumps(manifest))
