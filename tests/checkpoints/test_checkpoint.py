"""Checkpoints that are damaged, cut off, or restored on another mesh; disks that are full."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from orbax.checkpoint._src.metadata import checkpoint as metadata_store

from caat_jax.checkpoints import checkpoints as checkpoint
from caat_jax.checkpoints.checkpoints import SET_ASIDE_FOLDER, Checkpoints
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.devices import sharding
from caat_jax.errors import InputError
from caat_jax.training.step import Programs
from configs import base
from tests import runs
from tests.command_line import REPOSITORY

STEPS = (5, 10)
VOCAB_SIZE = 264


def programs_on(mesh, accumulation_steps=1):
    config = base.get_config()
    config.update_from_flattened_dict(runs.SMALL)
    config.model.vocab_size = VOCAB_SIZE
    config.train.accumulation_steps = accumulation_steps
    config.mesh.update(dict(zip(sharding.MESH_AXES, mesh, strict=True)))
    config = resolve(config)
    count = np.prod(mesh)
    sizes = resolve_mesh(config, count)
    return Programs(config, sharding.create_mesh(sizes, jax.devices()[:count]))


def step_on_batch(programs, state):
    """The next state and its loss and gradient norm, of a batch that is always the same."""
    shape = (programs.config.train.global_batch, programs.config.data.sequence_length + 1)
    rows = np.random.default_rng(0).integers(VOCAB_SIZE, size=shape, dtype=np.int32)
    batch = jax.device_put(rows, programs.batch_sharding)
    state, values = jax.block_until_ready(programs.train_step(state, batch))
    return state, [float(values[f"train/{name}"]) for name in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 5 and 10 of (data 2, fsdp 2, model 2), and what comes after 10."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    programs = programs_on((2, 2, 2))
    state = programs.initial_state()
    with Checkpoints(workdir) as checkpoints:
        for step in STEPS:
            state, _ = step_on_batch(programs, state)
            checkpoints.save(state, step, programs.config, {"next_batch": step})
            checkpoints.wait()
    _, after = step_on_batch(programs, state)
    return workdir, after


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 1, 1),
        (1, 8, 1),
        *(pytest.param(m, marks=pytest.mark.slow) for m in [(1, 1, 8), (4, 1, 2), (2, 2, 2)]),
    ],
    ids=str,
)
def test_next_step_on_another_mesh(saved, mesh):
    workdir, expected = saved
    programs = programs_on(mesh)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.resume_step() == STEPS[-1]
        state, _ = checkpoints.restore(STEPS[-1], programs.state_shapes)
    assert step_on_batch(programs, state)[1] == pytest.approx(expected, rel=1e-6)


# ---- Damage -----------------------------------------------------------------------------------


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_of(folder)}


def damage(folder, way, chance):
    """Damages a checkpoint in one of these `WAYS`."""
    path = chance.choice(files_of(folder))
    data = bytearray(path.read_bytes())
    if way == "truncated":
        path.write_bytes(data[: chance.randrange(len(data))])
    elif way == "flipped":
        for _ in range(chance.choice((1, 1, 20))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    elif way == "removed":
        path.unlink()
    elif way == "zeroed":
        start = chance.randrange(len(data))
        path.write_bytes(data[:start] + bytes(len(data) - start))
    elif way == "folder":  # of a part of the state: what a mount that is not there looks like
        shutil.rmtree(folder / "state")
    elif way == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    else:  # unreadable: a link to nowhere
        path.unlink()
        path.symlink_to("nowhere")


WAYS = ("truncated", "flipped", "removed", "zeroed", "folder", "empty", "unreadable")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]
)
def test_damage_ends_in_the_checkpoint_before(saved, tmp_path, capsys, way, seed):
    workdir = tmp_path / "run"
    shutil.copytree(saved[0], workdir, symlinks=True)
    newest, intact = (workdir / "checkpoints" / str(step) for step in reversed(STEPS))
    before = content(newest)
    damage(newest, way, random.Random(f"{way} {seed}"))
    after = content(newest)
    assert after != before

    step, config = checkpoint.newest_config(workdir)  # as eval.py and generate.py do
    said = capsys.readouterr().err
    assert step == STEPS[0] and config.model.vocab_size == VOCAB_SIZE
    assert said.count("\n") == 1 and said.startswith(f"warning: {newest} is damaged (")
    assert content(newest) == after

    with Checkpoints(workdir) as checkpoints:  # as train.py does
        assert checkpoints.resume_step() == STEPS[0]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{newest} is damaged (" in said
    assert "training resumes from step 5" in said
    assert content(workdir / SET_ASIDE_FOLDER / newest.name) == after
    assert not newest.exists() and content(intact) == content(saved[0] / "checkpoints" / "5")


@pytest.mark.parametrize(
    ("old", "new"), [(b"item_handlers", b"item_handlerz"), (b"{", b"["), (b'"', b"\xff")], ids=str
)
def test_damaged_metadata(saved, tmp_path, capsys, old, new):
    shutil.copytree(saved[0], tmp_path / "run")
    path = tmp_path / "run/checkpoints/10/_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    assert checkpoint.newest_config(tmp_path / "run")[0] == 5
    assert "(_CHECKPOINT_METADATA is damaged)" in capsys.readouterr().err


def test_nothing_undamaged_is_an_error_that_moves_nothing(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    for step in STEPS:
        (folder / str(step) / "config/metadata").unlink()
    before = content(tmp_path)
    for read in (
        lambda: checkpoint.newest_config(tmp_path / "run"),
        lambda: Checkpoints(tmp_path / "run").resume_step(),
    ):
        with pytest.raises(InputError) as caught:
            read()
        said = f"{folder} has no undamaged checkpoint (10: config/metadata: No such file"
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert content(tmp_path) == before


def test_a_save_that_was_cut_off_is_set_aside(saved, tmp_path, capsys):
    shutil.copytree(saved[0], tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    for _ in range(2):  # the second time there is one of that name already
        shutil.copytree(folder / "5", folder / "15.saving.orbax-checkpoint-tmp")
        with Checkpoints(tmp_path / "run") as checkpoints:
            assert checkpoints.resume_step() == 10
    aside = {path.name for path in (tmp_path / "run" / SET_ASIDE_FOLDER).iterdir()}
    assert aside == {"15.saving.orbax-checkpoint-tmp", "15.saving.orbax-checkpoint-tmp.1"}
    assert capsys.readouterr().err.count("was not completed") == 2
    assert {path.name for path in folder.iterdir()} == {"5", "10"}


def test_few_are_kept_aside(saved, tmp_path, capsys):
    shutil.copytree(saved[0], tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    for step in range(20, 26):
        (folder / f"{step}.saving").mkdir()
        assert Checkpoints(tmp_path / "run").resume_step() == 10
    aside = {path.name for path in (tmp_path / "run" / SET_ASIDE_FOLDER).iterdir()}
    assert aside == {"23.saving", "24.saving", "25.saving"}
    said = capsys.readouterr().err
    assert [f"{step}.saving is deleted" in said for step in range(20, 26)] == [True] * 3 + [
        False
    ] * 3


def test_digests_are_of_everything(saved):
    for step in STEPS:
        folder = saved[0] / "checkpoints" / str(step)
        listed = set(json.loads((folder / "digests.json").read_text())["files"])
        assert set(content(folder)) - listed == {"digests.json"}
        assert any(name.startswith("state/d/") for name in listed)


@pytest.mark.parametrize(
    "old", ["{}", "[]", '{"files": {}}', '{"files": []}', '{"files": {"a": 1}}']
)
def test_digests_that_say_nothing_are_damaged(saved, tmp_path, capsys, old):
    shutil.copytree(saved[0], tmp_path / "run")
    (tmp_path / "run/checkpoints/10/digests.json").write_text(old)
    assert checkpoint.newest_config(tmp_path / "run")[0] == 5
    assert "10 is damaged (" in capsys.readouterr().err


def test_checkpoints_of_the_first_layout_are_read(saved, tmp_path):
    """Theirs had a CRC-32 for each file, that of the metadata before the last change to it."""
    shutil.copytree(saved[0], tmp_path / "run")
    folder = tmp_path / "run/checkpoints/10"
    names = [name for name in content(folder) if name != "digests.json"]
    digests = {name: zlib.crc32((folder / name).read_bytes()) for name in names}
    (folder / "digests.json").write_text(json.dumps(digests | {"_CHECKPOINT_METADATA": 1}))
    assert checkpoint.newest_config(tmp_path / "run")[0] == 10
    path = next((folder / "state/d").iterdir())
    path.write_bytes(path.read_bytes() + b"x")
    assert checkpoint.newest_config(tmp_path / "run")[0] == 5


@pytest.mark.parametrize("name", ["6", "5000000000", "0"])
def test_a_checkpoint_under_another_steps_name_is_damaged(saved, tmp_path, capsys, name):
    shutil.copytree(saved[0], tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    shutil.rmtree(folder / "10")
    shutil.copytree(folder / "5", folder / name)
    (folder / "²").mkdir()  # a digit to Python, and none of the project's
    assert checkpoint.newest_config(tmp_path / "run")[0] == 5
    said = "it is the checkpoint of step 5"
    assert (said in capsys.readouterr().err) == (name != "0")


def test_slow_writes_of_metadata(tmp_path, monkeypatch, capsys):
    """Digests must be of what is final, however long Orbax takes to finish a file."""
    write = metadata_store._MetadataStoreImpl.write

    def in_two_parts(self, path, metadata):
        Path(path).write_text("")
        time.sleep(0.02)
        write(self, path, metadata)

    monkeypatch.setattr(metadata_store._MetadataStoreImpl, "write", in_two_parts)
    config = programs_on((1, 1, 1)).config
    with Checkpoints(tmp_path, to_keep=1) as checkpoints:
        for step in range(1, 6):
            checkpoints.save({"x": np.arange(step)}, step, config, {"next_batch": step})
            checkpoints.check()
    assert Checkpoints(tmp_path).resume_step() == 5
    assert runs.checkpoint_steps(tmp_path) == [5] and capsys.readouterr().err == ""


@pytest.mark.parametrize("saves", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_saves_one_after_the_other_on_a_busy_machine(tmp_path, capsys, saves):
    memory = Path("/dev/shm")  # where it is fast, saves are closest to each other
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else tmp_path))
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(os.cpu_count())]
    config = programs_on((1, 1, 1)).config
    try:
        with Checkpoints(folder, to_keep=2) as checkpoints:
            for step in range(1, saves + 1):
                checkpoints.save({"x": np.full(9, step)}, step, config, {"next_batch": step})
                checkpoints.check()
        assert runs.checkpoint_steps(folder) == [saves - 1, saves]
        assert checkpoint.newest_config(folder)[0] == saves and capsys.readouterr().err == ""
    finally:
        for process in busy:
            process.kill()
            process.wait()
        shutil.rmtree(folder)


def test_older_checkpoints_stay_until_the_new_one_is_verified(saved, tmp_path, monkeypatch):
    """As when something still writes to its files: the bug that this guards against."""
    shutil.copytree(saved[0], tmp_path / "run")
    write = checkpoint.digests.write

    def damaged_later(folder):
        write(folder)
        (folder / "config/metadata").write_text("{}")

    monkeypatch.setattr(checkpoint.digests, "write", damaged_later)
    with pytest.raises(InputError, match=r"15 is not as it was written \(config/metadata is dam"):
        with Checkpoints(tmp_path / "run", to_keep=1) as checkpoints:
            config = programs_on((1, 1, 1)).config
            checkpoints.save({"x": np.arange(3)}, 15, config, {"next_batch": 15})
    assert checkpoint.newest_config(tmp_path / "run")[0] == 10


def test_saving_asks_nobody_whether_to_stop(tmp_path, monkeypatch):
    """Only the loop may: with a step that is over, processes would agree on one that has passed."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with Checkpoints(tmp_path) as checkpoints:
        config = programs_on((1, 1, 1)).config
        checkpoints.save({"x": np.arange(3)}, 1, config, {"next_batch": 1})
    assert asked == []


