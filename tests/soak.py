"""Kills a run again and again, starts it again, and looks for anything lost, doubled or changed.

    python -m tests.soak [--kills=30] [--seed=0]
    python -m tests.soak --stops=30 [--seed=0]

A kill is SIGKILL after some seconds, at some step or while a checkpoint is being written, or
SIGTERM.  At the end the metrics, and the state to the last bit, must be those of a run that nobody
disturbed.

A stop is SIGTERM to one of a run's two processes, at any moment: both must end soon, with nothing
lost.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tqdm

from tests import runs
from tests.runs import Run

STEPS_PER_KILL = 6
LONGEST_STOP_SECONDS = 100
LONGEST_WAIT_SECONDS = 600  # for a step, however busy the machine is
COMPARED = ("train/loss", "train/grad_norm", "train/skipped_updates", "learning_rate", "eval/loss")


def soak(folder: Path, kills: int, seed: int) -> str:
    """Runs it in an empty folder; a line about what happened.

    Raises:
      AssertionError: something is lost, doubled or changed.
    """
    chance = random.Random(seed)
    steps = kills * STEPS_PER_KILL + 10
    fields = runs.corpus(folder) | {
        "train.steps": steps,
        "optimizer.decay_steps": steps,
        "train.checkpoint_every": 3,
        "train.eval_every": 7,
    }
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    assert Run(undisturbed, fields).wait() == 0

    ends, cut_off = [], 0
    for _ in tqdm.trange(kills, desc="kills", disable=None):
        before = runs.checkpoint_steps(disturbed)
        run = Run(disturbed, fields)
        ends.append(_kill(run, chance))
        cut_off += run.output.count("was not completed")
        went_on = f"resuming after step {before[-1]};" in run.output if before else True
        assert went_on or "compiling" not in run.output, run.output
        # Older ones make way for newer ones.
        assert before[-1:] <= runs.checkpoint_steps(disturbed)[-1:], "a checkpoint is gone"
    run = Run(disturbed, fields)
    assert run.wait() == 0, run.output

    for name in COMPARED:
        assert runs.series(disturbed, name) == runs.series(undisturbed, name), name
    trained = [line["step"] for line in runs.lines_of(disturbed) if "train/loss" in line]
    assert trained == list(range(1, steps + 1)), "a step is lost or doubled"
    assert _final_state(disturbed) == _final_state(undisturbed), "another state"
    for path in disturbed.glob("checkpoints_set_aside/*"):
        assert not path.name.isdigit(), f"{path} was complete and is damaged"
    counts = ", ".join(f"{name} {ends.count(name)}" for name in sorted(set(ends)))
    return f"{kills} kills ({counts}), {cut_off} checkpoints cut off, {steps} steps: all as it was"


def _kill(run: Run, chance: random.Random) -> str:
    """Ends a run in one way or another; the name of the way."""
    way = chance.choice(["at a step", "after a time", "while saving", "while saving", "SIGTERM"])
    if way == "after a time":
        time.sleep(chance.uniform(0, 6))
    else:
        # The run says so before it compiles; metrics of the run before may be there until then.
        run.wait_until(lambda: "compiling" in run.output)
        first = runs.last_step(run.workdir)
        target = first + chance.randint(1, STEPS_PER_KILL)
        saving = run.workdir / "checkpoints"
        if way == "while saving":
            run.wait_until(lambda: any(saving.glob("*.orbax-checkpoint-tmp")))
            time.sleep(chance.uniform(0, 0.2))
        else:
            run.wait_until(lambda: runs.last_step(run.workdir) >= target)
    run.signal(signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL)
    code = run.wait()
    allowed = (75, 0) if way == "SIGTERM" else (-signal.SIGKILL, 0)
    assert code in allowed, (way, code, run.output)
    return way


def stop_one_of_two(folder: Path, stops: int, seed: int) -> str:
    """Stops a run of two processes so often, in an empty folder; a line about what happened.

    Raises:
      AssertionError: a process ended otherwise, or a step that was reported is not saved.
      TimeoutError: a process did not end.
    """
    chance = random.Random(seed)
    endless = {"train.steps": 10**6, "train.checkpoint_every": 50, "train.eval_every": 30}
    fields = runs.corpus(folder) | endless | {"optimizer.decay_steps": 10**6}
    workdir = folder / "run"
    slowest = 0.0
    for _ in tqdm.trange(stops, desc="stops", disable=None):
        processes = runs.start_processes(2, workdir, fields, devices=1)
        try:
            slowest = max(slowest, _stop_one(processes, chance))
        finally:
            for process in processes:
                process.signal(signal.SIGKILL)
    return f"{stops} stops at {runs.last_step(workdir)} steps; the slowest took {slowest:.1f} s"


def _stop_one(processes: list[Run], chance: random.Random) -> float:
    """Stops one of two processes at some moment; the seconds until both have ended."""
    first, stopped = processes[0], processes[chance.randrange(2)]
    workdir = first.workdir
    first.wait_until(lambda: "compiling" in first.output, LONGEST_WAIT_SECONDS)
    target = runs.last_step(workdir) + chance.randint(1, 70)
    if chance.random() < 0.8:
        first.wait_until(lambda: runs.last_step(workdir) >= target, LONGEST_WAIT_SECONDS)
    time.sleep(chance.uniform(0, 0.3))
    start = time.monotonic()
    stopped.signal(signal.SIGTERM)
    codes = [run.wait(seconds=LONGEST_STOP_SECONDS) for run in processes]
    seconds = time.monotonic() - start
    assert codes == [75, 75], [run.output for run in processes]
    last = runs.last_step(workdir)
    assert not last or runs.checkpoint_steps(workdir)[-1] == last, first.output
    return seconds


def _final_state(workdir: Path) -> list[bytes]:
    """The arrays of the last checkpoint."""
    folder = workdir.absolute() / "checkpoints" / str(runs.checkpoint_steps(workdir)[-1]) / "state"
    checkpointer = ocp.PyTreeCheckpointer()
    arrays = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        checkpointer.metadata(folder).item_metadata.tree,
    )
    restored = checkpointer.restore(folder, restore_args=arrays)
    return [array.tobytes() for array in jax.tree.leaves(restored)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--stops", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if arguments.stops:
                print(stop_one_of_two(Path(folder), arguments.stops, arguments.seed))
            else:
                print(soak(Path(folder), arguments.kills, arguments.seed))
        except (AssertionError, TimeoutError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
