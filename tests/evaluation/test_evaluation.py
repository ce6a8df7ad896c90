"""The whole validation split, and the report in the workdir."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
import sentencepiece

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.resolve import with_data
from caat_jax.config.sections import Config
from caat_jax.data import corpora, token_cache
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.errors import InputError
from caat_jax.evaluation import report as evaluation
from caat_jax.evaluation.report import Report, Validation
from tests import models, reference
from tests.command_line import run_forked

VALIDATION = Validation(loss_sum=2.0, tokens=4, text_bytes=2)
TEXTS = [f"příliš žluťoučký kůň číslo {n}, and {'a shard ' * (n % 5)}" for n in range(24)]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a run whose own validation read two sequences only."""
    fields = {"train.eval_sequences": 2, "train.steps": 3}
    return models.small_run(tmp_path_factory.mktemp("run"), TEXTS, fields)


def configured(workdir, **mesh):
    step, config = checkpoint.newest_config(workdir)
    return step, dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))


def documents(config: Config) -> list[str]:
    return list(corpora.open_corpus(config.data).documents("validation"))


@pytest.mark.parametrize(
    "mesh",
    [dict(data=4, model=2), pytest.param(dict(model=8), marks=pytest.mark.slow)],
    ids=str,
)
def test_all_of_the_split_is_read(workdir, mesh):
    step, config = configured(workdir, **mesh)
    evaluated = evaluation.evaluate_checkpoint(workdir, step, config)

    rows = token_cache.open_cache(config.data, load_tokenizer("bytes")).validation
    assert len(rows) > 8 and len(rows) % 8  # several batches, the last one filled up
    rows = np.stack([rows[n] for n in range(len(rows))])
    sizes = dict(data=1, fsdp=1, model=8)
    programs = models.programs(configured(workdir, **sizes)[1])
    with Checkpoints(workdir) as checkpoints:
        parameters = checkpoints.restore_parameters(step, programs.state_shapes.parameters)
    expected = reference.loss(
        jax.device_get(parameters),
        np.maximum(rows[:, :-1], 0),
        rows[:, 1:],
        **models.method(config),
    )
    text = "".join(documents(config))
    # Each document has a token for each byte, one before and one after; the first is no target.
    assert evaluated.text_bytes == len(text.encode()) > len(text)
    assert evaluated.tokens == len(text.encode()) + 2 * len(documents(config)) - 1
    assert evaluated.loss == pytest.approx(expected, abs=2e-6)
    assert evaluated.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    bits = expected * evaluated.tokens / math.log(2)
    assert evaluated.bits_per_byte == pytest.approx(bits / len(text.encode()), abs=1e-5)


