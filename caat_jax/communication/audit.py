"""Compiles a program for devices that need not be there, and reads what it communicates."""

import collections
import dataclasses
import re
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from caat_jax.communication import compiled_programs, traced_programs
from caat_jax.communication.collectives import PLACES, Collective, place
from caat_jax.config.sections import MeshConfig
from caat_jax.devices import sharding
from caat_jax.training.step import Programs


@dataclasses.dataclass(frozen=True)
class Audit:
    """What one compiled program communicates and needs; bytes and FLOPs of one device."""

    # Equal ones once, in the order of the program; combined ones in parts, by place.
    collectives: tuple[Collective, ...]
    unrecognised: tuple[str, ...]
    memory_bytes: dict[str, int]  # by kind, and "together"
    product_flops: float  # of the matrix products, those included that are computed again
    compile_seconds: float

    def over(self, axis: str, places: Sequence[str] = PLACES) -> list[Collective]:
        """The collectives over a mesh axis, alone or with others, at these places."""
        return [c for c in self.collectives if axis in c.axes and c.place in places]

    def wire_bytes(self, axis: str, places: Sequence[str] = PLACES) -> float:
        """Bytes that each device sends in one run over a mesh axis, at these places."""
        return sum(c.times * c.wire_bytes for c in self.over(axis, places))


def audit(programs: Programs) -> Audit:
    """Compiles the training step and reads it."""
    return audit_program(
        lambda mesh: Programs(programs.config, mesh).trace_train_step(), programs.mesh
    )


def audit_program(trace: Callable[[Mesh | AbstractMesh], jax.stages.Traced], mesh: Mesh) -> Audit:
    """Compiles any program and reads it.

    Args:
      trace: the program on a mesh, traced from shapes; also on one without devices.
      mesh: what to compile it for.
    """
    start = time.perf_counter()
    compiled = trace(mesh).lower().compile()
    seconds = time.perf_counter() - start
    reading = compiled_programs.read(compiled.as_text())
    found = []
    for operation in reading.collectives:
        axes = mesh_axes(operation, mesh)
        for where, arrays in _parts(operation, axes):
            found.append(
                Collective(
                    operation.kind,
                    axes,
                    max(len(group) for group in operation.groups),
                    where,
                    arrays,
                    operation.times,
                    operation.asynchronous,
                    operation.between,
                    operation.overlapped_flops,
                )
            )
    # Counted in the program as it is traced without devices: with attention as products.
    without_devices = sharding.abstract_mesh(MeshConfig(**mesh.shape, simulated_devices=0))
    flops = traced_programs.count(trace(without_devices).jaxpr).flops
    return Audit(_merged(found), reading.unrecognised, _memory(compiled), flops, seconds)


def _parts(
    operation: compiled_programs.CompiledCollective, axes: tuple[str, ...]
) -> list[tuple[str, tuple]]:
    """The places an operation belongs to, with its arrays there.

    Where XLA combines several operations into one, the name is often "scope/(name:name:name)".
    """
    combined = re.fullmatch(r".*?\((.*:.*)\)", operation.name)
    names = combined[1].split(":") if combined else []
    if len(names) != len(operation.arrays):
        names = [operation.name] * len(operation.arrays)
    parts: dict[str, tuple] = {}
    for name, array in zip(names, operation.arrays, strict=True):
        where = place(name, operation.kind, axes)
        dtype, shape = array
        if where == "optimizer and metrics" and shape and "float" in dtype:
            # Outside of the scopes only scalars are reduced; XLA combines gradients with them.
            where = "gradient reduction"
        parts[where] = (*parts.get(where, ()), array)
    return list(parts.items())


def mesh_axes(operation: compiled_programs.CompiledCollective, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that an operation runs over: along which the devices of a group differ.

    With several TPU slices, groups are numbered within one slice; `data`, the outermost axis,
    spans them.
    """
    differ = set()
    for group in operation.groups:
        positions = np.array(np.unravel_index(group, mesh.devices.shape))
        differ |= set(np.flatnonzero((positions != positions[:, :1]).any(axis=1)))
    return tuple(axis for i, axis in enumerate(mesh.axis_names) if i in differ)


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
