"""What conversion costs at several p, and what each of its steps is worth.

    python -m benchmarks.conversion --link_texts=texts
    python -m benchmarks.conversion --workdir=runs/full --results=small.csv \\
        --sync_factors=0.75,0.5,0.25,0 [--files="texts/*.txt"]
    python -m benchmarks.conversion --plot=small.png --results=small.csv

The first makes links to documentation that Debian and Python packages install, several kinds of it,
in an order that mixes them.  The second converts a dense run at each p in five ways and adds a row
to the results for each; those that are there already are not measured again.  The third draws them.
"""

import csv
import dataclasses
import glob
import hashlib
import itertools
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from caat_jax import command_line, figures, files
from caat_jax.checkpoints import checkpoints
from caat_jax.checkpoints.trained import restore_model
from caat_jax.config.resolve import resolve_mesh
from caat_jax.conversion import basis, converting
from caat_jax.conversion.progress import Progress
from caat_jax.conversion.texts import open_texts

_LINK_TEXTS = flags.DEFINE_string("link_texts", None, "A folder for the links.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Of a dense run.")
_RESULTS = flags.DEFINE_string("results", None, "A CSV file.")
_SYNC_FACTORS = flags.DEFINE_list("sync_factors", "0.75,0.5,0.25,0", "p of every sublayer.")
_FILES = flags.DEFINE_string("files", None, "Text; default: the run's own.")
_CALIBRATION_TOKENS = flags.DEFINE_integer("calibration_tokens", 16_384, "To fit on.")
_HELD_OUT_TOKENS = flags.DEFINE_integer("held_out_tokens", 20_480, "To measure the loss on.")
_PLOT = flags.DEFINE_string("plot", None, "A picture of the results.")

DOCUMENTATION = {
    "vim": "/usr/share/vim/vim*/doc/*.txt",
    "git": "/usr/share/doc/git/RelNotes/*.txt",
    "cmake": "/usr/share/cmake-*/Help/*/*.rst",
    "perl": "/usr/share/perl/*/**/*.pod",
    "python": f"{sysconfig.get_paths()['purelib']}/*.dist-info/METADATA",
}
_BYTES = range(3_000, 20_001)  # of a document: enough for a sequence, no kind by one file alone
_OF_A_KIND = 64

# (the steps taken, the basis): of each, the loss.
WAYS = {
    "cut": (None, False),
    "channels": (converting.CHANNELS, False),
    "channels, fitted": (converting.CHANNELS, True),
    "rotation": (converting.ROTATION, False),
    "rotation, fitted": (converting.ROTATION, True),
}


class Row(NamedTuple):
    """One measured loss, and that of the dense model on the same text."""

    sync_factor: float
    way: str
    loss: float  # nats a token
    dense_loss: float
    calibration_tokens: int
    held_out_tokens: int


def main() -> None:
    if _LINK_TEXTS.value:
        link_texts(Path(_LINK_TEXTS.value))
    if _WORKDIR.value:
        measure(Path(_WORKDIR.value), Path(_RESULTS.value))
    if _PLOT.value:
        draw(read(Path(_RESULTS.value)), Path(_PLOT.value))


def link_texts(folder: Path) -> None:
    """Links to documents, named so that their order has nothing to do with their kind."""
    folder.mkdir(parents=True)
    for kind, pattern in DOCUMENTATION.items():
        paths = map(Path, sorted(glob.glob(pattern, recursive=True)))
        named = {_digest(path): path for path in paths if path.stat().st_size in _BYTES}
        for digest in sorted(named)[:_OF_A_KIND]:
            (folder / f"{digest}_{kind}.txt").symlink_to(named[digest])


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()


def measure(workdir: Path, results: Path) -> None:
    """Adds the rows that are missing."""
    step, config = checkpoints.newest_config(workdir)
    config = dataclasses.replace(config, mesh=resolve_mesh(config, len(jax.devices())))
    if _FILES.value:
        data = dataclasses.replace(config.data, files=_FILES.value)
        config = dataclasses.replace(config, data=data)
    model = restore_model(workdir, step, config)
    texts = open_texts(
        config.data,
        model.tokenizer,
        calibration_tokens=_CALIBRATION_TOKENS.value,
        held_out_tokens=_HELD_OUT_TOKENS.value,
        batch_tokens=4096,
        parts=config.mesh.data,
        prepare=True,
    )
    rows = read(results)
    bases = {}
    dense_loss, tokens = converting.loss(config, model.mesh, model.parameters, texts.held_out)
    for factor, way in itertools.product(map(float, _SYNC_FACTORS.value), WAYS):
        if (factor, way) in {(row.sync_factor, row.way) for row in rows}:
            continue
        loss = _loss(model, config.with_sync_factor(factor), texts, *WAYS[way], bases)
        rows.append(Row(factor, way, loss, dense_loss, texts.tokens, tokens))
        print(f"p={factor} {way}: {loss:.4f} ({loss - dense_loss:+.4f})", flush=True)
        write(rows, results)


def _loss(model, target, texts, new_basis, fitted, bases) -> float:
    """Of the model with the target's factors, in another basis, fitted."""
    parameters = jax.tree.map(np.array, model.parameters)
    if new_basis == converting.ROTATION:
        target = dataclasses.replace(
            target, model=dataclasses.replace(target.model, tied_head=False)
        )
    if new_basis:
        with tempfile.TemporaryDirectory() as folder:
            progress = Progress(Path(folder) / "output", {})
            if new_basis in bases:
                progress.save("basis", bases[new_basis])
            basis.fold_norms(parameters)
            converting.change_basis(
                parameters, model.config, model.mesh, texts, progress, new_basis
            )
            bases[new_basis] = progress.load("basis")
            if fitted:
                converting.fit(parameters, model.config, target, model.mesh, texts, progress)
    return converting.loss(target, model.mesh, parameters, texts.held_out)[0]


def read(path: Path) -> list[Row]:
    """The rows of a results file; none where there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        return [
            Row(*(kind(row[name]) for name, kind in Row.__annotations__.items()))
            for row in csv.DictReader(file)
        ]


def write(rows: list[Row], path: Path) -> None:
    """Replaces a results file."""
    lines = [",".join(Row._fields)]
    for row in rows:
        values = (f'"{value}"' if isinstance(value, str) else repr(value) for value in row)
        lines.append(",".join(values))
    files.write(path, "\n".join([*lines, ""]))


@figures.style()
def draw(rows: list[Row], output: Path) -> None:
    """Loss above the dense model's against p, a line for each way."""
    figure = figures.new(7, 4.5)
    panel = figure.subplots()
    for number, way in enumerate(WAYS):
        points = sorted(
            (row.sync_factor, row.loss - row.dense_loss) for row in rows if row.way == way
        )
        panel.plot(*zip(*points, strict=True), label=way, **figures.line(number))
    panel.set_yscale("log")
    panel.set_title("Loss above the dense model's, without training")
    panel.set_xlabel("p: synchronised fraction of the channels")
    panel.set_ylabel("nats a token")
    panel.legend()
    figures.save(figure, output)


if __name__ == "__main__":
    command_line.run(main)
