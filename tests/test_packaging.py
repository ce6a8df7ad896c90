"""What the code imports is in the requirements, which a machine that has more would not notice."""

import ast
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"caat_jax", "configs", "tests", "benchmarks"}
# Copied beside exported weights; nothing here imports it but `transformers`, in tests.
EXPORTED = ROOT / "caat_jax/huggingface/exported_code"
NEEDS_LM_EVAL = ROOT / "caat_jax/evaluation/harness.py"  # the one module that does


def requirements(name: str) -> set[str]:
    """The distributions a requirements file names, those of the files it includes too."""
    names = set()
    for line in (ROOT / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            names |= requirements(line.removeprefix("-r "))
        elif line:
            names.add(normal(line.partition(">=")[0]))
    return names


def normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def imported(path: Path) -> set[str]:
    """The packages that importing the module needs; an import in a function may be optional."""
    names = set()
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            names.add(statement.module.partition(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


def missing(file: str, paths: Iterable[Path]) -> list[str]:
    """What these modules import and the requirements file does not name."""
    distributions = packages_distributions()
    required = requirements(file)
    return sorted(
        f"{path.relative_to(ROOT)}: {package} is not in {file}"
        for path in paths
        for package in imported(path)
        if required.isdisjoint(map(normal, distributions.get(package, [package])))
    )


@pytest.mark.parametrize(
    "file, folders",
    [
        ("requirements.txt", ("*.py", "caat_jax/**/*.py", "configs/*.py", "benchmarks/*.py")),
        ("requirements-dev.txt", ("tests/**/*.py", "caat_jax/huggingface/exported_code/*.py")),
    ],
)
def test_imports_are_required(file, folders):
    paths = {path for folder in folders for path in ROOT.glob(folder)} - {NEEDS_LM_EVAL}
    if file == "requirements.txt":
        paths = {path for path in paths if EXPORTED not in path.parents}
    assert missing(file, paths) == []


def test_imports_of_the_harness_are_required():
    pytest.importorskip("lm_eval")
    assert missing("requirements-eval.txt", [NEEDS_LM_EVAL]) == []
