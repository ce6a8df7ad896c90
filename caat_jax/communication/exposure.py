"""How long a transfer takes on a chip's links, and how much of that nothing hides.

Hidden is the time, at the chip's peak rate, of the matrix products and attention kernels that the
compiler has scheduled between a transfer's start and its end; the rest is exposed.  A product
beside several transfers over the same links counts for each of them in equal parts.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from caat_jax.communication.collectives import Collective
from caat_jax.devices import sharding
from caat_jax.devices.chips import Chip, Link


@dataclasses.dataclass(frozen=True)
class Exposure:
    """Seconds."""

    transfer: float
    hidden: float

    @property
    def exposed(self) -> float:
        return self.transfer - self.hidden


def of_one(
    collective: Collective, chip: Chip, mesh: Mapping[str, int], efficiency: float = 1.0
) -> Exposure:
    """One execution.

    Args:
      collective: of a compiled program; of a traced one, which has no schedule, nothing is hidden.
      chip: whose figures to take.
      mesh: the size of each axis.
      efficiency: the share of the peak FLOP/s that matrix products reach.
    """
    transfer = transfer_seconds(collective, chip.link_over(span(collective.axes, mesh)))
    return Exposure(
        transfer, min(transfer, collective.overlapped_flops / (chip.flops * efficiency))
    )


def of_all(collectives: Iterable[Collective], chip: Chip, mesh: Mapping[str, int]) -> Exposure:
    """All executions of these collectives, in one run of the program."""
    each = [(c.times, of_one(c, chip, mesh)) for c in collectives]
    return Exposure(sum(n * e.transfer for n, e in each), sum(n * e.hidden for n, e in each))


def transfer_seconds(collective: Collective, link: Link) -> float:
    """One execution alone: hops · latency + bytes each device sends / bandwidth.

    In an all-to-all over n devices of a torus each also passes on what others send through it: half
    of everything crosses the middle, together n/4 of one device's array on each link.
    """
    hops = 1 if collective.kind == "collective-permute" else link.hops(collective.group_size)
    rounds = 2 if collective.kind == "all-reduce" else 1
    sent = collective.wire_bytes
    if collective.kind == "all-to-all" and link.closes_at:
        sent = collective.payload_bytes * collective.group_size / 4
    return rounds * hops * link.latency + sent / link.send_rate(collective.group_size)


def span(axes: tuple[str, ...], mesh: Mapping[str, int]) -> int:
    """How far apart in the mesh the devices of one group lie, its ends included, at most.

    Devices are numbered along `sharding.MESH_AXES`, the last axis first: neighbours on `model`
    are neighbours, neighbours on `fsdp` are a whole `model` axis apart.
    """
    outermost = min(sharding.MESH_AXES.index(axis) for axis in axes)
    return math.prod(mesh[axis] for axis in sharding.MESH_AXES[outermost:])
