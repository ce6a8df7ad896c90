"""p = 1 against p = 0.5 at widths of 64, 128 and 256, each at three learning rates.

    for D in 64 128 256; do
        python -m caat_jax.sweep --config=configs/equivalence_widths.py:$D \\
            --workdir=runs/equivalence_widths/$D --jobs=2
    done

The runs of `configs/equivalence.py` with D channels, and learning rates that fall as 1/D: is p = 1
only worse tuned, and does what p = 0.5 costs grow with the width?  No margin and no verdict: two
seeds for each rate and p, more with `--config.grid.seed`.
"""

from configs import equivalence


def get_config(width: str = "128"):
    config = equivalence.get_config()
    run = config.run
    run.model.embed_dim = int(width)
    run.model.mlp_dim = 3 * int(width)
    run.optimizer.warmup_steps = 20
    run.optimizer.final_learning_rate = 3e-4 * 128 / int(width)
    config.grid.model.sync_factor = (1.0, 0.5)
    rates = (7.5e-4, 1.5e-3, 3e-3)
    with config.unlocked():
        config.grid.optimizer = dict(peak_learning_rate=tuple(r * 128 / int(width) for r in rates))
    config.grid.seed = (0, 1)
    config.margin = 0.0
    config.looks = 1
    return config
