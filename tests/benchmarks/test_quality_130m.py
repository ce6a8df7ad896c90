"""`benchmarks/quality_130m.py` at a small size, on a CPU."""

import dataclasses
import json
import math
import shutil
import statistics

import pytest

from caat_jax.checkpoints import checkpoints
from caat_jax.data.tokenizers import load_tokenizer
from tests import runs
from tests.command_line import REPOSITORY, SMALL, TINY, assert_refused, flags_of, run_forked

BATCH, LENGTH, MINUTES = 4, 16, 0.005
FIELDS = SMALL | {
    "model.heads": 8,
    "model.kv_heads": 8,
    "model.vocab_size": -1,
    "compute.dtype": "float32",
    "data.sequence_length": LENGTH,
    "data.holdout_every": 3,
    "optimizer.warmup_steps": 2000,
    "train.global_batch": BATCH,
    "train.accumulation_steps": 1,
}
del FIELDS["train.steps"]
FOLDERS = {"p = 1": "p_1.0", "p = 0.5": "p_0.5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has the corpus and its cache."""
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def run(folder):
    """A function: further arguments -> exit code, stdout, stderr."""
    fields = flags_of(FIELDS | runs.corpus(folder))
    config = f"--config={REPOSITORY / 'configs/llama_130m.py'}"
    command = ["benchmarks/quality_130m.py", config, *fields, "--vocab_size=300"]
    return lambda *arguments: run_forked([*command, *arguments], folder)


@pytest.fixture(scope="module")
def finished(run, folder):
    """The workdir of a call that nothing interrupted, and its stdout."""
    workdir = folder / "run"
    code, stdout, stderr = run(f"--workdir={workdir}", f"--minutes={MINUTES}")
    assert code == 0, stderr
    return workdir, stdout


def result_of(workdir):
    return json.loads((workdir / "quality_130m.json").read_text())


@pytest.mark.slow
def test_result(finished, folder):
    workdir, stdout = finished
    result, plan = result_of(workdir), json.loads((workdir / "plan.json").read_text())
    seconds = sum(statistics.median(times) for times in plan["milliseconds"].values()) / 1000
    steps = result["steps"]
    assert steps == plan["steps"] == int(60 * MINUTES * 0.85 / seconds)
    assert result["tokens"] == steps * BATCH * LENGTH
    (manifest,) = folder.glob("cache/tokens/*/manifest.json")
    tokens = json.loads(manifest.read_text())["train"]["tokens"]
    assert result["corpus_tokens"] == (tokens - 1) // LENGTH * LENGTH
    assert result["epochs"] == pytest.approx(result["tokens"] / result["corpus_tokens"])
    assert [run["p"] for run in result["runs"]] == [1.0, 0.5]
    for run, name in zip(result["runs"], FOLDERS.values(), strict=True):
        losses = runs.series(workdir / name, "eval/loss")
        assert run["train_loss"] == runs.series(workdir / name, "train/loss")[steps]
        assert run["validation_loss"] == losses[steps]
        assert len(losses) >= min(10, steps)
        # All of the validation documents are evaluated in either way.
        whole = run["whole_validation_split"]
        assert whole["loss"] == losses[steps]
        bits = whole["loss"] * whole["tokens"] / math.log(2)
        assert whole["bits_per_byte"] == pytest.approx(bits / whole["text_bytes"])
        median = statistics.median(plan["milliseconds"][name])
        assert run["step_ms"]["least"] <= run["step_ms"]["median"] == median
        assert run["tokens_per_second"] == pytest.approx(BATCH * LENGTH / median * 1000)
        assert run["mfu"] is None  # nobody knows this CPU's peak
    assert result["runs"][0]["step_time_ratio"] == 1
    assert result["runs"][1]["train_loss"] != result["runs"][0]["train_loss"]
    assert (workdir / "quality_130m.png").stat().st_size > 10_000
    assert all(label in stdout for label in FOLDERS)
    assert max(map(len, stdout.splitlines())) <= 80


@pytest.mark.slow
def test_the_runs_differ_in_p_alone(finished):
    workdir, _ = finished
    steps = result_of(workdir)["steps"]
    (_, one), (_, half) = (checkpoints.newest_config(workdir / f) for f in FOLDERS.values())
    assert half.model.sync_factors == ((0.5, 0.5),)
    assert half.with_sync_factor(1.0) == one
    assert dataclasses.asdict(one.optimizer) | {
        "decay_steps": steps,
        "warmup_steps": steps // 10,
    } == dataclasses.asdict(one.optimizer)
    data = [workdir / f / f"checkpoints/{steps}/data/metadata" for f in FOLDERS.values()]
    states = [json.loads(path.read_text()) for path in data]
    # Seed, batch and tokens, from which the batches follow, and how many have been read.
    assert states[0] == states[1]
    assert states[0]["next_batch"] == steps


@pytest.mark.slow
def test_tokenizer_takes_any_text(finished):
    tokenizer = load_tokenizer(str(finished[0] / "tokenizer.json"))
    assert tokenizer.size == 300 == result_of(finished[0])["vocabulary"]["tokenizer"]
    for text in ("žluťoučký kůň 🐎, 日本語\r\n\t\x00", "<|end_of_text|> is text here", "é\u0301 "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_same_command_goes_on(run, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "p_0.5")
    (workdir / "quality_130m.json").unlink()
    code, stdout, stderr = run(f"--workdir={workdir}", "--minutes=100")
    assert code == 0, stderr
    assert "resuming the" in stderr and "tokenizer.json exists" in stderr
    assert (result_of(workdir), stdout) == (result_of(finished[0]), finished[1])


@pytest.mark.slow
def test_steps_and_a_tokenizer_of_ones_own(run, finished, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(finished[0] / "tokenizer.json", workdir)
    (workdir / "p_1.0").touch()  # ends the call when the plan is written: training takes long
    code, _, stderr = run(f"--workdir={workdir}", "--steps=3", "--vocab_size=260")
    assert code == 2 and f"{workdir}/p_1.0 is a file" in stderr.splitlines()[-1], stderr
    assert json.loads((workdir / "plan.json").read_text())["steps"] == 3
    kept = (workdir / "tokenizer.json").read_bytes()
    assert kept == (finished[0] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes=0"], ["--minutes=0.0 must be above 0"]),
        (["--minutes=nan"], ["--minutes=nan must be above 0"]),
        (["--steps=0"], ["--steps=0"]),
        (["--vocab_size=257"], ["--vocab_size=257", "258"]),
        (["--config.model.vocab_size=296"], ["--vocab_size=300", "model.vocab_size=296"]),
        (["--config.data.tokenizer=own.json"], ["data.tokenizer=own.json is not used here"]),
        (["--config.data.files=none/*"], ["data.files=none/* matches no file"]),
        (["--config.mesh.simulated_devices=8"], ["there are 8 devices", "on 1"]),
        (["--config.mesh.model=8"], ["mesh.model=8", "the 1 devices present"]),
        (["--config.model.layers=0"], ["model.layers=0"]),
        ([TINY, "--config.model.layer=2"], ["config.model.layer ", "config.model.layers"]),
    ],
    ids=str,
)
def test_refused(run, tmp_path, arguments, said):
    workdir = tmp_path / "run"
    assert_refused(run(f"--workdir={workdir}", *arguments), *said)
    assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps=1"], "--steps=1 must be"),
        (["--config.optimizer.beta1=0.5"], "optimizer.beta1: stored 0.9, requested 0.5"),
    ],
    ids=str,
)
def test_another_command_is_refused(run, finished, arguments, said):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    assert_refused(run(f"--workdir={finished[0]}", *arguments), said, "plan.json")
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


def test_workdir_that_cannot_be(run, tmp_path):
    (tmp_path / "file").touch()
    assert_refused(run(f"--workdir={tmp_path}/file/run"), "is a file; give a folder")
    (tmp_path / "plan.json").write_text("{}")
    assert_refused(run(f"--workdir={tmp_path}"), "plan.json is not a plan of this benchmark")


@pytest.mark.slow
def test_too_little_time(run, tmp_path):
    workdir = tmp_path / "run"
    code, _, stderr = run(f"--workdir={workdir}", "--minutes=1e-9")
    assert code == 2
    assert stderr.splitlines()[-1].startswith("error: --minutes=1e-09 must be more"), stderr
    assert [path.name for path in workdir.iterdir()] == ["tokenizer.json"]
