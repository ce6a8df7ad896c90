"""A small study of what p costs: 30 runs of a 0.9 M-parameter CAAT-Net on bytes of Python source.

    python -m caat_jax.sweep --config=configs/sweep.py --workdir=runs/sweep --jobs=2

All S shards of a run are on one device.  Your own sweep is a file like this one: `run` is any
configuration, `grid` holds the fields that vary, each with a tuple of values.
"""

from ml_collections import ConfigDict

from configs import base


def get_config():
    config = ConfigDict()
    config.run = run = base.get_config()
    run.model.embed_dim = 128
    run.model.mlp_dim = 384
    run.compute.scan_layers = False
    run.data.sequence_length = 128
    run.optimizer.peak_learning_rate = 3e-3
    run.optimizer.final_learning_rate = 3e-4
    run.optimizer.warmup_steps = 50
    run.train.steps = 1200
    run.train.global_batch = 8
    run.train.log_every = 10
    run.train.eval_every = 100
    run.train.eval_sequences = 512
    run.train.checkpoint_every = 600
    config.grid = ConfigDict(
        dict(
            model=dict(sync_factor=(1.0, 0.75, 0.5, 0.25, 0.0), tp_shards=(4, 8)),
            seed=(0, 1, 2),
        )
    )
    # Differences and their confidence intervals over the seeds are relative to this field's first
    # value, with all other fields equal.
    config.compared = "model.sync_factor"
    # Above 0: nats a token that a setting may lose; each then gets a verdict
    # (caat_jax/sweep/protocol.py), and what is asked is written down before the first run.
    config.margin = 0.0
    # How often the results of a study with a margin are looked at, evenly over the seeds.
    config.looks = 1
    # A run's loss is the mean of its last so many evaluations.
    config.late_evaluations = 1
    return config
