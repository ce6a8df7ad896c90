import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from caat_jax.data import corpora, token_cache, tokenizers
from caat_jax.errors import InputError

BYTES = tokenizers.load_tokenizer("bytes")
BOS, EOS = BYTES.bos_id, BYTES.eos_id


def _stream(documents) -> list[int]:
    return [token for text in documents for token in (BOS, *text.encode(), EOS)]


def _files(data) -> dict[str, bytes]:
    (folder,) = Path(data.cache_dir).glob("tokens/*")
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("length", [1, 7, 16, 100])
def test_every_token_is_a_target_once(data_config, texts, split, length):
    data = data_config(sequence_length=length)
    stream = _stream(corpora.open_corpus(data).documents(split))
    sequences = getattr(token_cache.open_cache(data, BYTES), split)
    rows = np.stack([sequences[i] for i in range(len(sequences))])
    assert rows.shape == (len(sequences), length + 1) and rows.dtype == np.int32
    targets = rows[:, 1:].ravel()
    kept = len(stream) - 1 if split == "validation" else (len(stream) - 1) // length * length
    assert targets[:kept].tolist() == stream[1 : kept + 1]
    assert rows[:, :-1].ravel()[:kept].tolist() == stream[:kept]
    assert len(targets) - kept < length and (targets[kept:] == token_cache.PADDING).all()
    assert len(targets) == kept or split == "validation"


def test_sequences_end(data_config, texts):
    train = token_cache.open_cache(data_config(), BYTES).train
    assert len(list(train)) == len(train)
    for index in (-1, len(train)):
        with pytest.raises(IndexError):
            train[index]


def test_large_vocabularies_take_four_bytes(data_config, texts):
    class Large(type(BYTES)):
        size, fingerprint = 2**16 + 1, "large"

        def encode_batch(self, texts):
            return [ids + (2**16 - 255) for ids in super().encode_batch(texts)]

    data = data_config(eval_split="train[20:]", train_split="train[:20]", sequence_length=5)
    train = token_cache.open_cache(data, Large()).train
    first = list(texts[0].encode())[:5]
    assert train[0].tolist() == [BOS, *(byte + 2**16 - 255 for byte in first)]
    assert len(_files(data)["train.bin"]) == 4 * len(_stream(texts[:20]))


def test_another_sequence_length_reads_the_same_files(data_config, texts, monkeypatch):
    token_cache.open_cache(data_config(), BYTES)
    monkeypatch.setattr(token_cache, "_build", None)
    cache = token_cache.open_cache(data_config(sequence_length=5), BYTES)
    assert cache.train[0].shape == (6,)


def test_another_tokenizer_or_rule_writes_others(data_config, texts):
    class Other(type(BYTES)):
        fingerprint = "other"

    caches = [
        token_cache.open_cache(data_config(), BYTES),
        token_cache.open_cache(data_config(), Other()),
        token_cache.open_cache(data_config(holdout_every=3), BYTES),
    ]
    assert len({cache.train.fingerprint for cache in caches}) == 3


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(0, 44, 3))
def test_killed_build_goes_on(data_config, texts, monkeypatch, after):
    """Stops before the n-th of all tokenisations, fsyncs and renames, with garbage written."""
    monkeypatch.setattr(token_cache, "_BATCH_DOCUMENTS", 3)
    token_cache.open_cache(data_config(cache_dir=data_config().cache_dir + "2"), BYTES)
    expected = _files(data_config(cache_dir=data_config().cache_dir + "2"))
    data, calls, encoded = data_config(), Counter(), []
    corpus = corpora.open_corpus(data)

    class Watched(type(BYTES)):
        def encode_batch(self, texts):
            encoded.extend(texts)
            return super().encode_batch(texts)

    def killing(original):
        def call(*args):
            calls["all"] += 1
            if calls["all"] > after:
                raise _Killed
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Watched, "encode_batch", killing(Watched.encode_batch))
        patch.setattr(os, "fsync", killing(os.fsync))
        patch.setattr(os, "replace", killing(os.replace))
        patch.setattr(corpora, "open_corpus", lambda *_: corpus)
        with pytest.raises(_Killed):
            token_cache.open_cache(data, Watched())
    for path in Path(data.cache_dir).glob("tokens/*/*.bin"):
        with open(path, "ab") as file:
            file.write(b"garbage")
    token_cache.open_cache(data, Watched())
    assert _files(data) == expected
    assert len(encoded) <= len(texts) + 3, "at most one batch is done again"


_BUILD = """
import os, signal, sys
from caat_jax.config.sections import DataConfig
from caat_jax.data import token_cache, tokenizers

class Mortal(type(tokenizers.load_tokenizer("bytes"))):
    calls = 0
    def encode_batch(self, texts):
        Mortal.calls += 1
        if Mortal.calls == {dies_at}:
            os.kill(os.getpid(), signal.SIGKILL)
        print(len(texts))
        return super().encode_batch(texts)

token_cache._BATCH_DOCUMENTS = 3
token_cache.open_cache({data!r}, Mortal())
"""


def _start(data, dies_at, stderr=None):
    script = _BUILD.format(data=data, dies_at=dies_at)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=stderr)


