"""A quarter, a half and three quarters of the synchronisations skipped: 12 runs from scratch.

    python -m caat_jax.sweep --config=configs/sweep_skips.py --workdir=runs/skips --jobs=2

Runs of the model of `configs/sweep.py` with S = 8, in which 0, 2, 4 and 6 of the eight sublayers
send nothing and the others everything: those whose cut to 0 costs least by docs/sensitivity.md, in
the run of `configs/sweep.py` with p = 1, S = 8 and seed 0.
"""

from ml_collections import ConfigDict

from configs import sweep

NONE = ()  # p = 1
QUARTER = ((1.0, 1.0), (1.0, 0.0), (1.0, 0.0), (1.0, 1.0))
HALF = ((0.0, 1.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0))
THREE_QUARTERS = ((0.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 0.0))


def get_config():
    config = sweep.get_config()
    config.run.model.sync_factor = 1.0
    config.run.model.tp_shards = 8
    config.grid = ConfigDict(
        dict(
            model=dict(sync_factor_per_layer=(NONE, QUARTER, HALF, THREE_QUARTERS)),
            seed=(0, 1, 2),
        )
    )
    config.compared = "model.sync_factor_per_layer"
    return config
