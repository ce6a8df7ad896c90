"""Files replaced in one go, locks, and JSON that anybody may have written."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from caat_jax import files
from caat_jax.errors import InputError


def test_a_write_replaces_a_link_and_not_what_it_points_to(tmp_path):
    outside, path = tmp_path / "outside", tmp_path / "folder" / "file"
    path.parent.mkdir()
    outside.write_text("mine")
    for planted in (path, path.with_name(f".file.{os.getpid()}.new")):
        planted.symlink_to(outside)
        files.write(path, "new")
        assert path.read_text() == "new" and not path.is_symlink()
        assert outside.read_text() == "mine"
        assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_what_was_there_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """The order of system calls, which decides what is left after a power failure."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def record(*args, name=name, real=real):
            what = (
                os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}")) if len(args) == 1 else ""
            )
            calls.append((name, what))
            return real(*args)

        monkeypatch.setattr(os, name, record)
    files.write(tmp_path / "file", "content")
    new = f".file.{os.getpid()}.new"
    assert calls == [("fsync", new), ("replace", ""), ("fsync", tmp_path.name)]


def refuse():
    raise InputError("busy")


HOLD = """
import sys
from pathlib import Path
from caat_jax import files
with files.held(Path(sys.argv[1]), None):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_against_other_processes_and_ends_with_its_own(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="busy"), files.held(path, refuse):
        pass
    said = threading.Event()
    threading.Thread(target=lambda: said.wait() and holder.kill()).start()
    with files.held(path, said.set):  # waits until the holder is killed
        assert path.exists()
    assert not path.exists()
    holder.communicate()


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with pytest.raises(InputError, match=f"{tmp_path}/lock cannot be locked .No locks available"):
        with files.held(tmp_path / "lock", refuse):
            pass


@pytest.mark.parametrize("content", [b"{}", b'{"a": [{"b": 1.5e10}]}', '{"ž": null}'.encode()])
def test_json_objects(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert files.read_json(tmp_path / "file", dict) == json.loads(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"null",
        b"[]",
        b"1",
        b'{"a": NaN}',
        b'{"a": 1',
        b'{"a": "\xff"}',
        b"\xff\xfe{",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_not_a_json_object(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        files.read_json(path, dict, "a report")
    assert str(caught.value).startswith(f"{path} is not a report (")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_not_a_file_is_neither_waited_for_nor_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(1 << 40)
    for name in ("fifo", "loop", "sparse", ".", "/dev/zero"):
        with pytest.raises(InputError):
            files.read_json(tmp_path / name, dict)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "missing", dict)
