"""Prints the validation loss of a run's newest checkpoint.

python eval.py --workdir=runs/tiny
"""

from pathlib import Path

from absl import flags

from caat_jax import checkpoint, command_line, evaluation

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder that train.py wrote.", required=True)


def main() -> None:
    workdir = Path(_WORKDIR.value).expanduser()
    step, config = checkpoint.newest_config(workdir)
    command_line.simulate_devices(config.mesh)
    loss = evaluation.evaluate_checkpoint(workdir, step, config)
    print(f"step {step}: validation loss {loss!r} nats per token")


if __name__ == "__main__":
    command_line.run(main)
