"""Trains a model, or goes on training it: the same command again resumes.

python train.py --config=configs/tiny.py --workdir=runs/tiny [--config.section.field=VALUE ...]
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

from absl import flags

from caat_jax import command_line
from caat_jax.config.sections import Config
from caat_jax.devices import processes
from caat_jax.storage import mirrors
from caat_jax.training import loop

_CONFIG = command_line.config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run's checkpoints and metrics lie.", required=True
)
processes.define_flags()


def main(config: Config) -> None:
    workdir = mirrors.folder("--workdir", _WORKDIR.value)
    processes.start()
    command_line.simulate_devices(config.mesh)
    steps, loss = loop.train(config, workdir)
    if processes.is_first():
        print(
            f"{steps} steps done, validation loss {loss:.4f} nats per token; checkpoints,"
            f" metrics.jsonl and TensorBoard events are in {_WORKDIR.value}; next:"
            f" python eval.py --workdir={_WORKDIR.value}"
        )


if __name__ == "__main__":
    command_line.run(main, _CONFIG)
