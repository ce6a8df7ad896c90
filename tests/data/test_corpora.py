import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from caat_jax.data import corpora
from caat_jax.errors import InputError


class Poems(tfds.core.GeneratorBasedBuilder):
    """What a user may have prepared."""

    VERSION = tfds.core.Version("2.0.0")
    url_infos = None

    def _info(self):
        features = {"poem": tfds.features.Text(), "year": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"poem": f"růže {i} of {count}", "year": 1900 + i}


@pytest.fixture
def poems(tmp_path, data_config):
    """The configuration of a prepared TFDS dataset, with what is overridden."""
    Poems(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()

    def make(**overrides):
        poems = {
            "tfds_name": "poems:2.0.0",
            "tfds_data_dir": str(tmp_path / "tfds"),
            "text_feature": "poem",
        }
        return data_config(files="", **{**poems, **overrides})

    return make


def test_standard_library_is_the_default_corpus(data_config, tmp_path):
    data = data_config(files="", holdout_every=20)
    corpus = corpora.open_corpus(data)
    train, validation = corpus.documents("train"), corpus.documents("validation")
    size = sum(len(text.encode()) for side in (train, validation) for text in side)
    assert 4e6 < size < 15e6
    assert 0.02 < len(validation) / len(train) < 0.1
    assert any("Read-only access to" in text or "def dataclass(" in text for text in train)
    assert not any("class TestCase(unittest.TestCase)" in text for text in train)
    elsewhere = corpora.open_corpus(
        data_config(files="", cache_dir=str(tmp_path), holdout_every=20)
    )
    assert elsewhere.fingerprint == corpus.fingerprint
    assert list(elsewhere.documents("validation")) == list(validation)


def test_files_are_documents_in_order(data_config, texts, tmp_path):
    (tmp_path / "texts" / "deeper" / "still").mkdir(parents=True)
    (tmp_path / "texts" / "deeper" / "still" / "a.txt").write_text("štill deeper")
    data = data_config(files=str(tmp_path / "texts" / "**" / "*.txt"), eval_split="train[:1]")
    documents = corpora.open_corpus(data).documents("train")
    assert list(documents) == [*texts, "štill deeper"]
    assert documents[3] == texts[3]


def test_what_is_not_a_document_is_left_out(data_config, texts, tmp_path, capsys):
    """Empty files, byte order marks, and the files again that a link to their own folder shows."""
    folder = tmp_path / "texts"
    (folder / "itself").symlink_to(folder)
    (folder / "empty.txt").touch()
    first = next(iter(sorted(folder.glob("*.txt"), key=lambda path: path.read_text() != texts[0])))
    first.write_bytes("\ufeff".encode() + first.read_bytes())
    data = data_config(files=str(folder / "**" / "*.txt"), eval_split="train[:1]")
    assert sorted(corpora.open_corpus(data).documents("train")) == sorted(texts)
    assert capsys.readouterr().err.count("1 empty files are left out") == 1
    corpora.open_corpus(data)
    assert "empty files" not in capsys.readouterr().err


def test_files_under_home(data_config, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = data_config(files="~/texts/*.txt", cache_dir="~/cache")
    assert len(corpora.open_corpus(data).documents("train"))
    assert (tmp_path / "cache").is_dir()


def test_no_validation_document_in_train(data_config, texts):
    corpus = corpora.open_corpus(data_config())
    train, validation = list(corpus.documents("train")), list(corpus.documents("validation"))
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)
    assert len(set(validation)) < len(validation), "the fixture should hold out a duplicate"


def test_changed_file_is_another_corpus(data_config, texts, tmp_path):
    before = corpora.open_corpus(data_config())
    path, same_size = tmp_path / "texts" / "00.txt", "!" * len(texts[0].encode())
    path.write_text(same_size)
    os.utime(path, ns=(0, 0))
    after = corpora.open_corpus(data_config())
    assert before.fingerprint != after.fingerprint
    assert same_size in [*after.documents("train"), *after.documents("validation")]


def test_copied_files_are_the_same_corpus(data_config, texts, tmp_path):
    shutil.copytree(tmp_path / "texts", tmp_path / "copy")
    original = corpora.open_corpus(data_config())
    copy = corpora.open_corpus(data_config(files=str(tmp_path / "copy" / "*.txt")))
    assert copy.fingerprint == original.fingerprint


@pytest.mark.parametrize(
    "overrides",
    [{"holdout_every": 5}, {"eval_split": "train[:2]"}, {"train_split": "train[:20]"}],
    ids=str,
)
def test_fingerprint_follows_the_rule(data_config, texts, overrides):
    fingerprint = corpora.open_corpus(data_config()).fingerprint
    assert corpora.open_corpus(data_config(**overrides)).fingerprint != fingerprint


@pytest.mark.parametrize(("errors", "text"), [("replace", "a�b"), ("ignore", "ab")])
def test_bytes_that_are_not_utf8(data_config, texts, tmp_path, errors, text):
    (tmp_path / "texts" / "00.txt").write_bytes(b"a\xffb")
    data = data_config(encoding_errors=errors, eval_split="train[1:]", train_split="train[:1]")
    assert list(corpora.open_corpus(data).documents("train")) == [text]


def _break_nothing(folder: Path) -> None:
    pass


def _add_latin1(folder: Path) -> None:
    (folder / "bad.txt").write_bytes("jméno".encode("latin-1"))


def _add_mark(folder: Path) -> None:
    (folder / "mark.txt").write_bytes("\ufeff".encode())


def _add_dangling(folder: Path) -> None:
    (folder / "gone.txt").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("spoil", "overrides", "line"),
    [
        (_break_nothing, {"files": "/nowhere/*.txt"}, "data.files=/nowhere/*.txt matches no file"),
        (_add_latin1, {}, "bad.txt is not UTF-8 at byte 2; data.encoding_errors="),
        (_add_mark, {}, "mark.txt holds no text"),
        (_break_nothing, {"files": "/dev"}, "it is a folder, whose files are /dev/**/*"),
        (_break_nothing, {"files": "/nowhere/{a,b}"}, "braces and commas mean themselves"),
        (_add_dangling, {}, "gone.txt cannot be read (No such file or directory)"),
        (_break_nothing, {"cache_dir": "/dev/null/cache"}, "choose another data.cache_dir"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_files(data_config, texts, tmp_path, spoil, overrides, line):
    spoil(tmp_path / "texts")
    with pytest.raises(InputError) as caught:
        corpora.open_corpus(data_config(**overrides))
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists(), "something was written"


def test_holdout_that_leaves_a_side_empty(data_config, texts):
    with pytest.raises(InputError, match="there are 40, with 30 different") as caught:
        corpora.open_corpus(data_config(holdout_every=10**6)).documents("train")
    every = int(str(caught.value).split("data.holdout_every=")[2].split()[0])
    corpus = corpora.open_corpus(data_config(holdout_every=every))
    assert len(corpus.documents("train")) and len(corpus.documents("validation"))


def test_single_document_cannot_be_held_out(data_config, texts, tmp_path):
    with pytest.raises(InputError, match=r"give data.eval_split, or more and different documents"):
        data = data_config(files=str(tmp_path / "texts" / "00.txt"))
        corpora.open_corpus(data).documents("validation")


def test_tfds_dataset_by_name(poems):
    corpus = corpora.open_corpus(poems(eval_split="test"))
    assert sorted(corpus.documents("train")) == sorted(f"růže {i} of 12" for i in range(12))
    assert sorted(corpus.documents("validation")) == sorted(f"růže {i} of 3" for i in range(3))
    held_out = corpora.open_corpus(poems(holdout_every=3))
    assert len(held_out.documents("train")) + len(held_out.documents("validation")) == 12


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"tfds_name": "prose"}, "tfds, where there is poems/2.0.0; prepare it with"),
        ({"tfds_name": "poems:9.9.9"}, "data.tfds_name=poems:9.9.9 is not under "),
        (
            {"tfds_data_dir": "/nowhere"},
            'is not prepared; prepare it with tfds.builder("poems:2.0.0"',
        ),
        ({"text_feature": "verse"}, "no text of that name; its text features: poem"),
        ({"text_feature": "year"}, "no text of that name; its text features: poem"),
        ({"train_split": "training"}, "has no split 'training'; it has"),
        ({"eval_split": "validation"}, "has no split 'validation'; it has"),
        ({"eval_split": "train"}, "data.eval_split=train is data.train_split too"),
        ({"train_split": "train[:0]"}, "split 'train[:0]' of poems/2.0.0 has no document"),
        ({"train_split": "train[9:2]"}, "split 'train[9:2]' of poems/2.0.0 has no document"),
    ],
    ids=str,
)
def test_bad_tfds_names(poems, overrides, line):
    with pytest.raises(InputError) as caught:
        corpora.open_corpus(poems(**overrides))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_tfds_dataset_in_another_format(poems, tmp_path):
    (info,) = (tmp_path / "tfds").rglob("dataset_info.json")
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    with pytest.raises(InputError, match=r"is prepared as tfrecord; prepare it as array_record"):
        corpora.open_corpus(poems())


