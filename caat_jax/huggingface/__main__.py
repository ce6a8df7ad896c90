"""Imports a Llama from Hugging Face's format, and exports to it.

    python -m caat_jax.huggingface import SRC_DIR WORKDIR [--tp_shards=8] [--sync_factor=1.0]
    python -m caat_jax.huggingface export WORKDIR DST_DIR [--dtype=float32]

docs/huggingface.md says what is mapped to what.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from caat_jax import command_line
from caat_jax.config import user_paths
from caat_jax.config.sections import Config
from caat_jax.config.stored import to_json
from caat_jax.errors import InputError
from caat_jax.huggingface import exporting, folders, importing, llama_config
from configs import base


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the arguments say; returns the exit code."""
    command_line.quieten_logs()
    try:
        given = _parse(arguments)
        if given.command == "import":
            _import(given)
        else:
            _export(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return InputError.exit_code
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for all other bad input, instead of the usage and a line."""
        raise InputError(f"{message} (--help explains)")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m caat_jax.huggingface", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", allow_abbrev=False)
    importer.add_argument("source", help="a folder: config.json, *.safetensors")
    importer.add_argument("workdir", help="a folder that is new or empty")
    importer.add_argument("--tp_shards", type=int, default=8, help="S (default: 8)")
    importer.add_argument("--sync_factor", type=float, default=1.0, help="p (default: 1)")
    exporter = commands.add_parser("export", allow_abbrev=False)
    exporter.add_argument("workdir", help="the --workdir of a run")
    exporter.add_argument("destination", help="a folder that is new or empty")
    exporter.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    return parser.parse_args(arguments)


def _import(given: argparse.Namespace) -> None:
    source = user_paths.expanded("source", given.source)
    workdir = user_paths.expanded("workdir", given.workdir)
    imported = importing.import_llama(
        source, workdir, tp_shards=given.tp_shards, sync_factor=given.sync_factor
    )
    config = imported.config
    arch = config.model
    print(
        f"Imported {source} into {workdir} as step 0:"
        f" {imported.parameters / 1e6:,.1f} M parameters from {', '.join(imported.dtypes)};"
        f" S={arch.tp_shards}, p={arch.describe_sync_factors()}"
    )
    if not llama_config.is_dense(arch):
        print(
            f"At p={arch.describe_sync_factors()} these weights are not the function that they are"
            " in the source: a CAAT-Net that begins with a dense model's weights, to be trained on"
        )
    if config.data.tokenizer == base.get_config().data.tokenizer:
        print(f"There is no {' or '.join(folders.TOKENIZERS)}: give --config.data.tokenizer")
    print(shlex.join(["python", "eval.py", f"--workdir={workdir}"]))
    train = ["python", "train.py", "--config=configs/base.py", f"--workdir={workdir}"]
    print(shlex.join([*train, *_flags(config)]))


def _flags(config: Config) -> list[str]:
    """What train.py must be told, since it compares the architecture."""
    fields = to_json(config)
    fields["model"]["sync_factor"] = fields["model"].pop("sync_factors")[0][0]
    usual = base.get_config()
    return [
        f"--config.{section}.{name}={fields[section][name]}"
        for section in ("model", "data")
        for name in usual[section]
        if name in fields[section] and fields[section][name] != usual[section][name]
    ]


def _export(given: argparse.Namespace) -> None:
    workdir = user_paths.expanded("workdir", given.workdir)
    destination = user_paths.expanded("destination", given.destination)
    jax.config.update("jax_platforms", "cpu")  # copying needs no accelerator, nor takes one
    exported = exporting.export(workdir, destination, dtype=given.dtype)
    arch = exported.config.model
    remote = "" if llama_config.is_dense(arch) else ", trust_remote_code=True"
    print(
        f"Exported step {exported.step} of {workdir} to {destination} in {given.dtype};"
        f" S={arch.tp_shards}, p={arch.describe_sync_factors()}"
    )
    print(f'AutoModelForCausalLM.from_pretrained("{destination}"{remote})')


if __name__ == "__main__":
    sys.exit(main())
