"""Where p, bits and both pay: predicted step times of 7B by the rate of the links.

    python -m benchmarks.wires_by_rate [--output=docs/wires.png]

H100s, 64 of them, 8 of which hold a model; what joins those 8 is varied, 4 µs a hop.  Nothing is
measured: `caat_jax.step_time` explains the model, in which all gathers and gradient sums that can
overlap do.  Takes half a minute.
"""

import csv
import dataclasses
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from caat_jax import command_line, figures
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.devices import chips
from caat_jax.devices.chips import Link
from caat_jax.step_time import model
from caat_jax.step_time.model import Workload
from configs import llama_7b

OUTPUT = flags.DEFINE_string("output", "wires.png", "PNG to write, and a CSV file beside it.")

DEVICES = 64
GIGABYTES = (3.125, 6.25, 12.5, 25, 50, 100, 200, 400, 800)
BASE = (1.0, "bfloat16")
SYSTEMS = ((0.5, "bfloat16"), (1.0, "int8"), (0.5, "int8"))


def main() -> None:
    works = {system: _workload(*system) for system in (BASE, *SYSTEMS)}
    gains = {
        system: [_step(works[BASE], rate) / _step(works[system], rate) for rate in GIGABYTES]
        for system in SYSTEMS
    }
    print(f"{'GB/s':16}" + "".join(f"{rate:>8g}" for rate in GIGABYTES))
    for system, row in gains.items():
        print(f"{_name(system):16}" + "".join(f"{gain:8.2f}" for gain in row))
    output = Path(OUTPUT.value)
    _plot(gains, output)
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["system", *GIGABYTES])
        writer.writerows([_name(system), *row] for system, row in gains.items())


def _workload(p: float, wire: str) -> Workload:
    fields: ConfigDict = llama_7b.get_config()
    fields.model.sync_factor = p
    fields.compute.update(forward_wire_dtype=wire, backward_wire_dtype=wire)
    config = resolve(fields)
    return model.workload(dataclasses.replace(config, mesh=resolve_mesh(config, DEVICES)))


def _step(work: Workload, gigabytes: float) -> float:
    chip = chips.by_name("h100-nvlink")
    chip = dataclasses.replace(chip, link=Link(bandwidth=1e9 * gigabytes, latency=4e-6))
    return model.predict(work, chip).step(overlap=True)


def _name(system: tuple[float, str]) -> str:
    return f"p = {system[0]:g}, {system[1]}"


@figures.style()
def _plot(gains: dict[tuple[float, str], list[float]], output: Path) -> None:
    figure = figures.new(6.5, 4)
    panel = figure.subplots()
    for number, (system, row) in enumerate(gains.items()):
        panel.plot(GIGABYTES, row, label=_name(system), **figures.line(number))
    panel.axhline(1, color="#999999", linewidth=0.8, zorder=1)
    panel.set_xscale("log", base=2)
    panel.set_xticks(GIGABYTES, [f"{rate:g}" for rate in GIGABYTES])
    panel.set(
        title="Predicted speed-up of a 7B training step on 64 H100",
        xlabel="GB/s that a device sends over model",
        ylabel="times as fast as p = 1 in bfloat16",
    )
    panel.legend(loc="upper right")
    figures.save(figure, output)


if __name__ == "__main__":
    command_line.run(main)
