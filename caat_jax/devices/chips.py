"""What accelerators and the links between them can do at best, as `chips.toml` lists them.

Bandwidths are bytes/s that one device SENDS while all of its group do, counted as
`Collective.wire_bytes` counts them.  A figure for which nothing published was found has a source
that begins with "assumption".
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caat_jax.errors import InputError

_FILE = Path(__file__).with_name("chips.toml")

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
    sparse_cores: bool = False  # beside its TensorCores: https://openxla.org/xla/sparsecore

    def link_over(self, span: int) -> Link:
        """What joins a group whose first and last device are `span` - 1 apart in the mesh."""
        return self.link if span <= self.domain else self.network

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The FIGURES for which nothing published was found."""
        return tuple(name for name in FIGURES if self.sources[name].startswith("assumption"))


def by_name(name: str) -> Chip:
    """The chip of that name.

    Raises:
      InputError: there is none; the message lists all, and the nearest.
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


def _chip(name: str, table: dict[str, Any]) -> Chip:
    """A chip from its table of `chips.toml`.

    Raises:
      ValueError: a figure is missing, or is not [number above 0, source].
      TypeError: a key is unknown.
    """
    figures = {}
    for path in FIGURES:
        section, _, key = path.rpartition(".")
        figure = (table.get(section, {}) if section else table).pop(key, None)
        match figure:
            case [int() | float() as value, str(source)] if value > 0 and source:
                figures[path] = value, source
            case _:
                raise ValueError(f"{_FILE}: {name}.{path} must be [number above 0, source]")
    values = {path: value for path, (value, _) in figures.items()}

    def link(section: str) -> Link:
        options = table.pop(section)
        return Link(values[f"{section}.bandwidth"], values[f"{section}.latency"], **options)

    return Chip(
        name,
        link=link("link"),
        network=link("network"),
        sources={path: source for path, (_, source) in figures.items()},
        device_kinds=tuple(table.pop("device_kinds", ())),
        **{path: value for path, value in values.items() if "." not in path},
        **table,
    )


CHIPS = tuple(_chip(*item) for item in tomllib.loads(_FILE.read_text(encoding="utf-8")).items())
