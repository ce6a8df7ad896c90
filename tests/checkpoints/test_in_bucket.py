"""Runs in a bucket: what is whole after any end, what is damaged, and the same run as on a disk."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import caat_jax
from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints import in_bucket
from caat_jax.checkpoints import workdir as workdir_lib
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.resolve import resolve
from caat_jax.errors import InputError
from caat_jax.storage import mirrors
from caat_jax.storage.bucket import Bucket
from configs import base
from tests import runs
from tests.command_line import run_forked
from tests.storage.stores import clock, folder_store, google_store, s3_server

__all__ = ["clock", "folder_store", "google_store"]  # fixtures

URL = "s3://bucket/run"


def state_of(step):
    mesh = jax.make_mesh((8,), ("model",))
    values = np.arange(64, dtype=np.float32).reshape(8, 8) * step
    split = NamedSharding(mesh, PartitionSpec("model"))
    return {"parameters": {"w": jax.device_put(values, split), "b": jax.device_put(values[0])}}


def save(workdir, *steps, to_keep=None):
    config = resolve(base.get_config())
    with Checkpoints(workdir, to_keep=to_keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), step, config, {"next_batch": step})


def check_restored(workdir, step):
    with Checkpoints(workdir) as checkpoints:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(step)
        )
        restored, data_state = checkpoints.restore(step, shapes)
    jax.tree.map(np.testing.assert_array_equal, restored, state_of(step))
    assert data_state == {"next_batch": step}


@pytest.fixture
def saved(folder_store):
    """A store's folder in which checkpoints 5 and 10 of a run are."""
    with mirrors.pushed():
        save(mirrors.folder("--workdir", URL), 5, 10)
    return folder_store / "run"


def test_a_checkpoint_is_what_was_saved_and_a_copy_of_it_is_one_on_a_disk(saved):
    with mirrors.pushed():
        workdir = mirrors.folder("--workdir", URL)
        assert checkpoint.newest_config(workdir)[0] == 10
        check_restored(workdir, 10)
        check_restored(workdir, 5)
    check_restored(saved, 10)
    assert checkpoint.newest_config(saved)[0] == 10


def test_a_checkpoint_in_googles_store(google_store):
    with mirrors.pushed():
        save(mirrors.folder("--workdir", "gs://bucket/run"), 5, 10, to_keep=1)
        workdir = mirrors.folder("--workdir", "gs://bucket/run")
        check_restored(workdir, 10)
        assert in_bucket.completed(mirrors.of(workdir), "checkpoints") == {"10": True}


def test_older_ones_go_and_the_mirror_holds_none(folder_store):
    with mirrors.pushed():
        workdir = mirrors.folder("--workdir", URL)
        save(workdir, 5, 10, 15, to_keep=2)
        assert list((workdir / "checkpoints").iterdir()) == []
    whole = (folder_store / "run").glob("checkpoints/*/digests.json")
    assert sorted(path.parent.name for path in whole) == ["10", "15"]
    assert [p for p in (folder_store / "run/checkpoints/5").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("done", [0, 3, -1])
def test_an_upload_that_is_cut_off_leaves_the_checkpoint_before(saved, monkeypatch, capsys, done):
    """`done`: objects that were uploaded before; -1: all but the last."""
    writes, write = [], Bucket.write

    def break_off(bucket, name, content):
        writes.append(name)
        if len(writes) > done >= 0 or name.endswith("digests.json"):
            raise InputError("the network is gone")
        write(bucket, name, content)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="the network is gone"):
        patch.setattr(Bucket, "write", break_off)
        save(mirrors.folder("--workdir", URL), 15)
    with mirrors.pushed():
        workdir = mirrors.folder("--workdir", URL)
        assert checkpoint.newest_config(workdir)[0] == 10
        assert (saved / "checkpoints/15").exists() == (done != 0)
        with Checkpoints(workdir) as checkpoints:
            assert checkpoints.resume_step() == 10
        said = f"{URL}/checkpoints/15 was not completed, is deleted; training resumes from step 10"
        assert (said in capsys.readouterr().err) == (done != 0)
        save(workdir, 15)
        check_restored(workdir, 15)


def test_what_a_listing_lacks_is_asked_for(saved, monkeypatch):
    names = Bucket.names

    def cut_off(*arguments):
        return [name for name in names(*arguments) if not name.endswith("digests.json")]

    monkeypatch.setattr(Bucket, "names", cut_off)
    mirror = mirrors.of(mirrors.folder("--workdir", URL))
    assert in_bucket.completed(mirror, "checkpoints") == {"5": True, "10": True}


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["changed", "missing", "added"])
def test_a_damaged_object_leaves_the_checkpoint_before(saved, capsys, how):
    folder = saved / "checkpoints/10"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how == "changed":
        damage(largest)
    elif how == "missing":
        largest.unlink()
    else:
        (folder / "state/more").write_text("")
    name = "state/more" if how == "added" else str(largest.relative_to(folder))
    with mirrors.pushed():
        workdir = mirrors.folder("--workdir", URL)
        assert checkpoint.newest_config(workdir)[0] == 5
        assert f"{URL}/checkpoints/10 is damaged ({name}" in capsys.readouterr().err
        with Checkpoints(workdir) as checkpoints:
            assert checkpoints.resume_step() == 5
        assert f"is now {URL}/checkpoints_set_aside/10" in capsys.readouterr().err
        save(workdir, 10)
        check_restored(workdir, 10)
    assert (saved / "checkpoints_set_aside/10/digests.json").exists()


