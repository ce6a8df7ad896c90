"""An audit of a program's communication as tables, and as JSON.

Each function takes the audits by what the tables shall call them, the one of interest first.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from jax.sharding import Mesh

from caat_jax.communication import exposure
from caat_jax.communication.audit import Audit
from caat_jax.communication.collectives import LAYER_LOOP, PLACES, Collective
from caat_jax.config.sections import Config
from caat_jax.devices import chips, sharding
from caat_jax.devices.chips import Chip
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
    chip = _chip(mesh)
    parts = [
        _heading(config, mesh, workload),
        _operations(name, first),
        *([_times(name, first, mesh, chip)] if chip else []),
        _totals(audits, mesh, chip),
        _needs(mesh, audits, workload, chip),
    ]
    for name, found in audits.items():
        if found.unrecognised:
            lines = "\n".join(f"  {problem}" for problem in found.unrecognised)
            parts.append(f"UNRECOGNISED in the program at {name}:\n{lines}")
    return "\n\n".join(parts)


def to_json(mesh: Mesh, audits: dict[str, Audit], workload: Workload) -> dict[str, Any]:
    """Bytes, FLOPs and seconds of one device; those of an operation are of one run.

    Seconds are there for chips of the table.
    """
    chip = _chip(mesh)
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
                    | (_seconds(c, mesh, chip) if chip else {})
                    for c in found.collectives
                ]
            }
            for name, found in audits.items()
        },
    }


def _seconds(collective: Collective, mesh: Mesh, chip: Chip) -> dict[str, float]:
    time = exposure.of_one(collective, chip, mesh.shape)
    return {"transfer_seconds": time.transfer, "exposed_seconds": time.exposed}


def _heading(config: Config, mesh: Mesh, workload: Workload) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"One {workload.name} on {mesh.size} {mesh.devices.flat[0].device_kind} devices: {axes}\n"
        f"S = {config.model.tp_shards}; {workload.size}"
    )


def _operations(name: str, found: Audit) -> str:
    rows = [("axes", "place", "operation", "array", "runs", "MB sent", "overlapped by")]
    for c in _ordered(found):
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


def _times(name: str, found: Audit, mesh: Mesh, chip: Chip) -> str:
    rows = [("axes", "place", "runs", "ms each", "GFLOP beside", "ms", "exposed", "of it")]
    for c in _ordered(found):
        each = exposure.of_one(c, chip, mesh.shape)
        rows.append(
            (
                "+".join(c.axes),
                c.place,
                f"{c.times:,}",
                _milliseconds(each.transfer),
                f"{c.overlapped_flops / 1e9:,.0f}" if c.overlapped_flops else "",
                _milliseconds(c.times * each.transfer),
                _milliseconds(c.times * each.exposed),
                f"{each.exposed / each.transfer:.0%}",
            )
        )
    return (
        f"Their time at {name} by the figures of {chip.name}, in ms a step, and what of it is"
        " exposed: longer\nthan the products and attention between start and end take at the peak"
        f" rate\n{_table(rows, right=range(2, len(rows[0])))}"
    )


def _totals(audits: dict[str, Audit], mesh: Mesh, chip: Chip | None) -> str:
    names = list(audits)
    rows = [("axis", "place", *(f"MB at {name}" for name in names), *["ratio"] * (len(names) > 1))]
    used = {axis for found in audits.values() for c in found.collectives for axis in c.axes}
    for axis in (axis for axis in sharding.MESH_AXES if axis in used):
        for label, places in [*((place, (place,)) for place in PLACES), ("all", PLACES)]:
            sent = [found.wire_bytes(axis, places) for found in audits.values()]
            if any(sent):
                rows.append((axis, label, *_side_by_side(sent)))
        if chip:
            rows += _exposed_rows(axis, audits, mesh, chip)
    return "Sent by one device in one step, MB; exposed, ms of ms\n" + _table(
        rows, right=range(2, len(rows[0]))
    )


def _exposed_rows(
    axis: str, audits: dict[str, Audit], mesh: Mesh, chip: Chip
) -> list[tuple[str, ...]]:
    """Of all transfers over an axis, and of those in the layers."""
    rows = []
    for label, places in (("exposed: layers", LAYER_LOOP), ("exposed: all", PLACES)):
        times = [
            exposure.of_all(found.over(axis, places), chip, mesh.shape) for found in audits.values()
        ]
        if any(time.transfer for time in times):
            cells = [
                f"{_milliseconds(time.exposed)} of {_milliseconds(time.transfer)}" for time in times
            ]
            first, last = times[0].exposed, times[-1].exposed
            ratio = [f"{first / last:.4g}" if last else ""] if len(times) > 1 else []
            rows.append((axis, label, *cells, *ratio))
    return rows


def _needs(mesh: Mesh, audits: dict[str, Audit], workload: Workload, chip: Chip | None) -> str:
    kinds = list(next(iter(audits.values())).memory_bytes)
    rows = [("one device", *audits)]
    for kind in kinds:
        sizes = [found.memory_bytes[kind] / 2**30 for found in audits.values()]
        rows.append((f"memory, GiB: {kind}", *(f"{size:.2f}" for size in sizes)))
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


def _ordered(found: Audit) -> list[Collective]:
    return sorted(found.collectives, key=lambda c: (c.axes, PLACES.index(c.place)))


def _chip(mesh: Mesh) -> Chip | None:
    """What the mesh is made of, where it is in the table of chips."""
    return chips.by_device_kind(mesh.devices.flat[0].device_kind)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.3g}"


def _side_by_side(sizes: list[float]) -> list[str]:
    """Megabytes of each, and the ratio of the first to the last where there are several."""
    ratio = f"{sizes[0] / sizes[-1]:.4g}" if sizes[-1] else ""
    return [*map(_megabytes, sizes), *[ratio] * (len(sizes) > 1)]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size >= 50_000 else f"{size / 1e6:.1g}"
