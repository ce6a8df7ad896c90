"""The rig of `benchmarks/links.py`: hosts that are network namespaces of this machine."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import network
from tests.command_line import REPOSITORY

LAYERS, WIDTH, BATCH, LENGTH, HOSTS = 2, 64, 2, 32, 2
SMALL = [
    *("--hosts=2", "--p=0.5", "--rate=100mbit", "--rounds=1", "--no_baselines"),
    *(f"--layers={LAYERS}", f"--embed_dim={WIDTH}", f"--train_batch={BATCH}"),
    *(f"--length={LENGTH}", "--prompts=2", "--prompt_length=8", "--new_tokens=9"),
]

needs_hosts = pytest.mark.skipif(
    network.unavailable() is not None, reason=str(network.unavailable())
)


def start(output, *arguments):
    command = [sys.executable, "-m", "benchmarks.links", *SMALL, f"--output={output}", *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def processes_about(text):
    """Those on this machine with this text in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:  # it has ended
            continue
        if text in command and int(path.parent.name) != os.getpid():
            found.append(command.replace("\0", " "))
    return found


@needs_hosts
def test_two_hosts(tmp_path):
    process = start(tmp_path / "links")
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    rows = json.loads((tmp_path / "links.json").read_text())["rows"]
    with (tmp_path / "links.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "links.png").stat().st_size > 10_000
    parts, rates = ["train", "prefill 2", "decode 2"], ["none", "100mbit"]
    found = [(row["part"], row["rate"], row["p"]) for row in rows]
    assert sorted(found) == sorted((part, r, p) for part in parts for r in rates for p in (1, 0.5))
    assert "train, link 100mbit" in said

    # Half of the channels of two sublayers a layer, forward and, in training, backward; an
    # all-reduce sends 2 (M - 1)/M of its array.
    wire = {(row["part"], row["p"]): row["wire_bytes"] for row in rows}
    tokens = {"train": 2 * BATCH * LENGTH, "prefill 2": 2 * 8, "decode 2": 2}
    for part, count in tokens.items():
        saved = 2 * LAYERS * count * WIDTH // 2 * 4 * 2 * (HOSTS - 1) / HOSTS
        assert wire[part, 1] - wire[part, 0.5] == saved
    for row in rows:
        link_ms = 0 if row["rate"] == "none" else row["wire_bytes"] * 8 / 100e6 * 1e3
        (compute,) = [
            r["ms"]
            for r in rows
            if (r["part"], r["rate"], r["p"]) == (row["part"], "none", row["p"])
        ]
        assert row["bound_ms"] == pytest.approx(compute + link_ms)


@needs_hosts
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_an_interrupted_run(tmp_path, number):
    """Namespaces go with the processes: the kernel takes them away."""
    process = start(tmp_path / "links")
    mark = f"--output={tmp_path}/links"
    while "starting" not in process.stderr.readline():
        assert process.poll() is None
    assert processes_about(mark)
    process.send_signal(number)
    process.wait(timeout=30)
    end = time.monotonic() + 30
    while processes_about(mark) or processes_about("benchmarks.link_workers"):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate=fast"], "--rate=fast must be a number with mbit or gbit"),
        (["--rate=0mbit"], "--rate=0mbit"),
        (["--p=1.5"], "--p=1.5 must be in [0, 1]"),
        (["--embed_dim=20"], "--embed_dim=20 must be a multiple of 8 times --hosts=2"),
        (["--prompts=0"], "--prompts=0 must be numbers above 0"),
    ],
    ids=str,
)
def test_bad_input(tmp_path, arguments, said):
    process = start(tmp_path / "links", *arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors.count("\n") == 1 and said in errors, errors


def test_a_machine_that_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert network.unavailable() == "there is no ip; on Debian and Ubuntu: apt-get install iproute2"
