"""What the user gives and cannot work: one line on stderr, exit code 2, nothing written.

Most commands run in the test's process (`tests/command_line.py`); one of each kind runs as users
run it.
"""

import re
import shutil
import sys

import pytest
import sentencepiece

import caat_jax.evaluation
from tests.command_line import (
    REPOSITORY,
    SMALL,
    TINY,
    assert_refused,
    flags_of,
    run_as_users_do,
    run_forked,
    run_here,
    write_texts,
)


@pytest.fixture
def run(tmp_path):
    """A function: script and arguments -> exit code, stdout, stderr; for what is refused."""
    return lambda *command: run_here(command, tmp_path)


@pytest.fixture
def run_whole(tmp_path):
    """The same in a process of its own, for what computes."""
    return lambda *command: run_forked(command, tmp_path)


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts")


@pytest.fixture
def small(texts, tmp_path):
    """The arguments of a run that works."""
    fields = {"data.files": f"{texts}/*.txt", "data.cache_dir": tmp_path / "cache", **SMALL}
    return ["train.py", TINY, f"--workdir={tmp_path / 'run'}", *flags_of(fields)]


# ---- Flags ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["--config is missing", "--config=configs/tiny.py"]),
        (["--config=configs/none.py"], ["--config", "configs/none.py"]),
        (["--config=configs"], ["--config", "configs"]),
        (
            [TINY, "--config.model.layer=2"],
            ["config.model.layer ", "nearest is config.model.layers"],
        ),
        ([TINY, "--config.model.layer", "2"], ["config.model.layer ", "config.model.layers"]),
        ([TINY, "--config.trian.steps=2"], ["config.trian.steps ", "config.train.steps"]),
        ([TINY, "--config.steps=2"], ["config.steps ", "config.train.steps"]),
        ([TINY, "--config.model=2"], ["config.model is not a field"]),
        ([TINY, "--config.seed.x=2"], ["config.seed.x ", "config.seed"]),
        ([TINY, "--config.model.layers=many"], ["config.model.layers", "many"]),
        ([TINY, "--config.model.layers=2.5"], ["config.model.layers", "2.5"]),
        ([TINY, "--config.model.layers=2\n3"], ["config.model.layers=2 3 must be a whole number"]),
        ([TINY, "--config.model.sync_factor=half"], ["config.model.sync_factor", "half"]),
        ([TINY, "--config.model.tied_head=maybe"], ["config.model.tied_head", "maybe"]),
        ([TINY, "--config.model.sync_factor_per_layer=(1,"], ["sync_factor_per_layer", "(1,"]),
        ([TINY, "--config.model.layers"], ["config.model.layers"]),
        ([TINY, "--wrkdir=x"], ["wrkdir"]),
        ([TINY, "steps=3"], ["'steps=3' is not a flag"]),
        ([TINY, "--config.model.sync_factor=1.5"], ["model.sync_factor=1.5", "[0, 1]"]),
        ([TINY, "--config.mesh.model=3"], ["mesh.model=3", "model.tp_shards=8", "1, 2, 4, 8"]),
        (
            [TINY, "--config.mesh.data=4", "--config.train.global_batch=6"],
            ["train.global_batch=6", "mesh.data=4", "multiple of 4", "4 or 8"],
        ),
        ([TINY, "--config.mesh.data=3"], ["mesh.data=3", "8 devices"]),
        ([TINY, "--config.data.tokenizer=words"], ["data.tokenizer=words", "bytes"]),
        (
            [TINY, "--config.data.tokenizer=none.model"],
            ["data.tokenizer=none.model", "No such file"],
        ),
        ([TINY, "--config.data.tokenizer=one\ntwo"], ["data.tokenizer=one two must be"]),
        *(
            (
                [TINY, f"--config.data.{field}=~nobody_here/x"],
                [f"data.{field}=~nobody_here/x: there is no user nobody_here"],
            )
            for field in ("tokenizer", "cache_dir")
        ),
        ([TINY, "--config.data.files=/dev/zero"], ["/dev/zero is not a regular file"]),
        (
            [TINY, "--config.model.mlp_dim=1000000000"],
            ["on each of 8 devices", "parameters", "train.global_batch=16"],
        ),
        (
            [TINY, "--config.train.global_batch=1000000000"],
            ["train.global_batch=1000000000", "data.sequence_length=256"],
        ),
        (
            [f"--config={REPOSITORY / 'configs/llama_130m.py'}"],
            ["data.files or data.tfds_name", "data.tokenizer", "data.own_text=True"],
        ),
        (
            [f"--config={REPOSITORY / 'configs/llama_7b.py'}", "--config.data.files=*.txt"],
            ["data.tokenizer missing", "data.own_text=True"],
        ),
        (
            [f"--config={REPOSITORY / 'configs/sweep.py'}"],
            ["--config", "python -m caat_jax.sweep"],
        ),
        ([TINY, TINY], ["both given"]),
        ([TINY, "--confg.train.steps=3"], ["--confg.train.steps", "--config.train.steps"]),
        ([TINY, "--nosuch"], ["--nosuch is not a flag", "--help"]),
        (
            [TINY, "--config.model.vocab_size=256"],
            ["data.tokenizer=bytes has 258 ids", "model.vocab_size=256", "264"],
        ),
    ],
    ids=lambda value: " ".join(value[-2:]),
)
def test_train_refuses_arguments(run, tmp_path, arguments, said):
    workdir = tmp_path / "run"
    assert_refused(run("train.py", *arguments, f"--workdir={workdir}"), *said)
    assert not workdir.exists()


