"""What a compiled program communicates, and what p < 1 saves: read from the program itself.

    python -m caat_jax.communication --config=configs/llama_7b.py --topology=v5p:4x4x4

Compiles the training step that `train.py` runs, ahead of time and without allocating anything, for
a TPU pod that need not be there (--topology) or for the devices of this machine, and lists every
collective operation in it; then compiles it again with everything synchronised (p = 1), and
compares.  --json prints the same for programs.  docs/communication.md explains the columns.
"""

import json
import sys

import jax
from absl import flags

from caat_jax import command_line, communication_audit, communication_report, sharding, topology
from caat_jax.config import Config, resolve_mesh
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.errors import InputError
from caat_jax.train_step import Programs

PROGRAMS = ("train",)

_CONFIG = command_line.config_flag()
_PROGRAM = flags.DEFINE_string("program", "train", f"What to compile: {', '.join(PROGRAMS)}.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", f"A TPU pod, such as {topology.EXAMPLES}; empty: this machine's devices."
)
_SLICES = flags.DEFINE_integer("slices", 1, "How many such pods, `data` spanning them.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of the tables.")


def main(config: Config) -> None:
    if _PROGRAM.value not in PROGRAMS:
        raise InputError(f"--program={_PROGRAM.value} is not one of: {', '.join(PROGRAMS)}")
    if _SLICES.value != 1 and not _TOPOLOGY.value:
        raise InputError(f"--slices={_SLICES.value} needs a --topology")
    if _TOPOLOGY.value:
        jax.config.update("jax_platforms", "cpu")  # compiling must not take a TPU that is there
        devices = topology.tpu_devices(_TOPOLOGY.value, _SLICES.value)
    else:
        command_line.simulate_devices(config.mesh)
        devices = jax.devices()
    if config.model.vocab_size == -1:
        config = config.with_vocabulary(load_tokenizer(config.data.tokenizer).size)
    mesh = sharding.create_mesh(resolve_mesh(config, len(devices)), devices)
    variants = {f"p = {config.model.describe_sync_factors()}": config}
    variants.setdefault("p = 1.0", config.with_sync_factor(1.0))
    audits = {}
    for name, variant in variants.items():
        print(f"compiling at {name} for {mesh.size} devices", file=sys.stderr)
        audits[name] = _audit(Programs(variant, mesh))
    if _JSON.value:
        print(json.dumps(communication_report.to_json(config, mesh, audits), indent=1))
    else:
        print(communication_report.tables(config, mesh, audits))


def _audit(programs: Programs) -> communication_audit.Audit:
    try:
        return communication_audit.audit(programs)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise InputError(
            f"the training step does not fit: {reason} More train.accumulation_steps,"
            " compute.remat=True or a larger mesh.fsdp take less"
        ) from None


if __name__ == "__main__":
    command_line.run(main, _CONFIG)