def test_tfds_text_that_is_not_utf8(poems):
    corpus = corpora.open_corpus(poems(encoding_errors="strict"))
    documents = corpus.documents("train")
    documents._source = [{"poem": b"\xe9"}] * 12
    with pytest.raises(InputError, match=r"split 'train', document .* is not UTF-8 at byte 0"):
        documents[0]


DAMAGES = {
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "nested": lambda path: path.write_bytes(b"[" * 100_000),
    "link": lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
}


@pytest.mark.parametrize("name", ["*.array_record-*", "dataset_info.json", "sealed.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_corpus_is_made_anew(data_config, texts, tmp_path, capsys, damage, name):
    documents = corpora.open_corpus(data_config()).documents("train")
    expected = list(documents)
    (path,) = (tmp_path / "cache").rglob(name)
    left_over = path.parent.with_name("incomplete.AB12_1.0.0")
    left_over.mkdir()
    DAMAGES[damage](path)
    assert list(corpora.open_corpus(data_config()).documents("train")) == expected
    assert capsys.readouterr().err.count(f"{path.parent} is damaged (") == 1
    assert not left_over.exists() and not path.is_symlink()


def test_a_copied_corpus_is_compared_and_kept(data_config, texts, tmp_path, monkeypatch):
    corpora.open_corpus(data_config())
    (path,) = (tmp_path / "cache").rglob("*.array_record-*")
    os.utime(path)
    monkeypatch.setattr(corpora.cache_folder, "locked", None)
    corpora.open_corpus(data_config())


def test_tensorflow_is_never_imported(data_config, texts, tmp_path):
    # Not even where it is installed.
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow is imported')")
    script = f"""
from caat_jax.config.sections import DataConfig
from caat_jax.data import loader, token_cache, tokenizers

cache = token_cache.open_cache({data_config()!r}, tokenizers.load_tokenizer("bytes"))
print(len(cache.train))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True
    )
    assert int(output.stdout)
