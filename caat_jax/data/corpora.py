"""Corpora: sequences of documents out of TFDS, without TensorFlow.

A corpus is a TFDS dataset in the array_record format, read through `as_data_source()`: one that
the user has prepared (`data.tfds_name`), or one that `TextFiles` prepares under `data.cache_dir`
from the files of `data.files`, by default the source of Python's standard library.
"""

import contextlib
import functools
import glob
import hashlib
import io
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from caat_jax.config import user_paths
from caat_jax.config.sections import DataConfig
from caat_jax.data import cache_folder
from caat_jax.errors import InputError

_NOT_THE_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "__pycache__",
}


class TextFiles(tfds.core.GeneratorBasedBuilder):
    """One document a file, in the order given.

    Attributes:
      content: a digest of all documents; stored with the dataset as `info.metadata["content"]`.
    """

    VERSION = tfds.core.Version("1.0.0")
    # There is nothing to download.  To find that out, TFDS 4.9.10 would import importlib_resources,
    # which it does not install.
    url_infos = None

    def __init__(
        self,
        *,
        files: Sequence[Path] = (),
        encoding_errors: str = "strict",
        content: str = "",
        **kwargs: Any,
    ):
        self._files, self._encoding_errors, self._content = files, encoding_errors, content
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text files, one document each.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(content=self._content),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for number, path in enumerate(self._files):
            yield number, {"text": _read(path, self._encoding_errors)}


class Documents(Sequence[str]):
    """Some documents of one split, read from disk when asked for.

    Args:
      source: the split's examples, a dictionary of features each.
      name: how to name the split in an error.
      data: for the feature that holds the text, and how to decode it.
      numbers: int64 [documents], the examples that belong to it; None: all.
    """

    def __init__(
        self,
        source: Sequence[dict[str, Any]],
        name: str,
        data: DataConfig,
        numbers: np.ndarray | None = None,
    ):
        self._source, self._name, self._data = source, name, data
        self._numbers = np.arange(len(source)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> str:
        """The text of a document.

        Raises:
          InputError: it is not UTF-8, under `data.encoding_errors="strict"`, or cannot be read.
        """
        number = int(self._numbers[index])
        try:
            text = self._source[number][self._data.text_feature]
        # What array_record and TFDS raise for a damaged file has no type in common.
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self._name}, document {number} cannot be read ({reason})"
            ) from error
        return _decode(text, self._data.encoding_errors, f"{self._name}, document {number}")

    def chosen(self, mask: np.ndarray) -> "Documents":
        """Those for which `mask`, bool [documents], is true."""
        return Documents(self._source, self._name, self._data, self._numbers[mask])


