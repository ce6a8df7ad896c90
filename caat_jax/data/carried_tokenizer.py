"""The tokeniser that a workdir carries with it, so that it works wherever it lies."""

import sys
from pathlib import Path

from caat_jax import files
from caat_jax.config import user_paths
from caat_jax.data import token_roles
from caat_jax.data.tokenizers import Tokenizer, load_tokenizer
from caat_jax.devices import processes

FOLDER = "tokenizer"
# Where an import puts a model's files, the tokeniser's among them.
IMPORTED_FOLDER = "huggingface"


def carry(name: str, workdir: Path) -> None:
    """Copies the file that `data.tokenizer` names, and those beside it, into a workdir.

    Where the file is not there (any more), or belongs to the workdir, nothing is done.
    """
    path = user_paths.expanded("data.tokenizer", name)
    if name == "bytes" or not path.is_file() or path.resolve().is_relative_to(workdir.resolve()):
        return
    folder = workdir / FOLDER
    folder.mkdir(exist_ok=True)
    for file in (*token_roles.FILES, path.name):
        if (path.parent / file).is_file():
            files.write(folder / file, (path.parent / file).read_bytes())


def find(name: str, workdir: Path) -> str:
    """`data.tokenizer` of a run, its path replaced by the workdir's own copy where there is one."""
    for folder in (IMPORTED_FOLDER, FOLDER):
        copy = workdir / folder / Path(name).name
        # Training may have replaced the tokeniser of an import.
        if copy.is_file() and (folder == FOLDER or Path(name).parent.name == IMPORTED_FOLDER):
            return str(copy)
    return name


def load(name: str, workdir: Path) -> Tokenizer:
    """The tokeniser of a run; raises as `load_tokenizer` does."""
    path = find(name, workdir)
    return load_tokenizer(path, is_imported=Path(path).parent == workdir / IMPORTED_FOLDER)


def load_for_training(name: str, workdir: Path) -> Tokenizer:
    """As `load`, but what the configuration names now goes before the copy of an earlier run."""
    path = user_paths.expanded("data.tokenizer", name)
    if path.is_file() and path.parent.name != IMPORTED_FOLDER:
        tokenizer = load_tokenizer(name)
    else:
        tokenizer = load(name, workdir)
    if tokenizer.roles.source == token_roles.USUAL_NAMES and processes.is_first():
        bos, eos = tokenizer.token(tokenizer.bos_id), tokenizer.token(tokenizer.eos_id)
        print(f"{name}: BOS is {bos} and EOS {eos}, by their usual names", file=sys.stderr)
    return tokenizer