def test_where_all_are_damaged_nothing_changes(saved):
    for step in (5, 10):
        damage(saved / f"checkpoints/{step}/data/metadata")
    before = sorted(saved.rglob("*"))
    with mirrors.pushed(), pytest.raises(InputError, match="has no undamaged checkpoint"):
        with Checkpoints(mirrors.folder("--workdir", URL)) as checkpoints:
            checkpoints.resume_step()
    assert sorted(saved.rglob("*")) == before


def test_a_second_run_writes_nothing_and_a_first_that_lost_its_place_neither(saved, clock):
    first, second = (mirrors.folder("--workdir", URL) for _ in range(2))
    clock.meanwhile = lambda: _replace(saved / "lock", b"process 1 on another, 2")
    with pytest.raises(InputError, match="is training there"):
        _replace(saved / "lock", b"process 1 on another, 1")
        with workdir_lib.sole_run(second):
            raise AssertionError("two runs at a time")
    (saved / "lock").unlink()
    with workdir_lib.sole_run(first):
        (first / "metrics.jsonl").write_text("{}\n")
    assert (saved / "metrics.jsonl").exists()
    with pytest.raises(InputError, match="has taken over"), workdir_lib.sole_run(first):
        _replace(saved / "lock", b"process 1 on another, 1")
        (first / "metrics.jsonl").write_text("not to be written\n")
        save(first, 15)
    assert (saved / "metrics.jsonl").read_text() == "{}\n"
    assert sorted(os.listdir(saved / "checkpoints")) == ["10", "5"]


def _replace(path, content):
    new = path.with_name("new")
    new.write_bytes(content)
    new.replace(path)


def kill_itself(bucket, name, content):
    """In place of `Bucket.write`: a kill when a part of checkpoint 10 is uploaded."""
    bucket._store.write(name, content).result()
    if name.startswith("checkpoints/10/state/ocdbt"):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment


def losses(text):
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if "loss" in k or k == "step"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_while_uploading_is_that_of_a_disk(s3, tmp_path, processes):
    fields = runs.corpus(tmp_path) | {"mesh.model": 4, "train.steps": 10}
    url = f"s3://bucket/killed{processes}"
    seconds = {"caat_jax.storage.lease.SECONDS": 2.0}
    killing = seconds | {"caat_jax.storage.bucket.Bucket.write": kill_itself}

    def train(workdir, constants):
        started = [
            runs.Run(tmp_path / "outputs" / f"{number}", fields, f"--workdir={workdir}", *flags,
                     devices=4 // processes, environment=s3, constants=constants)
            for number, flags in enumerate(runs.processes_flags(processes))
        ]  # fmt: skip
        return [run.wait() for run in started], started[0].output

    on_disk = tmp_path / "on_disk"
    assert train(on_disk, seconds)[0] == [0] * processes
    codes, output = train(url, killing)
    assert -signal.SIGKILL in codes, output
    bucket = Bucket("", url)
    found = in_bucket.completed(mirrors.Mirror(bucket, tmp_path), "checkpoints")
    assert found == {"5": True, "10": False}
    codes, output = train(url, seconds)
    assert codes == [0] * processes, output
    assert "resuming after step 5" in output and f"{url}/checkpoints/10 was not completed" in output
    assert losses(bucket.read("metrics.jsonl")[0].decode()) == losses(
        (on_disk / "metrics.jsonl").read_text()
    )
    assert bucket.read("lock")[0] is None
    if processes == 1:
        check_other_commands(url, on_disk, tmp_path, s3)


def check_other_commands(url, on_disk, folder, environment):
    """Evaluates, generates, plots, loads and exports both; the results are the same."""
    said = []
    for workdir in (url, str(on_disk)):
        for command in (
            ["eval.py", f"--workdir={workdir}"],
            ["generate.py", f"--workdir={workdir}", "--prompt=the", "--max_new_tokens=5"],
        ):
            code, output, errors = run_forked(command, folder, environment)
            assert code == 0, errors
            said.append(output)
        exported = folder / f"exported{len(said)}"
        for command in (
            ["caat_jax/plot/__main__.py", workdir, f"--output={exported}.png"],
            ["caat_jax/huggingface/__main__.py", "export", workdir, str(exported)],
        ):
            code, output, errors = run_forked(command, folder, environment)
            assert code == 0, errors
    assert said[:2] == said[2:]
    first, second = (folder / f"exported{n}/model.safetensors" for n in (2, 4))
    assert first.read_bytes() == second.read_bytes()
    report = Bucket("", url).read("evaluation.json")[0]
    assert json.loads(report) == json.loads((on_disk / "evaluation.json").read_text())
    tokens = np.arange(16).reshape(2, 8)
    logits = [caat_jax.load(workdir).logits(tokens) for workdir in (url, on_disk)]
    np.testing.assert_array_equal(*logits)
