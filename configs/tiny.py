"""A 3.5 M-parameter CAAT-Net on bytes of Python source, trained by `make train`.

    python train.py --config=configs/tiny.py --workdir=runs/tiny

S = 8 shards on 8 simulated CPU devices, p = 0.5.  Needs two cores, 2 GB of memory and no download:
the text is the standard library of the Python that runs it.  Takes three to six minutes, and ends
with a validation loss below 2.0 nats per byte.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.sync_factor = 0.5
    config.compute.scan_layers = False
    config.mesh.simulated_devices = 8
    config.optimizer.peak_learning_rate = 3e-3
    config.optimizer.final_learning_rate = 3e-4
    config.train.steps = 200
    config.train.eval_every = 50
    config.train.checkpoint_every = 100
    return config
