"""Trains one model for every combination of a grid, and reports what each setting costs in loss.

    python -m caat_jax.sweep --config=configs/sweep.py --workdir=DIR [--jobs=2]

Every run is a process of its own in DIR/runs/NAME, laid out as by `train.py`; the same command
resumes what was stopped.  At the end it writes DIR/results.csv (a row for each run),
DIR/summary.csv (a row for each setting) and a picture.  On a cluster, separate jobs do one run each
with --only=NAME (--list prints the names); the command without --only then writes the results.

With a margin it is a study: DIR/plan.json says what will be asked before the first run is, and the
results are written at each of the planned looks.  A setting that a look has decided is not trained
further.
"""

from caat_jax import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm
from absl import flags

from caat_jax import activity, command_line, files
from caat_jax.config import user_paths
from caat_jax.config.stored import difference, from_json, to_json
from caat_jax.devices.processes import StopRequest
from caat_jax.errors import InputError, Interrupted
from caat_jax.sweep import plan as sweep_plan
from caat_jax.sweep import registration, report
from caat_jax.sweep.plan import Plan, Run
from caat_jax.sweep.report import RESULT_FILE, run_folder
from caat_jax.training import loop
from caat_jax.training.metrics import METRICS_FILE, read_metrics

_CONFIG_FILE = "config.json"
_LOG_FILE = "log.txt"
_COMPILED_FOLDER = "compiled"

_POLL_SECONDS = 1.0

_CONFIG = command_line.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "For runs and results.", required=True)
_JOBS = flags.DEFINE_integer(
    "jobs", 1, "Runs at a time on this machine, which share its processors evenly.", 1
)
_ONLY = flags.DEFINE_string("only", None, "Do this run alone, in this process.")
_LIST = flags.DEFINE_bool("list", False, "Print the runs' names and do nothing.")


def main(plan: Plan) -> None:
    workdir = user_paths.expanded("--workdir", _WORKDIR.value)
    if _LIST.value:
        print("\n".join(run.name for run in plan.runs))
        return
    runs = plan.runs if _ONLY.value is None else [_run_named(plan, _ONLY.value)]
    for run in runs:
        _check_same_configuration(run, workdir)
    registration.register(plan, workdir)
    if _ONLY.value is not None:
        _train(runs[0], workdir)
        return
    for pairs in plan.looks:
        runs = report.undecided_runs(plan, pairs, workdir)
        failed = _train_all(runs, workdir, _JOBS.value)
        if failed:
            raise InputError(
                f"{len(failed)} of {len(runs)} runs failed: "
                + "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            )
        table = report.write(plan, workdir)
    print(table)


def _run_named(plan: Plan, name: str) -> Run:
    for run in plan.runs:
        if run.name == name:
            return run
    raise InputError(f"--only={name} is not one of the {len(plan.runs)} runs; --list prints them")


def _check_same_configuration(run: Run, workdir: Path) -> None:
    """Refuses a folder in which another configuration was trained under the same name."""
    folder = run_folder(workdir, run)
    try:
        stored = from_json(files.read_json(folder / _CONFIG_FILE, dict))
    except FileNotFoundError:
        return
    differing = difference(stored, run.config)
    if differing:
        raise InputError(
            f"{folder} holds a run of another configuration ({'; '.join(differing)}); give another"
            " --workdir"
        )


def _train(run: Run, workdir: Path) -> None:
    """Does one run in this process, or resumes it."""
    folder = run_folder(workdir, run)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / _CONFIG_FILE, to_json(run.config))
    command_line.simulate_devices(run.config.mesh)
    # Seeds share their compiled programs.
    jax.config.update("jax_compilation_cache_dir", str(workdir / _COMPILED_FOLDER))
    loop.train(run.config, folder)
    _, losses = read_metrics(folder / METRICS_FILE)["eval/loss"]
    _write_json(folder / RESULT_FILE, report.result(run.config, losses.tolist()))


def _write_json(path: Path, content: Any) -> None:
    files.write(path, json.dumps(content) + "\n")


class _Job:
    """A run in a process of its own."""

    def __init__(self, run: Run, workdir: Path, processors: set[int] | None):
        self.name = run.name
        self._folder = run_folder(workdir, run)
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "caat_jax.sweep", *sys.argv[1:], f"--only={run.name}"]
        with (self._folder / _LOG_FILE).open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        if processors is not None:  # long before it starts threads, which inherit this
            os.sched_setaffinity(self._process.pid, processors)
        self.processors = processors

    def is_running(self) -> bool:
        return self._process.poll() is None

    def failure(self) -> str | None:
        """The last line of a run that failed; None of one that did not."""
        if self._process.returncode == 0:
            return None
        lines = (self._folder / _LOG_FILE).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"

    def ask_to_stop(self) -> None:
        """After a checkpoint."""
        if self.is_running():
            self._process.terminate()

    def wait(self) -> None:
        """For its end."""
        self._process.wait()


def _stop(jobs: list[_Job]) -> None:
    for job in jobs:
        job.ask_to_stop()
    for job in jobs:
        job.wait()


def _train_all(runs: Sequence[Run], workdir: Path, jobs: int) -> dict[str, str]:
    """Does the unfinished runs; returns the last line of each that failed, by name."""
    steps = sum(run.config.train.steps for run in runs)
    waiting = [run for run in runs if not (run_folder(workdir, run) / RESULT_FILE).exists()]
    running: list[_Job] = []
    failed = {}
    free = _processor_shares(jobs)
    with (
        StopRequest() as stop_request,
        contextlib.ExitStack() as stack,
        tqdm.tqdm(
            total=steps, bar_format=activity.BAR_FORMAT, dynamic_ncols=True, disable=None
        ) as bar,
    ):
        stack.callback(_stop, running)
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Job(waiting.pop(0), workdir, free.pop()))
            ended = [job for job in running if not job.is_running()]
            for job in ended:
                running.remove(job)
                free.append(job.processors)
                if (reason := job.failure()) is not None:
                    failed[job.name] = reason
            done = sum(_steps_done(run_folder(workdir, run)) for run in runs)
            bar.update(done - bar.n)
            bar.set_postfix_str(
                f"{len(runs) - len(waiting) - len(running)} runs of {len(runs)} done"
            )
            if stop_request.reached():
                raise Interrupted("stopped; the same command resumes")
            time.sleep(0 if ended else _POLL_SECONDS)
    return failed


def _processor_shares(jobs: int) -> list[set[int] | None]:
    """This process's processors in that many equal parts, where the system can tell them apart.

    Programs that take turns on the same processors are slower than programs with their own.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    all_processors = sorted(os.sched_getaffinity(0))
    share = len(all_processors) // jobs
    if jobs == 1 or share == 0:
        return [None] * jobs
    return [set(all_processors[n * share : (n + 1) * share]) for n in range(jobs)]


def _steps_done(folder: Path) -> int:
    path = folder / METRICS_FILE
    if not path.exists():
        return 0
    steps, _ = read_metrics(path).get("train/loss", ((0,), None))
    return int(steps[-1])


if __name__ == "__main__":
    command_line.run(main, _CONFIG, sweep_plan.resolve, sweep_plan.all_fields)
