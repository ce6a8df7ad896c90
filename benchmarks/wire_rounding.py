"""What rounding on the wire does to a trained model, each direction on its own.

    python -m benchmarks.wire_rounding --workdir=runs/sweep/runs/sync_factor_0.5-tp_shards_4-seed_0

Without any further training, and so without its chances: for every type of the forward wire the
rise of the validation loss, and for every type of the backward wire how far the gradient of one
batch is from that with float32, as a fraction of its length.  "Another batch" is how far the
gradient of another batch is: what an optimizer has to live with anyway.  Wires are emulated on one
device (`compute.emulate_wires`).  Takes some three minutes for a model of `configs/sweep.py`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import PartitionSpec as P

from caat_jax import command_line
from caat_jax.checkpoints import checkpoints
from caat_jax.checkpoints.trained import TrainedModel, restore_model, tokenizer_of
from caat_jax.config.resolve import BACKWARD_WIRE_DTYPES
from caat_jax.config.sections import MeshConfig
from caat_jax.data.loader import validation_batches
from caat_jax.data.token_cache import open_cache, stored_data
from caat_jax.training.step import Programs
from caat_jax.training.validation import validation_loss

WORKDIR = flags.DEFINE_string("workdir", None, "Of a finished run.", required=True)
SEQUENCES = flags.DEFINE_integer("sequences", 512, "Validation sequences for the loss.", 1)


def main() -> None:
    workdir = Path(WORKDIR.value)
    step, stored = checkpoints.newest_config(workdir)
    config = dataclasses.replace(
        stored,
        compute=dataclasses.replace(stored.compute, emulate_wires=True),
        mesh=MeshConfig(data=1, fsdp=1, model=1, simulated_devices=0),
        train=dataclasses.replace(stored.train, eval_sequences=SEQUENCES.value),
    )
    data, prepare = stored_data(config.data, None)
    sequences = open_cache(data, tokenizer_of(config, workdir), prepare).validation
    model = restore_model(workdir, step, config, jax.devices()[:1])
    first, second, *_ = validation_batches(
        sequences,
        batch=config.train.global_batch,
        limit=2 * config.train.global_batch,
        sharding=_programs(model, "float32", "float32").batch_sharding,
    )
    exact_loss = validation_loss(
        _programs(model, "float32", "float32"), model.parameters, sequences
    )
    exact = _gradient(model, "float32")(model.parameters, first)
    print(f"loss with float32: {exact_loss:.4f}")
    print(f"{'':14}{'forward: loss':>16}{'backward: gradient':>20}")
    for wire in BACKWARD_WIRE_DTYPES[1:]:
        rise = ""
        if wire != "float8_e5m2":
            programs = _programs(model, wire, "float32")
            rise = f"{validation_loss(programs, model.parameters, sequences) - exact_loss:+.5f}"
        away = _distance(_gradient(model, wire)(model.parameters, first), exact)
        print(f"{wire:14}{rise:>16}{away:>20.4f}", flush=True)
    away = _distance(_gradient(model, "float32")(model.parameters, second), exact)
    print(f"{'another batch':14}{'':16}{away:>20.4f}")


def _programs(model: TrainedModel, forward: str, backward: str) -> Programs:
    compute = dataclasses.replace(
        model.config.compute, forward_wire_dtype=forward, backward_wire_dtype=backward
    )
    return Programs(dataclasses.replace(model.config, compute=compute), model.mesh)


def _gradient(model: TrainedModel, backward: str) -> Callable[[Any, jax.Array], Any]:
    programs = _programs(model, "float32", backward)
    return jax.jit(
        lambda parameters, batch: programs._shard_map(
            programs._loss_and_gradients, out_specs=(P(), programs.blueprint.specs)
        )(parameters, batch)[1]
    )


def _distance(gradient: Any, exact: Any) -> float:
    """|gradient − exact| / |exact|, of all parameters together."""

    def square(tree: Any) -> float:
        return sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree))

    return (square(jax.tree.map(jnp.subtract, gradient, exact)) / square(exact)) ** 0.5


if __name__ == "__main__":
    command_line.run(main)
