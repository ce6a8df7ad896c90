"""What a compiled program communicates, and what p < 1 saves: read from the program itself.

    python -m caat_jax.communication --config=configs/llama_7b.py --topology=v5p:4x4x4

Compiles the training step that `train.py` runs, ahead of time and without allocating anything, for
a TPU pod that need not be there (--topology) or for the devices of this machine, and lists every
collective operation in it; then compiles it again with everything synchronised (p = 1), and
compares.  --json prints the same for programs.
"""

import collections
import dataclasses
import itertools
import json
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from caat_jax import chips, command_line, hlo_collectives, sharding, topology
from caat_jax import config as config_lib
from caat_jax.collectives import PLACES, Collective, place
from caat_jax.config import Config
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.errors import InputError
from caat_jax.metrics import model_flops_per_token
from caat_jax.train_step import Programs

PROGRAMS = ("train",)


@dataclasses.dataclass(frozen=True)
class Audit:
    """What one compiled program communicates and needs; bytes and FLOPs of one device."""

    collectives: tuple[Collective, ...]  # equal ones once, in the order of the program
    not_understood: tuple[str, ...]
    memory_bytes: dict[str, int]  # by kind; "peak" is the most that is needed at once
    compile_seconds: float

    def wire_bytes(self, axis: str | None = None, places: tuple[str, ...] = PLACES) -> float:
        """Bytes that each device sends in one run, over a mesh axis (None: all), at these places.

        An operation over several axes together counts for each of them.
        """
        return sum(
            c.times * c.wire_bytes
            for c in self.collectives
            if (axis is None or axis in c.axes) and c.place in places
        )


def audit(programs: Programs) -> Audit:
    """Compiles the training step and reads it."""
    start = time.perf_counter()
    compiled = programs.compile_train_step()
    seconds = time.perf_counter() - start
    reading = hlo_collectives.read(compiled.as_text())
    problems = list(reading.not_understood)
    found = []
    for operation in reading.collectives:
        axes = mesh_axes(operation, programs.mesh)
        if not axes:
            problems.append(
                f"{operation.kind} over devices that are no mesh axis: {operation.groups[0]}, …"
            )
        found.append(
            Collective(
                operation.kind,
                axes,
                max(len(group) for group in operation.groups),
                place(operation.name, operation.kind, axes),
                operation.arrays,
                operation.times,
                operation.asynchronous,
                operation.between,
            )
        )
    return Audit(_merged(found), tuple(problems), _memory(compiled), seconds)


