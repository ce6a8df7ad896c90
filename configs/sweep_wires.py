"""What wires of few bits cost: 27 runs at p = 0.5, each type forward with each type backward.

    python -m caat_jax.sweep --config=configs/sweep_wires.py --workdir=runs/wires --jobs=2

The model of `configs/sweep.py` with S = 4, at the start of training: 0.1 M tokens.  All shards of a
run are on one device, which rounds what each of them would send.
"""

from ml_collections import ConfigDict

from configs import sweep

TYPES = ("float32", "int8", "float8_e4m3fn")


def get_config():
    config = sweep.get_config()
    run = config.run
    run.model.tp_shards = 4
    run.model.sync_factor = 0.5
    run.compute.emulate_wires = True
    run.compute.scan_layers = True
    run.optimizer.warmup_steps = 25
    run.train.steps = 200
    run.train.global_batch = 4
    run.train.eval_every = 200
    run.train.eval_sequences = 128
    run.train.checkpoint_every = 200
    config.grid = ConfigDict(
        dict(
            compute=dict(forward_wire_dtype=TYPES, backward_wire_dtype=TYPES),
            seed=(0, 1, 2),
        )
    )
    config.compared = "compute.backward_wire_dtype"
    return config
