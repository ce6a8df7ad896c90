"""The script for an accelerator, rehearsed."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import accelerator_results, accelerator_stages
from benchmarks.workers import ROOT


def test_every_stage_is_there():
    assert set(accelerator_results.STAGES) == set(accelerator_stages.BY_NAME)


def test_a_stage_gives_results_that_are_tables(tmp_path):
    records = [
        {"stage": name, **record}
        for name in ("device", "generate")
        for record in accelerator_stages.BY_NAME[name](tmp_path, True)
    ]
    assert [r["system"] for r in records[1:]] == ["caat_jax, p = 1", "caat_jax, p = 0.5"] * 2
    assert all(r["tokens_per_second"] > 0 for r in records[1:])
    table = accelerator_results.as_tables(json.loads(json.dumps(records)))
    assert "## generate\n\n| system | batch |" in table
    assert table.count("\n| caat_jax, p = 0.5 |") == 2


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """A stage that fails is said, and the others run; what has results is not run again."""
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--output={tmp_path}"]
    command += ["--rehearse", "--minutes=15"]

    def run() -> list[dict]:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return accelerator_results.read(tmp_path / "results.jsonl")

    in_the_way = tmp_path / "quality"
    in_the_way.write_text("where the study's folder belongs")
    records = run()
    assert {record["stage"] for record in records} == set(accelerator_results.STAGES)
    assert [record["stage"] for record in records if "error" in record] == ["quality"]
    assert all(record.get("ok", True) for record in records)
    in_the_way.unlink()
    assert [record["stage"] for record in run()[len(records) :]] == ["quality"]
