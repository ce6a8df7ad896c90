"""The house: a part of `caat_jax` imports only those above it in this list."""

import ast
from pathlib import Path

import pytest

import caat_jax

PACKAGE = Path(caat_jax.__file__).parent
LAYERS = (
    "errors",
    "interrupts",
    "files",
    "config",
    "devices",
    "activity",
    "command_help",
    "storage",
    "command_line",
    "figures",
    "model",
    "data",
    "checkpoints",
    "training",
    "inference",
    "evaluation",
    "huggingface",
    "conversion",
    "communication",
    "step_time",
    "sweep",
    "sensitivity",
    "plot",
    "loaded",
    "__init__",
)


def layer(module):
    """The part of the package that a dotted name below `caat_jax` belongs to."""
    return module.split(".")[0] if module else "__init__"


def imports(path):
    """The `caat_jax` modules that a file imports, anywhere in it, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (
            name.removeprefix("caat_jax").removeprefix(".")
            for name in names
            if name.split(".")[0] == "caat_jax"
        )


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_point_upwards(path):
    own = layer(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    below = [name for name in imports(path) if LAYERS.index(layer(name)) > LAYERS.index(own)]
    assert below == [], f"{own} imports what comes after it; the order is {', '.join(LAYERS)}"


def test_every_part_of_the_package_has_its_place():
    parts = {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert parts <= set(LAYERS)
