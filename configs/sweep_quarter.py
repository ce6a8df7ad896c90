"""A quarter of the communication, spread evenly or by sensitivity, from the start or after p = 1.

    python -m caat_jax.sweep --config=configs/sweep_quarter.py --workdir=runs/quarter --jobs=2

12 runs like those of `configs/sweep_half.py`, with the factors of `--budget=0.25`.
"""

from ml_collections import ConfigDict

from configs import sweep_half

BY_SENSITIVITY = ((0.0, 0.75), (0.5, 0.0), (0.5, 0.0), (0.0, 0.25))


def get_config():
    config = sweep_half.get_config()
    config.run.model.sync_factor = 0.25
    steps = config.run.train.steps
    config.grid = ConfigDict(
        dict(
            train=dict(sync_schedule=((), ((steps // 2, 1.0),))),
            model=dict(sync_factor_per_layer=(sweep_half.EVENLY, BY_SENSITIVITY)),
            seed=(0, 1, 2),
        )
    )
    config.compared = "model.sync_factor_per_layer"
    return config
