"""Predicts the step time of a configuration on chips that need not be there.

    python -m caat_jax.step_time --config=configs/llama_7b.py --devices=64 --chip=v5p \\
        --chip=h100-nvlink [--p=1 --p=0.5] [--efficiency=0.6] [--output=step_time.png] [--json]

--topology=v5p:4x4x4 compiles the step for such a pod, and takes from its schedule which transfers
are hidden.  A chip of one's own: --flops=… --memory_rate=… --link_bandwidth=… --link_latency=….
The formulae, the chips' figures with their sources, and what is left out: docs/step_time_model.md.
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import dataclasses
import json
import sys
from collections.abc import Sequence

import jax
from absl import flags

from caat_jax import command_line
from caat_jax.communication.audit import audit
from caat_jax.config import user_paths
from caat_jax.config.resolve import resolve_mesh
from caat_jax.config.sections import Config
from caat_jax.devices import chips, sharding, topology
from caat_jax.devices.chips import Chip
from caat_jax.errors import InputError
from caat_jax.figures import COLOURS
from caat_jax.step_time import model, own_chip, report
from caat_jax.step_time.model import Prediction, Workload
from caat_jax.training.step import Programs

_CONFIG = command_line.config_flag()
_DEVICES = flags.DEFINE_integer("devices", None, "How many chips.", required=True)
_CHIP = flags.DEFINE_multi_string("chip", [], "A chip of the table; may be repeated.")
_TOPOLOGY = flags.DEFINE_multi_string(
    "topology", [], f"Predict from the step compiled for it, such as {topology.EXAMPLES}."
)
_P = flags.DEFINE_multi_float(
    "p", [1.0, 0.5, 0.25], "A synchronisation factor of every sublayer; 1 is always there."
)
_EFFICIENCY = flags.DEFINE_float(
    "efficiency", 1.0, "The share of its peak FLOP/s that a chip reaches in matrix products."
)
_OUTPUT = flags.DEFINE_string("output", "step_time.png", "PNG to write; empty: none.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of the table.")
own_chip.define_flags()


def main(config: Config) -> None:
    jax.config.update("jax_platforms", "cpu")  # tracing needs no accelerator
    own = own_chip.from_flags(_DEVICES.value)
    chosen = [chips.by_name(name) for name in dict.fromkeys(_CHIP.value)] + [own] * (
        own is not None
    )
    configs = configurations(config, _DEVICES.value, _P.value)
    check(configs[0], chosen, _TOPOLOGY.value, _EFFICIENCY.value)
    works = [model.workload(each) for each in configs]
    predictions = [
        [model.predict(work, chip, _EFFICIENCY.value) for work in works] for chip in chosen
    ]
    predictions += [compiled(name, works, _EFFICIENCY.value) for name in _TOPOLOGY.value]
    output = _OUTPUT.value and user_paths.expanded("--output", _OUTPUT.value)
    if output:
        report.plot(predictions, output)
    if _JSON.value:
        print(json.dumps(report.to_json(predictions, _EFFICIENCY.value), indent=2))
    else:
        print(report.table(predictions, _EFFICIENCY.value))
        if output:
            print(f"\nPlotted: {output.resolve()}")


def configurations(config: Config, devices: int, factors: Sequence[float]) -> list[Config]:
    """One configuration for every p, p = 1 first; last its own, where it differs by sublayer.

    Raises:
      InputError: a factor outside [0, 1], no vocabulary, devices that the mesh cannot use.
    """
    for p in factors:
        if not 0 <= p <= 1:
            raise InputError(f"--p={p:g} is outside [0, 1]")
    if devices < 1:
        raise InputError(f"--devices={devices} must be at least 1")
    if config.model.vocab_size == -1:
        raise InputError(
            "model.vocab_size=-1 is the tokeniser's, which is not read here; give it, such as"
            " --config.model.vocab_size=32000"
        )
    config = dataclasses.replace(config, mesh=resolve_mesh(config, devices))
    ordered = sorted({1.0, *factors}, reverse=True)
    chosen = [config.with_sync_factor(p) for p in ordered]
    differing = len({p for pair in config.model.sync_factors for p in pair}) > 1
    return chosen + [config] * differing


def compiled(name: str, works: Sequence[Workload], efficiency: float) -> list[Prediction]:
    """Predictions for a topology, from the schedules of the steps compiled for it.

    Raises:
      InputError: there is no such topology, of --devices devices, or no figures for its chip.
    """
    devices = topology.devices(name)
    if len(devices) != works[0].devices:
        raise InputError(f"--topology={name} has {len(devices)} devices, not {works[0].devices}")
    chip = chips.by_device_kind(devices[0].device_kind)
    if chip is None:
        raise InputError(
            f"--topology={name}: {devices[0].device_kind} is not in the table of chips"
        )
    chip = dataclasses.replace(
        chip, name=f"{chip.name} (compiled)", description=f"{chip.description}; schedule of {name}"
    )
    rows = []
    for work in works:
        print(
            f"compiling at p = {work.config.model.describe_sync_factors()} for {name}",
            file=sys.stderr,
        )
        mesh = sharding.create_mesh(work.config.mesh, devices)
        rows.append(model.predict(work, chip, efficiency, audit(Programs(work.config, mesh))))
    return rows


def check(
    config: Config, chosen: Sequence[Chip], topologies: Sequence[str], efficiency: float
) -> None:
    """Refuses what the model can say nothing about.

    Raises:
      InputError: no chip or too many, an impossible efficiency, a type without figures.
    """
    names = ", ".join(known.name for known in chips.CHIPS)
    rows = len(chosen) + len(topologies)
    if not rows:
        raise InputError(
            f"--chip is missing; there are {names}; or give a --topology, or all of"
            f" {own_chip.flag_names()}"
        )
    if rows > len(COLOURS):
        raise InputError(f"{rows} chips; more than {len(COLOURS)} cannot be told apart")
    if not 0 < efficiency <= 1:
        raise InputError(f"--efficiency={efficiency:g} is outside (0, 1]")
    if config.compute.dtype != "bfloat16" and (
        topologies or any(known in chips.CHIPS for known in chosen)
    ):
        raise InputError(
            f"compute.dtype={config.compute.dtype}, but the table has FLOP/s of bfloat16 only; give"
            " --config.compute.dtype=bfloat16, or a chip of your own with --flops"
        )


if __name__ == "__main__":
    command_line.run(main, _CONFIG)