def test_a_saved_checkpoint_is_on_the_disk(tmp_path, monkeypatch):
    """All files and folders are synchronised before it gets its name, and its name after that."""
    synchronised, names = {}, []
    fsync, replace = os.fsync, os.replace

    def noted(descriptor):
        status = os.fstat(descriptor)
        synchronised[status.st_ino] = status.st_size
        fsync(descriptor)

    def renamed(source, destination):
        replace(source, destination)
        if Path(destination).name == "1":
            paths = [Path(destination), *Path(destination).rglob("*")]
            names.extend(p for p in paths if p.stat().st_ino not in synchronised)
            cut = [
                p
                for p in paths
                if p.is_file() and synchronised[p.stat().st_ino] != p.stat().st_size
            ]
            names.extend(cut)
            synchronised.clear()

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    with Checkpoints(tmp_path) as checkpoints:
        config = programs_on((1, 1, 1)).config
        checkpoints.save({"x": np.arange(3)}, 1, config, {"next_batch": 1})
    assert names == []
    assert {(tmp_path / "checkpoints").stat().st_ino, tmp_path.stat().st_ino} <= set(synchronised)


# ---- Disks ------------------------------------------------------------------------------------

MOUNT = "mkdir -p {0} && mount -t tmpfs -o size={1}k tmpfs {0} && "


