"""What a compiled program communicates, and what p < 1 saves: read from the program itself.

    python -m caat_jax.communication --config=configs/llama_7b.py --topology=v5p:4x4x4

Compiles a program, ahead of time and without allocating anything, for a TPU pod or for GPUs that
need not be there (--topology), or for the devices of this machine.  Lists every collective
operation in it, how long it takes on the chip's links, and what of that no computation hides; then
compiles the program again with everything synchronised (p = 1), and compares.  --program=train is
the step that `train.py` runs; prefill and decode are those of `generate.py`, decode being one token
of --batch sequences whose cache has --length slots.  --json prints it as JSON.
docs/communication.md explains the columns.
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import json
import sys

import jax
from absl import flags
from jax.sharding import Mesh

from caat_jax import activity, command_line
from caat_jax.communication import audit, report
from caat_jax.config.resolve import resolve_mesh
from caat_jax.config.sections import Config
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.devices import memory, sharding, topology
from caat_jax.errors import InputError
from caat_jax.inference.programs import InferencePrograms
from caat_jax.training.step import Programs

_MANY_PARAMETERS = 100_000_000

PROGRAMS = ("train", "prefill", "decode")

_CONFIG = command_line.config_flag()
_PROGRAM = flags.DEFINE_string("program", "train", f"What to compile: {', '.join(PROGRAMS)}.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", f"A TPU pod or GPUs: {topology.EXAMPLES}; empty: this machine's devices."
)
_SLICES = flags.DEFINE_integer("slices", 1, "How many such pods, `data` spanning them.")
_BATCH = flags.DEFINE_integer(
    "batch", None, "Sequences in prefill and decode; by default one for each part of the data axes."
)
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of a prompt, or slots of the cache; by default data.sequence_length."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of the tables.")


def main(config: Config) -> None:
    if _PROGRAM.value not in PROGRAMS:
        raise InputError(f"--program={_PROGRAM.value} is not one of: {', '.join(PROGRAMS)}")
    if _PROGRAM.value == "train":
        for flag in (_BATCH, _LENGTH):
            if flag.value is not None:
                raise InputError(f"--{flag.name}={flag.value} needs --program=prefill or decode")
    if _SLICES.value != 1 and not _TOPOLOGY.value:
        raise InputError(f"--slices={_SLICES.value} needs a --topology")
    if _TOPOLOGY.value:
        jax.config.update("jax_platforms", "cpu")  # compiling must not take a device that is there
        devices = topology.devices(_TOPOLOGY.value, _SLICES.value)
    else:
        command_line.simulate_devices(config.mesh)
        devices = jax.devices()
    if config.model.vocab_size == -1:
        config = config.with_vocabulary(load_tokenizer(config.data.tokenizer).size)
    mesh = sharding.create_mesh(resolve_mesh(config, len(devices)), devices)
    variants = {f"p = {config.model.describe_sync_factors()}": config}
    variants.setdefault("p = 1.0", config.with_sync_factor(1.0))
    batch, length = (None, None) if _PROGRAM.value == "train" else _sizes(config, mesh)
    audits = {}
    for name, variant in variants.items():
        print(f"compiling at {name} for {mesh.size} devices{_how_long(config)}", file=sys.stderr)
        with activity.shown("compiling"):
            audits[name] = _audit(variant, mesh, batch, length)
    workload = {
        "train": lambda: report.training(config),
        "prefill": lambda: report.prefill(config, batch, length),
        "decode": lambda: report.decode(config, batch, length),
    }[_PROGRAM.value]()
    if _JSON.value:
        print(json.dumps(report.to_json(mesh, audits, workload), indent=1))
    else:
        print(report.tables(config, mesh, audits, workload))


def _how_long(config: Config) -> str:
    """A warning where compiling for this machine is slow: it has few CPUs for large arrays."""
    parameters = memory.parameter_count(config.model)
    if _TOPOLOGY.value or jax.default_backend() != "cpu" or parameters < _MANY_PARAMETERS:
        return ""
    return (
        f" of this machine, which with {parameters / 1e6:,.0f} M parameters may take an hour;"
        " --topology=v5p:4x4x4 compiles for a TPU pod in about a minute"
    )


def _sizes(config: Config, mesh: Mesh) -> tuple[int, int]:
    """--batch and --length, or their defaults."""
    ways = sharding.data_parallel_size(mesh)
    batch = ways if _BATCH.value is None else _BATCH.value
    length = config.data.sequence_length if _LENGTH.value is None else _LENGTH.value
    if batch < 1 or batch % ways:
        raise InputError(f"--batch={batch} must be a multiple of mesh.data x mesh.fsdp = {ways}")
    if length < 1:
        raise InputError(f"--length={length} must be at least 1")
    return batch, length


def _audit(config: Config, mesh: Mesh, batch: int | None, length: int | None) -> audit.Audit:
    traces = {
        "train": lambda mesh: Programs(config, mesh).trace_train_step(),
        "prefill": lambda mesh: InferencePrograms(config, mesh).trace_prefill(batch, length),
        "decode": lambda mesh: InferencePrograms(config, mesh).trace_decode(batch, length),
    }
    return audit.audit_program(traces[_PROGRAM.value], mesh)


if __name__ == "__main__":
    command_line.run(main, _CONFIG)