def mesh_axes(operation: hlo_collectives.CompiledCollective, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that an operation runs over; empty where its groups are those of none."""
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    wide = [axis for axis, size in mesh.shape.items() if size > 1]
    for count in range(1, len(wide) + 1):
        for axes in itertools.combinations(wide, count):
            positions = [mesh.axis_names.index(axis) for axis in axes]
            groups = np.moveaxis(places, positions, range(-count, 0))
            groups = groups.reshape(-1, np.prod([mesh.shape[axis] for axis in axes]))
            members = {frozenset(group) for group in groups.tolist()}
            if operation.kind == "collective-permute":
                if all(any(m.issuperset(pair) for m in members) for pair in operation.groups):
                    return axes
            elif members == {frozenset(group) for group in operation.groups}:
                return axes
    return ()


def _merged(found: list[Collective]) -> tuple[Collective, ...]:
    """Equal operations as one that runs so much more often."""
    times = collections.Counter()
    for collective in found:
        times[dataclasses.replace(collective, times=0)] += collective.times
    return tuple(dataclasses.replace(c, times=n) for c, n in times.items())


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    sizes = compiled.memory_analysis()
    kinds = {
        "arguments": sizes.argument_size_in_bytes,
        "results outside of them": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
    }
    return kinds | {"together": sum(kinds.values())}


def fully_synchronised(config: Config) -> Config:
    """The same configuration at p = 1 in every sublayer."""
    factors = ((1.0, 1.0),) * config.model.layers
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, sync_factors=factors)
    )


def programs_on(config: Config, topology_name: str, slices: int) -> Programs:
    """The programs of a configuration on a TPU topology, or on this machine's devices ("").

    Raises:
      InputError: the topology is unknown or cannot be compiled for, or the mesh does not fit it.
    """
    if topology_name:
        devices = topology.tpu_devices(topology_name, slices)
    else:
        command_line.simulate_devices(config.mesh)
        devices = jax.devices()
    if config.model.vocab_size == -1:
        config = config.with_vocabulary(load_tokenizer(config.data.tokenizer).size)
    mesh_config = config_lib.resolve_mesh(config, len(devices))
    return Programs(config, sharding.create_mesh(mesh_config, devices))


def describe(programs: Programs, audits: dict[str, Audit]) -> str:
    """The report, for a terminal: `audits` by the name of their p, the first one in full."""
    name, first = next(iter(audits.items()))
    return "\n\n".join(
        [
            _heading(programs),
            _operations_table(name, first),
            _totals_table(audits),
            _needs(programs, audits),
            *(
                f"NOT UNDERSTOOD in the program at {name}:\n"
                + "\n".join(f"  {problem}" for problem in found.not_understood)
                for name, found in audits.items()
                if found.not_understood
            ),
        ]
    )


def _heading(programs: Programs) -> str:
    config, mesh = programs.config, programs.mesh
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"{programs.blueprint.size / 1e6:,.1f} M parameters, S = {config.model.tp_shards};"
        f" one training step on {mesh.size} {mesh.devices.flat[0].device_kind} devices: {axes}\n"
        f"{config.train.global_batch:,} sequences of {config.data.sequence_length:,} tokens,"
        f" {config.train.accumulation_steps} after the other"
        f" ({config.compute.dtype}{', layers rematerialised' * config.compute.remat})"
    )


def _operations_table(name: str, found: Audit) -> str:
    rows = [["axes", "place", "operation", "of", "runs", "MB sent", "meanwhile"]]
    order = {where: i for i, where in enumerate(PLACES)}
    for c in sorted(found.collectives, key=lambda c: (c.axes, order[c.place])):
        rows.append(
            [
                "+".join(c.axes) or "?",
                c.place,
                c.kind,
                _arrays(c),
                f"{c.times:,}",
                _megabytes(c.times * c.wire_bytes),
                _meanwhile(c),
            ]
        )
    return f"Every collective at {name}; MB of one device and step, by the ring algorithm\n" + (
        _table(rows, right=(4, 5))
    )


def _totals_table(audits: dict[str, Audit]) -> str:
    names = list(audits)
    rows = [["axis", "place", *(f"MB at {name}" for name in names), "ratio"][: 3 + len(names)]]
    axes = dict.fromkeys(a for found in audits.values() for c in found.collectives for a in c.axes)
    for axis in (a for a in sharding.MESH_AXES if a in axes):
        for label, places in [*((where, (where,)) for where in PLACES), ("all", PLACES)]:
            sent = [found.wire_bytes(axis, places) for found in audits.values()]
            if any(sent):
                rows.append([axis, label, *map(_megabytes, sent), _ratio(*sent)])
    rows = [row[: 2 + len(names) + (len(names) > 1)] for row in rows]
    return "Sent by one device in one step\n" + _table(rows, right=range(2, len(rows[0])))


def _needs(programs: Programs, audits: dict[str, Audit]) -> str:
    config, mesh = programs.config, programs.mesh
    tokens = config.train.global_batch * config.data.sequence_length
    flops = model_flops_per_token(config.model, config.data.sequence_length) * tokens / mesh.size
    kind = mesh.devices.flat[0].device_kind
    chip = chips.by_device_kind(kind)
    lines = [f"Model FLOPs of one device and step: {flops:.3e}"]
    for name, found in audits.items():
        memory = ", ".join(
            f"{what} {size / 2**30:.2f}" for what, size in found.memory_bytes.items()
        )
        share = (
            f" ({found.memory_bytes['together'] / chip.memory_bytes:.0%} of {kind})" if chip else ""
        )
        lines.append(f"Memory at {name}, GiB a device: {memory}{share}")
    seconds = ", ".join(f"{found.compile_seconds:.0f} s at {n}" for n, found in audits.items())
    return "\n".join([*lines, f"Compiled in {seconds}"])


def _table(rows: list[list[str]], right: Any) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _arrays(collective: Collective) -> str:
    (dtype, shape), *others = collective.arrays
    short = dtype.replace("bfloat", "bf").replace("float", "f").replace("int", "i")
    return f"{short}{list(shape)}".replace(" ", "") + (f" +{len(others)}" if others else "")


def _meanwhile(collective: Collective) -> str:
    if not collective.asynchronous:
        return "waits"
    products = collective.between.count("matrix product")
    others = len(collective.between) - products
    return f"{products} products, {others} others"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size >= 50_000 else f"{size / 1e6:.1g}"


def _ratio(size: float, other: float = 0.0) -> str:
    return f"{size / other:.4g}" if other else ""


def main(config: Config) -> None:
    if _PROGRAM.value not in PROGRAMS:
        raise InputError(
            f"--program={_PROGRAM.value} is no program; there are: {', '.join(PROGRAMS)}"
        )
    if _SLICES.value != 1 and not _TOPOLOGY.value:
        raise InputError(f"--slices={_SLICES.value} needs --topology")
    variants = {f"p = {config.model.describe_sync_factors()}": config}
    variants.setdefault("p = 1.0", fully_synchronised(config))
    audits = {}
    for name, variant in variants.items():
        programs = programs_on(variant, _TOPOLOGY.value, _SLICES.value)
        print(f"compiling at {name} for {programs.mesh.size} devices", file=sys.stderr)
        audits[name] = audit(programs)
    if _JSON.value:
        print(json.dumps(_to_json(programs, audits), indent=1))
    else:
        print(describe(programs, audits))


def _to_json(programs: Programs, audits: dict[str, Audit]) -> dict[str, Any]:
    return {
        "mesh": dict(programs.mesh.shape),
        "device_kind": programs.mesh.devices.flat[0].device_kind,
        "programs": {
            name: dataclasses.asdict(found)
            | {
                "collectives": [
                    dataclasses.asdict(c)
                    | {"payload_bytes": c.payload_bytes, "wire_bytes": c.wire_bytes}
                    for c in found.collectives
                ]
            }
            for name, found in audits.items()
        },
    }


if __name__ == "__main__":
    _CONFIG = command_line.config_flag()
    _PROGRAM = flags.DEFINE_string("program", "train", f"One of: {', '.join(PROGRAMS)}.")
    _TOPOLOGY = flags.DEFINE_string(
        "topology", "", f"A TPU pod, such as {topology.EXAMPLES}; empty: this machine's devices."
    )
    _SLICES = flags.DEFINE_integer("slices", 1, "How many such pods, `data` spanning them.")
    _JSON = flags.DEFINE_boolean("json", False, "Print everything as JSON.")
    command_line.run(main, _CONFIG)
