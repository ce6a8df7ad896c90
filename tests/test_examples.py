"""The examples run from the first cell to the last, shortened; they check their own results."""

import os
import subprocess
import sys

import pytest

from tests.command_line import REPOSITORY

EXAMPLES = {"streams.py": "one_layer.png", "conversion.py": "loss_by_bytes.png"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(tmp_path, name):
    settings = {"EXAMPLES_OUTPUT": str(tmp_path), "EXAMPLES_STEPS": "60", "MPLBACKEND": "agg"}
    path = {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(
        [sys.executable, f"examples/{name}"],
        cwd=REPOSITORY,
        env=os.environ | settings | path,
        check=True,
    )
    assert (tmp_path / EXAMPLES[name]).stat().st_size > 0


def test_every_example_is_run():
    assert {path.name for path in (REPOSITORY / "examples").glob("*.py")} == set(EXAMPLES)