class Corpus:
    """Training and validation documents of one prepared TFDS dataset.

    Attributes:
      fingerprint: identifies the documents of both splits, whichever machine or folder they lie
        on.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, data: DataConfig):
        self._builder, self._data = builder, data
        splits = builder.info.splits.values()
        self.fingerprint = cache_folder.key_of(
            builder.info.full_name,
            dict(builder.info.metadata or {}),
            [[split.name, list(split.shard_lengths), split.num_bytes] for split in splits],
            [data.text_feature, data.encoding_errors, data.train_split],
            data.eval_split or data.holdout_every,
        )
        # Refused here already, rather than when the documents are first read.
        self._split(data.train_split)
        self._split(data.eval_split or data.train_split)

    def documents(self, split: Literal["train", "validation"]) -> Documents:
        """The documents to train on, or those to validate on.

        With `data.eval_split` these are that split's.  Without, they are the documents of
        `data.train_split` whose digest is a multiple of `data.holdout_every`, all of them where
        that is 1; the first call then reads all of them.

        Raises:
          InputError: the rule leaves no document on one side.
        """
        validation = split == "validation"
        if self._data.eval_split:
            return self._split(self._data.eval_split if validation else self._data.train_split)
        held_out = self._digests % np.uint64(self._data.holdout_every) == 0
        if not held_out.any() or (held_out.all() and self._data.holdout_every > 1):
            raise InputError(self._bad_holdout())
        return self._split(self._data.train_split).chosen(held_out == validation)

    @functools.cached_property
    def _digests(self) -> np.ndarray:
        """uint64 [documents of the training split]: one number for one text."""
        documents = self._split(self._data.train_split)
        return np.fromiter(
            (_digest(text) for text in _progress(documents, "digesting documents")),
            np.uint64,
            len(documents),
        )

    def _bad_holdout(self) -> str:
        given, documents = self._data.holdout_every, len(self._digests)
        for every in sorted(range(2, 1000), key=lambda every: abs(every - given)):
            if 0 < np.count_nonzero(self._digests % np.uint64(every) == 0) < documents:
                remedy = f"give data.holdout_every={every} or more documents (one a file)"
                break
        else:
            remedy = "give data.eval_split, or more and different documents (one a file)"
        return (
            f"data.holdout_every={given} leaves the training or the validation split without a"
            f" document: there are {documents}, with {len(np.unique(self._digests))} different"
            f" texts; {remedy}; eval.py takes all of them with data.holdout_every=1"
        )

    def _split(self, split: str) -> Documents:
        info = self._builder.info
        try:
            examples = info.splits[split].num_examples
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{info.full_name} has no split {split!r}; it has {', '.join(info.splits)}"
            ) from error
        if examples < 1:  # fewer than none in one such as train[9:2]
            raise InputError(f"split {split!r} of {info.full_name} has no document")
        source = self._builder.as_data_source(split, file_format="array_record")
        return Documents(source, f"{info.full_name}, split {split!r}", self._data)


def open_corpus(data: DataConfig, prepare: bool = True) -> Corpus:
    """The corpus that the configuration names; prepares that of text files at first.

    Args:
      data: the configuration.
      prepare: whether it may write to `data.cache_dir`.

    Raises:
      InputError: there is no such corpus, split or feature, or a file cannot serve.  Nothing has
        been written then.
    """
    if data.eval_split and data.eval_split == data.train_split:
        raise InputError(f"data.eval_split={data.eval_split} is data.train_split too")
    builder = _prepared_by_user(data) if data.tfds_name else _prepared_from_files(data, prepare)
    features = builder.info.features
    texts = [name for name in features if isinstance(features[name], tfds.features.Text)]
    if data.text_feature not in texts:
        raise InputError(
            f"data.text_feature={data.text_feature!r}: {builder.info.full_name} has no text of that"
            f" name; its text features: {', '.join(texts) or 'none'}"
        )
    return Corpus(builder, data)


def _prepared_by_user(data: DataConfig) -> tfds.core.DatasetBuilder:
    folder = user_paths.expanded(
        "data.tfds_data_dir", data.tfds_data_dir or tfds.core.constants.DATA_DIR
    )
    remedy = (
        f'prepare it with tfds.builder("{data.tfds_name}", file_format="array_record",'
        f' data_dir="{folder}").download_and_prepare()'
    )
    try:
        builder = tfds.builder(data.tfds_name, data_dir=folder)
    # What TFDS raises for a wrong name, config or version has no type in common.
    except Exception as error:
        # <name>/<version>, or <name>/<config>/<version>.
        found = [*folder.glob("*/*/dataset_info.json"), *folder.glob("*/*/*/dataset_info.json")]
        names = sorted(str(path.parent.relative_to(folder)) for path in found)
        raise InputError(
            f"data.tfds_name={data.tfds_name} is not under {folder}, where there is"
            f" {', '.join(names) or 'no dataset'}; {remedy}"
        ) from error
    if not builder.info.splits:
        raise InputError(f"data.tfds_name={data.tfds_name} is not prepared; {remedy}")
    formats = sorted(format.value for format in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise InputError(
            f"data.tfds_name={data.tfds_name} under {folder} is prepared as {', '.join(formats)};"
            " prepare it as array_record in another data.tfds_data_dir"
        )
    return builder


def _prepared_from_files(data: DataConfig, prepare: bool) -> tfds.core.DatasetBuilder:
    paths = _matching(data.files) if data.files else _standard_library()
    try:
        identities = [(str(path), path.stat()) for path in paths]
    except OSError as error:
        raise _unreadable(error) from error
    for path in paths:
        if not path.is_file():  # a device or a pipe may have no end
            raise InputError(f"{path} is not a regular file; leave it out of data.files")
    given = len(identities)
    identities = [(path, stat) for path, stat in identities if stat.st_size]
    if not identities:
        raise InputError(f"data.files={data.files}: all {given} files are empty")
    paths = [Path(path) for path, _ in identities]
    key = cache_folder.key_of(
        data.encoding_errors,
        [[path, stat.st_size, stat.st_mtime_ns] for path, stat in identities],
    )
    folder = user_paths.expanded("data.cache_dir", data.cache_dir) / "corpora" / key
    prepared = folder / "text_files" / str(TextFiles.VERSION)
    if cache_folder.damage(prepared) is None:
        return TextFiles(data_dir=folder)
    if not prepare:
        raise cache_folder.not_prepared(prepared)
    if given > len(paths):
        print(f"data.files: {given - len(paths)} empty files are left out", file=sys.stderr)
    content = hashlib.blake2b(digest_size=16)
    for path in _progress(paths, "checking files"):
        content.update(_digest(_read(path, data.encoding_errors)).to_bytes(8, "big"))
    with cache_folder.locked(folder):
        damage = cache_folder.damage(prepared)
        if damage is None:  # another process was faster
            return TextFiles(data_dir=folder)
        if prepared.exists():
            print(f"{prepared} is damaged ({damage}); it is made anew", file=sys.stderr)
        for left_over in (prepared, *prepared.parent.glob("incomplete.*")):
            shutil.rmtree(left_over, ignore_errors=True)
        builder = TextFiles(
            files=paths,
            encoding_errors=data.encoding_errors,
            content=content.hexdigest(),
            data_dir=folder,
        )
        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        try:
            # TFDS announces itself on stdout, which belongs to the program.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare()
            cache_folder.seal(prepared)
        # What TFDS and array_record raise, where a disk is full, has no type in common.
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{folder} could not be prepared ({reason})") from error
    return builder


def _matching(pattern: str) -> list[Path]:
    expanded = user_paths.expanded("data.files", pattern)
    paths: dict[str, Path] = {}
    for found in sorted(glob.glob(str(expanded), recursive=True)):
        if not os.path.isdir(found):
            # A link to a folder above leads to the same files again and again.
            paths.setdefault(os.path.realpath(found), Path(found).absolute())
    if not paths:
        hint = ""
        if expanded.is_dir():
            hint = f"; it is a folder, whose files are {expanded / '**/*'}"
        elif any(character in pattern for character in "{,"):
            hint = "; it is one pattern of *, ** and ?, in which braces and commas mean themselves"
        raise InputError(f"data.files={pattern} matches no file{hint}")
    return list(paths.values())


def _standard_library() -> list[Path]:
    """The sources of the running Python's library, without tests or files that are not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for path in sorted(root.rglob("*.py")):
        if _NOT_THE_LIBRARY.isdisjoint(path.relative_to(root).parts[:-1]):
            with contextlib.suppress(InputError):
                _read(path, "strict")
                paths.append(path)
    if not paths:
        raise InputError(f"no Python source under {root}; give data.files or data.tfds_name")
    return paths


def _read(path: Path, encoding_errors: str) -> str:
    try:
        text = _decode(path.read_bytes(), encoding_errors, str(path))
    except OSError as error:
        raise _unreadable(error) from error
    if not text:
        raise InputError(f"{path} holds no text; leave it out of data.files")
    return text


def _decode(text: bytes, encoding_errors: str, name: str) -> str:
    try:
        return text.decode("utf-8", encoding_errors).removeprefix("\ufeff")  # a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 at byte {error.start}; data.encoding_errors=replace or ignore"
            " would read it all the same"
        ) from error


def _unreadable(error: OSError) -> InputError:
    return InputError(f"{error.filename} cannot be read ({error.strerror})")


def _digest(text: str) -> int:
    """64 bits of a text's digest."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _progress(items: Iterable[Any], what: str) -> Iterable[Any]:
    return tqdm.tqdm(items, what, leave=False, disable=None)
