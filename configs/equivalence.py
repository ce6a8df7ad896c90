"""Does partial synchronisation cost quality?  A study with a verdict for every p.

    python -m caat_jax.sweep --config=configs/equivalence.py --workdir=runs/equivalence --jobs=2

12 pairs of runs for each p, which share their initial parameters and batches.  p = 0 is the
positive control: a study that cannot tell it from p = 1 can tell nothing.  The model and text of
`configs/sweep.py` with S = 8 for a third of its steps; a run's loss is the mean of its last two
evaluations on the whole validation split.  The learning rate is the one of three that suits p = 1
best (`configs/equivalence_widths.py`), found with other seeds.
"""

from configs import sweep


def get_config():
    config = sweep.get_config()
    run = config.run
    run.data.holdout_every = 80  # 645 validation sequences: evaluating costs less than training
    run.optimizer.peak_learning_rate = 1.5e-3
    run.optimizer.warmup_steps = 40
    run.train.steps = 400
    run.train.eval_every = 80
    run.train.eval_sequences = -1
    run.train.checkpoint_every = 200
    config.grid.model.sync_factor = (1.0, 0.5, 0.25, 0.0)
    config.grid.model.tp_shards = (8,)
    config.grid.seed = tuple(range(12, 24))
    config.margin = 0.01
    config.looks = 3
    config.late_evaluations = 2
    return config