@pytest.mark.parametrize(
    "command", [["train.py", TINY], ["eval.py"], ["generate.py", "--prompt=a"]], ids=str
)
def test_workdir_is_required(run, command):
    assert_refused(run(*command), "--workdir is missing; give --workdir=WORKDIR")
    assert_refused(run(*command, "--workdir="), "--workdir is empty")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", "--workdir=/nonexistent/x", TINY, "--config.model.layer=2"],
        *(
            pytest.param(arguments, marks=pytest.mark.slow)
            for arguments in (
                ["train.py", "--workdir=/nonexistent/x", TINY, "--config.model.sync_factor=1.5"],
                ["eval.py", "--workdir=/nonexistent/x"],
                ["generate.py", "--workdir=/nonexistent/x", "--prompt=a"],
            )
        ),
    ],
    ids=["flags", "configuration", "evaluation", "generation"],
)
def test_refused_as_users_see_it(arguments):
    assert_refused(run_as_users_do(*arguments))


def test_what_does_not_fit_into_memory(run, tmp_path):
    script = tmp_path / "large.py"
    script.write_text(
        "import jax.numpy as jnp\n"
        "from caat_jax import command_line\n"
        "command_line.run(lambda: jnp.zeros(2**46, jnp.float32).block_until_ready())\n"
    )
    assert_refused(run(str(script)), "memory", f"{2**48} bytes")


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("broken.py", "def get_config(:\n", "broken.py"),
        ("empty.py", "", "get_config"),
        (
            "field.py",
            "from configs import base\n"
            "def get_config():\n"
            "    config = base.get_config()\n"
            "    config.model.width = 3\n"
            "    return config\n",
            "width",
        ),
    ],
    ids=["syntax", "no get_config", "unknown field"],
)
def test_config_file_that_cannot_be_used(run_whole, tmp_path, name, source, said):
    """Not in this process, which would keep what it has of another file."""
    (tmp_path / name).write_text(source)
    result = run_whole("train.py", f"--config={tmp_path / name}", f"--workdir={tmp_path / 'run'}")
    assert_refused(result, said)


# ---- Files and folders ------------------------------------------------------------------------


def write_bytes(path, content):
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, ["data.files=", "no file"]),
        (
            lambda texts: [write_bytes(path, b"") for path in texts.iterdir()],
            ["data.files=", "all 12 files are empty"],
        ),
        (lambda texts: write_bytes(texts / "3.txt", b"a\xff"), ["3.txt is not UTF-8 at byte 1"]),
        (
            lambda texts: [write_bytes(path, b"same") for path in texts.iterdir()],
            ["data.holdout_every=2", "12", "data.eval_split"],
        ),
    ],
    ids=["missing", "empty", "not UTF-8", "all the same"],
)
def test_bad_data_files(run, small, texts, tmp_path, spoil, said):
    spoil(texts)
    assert_refused(run(*small), *said)
    assert not (tmp_path / "run").exists()


