"""Every file of a workdir, of its caches and of an imported folder, replaced by rubbish in turn.

What reads it must end as if nothing had happened, or in an `InputError` of one line, soon, and
write nothing outside.
"""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.sections import DataConfig
from caat_jax.data import token_cache
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.errors import InputError
from caat_jax.evaluation.report import Report, Validation
from caat_jax.huggingface.importing import import_llama
from caat_jax.training.metrics import METRICS_FILE, MetricsWriter, read_metrics
from configs import base
from tests import models
from tests.huggingface.folders_by_hand import llama_by_hand

LONGEST_SECONDS = 60
OUTSIDE = "outside"


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(1 << 30)


def wrong_types(path):
    """Numbers become words and lists objects, inside of what is still JSON; else bits flip."""
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        path.write_bytes(bytes(byte ^ 0x55 for byte in content))
    else:
        path.write_text(text.replace("[", '{"a": [').replace("]", "]}").replace(": 1", ': "1'))


RUBBISH = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "null": lambda path: path.write_text("null"),
    "list": lambda path: path.write_text("[]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "fifo": os.mkfifo,
    "link": lambda path: path.symlink_to(path.parents[-1] / os.environ[OUTSIDE] / "file"),
    "loop": lambda path: path.symlink_to(path.name),
    "sparse": sparse,
    "binary": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "truncated": None,
    "wrong types": None,
}


def replace(path, kind):
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "wrong types":
        wrong_types(path)
    else:
        path.unlink()
        RUBBISH[kind](path)


@pytest.fixture(autouse=True)
def bounded(tmp_path, monkeypatch):
    """Stops what waits, and looks at what lies outside."""
    outside = tmp_path / OUTSIDE
    outside.mkdir()
    (outside / "file").write_text("mine")
    monkeypatch.setenv(OUTSIDE, str(outside))
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "mine"


def check(source, target, read, kinds):
    """Calls `read` with a copy of the folder in which one file after the other is rubbish."""
    names = sorted(str(p.relative_to(source)) for p in source.rglob("*") if p.is_file())
    assert names
    shutil.copytree(source, target)
    expected = read(target)
    shutil.rmtree(target)
    for name in names:
        for kind in kinds:
            shutil.copytree(source, target)
            replace(target / name, kind)
            signal.alarm(LONGEST_SECONDS)
            try:
                found = read(target)
            except InputError as error:
                assert len(str(error).splitlines()) == 1, (name, kind)
            except Exception as error:
                raise AssertionError(f"{name}, {kind}") from error
            else:
                assert found == expected, (name, kind)
            signal.alarm(0)
            shutil.rmtree(target)


KINDS = [
    pytest.param(tuple(RUBBISH)[n::4], id=f"{n + 1} of 4", marks=[pytest.mark.slow] * (n > 0))
    for n in range(4)
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """With the checkpoints 1 and 2, metrics and a report."""
    folder = tmp_path_factory.mktemp("workdir") / "run"
    programs = models.programs(models.small_config())
    state = programs.initial_state()
    with MetricsWriter(folder) as writer, Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            writer.write(step, {"train/loss": 1.5})
            checkpoints.save(state, step, programs.config, {"next_batch": step})
    shutil.rmtree(folder / "tensorboard")  # written, never read
    Report(folder, 2, programs.config).add_validation(Validation(1.0, 1, 1))
    return folder


@pytest.mark.parametrize("kinds", KINDS)
def test_workdirs(workdir, tmp_path, kinds, capsys):
    shapes = models.programs(models.small_config()).state_shapes

    def read(folder):
        step, config = checkpoint.newest_config(folder)
        with Checkpoints(folder) as checkpoints:
            state, data = checkpoints.restore(step, shapes)
            assert checkpoints.resume_step() == step == data["next_batch"]
        Report(folder, step, config)._write()
        read_metrics(folder / METRICS_FILE)
        MetricsWriter(folder, step).close()
        return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))

    check(workdir, tmp_path / "run", read, kinds)


@pytest.mark.parametrize("kinds", KINDS)
def test_caches(tmp_path, kinds):
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / f"texts/{number}.txt").write_text(f"document {number} " * 9)
    data = DataConfig(**base.get_config().data)
    cache, tokenizer = tmp_path / "cache", load_tokenizer("bytes")
    data = dataclasses.replace(
        data,
        files=f"{tmp_path}/texts/*.txt",
        cache_dir=str(cache),
        sequence_length=8,
        holdout_every=2,
    )

    def read(_):
        cache = token_cache.open_cache(data, tokenizer)
        return [split[n].tolist() for split in cache for n in range(len(split))]

    token_cache.open_cache(data, tokenizer)
    shutil.copytree(cache, tmp_path / "kept")
    shutil.rmtree(cache)
    check(tmp_path / "kept", cache, read, kinds)


@pytest.mark.parametrize("kinds", KINDS)
def test_imported_folders(tmp_path, kinds):
    llama_by_hand(tmp_path / "llama")
    (tmp_path / "llama/tokenizer_config.json").write_text('{"bos_token": "<s>"}')

    def read(folder):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        imported = import_llama(folder, tmp_path / "run", tp_shards=2, sync_factor=1.0)
        for path in (tmp_path / "run").rglob("*"):
            assert not path.is_file() or path.read_bytes() != b"mine"
        return imported.parameters

    check(tmp_path / "llama", tmp_path / "copy", read, kinds)


def test_no_file_outside_is_written_through_a_link(workdir, tmp_path):
    """`metrics.jsonl` that does not exist where its link leads, and a report's old new name."""
    outside = Path(os.environ[OUTSIDE])
    shutil.copytree(workdir, tmp_path / "run")
    for name in (METRICS_FILE, "evaluation.json", "evaluation.new", f"{METRICS_FILE}.tmp"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).symlink_to(outside / "made")
    MetricsWriter(tmp_path / "run", 1).close()
    Report(tmp_path / "run", 2, models.small_config()).add_validation(Validation(1.0, 1, 1))
    assert not (tmp_path / "run" / METRICS_FILE).is_symlink()
