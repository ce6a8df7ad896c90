"""Half of the communication: dropped from the start or later, evenly or by sensitivity.

    python -m caat_jax.sweep --config=configs/sweep_half.py --workdir=runs/half --jobs=2

18 runs of the model of `configs/sweep.py` with S = 8.  They synchronise all channels throughout,
half of them from the start, or half of them from the middle on (continued training from the p = 1
checkpoint there).  The half is spread evenly or by sensitivity, that is, with the factors that
`python -m caat_jax.sensitivity --budget=0.5` found for the run of `configs/sweep.py` with p = 1,
S = 8 and seed 0.
"""

from ml_collections import ConfigDict

from configs import sweep

EVENLY = ()
BY_SENSITIVITY = ((0.5, 1.0), (0.75, 0.0), (0.75, 0.0), (0.5, 0.5))


def get_config():
    config = sweep.get_config()
    config.run.model.sync_factor = 0.5
    steps = config.run.train.steps
    config.grid = ConfigDict(
        dict(
            train=dict(sync_schedule=(((steps, 1.0),), ((steps // 2, 1.0),), ())),
            model=dict(sync_factor_per_layer=(EVENLY, BY_SENSITIVITY)),
            seed=(0, 1, 2),
        )
    )
    config.compared = "train.sync_schedule"
    return config