def needs_mount():
    """Mounting needs no root where users may have a namespace of their own."""
    done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False)
    return pytest.mark.skipif(done.returncode != 0, reason="unshare -rm mount is not allowed here")


def train_on(disk, kilobytes, fields, then=""):
    """Trains on a small disk; exit code, stderr and the names of the checkpoints at the end."""
    given = runs.SMALL | {"mesh.simulated_devices": 1} | fields
    flags = " ".join(f"--config.{name}={value}" for name, value in given.items())
    train = f"{runs.PYTHON} train.py --config=configs/tiny.py --workdir={disk}/run {flags}"
    script = f"{MOUNT.format(disk, kilobytes)} {{ {then.format(disk)} {train}; code=$?; }}"
    script += f"; ls {disk}/run/checkpoints; exit $code"
    command = ["unshare", "-rm", "sh", "-c", script]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, done.stdout.split()


@needs_mount()
def test_full_disk(tmp_path):
    fields = runs.corpus(tmp_path) | {"train.checkpoint_every": 2, "train.checkpoints_to_keep": 9}
    code, said, checkpoints = train_on(tmp_path / "disk", 1100, fields)
    assert code == 2 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert "(No space left on device); the checkpoints before it are whole" in line
    assert checkpoints[0] == "2"
    assert not re.search(rf"checkpoints/({'|'.join(checkpoints)}) could", line)


@needs_mount()
# For the tokens; for the corpus.
@pytest.mark.parametrize("kilobytes", [40, pytest.param(8, marks=pytest.mark.slow)])
def test_full_disk_while_the_corpus_is_prepared(tmp_path, kilobytes):
    fields = runs.corpus(tmp_path) | {"data.cache_dir": tmp_path / "disk/cache"}
    code, said, _ = train_on(tmp_path / "disk", kilobytes, fields)
    (line,) = [line for line in said.splitlines() if not line.startswith("ls:")]
    assert code == 2 and line.startswith("error: ") and "No space left on device" in line
    assert f"{tmp_path}/disk/cache/" in line


@needs_mount()
@pytest.mark.slow
def test_disk_that_cannot_be_written(tmp_path):
    fields = runs.corpus(tmp_path)
    code, said, _ = train_on(tmp_path / "disk", 1100, fields, then="mount -o remount,ro {0};")
    (line,) = [line for line in said.splitlines() if not line.startswith("ls:")]
    assert code == 2 and line.startswith("error: ") and "cannot be written" in line
