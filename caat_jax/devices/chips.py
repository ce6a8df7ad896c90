"""What accelerators and the links between them can do at best, with the source of each figure.

Bandwidths are bytes/s that one device SENDS while all of its group do, counted as
`Collective.wire_bytes` counts them.  A figure for which nothing published was found has a source
that begins with "assumption".
"""

import dataclasses
import difflib
from collections.abc import Mapping

from caat_jax.errors import InputError

ASSUMPTION = "assumption"

# Every figure of a chip, as `Chip.sources` names it.
FIGURES = (
    "flops",
    "memory_bytes",
    "memory_rate",
    "domain",
    "link.bandwidth",
    "link.latency",
    "network.bandwidth",
    "network.latency",
)


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the devices of one mesh axis."""

    bandwidth: float  # bytes/s that a device sends; on a torus in one direction of one axis
    latency: float  # seconds a hop
    # Torus: a group whose size is a multiple of this closes to a ring, and half of the data goes
    # each way round.  0: no torus.
    closes_at: int = 0
    # Full mesh: `bandwidth` is shared evenly by the wires to so many peers.  0: no full mesh.
    peers: int = 0

    def send_rate(self, group_size: int) -> float:
        """Bytes/s that each of `group_size` devices sends in a collective operation."""
        if self.closes_at and group_size % self.closes_at == 0:
            return 2 * self.bandwidth
        if self.peers:
            return self.bandwidth * min(group_size - 1, self.peers) / self.peers
        return self.bandwidth

    def hops(self, group_size: int) -> int:
        """Hops one after the other until every device of a group has heard of every other."""
        return 1 if self.peers else group_size - 1


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device, in the machine it is sold in.

    The first `domain` devices that lie next to each other in the mesh (`model` is its innermost
    axis) are joined by `link`; a group that reaches further uses `network` for all of its traffic.
    """

    name: str
    description: str
    flops: float  # dense bfloat16 FLOP/s
    memory_bytes: float
    memory_rate: float  # bytes/s
    domain: int
    link: Link
    network: Link
    sources: Mapping[str, str]  # of each of FIGURES
    device_kinds: tuple[str, ...] = ()  # names that `jax.Device.device_kind` gives it

    def link_over(self, span: int) -> Link:
        """What joins a group whose first and last device are `span` - 1 apart in the mesh."""
        return self.link if span <= self.domain else self.network

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Those of FIGURES for which nothing published was found."""
        return tuple(name for name in FIGURES if self.sources[name].startswith(ASSUMPTION))


def chip(name: str) -> Chip:
    """The chip of that name.

    Raises:
      InputError: there is none; the message has those there are, and the nearest.
    """
    for known in CHIPS:
        if known.name == name:
            return known
    names = [known.name for known in CHIPS]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise InputError(
        f"--chip={name} is not in the table; the nearest is {nearest}; there are {', '.join(names)}"
    )


def by_device_kind(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names so, or None where it is not in the table."""
    return next((known for known in CHIPS if device_kind in known.device_kinds), None)


_BOOK = "https://jax-ml.github.io/scaling-book"
_ICI_BANDWIDTH = f"{_BOOK}/tpus, table of ICI bandwidths, one way"
_ICI_LATENCY = f"{_BOOK}/sharding, a note on ICI latency: about 1 µs a hop"
_NO_DCN_LATENCY = f"{ASSUMPTION}: 10 µs; nothing published was found"

_NCCL = "https://github.com/NVIDIA/nccl, src/graph/tuning.cc, hwLat of rings"
_NVLINK_LATENCY = f"{_NCCL}: NVLink, LL128"
_NETWORK_LATENCY = f"{_NCCL}: network, LL128"
_NVLINK_BANDWIDTH = "https://github.com/NVIDIA/nccl-tests/issues/212: 370 of the line's 450 GB/s"
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture white paper, without sparsity"
_H100 = "https://www.nvidia.com/en-us/data-center/h100"
_H200 = "https://www.nvidia.com/en-us/data-center/h200"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_DGX = (
    "https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-"
    "enterprise-ai/latest/core-components.html"
)
_DGX_NETWORK = f"{_DGX}: one 400 Gb/s port a GPU"
_GAUDI = "Intel Gaudi 3 AI Accelerator, Hot Chips 2024"
_GAUDI_PORTS = (
    "https://docs.habana.ai/en/latest/Management_and_Monitoring/Network_Configuration/index.html"
)
_ROCE_LATENCY = f"{ASSUMPTION}: as NCCL's network; nothing published was found"

