"""p = 1 against p = 0.5 at 25 M parameters on one accelerator: four pairs, S = 8.

    python -m caat_jax.sweep --config=configs/equivalence_25m.py --workdir=runs/equivalence_25m

The text is the source of Python's standard library as bytes.  A GPU of 2023 takes about a minute a
run, by the FLOPs; it has been run at small sizes on a CPU only.
"""

from configs import equivalence


def get_config():
    config = equivalence.get_config()
    run = config.run
    run.model.layers = 8
    run.model.embed_dim = 512
    run.model.mlp_dim = 1376
    run.compute.dtype = "bfloat16"
    run.compute.scan_layers = True
    run.data.sequence_length = 512
    run.optimizer.peak_learning_rate = 1e-3
    run.optimizer.final_learning_rate = 1e-4
    run.optimizer.warmup_steps = 100
    run.train.steps = 2000
    run.train.eval_every = 400
    run.train.global_batch = 32
    run.train.checkpoint_every = 1000
    config.grid.model.sync_factor = (1.0, 0.5)
    config.grid.seed = (0, 1, 2, 3)
    config.looks = 1
    return config
