import subprocess
import sys

import pytest

from caat_jax.data import tokenizers, train_tokenizer
from caat_jax.errors import InputError


def test_trained_tokenizer_serves(data_config, texts, tmp_path):
    path = str(tmp_path / "trained.json")
    size = train_tokenizer.train(data_config(), 300, path)
    tokenizer = tokenizers.load_tokenizer(path)
    assert tokenizer.size == size and 258 < size <= 300
    assert tokenizer.bos_id != tokenizer.eos_id
    for text in [*texts, "never seen: 日本語", "<|end_of_text|>"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(texts[3])) < len(texts[3].encode()) / 2


def test_only_training_documents_are_read(data_config, texts, tmp_path):
    # "zq" is frequent, but only in the half that the validation split has.
    for number in range(20):
        (tmp_path / "texts" / f"z{number}.txt").write_text("zq" * 1000)
    halves = {"train_split": "train[:40]", "eval_split": "train[40:]"}
    path = str(tmp_path / "trained.json")
    train_tokenizer.train(data_config(**halves), 270, path)
    assert len(tokenizers.load_tokenizer(path).encode("zq")) == 2


@pytest.mark.parametrize(
    ("vocab_size", "output", "line"),
    [
        (257, "t.json", "vocab_size=257 must be at least 258"),
        (300, "t.txt", "must end in .json"),
        (300, "no/such/t.json", "no/such/t.json cannot be written"),
        (300, "folder.json", "folder.json cannot be written"),
    ],
)
def test_bad_arguments(data_config, texts, tmp_path, vocab_size, output, line):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=line):
        train_tokenizer.train(data_config(), vocab_size, str(tmp_path / output))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("vocab_size", "code", "line"),
    [
        (300, 0, "has 300 ids; use it with --config.data.tokenizer="),
        (5, 2, "error: vocab_size=5 must be at least 258"),
    ],
)
def test_command(texts, tmp_path, vocab_size, code, line):
    command = [
        *(sys.executable, "-m", "caat_jax.data.train_tokenizer", "--config=configs/tiny.py"),
        f"--config.data.files={tmp_path}/texts/*.txt",
        f"--config.data.cache_dir={tmp_path}/cache",
        "--config.data.holdout_every=4",
        f"--vocab_size={vocab_size}",
        f"--output={tmp_path}/trained.json",
    ]
    output = subprocess.run(command, capture_output=True, text=True)
    assert output.returncode == code, output.stderr
    assert line in (output.stderr if code else output.stdout).splitlines()[-1]
