"""What a checkpoint costs: the steps while it is saved, its digests, restoring it.

    python -m benchmarks.checkpointing --config=configs/tiny.py [--saves=5]
    python -m benchmarks.checkpointing --config=configs/llama_130m.py --saves=3 \\
        --config.data.sequence_length=256 --config.train.global_batch=8 \\
        --config.train.accumulation_steps=1

Runs the project's training step on random tokens and saves in between, as the training loop does.
A step counts as "during a save" if the save was in progress when the step started.  The call that
starts the save, which copies the state from the devices, is counted in the first of these steps.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags

from caat_jax import command_line
from caat_jax.checkpoints import digests
from caat_jax.checkpoints.checkpoints import Checkpoints
from caat_jax.config.resolve import resolve_mesh
from caat_jax.config.sections import Config
from caat_jax.devices import sharding
from caat_jax.training.step import Programs

_CONFIG = command_line.config_flag()
_SAVES = flags.DEFINE_integer("saves", 5, "How many checkpoints are saved.", lower_bound=1)
_STEPS_BETWEEN = 5


def main(config: Config) -> None:
    command_line.simulate_devices(config.mesh)
    if config.model.vocab_size == -1:
        config = config.with_vocabulary(258)
    mesh = sharding.create_mesh(resolve_mesh(config, len(jax.devices())))
    programs = Programs(config, mesh)
    train_step, state = programs.compile_train_step(), programs.initial_state()
    shape = (config.train.global_batch, config.data.sequence_length + 1)
    rows = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    batch = jax.device_put(rows, programs.batch_sharding)

    def step() -> None:
        nonlocal state
        state, values = train_step(state, batch)
        jax.block_until_ready(values)

    quiet, starts, first, others = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(Path(folder), to_keep=2) as checkpoints:
            step()
            for number in range(_SAVES.value):
                quiet += [_seconds(step) for _ in range(_STEPS_BETWEEN)]
                starts.append(
                    _seconds(lambda n=number: checkpoints.save(state, n, config, {"next_batch": n}))
                )
                first.append(starts[-1] + _seconds(step))
                while checkpoints.is_saving():
                    others.append(_seconds(step))
            checkpoints.wait()
            newest = checkpoints.folder / str(_SAVES.value - 1)
            size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
            verify = _seconds(lambda: digests.damage(newest))
            restore = _seconds(
                lambda: jax.block_until_ready(
                    checkpoints.restore(_SAVES.value - 1, programs.state_shapes)
                )
            )
    median = statistics.median(quiet)
    print(f"{programs.blueprint.size / 1e6:.1f} M parameters, {size / 1e6:.0f} MB a checkpoint")
    for name, seconds in (
        ("step, nothing being saved", quiet),
        ("start of a save", starts),
        ("step with the start of a save", first),
        ("later steps during the save", others),
    ):
        if seconds:
            ms, ratio = 1000 * statistics.median(seconds), statistics.median(seconds) / median
            print(f"{name:32} {ms:9.1f} ms  {ratio:5.2f} of a step  ({len(seconds)} measured)")
    print(f"{'digests compared':32} {1000 * verify:9.1f} ms  {size / verify / 1e9:5.2f} GB/s")
    print(f"{'restored, digests not compared':32} {1000 * restore:9.1f} ms")


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    command_line.run(main, _CONFIG)