def test_bytes_do_not_depend_on_the_tokenizer(tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(tmp_path / "words"),
        vocab_size=64,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    fields = {"data.tokenizer": f"{tmp_path}/words.model", "train.steps": 3}
    workdir = models.small_run(tmp_path, TEXTS, fields)
    step, config = configured(workdir)
    evaluated = evaluation.evaluate_checkpoint(workdir, step, config)
    assert evaluated.text_bytes == sum(len(text.encode()) for text in documents(config))
    assert evaluated.tokens < evaluated.text_bytes


def test_eval_py_writes_what_it_prints(workdir, tmp_path):
    step, config = configured(workdir)
    expected = evaluation.evaluate_checkpoint(workdir, step, config)
    code, stdout, stderr = run_forked(["eval.py", f"--workdir={workdir}"], tmp_path)
    assert code == 0, stderr
    report = json.loads((workdir / "evaluation.json").read_text())
    figures = report.pop("validation")
    assert report == {"step": 3, "S": 8, "p": "0.5"}
    assert figures["tokens"] == expected.tokens and figures["text_bytes"] == expected.text_bytes
    for name, value in (
        ("loss", expected.loss),
        ("perplexity", expected.perplexity),
        ("bits_per_byte", expected.bits_per_byte),
    ):
        assert figures[name] == pytest.approx(value, rel=1e-5)  # one device there, eight here
    printed = [float(number) for number in re.findall(r" (\d+\.\d+)", stdout)]
    assert printed == pytest.approx(
        [figures["loss"], figures["perplexity"], figures["bits_per_byte"]], abs=1e-4
    )
    assert not (workdir / "evaluation.new").exists()


def test_eval_py_on_other_text(workdir, tmp_path):
    """One file, all of it held out; the run's own figures stay."""
    text = "a text of somebody else's, žluťoučký\n" * 9
    (tmp_path / "text").write_bytes(text.encode())
    Report(workdir, 3, configured(workdir)[1]).add_validation(VALIDATION)
    fields = {"files": tmp_path / "text", "holdout_every": 1, "sequence_length": 2048}
    flags = [f"--config.data.{name}={value}" for name, value in fields.items()]
    code, stdout, stderr = run_forked(["eval.py", f"--workdir={workdir}", *flags], tmp_path)
    assert code == 2 and "--cache_dir" in stderr  # the run's cache is not the usual one
    flags.append(f"--config.data.cache_dir={tmp_path}/cache")
    code, stdout, stderr = run_forked(["eval.py", f"--workdir={workdir}", *flags], tmp_path)
    assert code == 0, stderr
    report = json.loads((workdir / "evaluation.json").read_text())
    assert report["validation"] == VALIDATION.figures()
    name = f"files={tmp_path}/text holdout_every=1 sequence_length=2048"
    figures = report["other_data"][name]

    _, config = configured(workdir, data=1, fsdp=1, model=8)
    programs = models.programs(config)
    with Checkpoints(workdir) as checkpoints:
        parameters = checkpoints.restore_parameters(3, programs.state_shapes.parameters)
    tokenizer = load_tokenizer("bytes")
    ids = np.array([[tokenizer.bos_id, *text.encode(), tokenizer.eos_id]])
    expected = reference.loss(
        jax.device_get(parameters), ids[:, :-1], ids[:, 1:], **models.method(config)
    )
    assert figures["text_bytes"] == len(text.encode())
    assert figures["tokens"] == ids.shape[1] - 1
    assert figures["loss"] == pytest.approx(expected, abs=2e-6)
    assert f"{figures['loss']:.6f}" in stdout


def test_another_corpus_has_its_own_splits(workdir):
    _, config = configured(workdir)
    data = dataclasses.replace(
        config.data, tfds_name="c4/en", files="", train_split="a", eval_split="b", text_feature="t"
    )
    config = with_data(dataclasses.replace(config, data=data), {"files": "x"})
    data = config.data
    assert (data.tfds_name, data.files) == ("", "x")
    assert (data.train_split, data.eval_split, data.text_feature) == ("train", "", "text")
    with pytest.raises(InputError, match=r"data.tokenizer=y: the checkpoint has its own, x\.model"):
        data = dataclasses.replace(data, tokenizer="x.model")
        with_data(dataclasses.replace(config, data=data), {"tokenizer": "y"})


# ---- The report -------------------------------------------------------------------------------


@pytest.fixture
def report_of(tmp_path):
    """A function: step, p -> the report in tmp_path."""

    def make(step=5, p=0.5):
        return Report(tmp_path, step, models.small_config(model=dict(sync_factor=p)))

    return make


def test_report_grows_for_one_checkpoint(report_of):
    report_of().add_tasks({"one": 1, "two": 2})
    report_of().add_validation(VALIDATION)
    report_of().add_tasks({"two": 3})
    assert json.loads(report_of().path.read_text()) == {
        "step": 5,
        "S": 8,
        "p": "0.5",
        "tasks": {"one": 1, "two": 3},
        "validation": VALIDATION.figures(),
    }


@pytest.mark.parametrize("other", [dict(step=6), dict(p=1.0)], ids=str)
def test_report_begins_anew_for_another(report_of, other):
    report_of().add_tasks({"one": 1})
    before = report_of().path.read_text()
    report = report_of(**other)
    assert report.path.read_text() == before  # until there is something new
    report.add_validation(VALIDATION)
    content = json.loads(report.path.read_text())
    assert "tasks" not in content and content["validation"] == VALIDATION.figures()


@pytest.mark.parametrize("content", ["", "3", "[1]", "{"])
def test_file_that_is_no_report_is_kept(report_of, tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match=r"evaluation\.json is not a report"):
        report_of()
    assert (tmp_path / "evaluation.json").read_text() == content


def test_loss_that_is_no_number(report_of):
    report_of().add_validation(Validation(math.nan, 4, 2))
    report_of().add_validation(Validation(1e6, 4, 2))
    content = json.loads(report_of().path.read_text())["validation"]
    assert content["perplexity"] == "inf" and content["loss"] == 250_000
