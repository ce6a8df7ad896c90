"""Is p = 1 only worse tuned?  The runs of `configs/equivalence.py` at three learning rates.

    python -m caat_jax.sweep --config=configs/equivalence_rates.py \\
        --workdir=runs/equivalence_rates --jobs=2

No margin and no verdict: two seeds for each rate and p.
"""

from configs import equivalence


def get_config():
    config = equivalence.get_config()
    config.grid.model.sync_factor = (1.0, 0.5)
    with config.unlocked():
        config.grid.optimizer = dict(peak_learning_rate=(7.5e-4, 1.5e-3, 3e-3))
    config.grid.seed = (0, 1)
    config.margin = 0.0
    config.looks = 1
    return config
