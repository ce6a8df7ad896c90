"""Does a wire of 8 bits pay in decode?  Predicted times of one token of 7B by sequences and chip.

    python -m benchmarks.wires_in_decode [--output=docs/wires_decode.csv]

p = 0.5 on 8 devices, caches of 1,024 tokens; for bfloat16 and for int8 the microseconds of a token
of all sequences.  Nothing is measured: `caat_jax.step_time` explains the model.  Takes two seconds.
"""

import csv
import dataclasses
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from caat_jax import command_line
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.devices import chips
from caat_jax.step_time import model
from caat_jax.step_time.model import Workload
from configs import llama_7b

OUTPUT = flags.DEFINE_string("output", "wires_decode.csv", "CSV file to write.")

DEVICES = 8
SLOTS = 1024
SEQUENCES = (1, 8, 64, 512)
WIRES = ("bfloat16", "int8")
CHIPS = ("v5e", "v5p", "h100-nvlink", "h100-infiniband", "gaudi3")


def main() -> None:
    works = {(wire, batch): _workload(wire, batch) for wire in WIRES for batch in SEQUENCES}
    columns = ["chip", *(f"{wire}, {batch}" for batch in SEQUENCES for wire in WIRES)]
    rows = [
        [name] + [_microseconds(works[wire, batch], name) for batch in SEQUENCES for wire in WIRES]
        for name in CHIPS
    ]
    print("µs a token; of how many sequences:")
    for name, *cells in [columns, *rows]:
        print(f"{name:16}" + "".join(f"{cell:>15}" for cell in cells))
    with Path(OUTPUT.value).open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def _workload(wire: str, batch: int) -> Workload:
    fields: ConfigDict = llama_7b.get_config()
    fields.compute.forward_wire_dtype = wire
    fields.mesh.fsdp = 1
    fields.train.update(global_batch=batch, accumulation_steps=1)
    fields.data.sequence_length = SLOTS
    config = resolve(fields)
    config = dataclasses.replace(config, mesh=resolve_mesh(config, DEVICES))
    return model.inference_workload(config, "decode")


def _microseconds(work: Workload, chip: str) -> str:
    return f"{1e6 * model.predict(work, chips.by_name(chip)).step(overlap=True):.1f}"


if __name__ == "__main__":
    command_line.run(main)