_NVLINK = Link(bandwidth=370e9, latency=1.9e-6)
_INFINIBAND = Link(bandwidth=50e9, latency=4.0e-6)


def _tpu(
    version: str,
    description: str,
    *,
    flops: float,
    memory_bytes: float,
    memory_rate: float,
    domain: int,
    ici: float,
    closes_at: int,
    network: float,
    network_source: str,
    device_kinds: tuple[str, ...],
) -> Chip:
    """A TPU: all axes of a mesh lie on the torus of a slice, one ring on one axis of the torus."""
    documentation = f"https://cloud.google.com/tpu/docs/{version}"
    return Chip(
        name=version,
        description=description,
        flops=flops,
        memory_bytes=memory_bytes,
        memory_rate=memory_rate,
        domain=domain,
        link=Link(bandwidth=ici, latency=1e-6, closes_at=closes_at),
        network=Link(bandwidth=network, latency=10e-6),
        sources={
            "flops": documentation,
            "memory_bytes": documentation,
            "memory_rate": documentation,
            "domain": f"{documentation}: chips of the largest slice",
            "link.bandwidth": _ICI_BANDWIDTH,
            "link.latency": _ICI_LATENCY,
            "network.bandwidth": f"{documentation}: {network_source}",
            "network.latency": _NO_DCN_LATENCY,
        },
        device_kinds=device_kinds,
    )


_H100_NVLINK = Chip(
    name="h100-nvlink",
    description="H100 SXM, 8 a host on NVLink; hosts on 400 Gb/s InfiniBand a GPU",
    flops=989.4e12,
    memory_bytes=80e9,
    memory_rate=3.35e12,
    domain=8,
    link=_NVLINK,
    network=_INFINIBAND,
    sources={
        "flops": _HOPPER,
        "memory_bytes": _H100,
        "memory_rate": _H100,
        "domain": _DGX,
        "link.bandwidth": _NVLINK_BANDWIDTH,
        "link.latency": _NVLINK_LATENCY,
        "network.bandwidth": _DGX_NETWORK,
        "network.latency": _NETWORK_LATENCY,
    },
    device_kinds=("NVIDIA H100 80GB HBM3",),
)


def _a100(gigabytes: int, memory_rate: float) -> Chip:
    return Chip(
        name=f"a100-{gigabytes}gb",
        description=f"A100 SXM {gigabytes} GB, 8 a host on NVLink; hosts on 200 Gb/s InfiniBand",
        flops=312e12,
        memory_bytes=gigabytes * 1e9,
        memory_rate=memory_rate,
        domain=8,
        link=Link(bandwidth=235e9, latency=1.9e-6),
        network=Link(bandwidth=25e9, latency=4.0e-6),
        sources={
            "flops": _A100,
            "memory_bytes": _A100,
            "memory_rate": _A100,
            "domain": "NVIDIA DGX A100 data sheet",
            "link.bandwidth": "https://github.com/NVIDIA/nccl, src/graph/tuning.cc of 2.8: 235"
            " of the line's 300 GB/s",
            "link.latency": _NVLINK_LATENCY,
            "network.bandwidth": "NVIDIA DGX A100 data sheet: one 200 Gb/s port a GPU",
            "network.latency": _NETWORK_LATENCY,
        },
        device_kinds=(f"NVIDIA A100-SXM4-{gigabytes}GB",),
    )