def test_racing_processes_and_a_kill(data_config, texts):
    expected = data_config(cache_dir=data_config().cache_dir + "2")
    token_cache.open_cache(expected, BYTES)
    data = data_config()
    killed = _start(data, dies_at=5)
    first = sum(map(int, killed.communicate()[0].split()))
    assert killed.returncode == -signal.SIGKILL and first == 12
    racing = [_start(data, dies_at=None) for _ in range(2)]
    encoded = [sum(map(int, process.communicate()[0].split())) for process in racing]
    assert [process.returncode for process in racing] == [0, 0]
    assert sorted(encoded) == [0, len(texts) - first]
    assert _files(data) == _files(expected)


def test_waiting_is_said(data_config, texts):
    data = data_config()
    token_cache.open_cache(data, BYTES)
    (manifest,) = Path(data.cache_dir).glob("tokens/*/manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "finished": False}))
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD.format(folder=str(manifest.parent))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    waiting = _start(data, dies_at=None, stderr=subprocess.PIPE)
    said = f"waiting for the process that is preparing {manifest.parent}\n".encode()
    assert said in iter(waiting.stderr.readline, b"")
    assert waiting.poll() is None
    holder.communicate()
    waiting.communicate()
    assert waiting.returncode == 0


_HOLD = """
from pathlib import Path
from caat_jax.data import cache_folder
with cache_folder.locked(Path({folder!r})):
    print("held", flush=True)
    input_or_end = __import__("sys").stdin.read()
"""


def test_other_text_than_a_run_began_with_is_not_tokenised(data_config, texts, tmp_path):
    begun_with = token_cache.open_cache(data_config(), BYTES).train.fingerprint
    again = token_cache.open_cache(data_config(), BYTES, begun_with=begun_with)
    assert again.train.fingerprint == begun_with
    (tmp_path / "texts/00.txt").write_text("another text")
    with pytest.raises(InputError, match=r"no longer that with which the run began; .*txt"):
        token_cache.open_cache(data_config(), BYTES, begun_with=begun_with)
    assert [path.name for path in (tmp_path / "cache/tokens").iterdir()] == [begun_with]


def test_too_little_text(data_config, texts):
    tokens = len(_stream(corpora.open_corpus(data_config()).documents("train")))
    with pytest.raises(InputError) as caught:
        token_cache.open_cache(data_config(sequence_length=tokens), BYTES)
    assert f"have {tokens} tokens" in str(caught.value)
    assert f"data.sequence_length of at most {tokens - 1}" in str(caught.value)
    longest = token_cache.open_cache(data_config(sequence_length=tokens - 1), BYTES)
    assert len(longest.train) == 1 and len(longest.validation) == 1


def _replaced_by_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGES = {
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "ones": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "link": _replaced_by_link,
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokens_are_made_anew(data_config, texts, capsys, damage, finished, name):
    data = data_config()
    token_cache.open_cache(data, BYTES)
    expected = _files(data)
    (folder,) = Path(data.cache_dir).glob("tokens/*")
    if not finished:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    DAMAGES[damage](folder / name)
    capsys.readouterr()
    token_cache.open_cache(data, BYTES)
    assert _files(data) == expected
    assert capsys.readouterr().err.count(f"{folder}/{name} is damaged (") == 1


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"finished": true}', "{" * 10000])
def test_a_damaged_manifest_is_made_anew(data_config, texts, capsys, content):
    data = data_config()
    token_cache.open_cache(data, BYTES)
    expected = _files(data)
    (manifest,) = Path(data.cache_dir).glob("tokens/*/manifest.json")
    manifest.write_text(content)
    capsys.readouterr()
    token_cache.open_cache(data, BYTES)
    assert _files(data) == expected and json.loads(manifest.read_text())["finished"]
    assert capsys.readouterr().err.count(f"{manifest} is damaged (") == 1


def test_tokens_are_compared_once_for_each_change(data_config, texts, monkeypatch):
    data, compared = data_config(), []
    token_cache.open_cache(data, BYTES)
    (path,) = Path(data.cache_dir).glob("tokens/*/train.bin")
    real = token_cache._damage
    monkeypatch.setattr(token_cache, "_damage", lambda *a: compared.append(a) or real(*a))
    for touched, times in ((False, 0), (True, 2), (False, 2)):
        if touched:
            os.utime(path)
        token_cache.open_cache(data, BYTES)
        assert len(compared) == times


def test_a_long_document_takes_little_memory(tmp_path):
    """Ids of 4 bytes each, and little else."""
    tokens = 5_000_000

    class Long(type(BYTES)):
        def encode_batch(self, texts):
            return [np.zeros(tokens, np.int32) for _ in texts]

    manifest = {"train": dict.fromkeys(token_cache._COUNTS, 0)}
    tracemalloc.start()
    token_cache._tokenize(tmp_path, "train", ["text"], Long(), manifest)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 4 * tokens
    assert (tmp_path / "train.bin").stat().st_size == 2 * (tokens + 2)


def test_finished_cache_may_be_read_only(data_config, texts, monkeypatch):
    token_cache.open_cache(data_config(), BYTES)
    monkeypatch.setattr(token_cache.cache_folder, "locked", None)
    assert len(token_cache.open_cache(data_config(), BYTES).train)
