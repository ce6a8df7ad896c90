"""--help of every command: exit code 0; its examples, its flags, the configuration's fields."""

import ast
import re

import pytest

from caat_jax.config.field_comments import field_comments
from caat_jax.config.resolve import leaves
from configs import base
from tests.command_line import REPOSITORY, run_here
from tests.test_interrupts import COMMANDS

WITH_CONFIG = {
    "train.py",
    "caat_jax/communication/__main__.py",
    "caat_jax/data/train_tokenizer.py",
    "caat_jax/step_time/__main__.py",
}
SWEEP = "caat_jax/sweep/__main__.py"


def entries(text, heading):
    """The names under a heading, without their values."""
    section = text.partition(f"\n{heading}")[2].partition("\n\n")[0]
    return set(re.findall(r"^  (?:--)?([\w.]+)", section, re.MULTILINE))


@pytest.mark.parametrize("script", sorted(COMMANDS))
def test_help(tmp_path, script):
    source = (REPOSITORY / script).read_text()
    code, stdout, stderr = run_here([script, "--workdir=x", "--help"], tmp_path)
    assert (code, stderr) == (0, "")
    assert stdout.startswith(ast.get_docstring(ast.parse(source), clean=False).strip())
    defined = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))
    shared = {"config"} if "command_line.config_flag()" in source else set()
    if "processes.define_flags()" in source:
        shared |= {"coordinator_address", "num_processes", "process_id"}
    assert entries(stdout, "Flags:") >= defined | shared and defined | shared
    names = {name for name, _ in leaves(base.get_config())}
    fields = entries(stdout, "Fields, as --config.FIELD=VALUE:")
    if script == "eval.py":
        names = {name for name in names if name.startswith("data.")}
    if script == SWEEP:
        names = {f"run.{name}" for name in names}
        names |= {"compared", "margin", "looks", "late_evaluations"}
    assert fields == (names if script in WITH_CONFIG | {"eval.py", SWEEP} else set())


@pytest.mark.parametrize("flag", ["-h", "-?", "--helpfull", "--helpshort"])
def test_other_names_of_help(tmp_path, flag):
    code, stdout, _ = run_here(["generate.py", flag], tmp_path)
    assert code == 0 and "python generate.py --workdir=runs/tiny" in stdout


def test_comments_of_fields():
    """As a reader of configs/base.py finds them: above the field, beside it, both, or none."""
    comments = field_comments()
    assert list(comments)[:3] == ["seed", "model.layers", "model.embed_dim"]
    assert (
        comments["seed"] == "Seeds the initial parameters and the order of the training sequences."
    )
    assert comments["model.embed_dim"] == "D, the width of the residual stream"
    assert comments["model.layers"] == ""
    assert comments["model.rope_scaling_factor"].endswith("are unchanged. 1: none")
    assert set(comments) == {name for name, _ in leaves(base.get_config())}
