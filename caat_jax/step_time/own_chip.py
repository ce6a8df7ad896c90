"""Flags for a chip that is not in the table: its figures, all of them or none."""

import math

from absl import flags

from caat_jax.devices import chips
from caat_jax.devices.chips import Chip, Link
from caat_jax.errors import InputError

_HELP = {
    "flops": "Own chip: FLOP/s in the configuration's type.",
    "memory_rate": "Own chip: memory bytes/s.",
    "link_bandwidth": "Own chip: bytes/s that a device sends, whatever the mesh axis.",
    "link_latency": "Own chip: seconds a hop.",
}


def define_flags() -> None:
    """Defines --flops, --memory_rate, --link_bandwidth and --link_latency."""
    for name, text in _HELP.items():
        flags.DEFINE_float(name, None, text)


def from_flags(devices: int) -> Chip | None:
    """The chip of the flags' numbers, in a machine of so many; None where there are none.

    Raises:
      InputError: some are given and some are missing, or one is impossible.
    """
    figures = {name: flags.FLAGS[name].value for name in _HELP}
    missing = [f"--{name}" for name, value in figures.items() if value is None]
    if len(missing) == len(figures):
        return None
    if missing:
        raise InputError(f"a chip of your own also needs {', '.join(missing)}")
    for name, value in figures.items():
        if not (math.isfinite(value) and (value > 0 or (value == 0 and name == "link_latency"))):
            raise InputError(f"--{name}={value:g} must be a finite number above 0")
    return of(**figures, devices=devices)


def of(
    flops: float, memory_rate: float, link_bandwidth: float, link_latency: float, devices: int
) -> Chip:
    """A chip with these figures, so many of which are joined by one kind of link."""
    link = Link(link_bandwidth, link_latency)
    return Chip(
        name="own",
        description="the figures of the command line, one kind of link",
        flops=flops,
        memory_bytes=math.inf,
        memory_rate=memory_rate,
        domain=devices,
        link=link,
        network=link,
        sources=dict.fromkeys(chips.FIGURES, "the command line"),
    )


def flag_names() -> str:
    """For a message: every flag, in one line."""
    return ", ".join(f"--{name}" for name in _HELP)