def test_tokenizer_with_more_ids_than_the_vocabulary(run, small, tmp_path):
    (tmp_path / "words.txt").write_text("one two three four five six seven\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(tmp_path / "words"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = tmp_path / "words.model"
    size = sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size()
    fields = flags_of({"data.tokenizer": model, "model.vocab_size": 16})
    assert_refused(run(*small, *fields), f"{model} has {size} ids", "model.vocab_size=16")
    assert not (tmp_path / "run").exists()


def test_texts_shorter_than_one_sequence(run, small, tmp_path):
    result = run(*small, "--config.data.sequence_length=4096")
    code, _, stderr = result
    assert code == 2 and "data.sequence_length=4096" in stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["run", "run/below"])
def test_workdir_that_is_a_file(run, small, tmp_path, place):
    (tmp_path / "run").write_text("a file")
    assert_refused(run(*small, f"--workdir={tmp_path / place}"), "--workdir", str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize("script", ["train.py", "eval.py", "generate.py"])
def test_workdir_of_nobody(run, small, script):
    arguments = {"train.py": small[1:], "eval.py": [], "generate.py": ["--prompt=a"]}[script]
    result = run(script, *arguments, "--workdir=~nobody_here/run")
    assert_refused(result, "--workdir=~nobody_here/run: there is no user nobody_here")


URLS = ("http://host/run", "az://bucket/run", "gs:/bucket")


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("script", ["train.py", "eval.py", "generate.py"])
def test_workdir_that_is_another_url(run, small, tmp_path, script, url):
    arguments = {"train.py": small[1:], "eval.py": [], "generate.py": ["--prompt=a"]}[script]
    before = set(tmp_path.rglob("*"))
    result = run(script, *arguments, f"--workdir={url}")
    assert_refused(result, f"--workdir={url} is a URL", "mounted")
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("field", ["files", "tfds_data_dir", "tokenizer", "cache_dir"])
def test_data_in_a_bucket(run, small, tmp_path, field):
    before = set(tmp_path.rglob("*"))
    result = run(*small, f"--config.data.{field}=gs://bucket/x")
    assert_refused(result, f"data.{field}=gs://bucket/x is a URL")
    assert set(tmp_path.rglob("*")) == before


def test_evaluation_of_an_empty_workdir(run, tmp_path):
    assert_refused(run("eval.py", f"--workdir={tmp_path}"), f"--workdir={tmp_path}", "train.py")
    assert list(tmp_path.iterdir()) == []


def test_tasks_without_lm_eval(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "caat_jax.evaluation.harness", raising=False)
    monkeypatch.delattr(caat_jax.evaluation, "harness", raising=False)  # of an earlier import
    result = run("eval.py", "--workdir=/nonexistent/x", "--tasks=piqa")
    assert_refused(result, "lm_eval", "not installed", "pip install")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--batch=2"], ["--batch=2", "--program=prefill or decode"]),
        (["--length=2"], ["--length=2", "--program=prefill or decode"]),
        (["--program=decode", "--batch=0"], ["--batch=0", "multiple of"]),
        (
            ["--program=decode", "--batch=3", "--config.mesh.model=4"],
            ["--batch=3", "mesh.data x mesh.fsdp = 2"],
        ),
        (["--program=prefill", "--length=0"], ["--length=0", "at least 1"]),
        (["--topology=v5e"], ["--topology=v5e", "v5p:4x4x4"]),
        (["--topology=v5e:3x3"], ["--topology=v5e:3x3", "v5p:4x4x4"]),
        (["--topology=v5e:2x2", "--slices=0"], ["--slices=0", "at least 1"]),
        (
            ["--topology=v5e:2x4", "--config.mesh.model=4", "--config.mesh.data=4"],
            ["mesh.data=4", "8 devices"],
        ),
        (
            ["--topology=v5e:2x4", "--slices=2", "--config.mesh.fsdp=2", "--config.mesh.data=1"],
            ["mesh.data=1", "2 TPU slices"],
        ),
        (["--config.mesh.model=4", "--config.mesh.data=1"], ["mesh.model=4", "8 devices"]),
    ],
    ids=str,
)
def test_communication_refuses(run, arguments, said):
    if any("topology" in argument for argument in arguments):
        pytest.importorskip("libtpu")
    assert_refused(run("caat_jax/communication/__main__.py", TINY, *arguments), *said)


