"""The rig of `benchmarks/links.py`: hosts that are network namespaces of this machine."""

import collections
import contextlib
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import link_profile, links_report, network
from tests.command_line import REPOSITORY, assert_refused, run_here

MARK = "CAAT_JAX_TEST_OF_LINKS"
LAYERS, WIDTH, BATCH, LENGTH, HOSTS = 2, 64, 2, 32, 2
SMALL = [
    *("--hosts=2", "--p=0.5", "--rate=100mbit", "--rounds=1", "--no_baselines", "--latency=0.5"),
    *(f"--layers={LAYERS}", f"--embed_dim={WIDTH}", f"--train_batch={BATCH}"),
    *(f"--length={LENGTH}", "--generate=2x8+9"),
]

needs_hosts = pytest.mark.skipif(
    network.unavailable() is not None, reason=str(network.unavailable())
)


def start(output, *arguments):
    command = [sys.executable, "-m", "benchmarks.links", *SMALL, f"--output={output}", *arguments]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, MARK: str(output)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(output):
    """Those on this machine that come from `start(output)`, by what they inherit from it."""
    mark = f"{MARK}={output}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended
            if mark in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.mark.slow
@needs_hosts
def test_two_hosts(tmp_path):
    process = start(tmp_path / "links", "--plan=1x(0,1)(0,0.5)")
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    rows = json.loads((tmp_path / "links.json").read_text())["rows"]
    with (tmp_path / "links.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "links.png").stat().st_size > 10_000
    parts, rates = ["train", "prefill 2x8", "decode 2x8"], ["none", "100mbit"]
    systems = ["caat_jax, p = 1", "caat_jax, p = 0.5", "caat_jax, 1x(0,1)(0,0.5)"]
    found = [(row["part"], row["rate"], row["system"]) for row in rows]
    assert sorted(found) == sorted(itertools.product(parts, rates, systems))
    assert "train, link 100mbit" in said

    # Half of the channels of two sublayers a layer, forward and, in training, backward; an
    # all-reduce sends 2 (M - 1)/M of its array.
    wire = {(row["part"], row["system"]): row["wire_bytes"] for row in rows}
    tokens = {"train": 2 * BATCH * LENGTH, "prefill 2x8": 2 * 8, "decode 2x8": 2}
    for part, count in tokens.items():
        saved = 2 * LAYERS * count * WIDTH // 2 * 4 * 2 * (HOSTS - 1) / HOSTS
        assert wire[part, systems[0]] - wire[part, systems[1]] == saved
        # Of two sublayers in each of two layers' widths, one and a half are left.
        assert wire[part, systems[0]] - wire[part, systems[2]] == saved * 5 / 4
    for row in rows:
        collective, operation = row["profile_collective_ms"], row["profile_operation_ms"]
        assert collective > 0 and operation > 0
        assert collective + operation < row["profile_total_ms"]


@needs_hosts
def test_a_switch_that_delays():
    """There and back takes twice the delay at least, and what is sent at once arrives whole."""
    command = [sys.executable, "-m", "tests.benchmarks.delayed_hosts"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    round_trip, received = done.stdout.split()
    assert 0.04 <= float(round_trip) < 1 and int(received) == 300_000


def test_bounds():
    """Figures by hand: 1 MB at 100 Mbit/s takes 80 ms."""
    wire_bytes = {"caat_jax, p = 1": {"train": 1e6}, "caat_jax, p = 0.5": {"train": 0.5e6}}
    measured = links_report.Measurements({"none": None, "100mbit": 100.0}, wire_bytes)
    measured.profiles = collections.defaultdict(dict)
    measured.predictions = collections.defaultdict(float)
    times = {
        ("none", "caat_jax, p = 1"): [20, 10, 30],
        ("none", "caat_jax, p = 0.5"): [10, 20, 60],
        ("100mbit", "caat_jax, p = 1"): [100, 120, 140],
        ("100mbit", "caat_jax, p = 0.5"): [100, 60, 60],
    }
    for (rate, system), milliseconds in times.items():
        for value in milliseconds:
            measured.add_time(rate, system, "train", value)
    row = measured.rows()[-1]
    assert (row["rate"], row["system"], row["ms"]) == ("100mbit", "caat_jax, p = 0.5", 60)
    assert row["speed_up"] == 2  # of the rounds' 1, 2, 2.33
    assert (row["link_ms"], row["bound_ms"]) == (40, 60)
    assert row["bound_speed_up"] == pytest.approx(100 / 60)
    assert row["reached"] == pytest.approx(1.2)
    assert row["communication_to_compute"] == 2


def test_predictions_beside_measurements():
    row = {"part": "decode 1x8", "rate": "none", "system": "caat_jax, p = 1"}
    row |= {"ms": 1200.0, "speed_up": 2.0, "predicted_ms": 1080.0}
    of_another_system = row | {"system": "dense"}
    del of_another_system["predicted_ms"]
    assert links_report.predictions_table([row, of_another_system]).splitlines() == [
        "|  |  | none |",
        "| --- | --- | --: |",
        "| decode 1x8 | caat_jax, p = 1 | 2.00 (1,200.0 ms, 0.90) |",
    ]


def test_intervals_are_not_counted_twice():
    assert link_profile.covered([(5, 6), (0, 2), (1, 3), (2, 3), (8, 9)]) == 5


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_an_interrupted_run(tmp_path, number):
    """Namespaces go with the processes: the kernel takes them away."""
    process = start(tmp_path / "links")
    while "starting" not in process.stderr.readline():
        assert process.poll() is None
    assert processes_of(tmp_path / "links")
    process.send_signal(number)
    process.wait(timeout=30)
    end = time.monotonic() + 30
    while processes_of(tmp_path / "links"):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate=fast"], "--rate=fast must be a number with mbit or gbit"),
        (["--rate=0mbit"], "--rate=0mbit"),
        (["--plan=2x(0,2)"], "--plan=2x(0,2) must be layers x (attention's factor, the MLP's)"),
        (["--plan=3x(0,1)"], "--plan=3x(0,1) has 3 layers, not --layers=2"),
        (["--latency=-1"], "latency"),
        (["--p=1.5"], "--p=1.5 must be in [0, 1]"),
        (
            ["--also=0.5:int4"],
            "--also=0.5:int4 must be a p from 0 to 1, a colon, and one of: float32",
        ),
        (["--embed_dim=20"], "--embed_dim=20 must be a multiple of 8 times --hosts=2"),
        (["--generate=0x8+2"], "--generate=0x8+2 must be prompts x tokens"),
        (["--generate=2x8+1"], "--generate=2x8+1 must be"),
    ],
    ids=str,
)
def test_bad_input(tmp_path, arguments, said):
    command = ["benchmarks/links.py", *SMALL, f"--output={tmp_path}/links", *arguments]
    assert_refused(run_here(command, tmp_path), said)


def test_a_machine_that_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert network.unavailable() == "there is no ip; on Debian and Ubuntu: apt-get install iproute2"


def test_tables_of_the_docs_are_those_of_the_results():
    rows = json.loads((REPOSITORY / "docs/links.json").read_text())["rows"]
    page = (REPOSITORY / "docs/benchmarks.md").read_text()
    for name, table in links_report.markdown_tables(rows).items():
        assert table in page, name


def test_tables_of_latency_are_those_of_the_results():
    page = (REPOSITORY / "docs/inference.md").read_text()
    for name in ("links_latency", "links_latency_5ms"):
        rows = json.loads((REPOSITORY / f"docs/{name}.json").read_text())["rows"]
        assert links_report.predictions_table(rows) in page, name
