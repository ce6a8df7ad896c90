"""Requirements, locks and the package: what a machine that has more installed would not notice."""

import ast
import functools
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OURS = {"caat_jax", "configs", "tests", "benchmarks"}
RUNTIME = "requirements.txt"
FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))
NOT_LOCKED = ("requirements-docs.txt", "requirements-gpu.txt")
PYTORCH_LOCK = "requirements-torch.lock"
# Copied beside exported weights; nothing here imports it but `transformers`, in tests.
EXPORTED = ROOT / "caat_jax/huggingface/exported_code"
HARNESS = ROOT / "caat_jax/evaluation/harness.py"


def requirements(*files: str) -> list[tuple[Requirement, str]]:
    """Each requirement of these files, with the comment on its line."""
    rows = [
        line.partition("#") for file in files for line in (ROOT / file).read_text().splitlines()
    ]
    return [(Requirement(text), comment.strip()) for text, _, comment in rows if text.strip()]


def pins(lock: str) -> dict[str, Requirement]:
    """The pinned requirements of a lock, by canonical name."""
    lines = (ROOT / lock).read_text().splitlines()
    pinned = [
        Requirement(line.partition(" #")[0].removesuffix("\\"))
        for line in lines
        if line[:1] not in ("", " ", "#")
    ]
    assert len({pin.name for pin in pinned}) == len(pinned), "one version for all platforms"
    return {canonicalize_name(pin.name): pin for pin in pinned}


@functools.cache
def imported(path: Path) -> set[str]:
    """The distributions' packages that a module imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


DISTRIBUTIONS = packages_distributions()  # reads the file lists of all that is installed


def distributions(package: str) -> set[str]:
    return {canonicalize_name(name) for name in DISTRIBUTIONS.get(package, [package])}


def modules(*patterns: str) -> set[Path]:
    return {path for pattern in patterns for path in ROOT.glob(pattern)}


def missing(paths: Iterable[Path], *files: str) -> list[str]:
    """What these modules import and the requirements files do not name."""
    required = {canonicalize_name(requirement.name) for requirement, _ in requirements(*files)}
    return sorted(
        f"{path.relative_to(ROOT)}: {package} is not in {', '.join(files)}"
        for path in paths
        for package in imported(path)
        if required.isdisjoint(distributions(package))
    )


def test_what_the_package_imports_is_required():
    paths = modules("*.py", "caat_jax/**/*.py", "configs/*.py")
    assert missing(paths - {HARNESS} - set(EXPORTED.iterdir()), RUNTIME) == []


def test_what_the_harness_imports_is_required():
    pytest.importorskip("lm_eval")
    assert missing([HARNESS], RUNTIME, "requirements-eval.txt") == []


def test_what_tests_and_benchmarks_import_is_required():
    paths = modules("tests/**/*.py", "benchmarks/*.py", "caat_jax/huggingface/exported_code/*.py")
    assert missing(paths, *FILES) == []


def test_what_is_required_is_imported_or_has_a_reason():
    paths = modules("*.py", "caat_jax/**/*.py", "configs/*.py", "benchmarks/*.py", "tests/**/*.py")
    packages = set().union(*map(imported, paths))
    known = set().union(*map(distributions, packages))
    unexplained = [
        requirement.name
        for requirement, reason in requirements(*FILES)
        if canonicalize_name(requirement.name) not in known and not reason
    ]
    assert unexplained == []


def loaded(name: str) -> set[str]:
    """What importing this module of ours imports, its imports of ours followed."""
    done, left = set(), {name}
    while left:
        name = left.pop()
        done.add(name)
        path = ROOT / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name.partition(".")[0] in OURS and path.exists():
            left |= imported_at_once(ast.parse(path.read_text())) - done
    return {name.partition(".")[0] for name in done}


def imported_at_once(node: ast.AST) -> set[str]:
    """Dotted names whose import does not wait for a call; names in modules may be among them."""
    if isinstance(node, ast.FunctionDef):
        return set()
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return set()
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return set().union(*map(imported_at_once, ast.iter_child_nodes(node)))


def test_training_starts_without_what_it_may_not_need():
    packages = loaded("caat_jax.training.loop")
    assert {"jax", "optax", "orbax", "grain"} <= packages  # the walk arrives there
    rare = {"matplotlib", "scipy", "tensorboardX", "tokenizers", "sentencepiece", "safetensors"}
    assert packages.isdisjoint(rare | {"torch", "transformers", "lm_eval"})


@pytest.mark.parametrize(
    "lock, files",
    [
        ("requirements.lock", [RUNTIME]),
        ("requirements-dev.lock", [file for file in FILES if file not in NOT_LOCKED]),
    ],
)
def test_locked_versions_are_within_the_ranges(lock, files):
    locked = pins(lock) | pins(PYTORCH_LOCK)
    for requirement, _ in requirements(*files):
        (pin,) = locked[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement


def test_both_locks_hold_the_same_versions():
    runtime, development = pins("requirements.lock"), pins("requirements-dev.lock")
    for name, pin in runtime.items():
        assert development[name].specifier == pin.specifier, name


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_every_locked_version_has_hashes_and_no_address(lock):
    text = (ROOT / lock).read_text()
    assert "://" not in text
    for entry in text.replace("\\\n", "").splitlines():
        assert entry[:1] in ("#", " ", "") or "--hash=sha256:" in entry, entry


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The package as `pip install` builds it."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("caat_jax", "configs"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE", *FILES):
        shutil.copy(ROOT / file, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    return zipfile.ZipFile(next(source.glob("*.whl")))


def test_the_wheel_holds_every_file_of_the_package(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in modules("caat_jax/**/*", "configs/**/*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_requires_what_the_files_name(wheel):
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(path).decode())
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    extras = setuptools["dynamic"]["optional-dependencies"]
    assert {file for extra in extras.values() for file in extra["file"]} == set(FILES) - {RUNTIME}
    required = {None: [RUNTIME]} | {name: extra["file"] for name, extra in extras.items()}
    expected = {
        (extra, requirement.name, str(requirement.specifier))
        for extra, files in required.items()
        for requirement, _ in requirements(*files)
    }
    described = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    stated = {
        (extra, requirement.name, str(requirement.specifier))
        for requirement in described
        for extra in required
        if f'extra == "{extra}"' in str(requirement.marker)
        or (extra is None and "extra" not in str(requirement.marker))
    }
    assert stated == expected


def test_the_changelog_starts_with_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = [row for row in (ROOT / "CHANGELOG.md").read_text().splitlines() if row[:3] == "## "]
    assert headings[0].split()[1] == version