def test_run_that_works_and_then_another_architecture(run_whole, small, tmp_path):
    """The way from train.py to eval.py, and its workdir given to another model."""
    workdir = tmp_path / "run"
    code, stdout, stderr = run_whole(*small)
    assert code == 0, stderr
    assert f"python eval.py --workdir={workdir}" in stdout
    code, evaluated, stderr = run_whole("eval.py", f"--workdir={workdir}")
    assert code == 0, stderr
    loss = float(re.search(r"validation loss +(\S+)", evaluated)[1])
    assert f"validation loss {loss:.4f} nats per token" in stdout
    check_generation(run_whole, workdir, tmp_path)

    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    other = ["--config.model.layers=2", "--config.model.sync_factor=0.25"]
    said = ["model.layers: stored 1, requested 2", "model.sync_factors", str(workdir)]
    assert_refused(run_whole(*small, *other), *said)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def check_generation(run, workdir, tmp_path):
    """Of a model with a context of 16 tokens that has seen 1 step: what it says is any bytes."""
    command = ["generate.py", f"--workdir={workdir}"]
    code, one, stderr = run(*command, "--prompt=text é", "--max_new_tokens=9")
    assert code == 0, stderr
    assert one.startswith("text é") and one.endswith("\n")
    (tmp_path / "prompts").write_text("text é\nnumber\n")
    options = ["--max_new_tokens=9", f"--prompt_file={tmp_path / 'prompts'}"]
    code, both, stderr = run(*command, *options)
    assert code == 0, stderr
    assert both.startswith(f"--- prompt 1 ---\n{one}--- prompt 2 ---\nnumber")
    said = ["prompt 1 has 17 tokens", "data.sequence_length=16"]
    assert_refused(run(*command, "--prompt=" + 16 * "a"), *said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["--prompt", "--prompt_file"]),
        (["--prompt=a", "--prompt_file=x"], ["--prompt", "--prompt_file"]),
        (["--prompt="], ["--prompt is empty"]),
        (["--prompt=a", "--prompt="], ["--prompt is empty"]),
        (["--prompt_file=none"], ["--prompt_file=none", "No such file"]),
        (["--prompt_file=."], ["--prompt_file=.", "directory"]),
        (["--prompt_file=empty"], ["--prompt_file=empty is empty"]),
        (["--prompt_file=gap"], ["--prompt_file=gap", "line 2 is empty"]),
        (["--prompt_file=bytes"], ["--prompt_file=bytes", "not UTF-8 at byte 1"]),
        (["--prompt=a\udcff"], ["'a\\udcff' is not UTF-8"]),
        (["--prompt=a", "--system=b"], ["--system", "--chat"]),
        (["--prompt=a", "--chat", "--special_tokens"], ["--special_tokens", "--chat"]),
        (["--prompt=a", "--temperature=-1"], ["temperature=-1"]),
        (["--prompt=a", "--temperature=warm"], ["temperature", "warm"]),
        (["--prompt=a", "--top_p=0"], ["top_p=0"]),
        (["--prompt=a", "--top_k=-1"], ["top_k=-1"]),
        (["--prompt=a", "--seed=-1"], ["seed=-1"]),
        (["--prompt=a", "--max_new_tokens=0"], ["max_new_tokens=0"]),
    ],
    ids=str,
)
def test_generate_refuses(run, tmp_path, arguments, said):
    """Before it looks for the checkpoint: there is none."""
    for name, content in (("empty", b""), ("gap", b"a\n\nb\n"), ("bytes", b"a\xff")):
        (tmp_path / name).write_bytes(content)
    assert_refused(run("generate.py", f"--workdir={tmp_path / 'run'}", *arguments), *said)
    assert not (tmp_path / "run").exists()


def test_workdir_below_the_home_folder(run_whole, small, tmp_path):
    """Shells leave the ~ of `--workdir=~/run` to the program."""
    code, _, stderr = run_whole(*small, "--workdir=~/run")
    assert code == 0, stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"checkpoints", "metrics.jsonl"}
    assert not (tmp_path / "~").exists()
