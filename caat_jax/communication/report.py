"""An audit of a program's communication as tables, and as JSON.

Each function takes the audits by what the tables shall call them, the one of interest first.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from jax.sharding import Mesh

from caat_jax.communication.audit import Audit
from caat_jax.communication.collectives import PLACES, Collective
from caat_jax.config.sections import Config
from caat_jax.devices import chips, sharding
from caat_jax.training.metrics import model_flops_per_token


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one run of a program does."""

    name: str
    size: str
    model_flops: float  # of all devices, see `metrics.model_flops_per_token`


def training(config: Config) -> Workload:
    """One update."""
    train, length = config.train, config.data.sequence_length
    return Workload(
        "training step",
        f"{train.accumulation_steps} times {train.global_batch // train.accumulation_steps:,}"
        f" sequences of {length:,} tokens; {config.compute.dtype}"
        f"{', layers rematerialised' * config.compute.remat}",
        model_flops_per_token(config.model, length) * train.global_batch * length,
    )


def prefill(config: Config, batch: int, length: int) -> Workload:
    """Prompts into a cache, and one new token each."""
    # Forward is a third of training; only the last position of a prompt has logits.
    everywhere = model_flops_per_token(config.model, length) / 3 * length
    head = 2 * config.model.embed_dim * config.model.vocab_size
    return Workload(
        "prefill",
        f"{batch:,} prompts of {length:,} tokens; {config.compute.dtype}",
        batch * (everywhere - head * (length - 1)),
    )


def decode(config: Config, batch: int, length: int) -> Workload:
    """One new token of each sequence."""
    # A new token meets the whole cache, one of a training sequence half of its sequence.
    return Workload(
        "decode step",
        f"1 token for {batch:,} sequences, cache of {length:,} slots; {config.compute.dtype}",
        batch * model_flops_per_token(config.model, 2 * length) / 3,
    )


def tables(config: Config, mesh: Mesh, audits: dict[str, Audit], workload: Workload) -> str:
    """For a terminal: every operation of the first program, then all programs side by side."""
    name, first = next(iter(audits.items()))
    parts = [
        _heading(config, mesh, workload),
        _operations(name, first),
        _totals(audits),
        _needs(mesh, audits, workload),
    ]
    for name, found in audits.items():
        if found.unrecognised:
            lines = "\n".join(f"  {problem}" for problem in found.unrecognised)
            parts.append(f"UNRECOGNISED in the program at {name}:\n{lines}")
    return "\n\n".join(parts)


def to_json(mesh: Mesh, audits: dict[str, Audit], workload: Workload) -> dict[str, Any]:
    """Bytes and FLOPs of one device; the bytes of an operation are those of one run."""
    return {
        "devices": mesh.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "program": workload.name,
        "model_flops": workload.model_flops / mesh.size,
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


def _heading(config: Config, mesh: Mesh, workload: Workload) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"One {workload.name} on {mesh.size} {mesh.devices.flat[0].device_kind} devices: {axes}\n"
        f"S = {config.model.tp_shards}; {workload.size}"
    )


def _operations(name: str, found: Audit) -> str:
    rows = [("axes", "place", "operation", "array", "runs", "MB sent", "overlapped by")]
    for c in sorted(found.collectives, key=lambda c: (c.axes, PLACES.index(c.place))):
        rows.append(
            (
                "+".join(c.axes),
                c.place,
                c.kind,
                _arrays(c),
                f"{c.times:,}",
                _megabytes(c.times * c.wire_bytes),
                _overlapped_by(c),
            )
        )
    return (
        f"Every collective at {name}: MB that one device sends in one step, by the ring algorithm,"
        f" and\nwhat is scheduled between its start and its end\n{_table(rows, right=(4, 5))}"
    )


def _totals(audits: dict[str, Audit]) -> str:
    names = list(audits)
    rows = [("axis", "place", *(f"MB at {name}" for name in names), *["ratio"] * (len(names) > 1))]
    used = {axis for found in audits.values() for c in found.collectives for axis in c.axes}
    for axis in (axis for axis in sharding.MESH_AXES if axis in used):
        for label, places in [*((place, (place,)) for place in PLACES), ("all", PLACES)]:
            sent = [found.wire_bytes(axis, places) for found in audits.values()]
            if any(sent):
                rows.append((axis, label, *_side_by_side(sent)))
        exposed = [found.wire_bytes(axis, exposed_only=True) for found in audits.values()]
        rows.append((axis, "exposed", *_side_by_side(exposed)))
    return (
        "Sent by one device in one step; exposed: no matrix product runs at the same time\n"
        + _table(rows, right=range(2, len(rows[0])))
    )


def _needs(mesh: Mesh, audits: dict[str, Audit], workload: Workload) -> str:
    kinds = list(next(iter(audits.values())).memory_bytes)
    rows = [("one device", *audits)]
    for kind in kinds:
        sizes = [found.memory_bytes[kind] / 2**30 for found in audits.values()]
        rows.append((f"memory, GiB: {kind}", *(f"{size:.2f}" for size in sizes)))
    chip = chips.by_device_kind(mesh.devices.flat[0].device_kind)
    if chip:
        shares = [found.memory_bytes["together"] / chip.memory_bytes for found in audits.values()]
        rows.append(("  of the chip's", *(f"{share:.0%}" for share in shares)))
    model = workload.model_flops / mesh.size
    rows.append(("TFLOP a step: of the model", *[f"{model / 1e12:.4g}"] * len(audits)))
    executed = [found.product_flops / 1e12 for found in audits.values()]
    rows.append(("  products, with recomputation", *(f"{flops:.4g}" for flops in executed)))
    seconds = [found.compile_seconds for found in audits.values()]
    rows.append(("seconds to compile", *(f"{each:.0f}" for each in seconds)))
    return _table(rows, right=range(1, len(rows[0])))


def _table(rows: list[tuple[str, ...]], right: Collection[int]) -> str:
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
    short = dtype.replace("bfloat", "bf").replace("float", "f")
    return f"{short}{list(shape)}".replace(" ", "") + (f" +{len(others)}" if others else "")


def _overlapped_by(collective: Collective) -> str:
    products = collective.between.count("matrix product")
    if products:
        return f"{products} product{'s' * (products > 1)}"
    return "copies and the like" if collective.asynchronous else ""


def _side_by_side(sizes: list[float]) -> list[str]:
    """Megabytes of each, and the ratio of the first to the last where there are several."""
    ratio = f"{sizes[0] / sizes[-1]:.4g}" if sizes[-1] else ""
    return [*map(_megabytes, sizes), *[ratio] * (len(sizes) > 1)]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size >= 50_000 else f"{size / 1e6:.1g}"
