"""Imports a Llama from Hugging Face's format, and exports to it.

    python -m caat_jax.huggingface import SRC_DIR WORKDIR [--tp_shards=8] [--sync_factor=1] [--pad]
    python -m caat_jax.huggingface export WORKDIR DST_DIR [--dtype=float32]

SRC_DIR holds config.json and *.safetensors; what is written must be new or empty.
docs/huggingface.md says what is mapped to what.
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import shlex
from pathlib import Path

import jax
from absl import flags

from caat_jax import command_line
from caat_jax.config import user_paths
from caat_jax.config.architecture import Architecture
from caat_jax.data import carried_tokenizer
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.errors import InputError
from caat_jax.huggingface import config_file, exporting, folders, importing
from caat_jax.storage import mirrors
from configs import base

_TP_SHARDS = flags.DEFINE_integer("tp_shards", 8, "Of an import: S, the tensor-parallel shards.")
_SYNC_FACTOR = flags.DEFINE_float("sync_factor", 1.0, "Of an import: p of every sublayer.")
_PAD = flags.DEFINE_bool(
    "pad", False, "Of an import: add zero heads, MLP columns and ids where S does not divide them."
)
_DTYPE = flags.DEFINE_string("dtype", "float32", "Of an export: float32, bfloat16 or float16.")

_OTHERS_FLAGS = {"import": (_DTYPE,), "export": (_TP_SHARDS, _SYNC_FACTOR, _PAD)}


def main(arguments: list[str]) -> None:
    """Does what the arguments say: a command and two folders."""
    if len(arguments) != 3 or arguments[0] not in _OTHERS_FLAGS:
        given = " ".join(arguments) or "nothing"
        raise InputError(f"{given}: give import SRC_DIR WORKDIR, or export WORKDIR DST_DIR")
    command, source, destination = arguments
    for flag in _OTHERS_FLAGS[command]:
        if flag.present:
            raise InputError(f"--{flag.name} is not a flag of {command}; --help says more")
    destination = user_paths.expanded(command, destination)
    if command == "import":
        _import(user_paths.expanded(command, source), destination)
    else:
        _export(mirrors.folder(command, source), destination)


def _import(source: Path, workdir: Path) -> None:
    imported = importing.import_llama(
        source,
        workdir,
        tp_shards=_TP_SHARDS.value,
        sync_factor=_SYNC_FACTOR.value,
        pad=_PAD.value,
    )
    config = imported.config
    arch = config.model
    print(
        f"Imported {source} into {workdir} as step 0:"
        f" {imported.parameters / 1e6:,.1f} M parameters from {', '.join(imported.dtypes)};"
        f" S={arch.tp_shards}, p={arch.describe_sync_factors()}"
    )
    if sizes := _padded_sizes(imported.real, arch):
        print(f"Padded with zeros, which are computed like any others: {sizes}")
    if imported.unties:
        print(
            "config.json says tie_word_embeddings, but lm_head.weight is stored and differs from"
            " the embedding: it is kept, as transformers does"
        )
    if not arch.is_dense:
        print(
            f"At p={arch.describe_sync_factors()} these weights do not compute what they compute in"
            " the source: this is a CAAT-Net initialised from a dense model, to be trained"
        )
    if config.data.tokenizer == base.get_config().data.tokenizer:
        print(f"There is no {' or '.join(folders.TOKENIZERS)}: give --config.data.tokenizer")
    else:
        print(_roles(carried_tokenizer.load(config.data.tokenizer, workdir)))
    print(shlex.join(["python", "eval.py", f"--workdir={workdir}"]))
    train = ["python", "train.py", f"--config={workdir / config_file.NAME}"]
    print(shlex.join([*train, f"--workdir={workdir}"]))
    print("Both take --config.data.files=PATTERN; training wants its learning rate and steps too")


def _padded_sizes(real: Architecture, padded: Architecture) -> str:
    pairs = {
        name: (getattr(real, name), getattr(padded, name))
        for name in ("heads", "kv_heads", "mlp_dim", "vocab_size")
    }
    return ", ".join(f"{name} {a} → {b}" for name, (a, b) in pairs.items() if a != b)


def _roles(tokenizer: Tokenizer) -> str:
    stops = ", ".join(f"{tokenizer.token(i)} ({i})" for i in tokenizer.roles.stop_ids)
    bos = f"{tokenizer.token(tokenizer.bos_id)} ({tokenizer.bos_id})"
    before = "before each text" if tokenizer.prefix else "which this tokeniser adds nowhere"
    return f"By {tokenizer.roles.source}, BOS is {bos}, {before}, and text ends at {stops}"


def _export(workdir: Path, destination: Path) -> None:
    jax.config.update("jax_platforms", "cpu")  # copying needs no accelerator, nor takes one
    exported = exporting.export(workdir, destination, dtype=_DTYPE.value)
    arch = exported.config.model
    remote = "" if arch.is_dense else ", trust_remote_code=True"
    print(
        f"Exported step {exported.step} of {mirrors.with_urls(str(workdir))} to {destination} in"
        f" {_DTYPE.value};"
        f" S={arch.tp_shards}, p={arch.describe_sync_factors()}"
    )
    if sizes := _padded_sizes(exported.arch, arch):
        print(f"Without the zeros that padded it: {sizes}")
    print(f'AutoModelForCausalLM.from_pretrained("{destination}"{remote})')


if __name__ == "__main__":
    command_line.run(main, positionals=True)