CHIPS = (
    _tpu(
        "v5e",
        "TPU v5e, 2-D torus; an axis closes at 16",
        flops=197e12,
        memory_bytes=16e9,
        memory_rate=819e9,
        domain=256,
        ici=45e9,
        closes_at=16,
        network=3.125e9,
        network_source="6.4 Tb/s a pod of 256",
        device_kinds=("TPU v5 lite", "TPU v5e"),
    ),
    _tpu(
        "v5p",
        "TPU v5p, 3-D torus; an axis closes at 4",
        flops=459e12,
        memory_bytes=95 * 2**30,
        memory_rate=2765e9,
        domain=6144,
        ici=90e9,
        closes_at=4,
        network=6.25e9,
        network_source="50 Gb/s a chip",
        device_kinds=("TPU v5", "TPU v5p"),
    ),
    _tpu(
        "v6e",
        "TPU v6e, 2-D torus; an axis closes at 16",
        flops=918e12,
        memory_bytes=32e9,
        memory_rate=1640e9,
        domain=256,
        ici=90e9,
        closes_at=16,
        network=12.5e9,
        network_source="25.6 Tb/s a pod of 256",
        device_kinds=("TPU v6 lite", "TPU v6e"),
    ),
    _H100_NVLINK,
    Chip(
        name="h100-pcie",
        description="H100 PCIe, 8 a host on PCIe 5.0 x16 without NVLink bridges",
        flops=756e12,
        memory_bytes=80e9,
        memory_rate=2.0e12,
        domain=8,
        link=Link(bandwidth=64e9, latency=5.7e-6),
        network=Link(bandwidth=50e9, latency=14.0e-6),
        sources={
            "flops": _HOPPER,
            "memory_bytes": _H100,
            "memory_rate": _H100,
            "domain": f"{ASSUMPTION}: 8 cards a host",
            "link.bandwidth": f"{_H100}: the line rate, half of 128 GB/s both ways",
            "link.latency": f"{_NCCL}: PCI, Simple",
            "network.bandwidth": f"{ASSUMPTION}: one 400 Gb/s port a GPU, as in a DGX",
            "network.latency": f"{_NCCL}: network, Simple",
        },
        device_kinds=("NVIDIA H100 PCIe",),
    ),
    dataclasses.replace(
        _H100_NVLINK,
        name="h100-infiniband",
        description="H100 SXM, every group across hosts: 400 Gb/s InfiniBand a GPU, no NVLink",
        domain=1,
        link=_INFINIBAND,
        sources=dict(_H100_NVLINK.sources)
        | {
            "domain": f"{ASSUMPTION}: each group has one GPU a host",
            "link.bandwidth": _DGX_NETWORK,
            "link.latency": _NETWORK_LATENCY,
        },
        device_kinds=(),
    ),
    Chip(
        name="gaudi3",
        description="Gaudi 3, 8 a host, each joined to each by 3 of 21 ports of 200 Gb/s",
        flops=1835e12,
        memory_bytes=128e9,
        memory_rate=3.67e12,
        domain=8,
        link=Link(bandwidth=525e9, latency=4.0e-6, peers=7),
        network=Link(bandwidth=75e9, latency=4.0e-6),
        sources={
            "flops": _GAUDI,
            "memory_bytes": _GAUDI,
            "memory_rate": _GAUDI,
            "domain": _GAUDI_PORTS,
            "link.bandwidth": f"{_GAUDI_PORTS}: the line rate",
            "link.latency": _ROCE_LATENCY,
            "network.bandwidth": f"{_GAUDI_PORTS}: 3 ports of 200 Gb/s, the line rate",
            "network.latency": _ROCE_LATENCY,
        },
    ),
    _tpu(
        "v4",
        "TPU v4, 3-D torus; an axis closes at 4",
        flops=275e12,
        memory_bytes=32 * 2**30,
        memory_rate=1200e9,
        domain=4096,
        ici=45e9,
        closes_at=4,
        network=6.25e9,
        network_source=f"4 chips a host; {_BOOK}/tpus: 25 GB/s a host",
        device_kinds=("TPU v4",),
    ),
    _a100(40, 1.555e12),
    _a100(80, 2.039e12),
    dataclasses.replace(
        _H100_NVLINK,
        name="h200",
        description="H200 SXM, links as the H100's",
        memory_bytes=141e9,
        memory_rate=4.8e12,
        sources=dict(_H100_NVLINK.sources) | {"memory_bytes": _H200, "memory_rate": _H200},
        device_kinds=("NVIDIA H200",),
    ),
)
