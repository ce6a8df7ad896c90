"""A sweep's results: results.csv, summary.csv, a table for people, and a picture.

`results.csv` has a row for each run, the grid's fields first; all the rest is computed from it.
"""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from caat_jax import files
from caat_jax.communication import traced_programs
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.devices import sharding
from caat_jax.errors import InputError
from caat_jax.sweep import picture, protocol
from caat_jax.sweep.plan import Plan, Run, evaluated_steps
from caat_jax.sweep.protocol import Verdict
from caat_jax.training.metrics import json_number
from caat_jax.training.step import Programs

RUNS_FOLDER = "runs"
RESULT_FILE = "result.json"
RESULTS_FILE = "results.csv"
SUMMARY_FILE = "summary.csv"
PICTURE_FILE = "sweep.png"

CONFIDENCE = 0.95


class Result(NamedTuple):
    """One run."""

    setting: tuple[Any, ...]  # `Run.setting`
    seed: int
    tokens: int  # trained on
    wire_bytes: int  # that one of S devices sent over `model` in the whole run
    losses: tuple[float, ...]  # of every evaluation, nats a token


class Summary(NamedTuple):
    """One setting, over its seeds."""

    setting: tuple[Any, ...]
    seeds: int
    tokens: int
    wire_bytes: int
    loss: float  # mean
    spread: float  # standard deviation over the seeds; nan for one
    difference: float  # mean over the pairs of this loss minus the baseline's of the same seed
    lower: float  # bounds of the difference: of the verdict, otherwise those of the interval with
    upper: float  # `CONFIDENCE`; nan for one seed
    equal_loss_steps: float  # `protocol.equal_loss_steps`
    verdict: Verdict | None  # None without a margin, before the first look, and of a baseline


def run_folder(workdir: Path, run: Run) -> Path:
    """Where a run's checkpoints, metrics and result lie."""
    return workdir / RUNS_FOLDER / run.name


def result(config: Config, losses: Sequence[float]) -> dict[str, Any]:
    """What `result.json` of a finished run holds."""
    train = config.train
    return {
        "losses": [json_number(loss) for loss in losses],
        "tokens": train.steps * train.global_batch * config.data.sequence_length,
        "wire_bytes": wire_bytes(config, train.steps),
    }


def wire_bytes(config: Config, steps: int) -> int:
    """Bytes that one device sends in that many training steps, each device holding one shard.

    Counted in the traced step: the embedding and the loss are in it.
    """
    ends = [stage.until for stage in config.train.sync_schedule if stage.until < steps]
    total = 0.0
    for first, last in itertools.pairwise([0, *ends, steps]):
        total += (last - first) * _step_wire_bytes(_without_history(config.at_step(last)))
    return round(total)


def _without_history(config: Config) -> Config:
    """Without seed and schedule, on which what a step sends does not depend.

    An emulated wire is counted as the wire that it emulates.
    """
    train = dataclasses.replace(config.train, sync_schedule=())
    compute = dataclasses.replace(config.compute, emulate_wires=False)
    return dataclasses.replace(config, seed=0, train=train, compute=compute)


@functools.cache
def _step_wire_bytes(config: Config) -> float:
    config = config.with_vocabulary(load_tokenizer(config.data.tokenizer).size)
    mesh = MeshConfig(data=1, fsdp=1, model=config.model.tp_shards, simulated_devices=0)
    programs = Programs(dataclasses.replace(config, mesh=mesh), sharding.abstract_mesh(mesh))
    return traced_programs.count(programs.trace_train_step().jaxpr).wire_bytes


def read(plan: Plan, workdir: Path) -> list[Result]:
    """Of the runs that are done.

    Raises:
      InputError: a result lacks what `result` writes.
    """
    results = []
    for run in plan.runs:
        path = run_folder(workdir, run) / RESULT_FILE
        with contextlib.suppress(FileNotFoundError):
            found = files.read_json(path, dict)
            missing = [name for name in Result._fields[2:] if name not in found]
            if missing:
                raise InputError(
                    f"{path} has no {', '.join(missing)}: another version wrote it; delete it, and"
                    " the same command writes it anew from the finished run"
                )
            losses = tuple(map(float, found["losses"]))
            numbers = (found["tokens"], found["wire_bytes"])
            results.append(Result(run.setting, run.seed, *numbers, losses))
    return results


def write(plan: Plan, workdir: Path) -> str:
    """Writes every file of the results of the runs that are done; returns the table for people."""
    results = read(plan, workdir)
    rows = [(*r[1:-1], " ".join(f"{loss:.6f}" for loss in r.losses)) for r in results]
    _write_csv(workdir / RESULTS_FILE, plan, Result, results, rows)
    summaries = summarise(plan, results)
    rows = [(*s[1:-1], s.verdict and s.verdict.word) for s in summaries]
    _write_csv(workdir / SUMMARY_FILE, plan, Summary, summaries, rows)
    picture.plot(plan, summaries, _curves(plan, results), workdir / PICTURE_FILE)
    names = f"{RESULTS_FILE}, {SUMMARY_FILE}, {PICTURE_FILE}"
    return f"{table(plan, summaries)}\n\nIn {workdir}: {names}"


def _curves(plan: Plan, results: Sequence[Result]) -> dict[tuple[Any, ...], picture.Curve]:
    """By setting: the mean losses over its seeds."""
    configs = {run.setting: run.config for run in plan.runs}
    curves = {}
    for setting, found in _by_setting(results).items():
        steps = evaluated_steps(configs[setting])
        sent = [wire_bytes(configs[setting], step) for step in steps]
        losses = np.mean([result.losses for result in found.values()], axis=0)
        curves[setting] = picture.Curve(steps, sent, losses)
    return curves


def undecided_runs(plan: Plan, pairs: int, workdir: Path) -> list[Run]:
    """Of the first so many seeds, the runs of settings that no look has decided, and baselines."""
    found = verdicts(plan, read(plan, workdir)) if plan.margin else {}
    decided = {
        setting
        for setting, verdict in found.items()
        if verdict and verdict.word != protocol.UNDECIDED
    }
    settings = {run.setting for run in plan.runs}
    for baseline in settings:
        others = {s for s in settings if plan.baseline_of(s) == baseline} - {baseline}
        if others and others <= decided:
            decided.add(baseline)
    seeds = plan.seeds[:pairs]
    return [run for run in plan.runs if run.setting not in decided and run.seed in seeds]


def verdicts(plan: Plan, results: Sequence[Result]) -> dict[tuple[Any, ...], Verdict | None]:
    """That of every setting with results but the baselines."""
    by_setting = _by_setting(results)
    return {
        setting: protocol.judge(_differences(plan, by_setting, setting), plan.margin, plan.looks)
        for setting in by_setting
        if setting != plan.baseline_of(setting)
    }


def summarise(plan: Plan, results: Sequence[Result]) -> list[Summary]:
    """Means over the seeds of every setting, and what it costs against the baseline.

    Differences are taken seed by seed: two runs with one seed have the same initial parameters and
    the same batches, so that most of the seed's effect cancels.
    """
    by_setting = _by_setting(results)
    found = verdicts(plan, results) if plan.margin else {}
    summaries = []
    for setting, of_seed in by_setting.items():
        baseline = by_setting.get(plan.baseline_of(setting), {})
        losses = [_loss(plan, r) for r in of_seed.values()]
        some, verdict = next(iter(of_seed.values())), found.get(setting)
        if verdict:
            difference, lower, upper = verdict.difference, verdict.lower, verdict.upper
        else:
            difference, lower, upper = _interval(_differences(plan, by_setting, setting))
        summaries.append(
            Summary(
                setting=setting,
                seeds=len(losses),
                tokens=some.tokens,
                wire_bytes=some.wire_bytes,
                loss=statistics.fmean(losses),
                spread=_deviation(losses),
                difference=difference,
                lower=lower,
                upper=upper,
                equal_loss_steps=_equal_loss_steps(plan, of_seed, baseline),
                verdict=verdict,
            )
        )
    return summaries


def _by_setting(results: Sequence[Result]) -> dict[tuple[Any, ...], dict[int, Result]]:
    by_setting: dict[tuple, dict[int, Result]] = {}
    for found in results:
        by_setting.setdefault(found.setting, {})[found.seed] = found
    return by_setting


def _differences(
    plan: Plan, by_setting: dict[tuple[Any, ...], dict[int, Result]], setting: tuple[Any, ...]
) -> list[float]:
    """Of the first pairs planned, to the first that is not done."""
    pairs = (by_setting[setting], by_setting.get(plan.baseline_of(setting), {}))
    done = itertools.takewhile(lambda seed: all(seed in runs for runs in pairs), plan.seeds)
    return [_loss(plan, pairs[0][seed]) - _loss(plan, pairs[1][seed]) for seed in done]


def _equal_loss_steps(plan: Plan, runs: dict[int, Result], baseline: dict[int, Result]) -> float:
    """From the mean curves of the seeds that both have."""
    seeds = runs.keys() & baseline.keys()
    curves = [np.mean([of[seed].losses for seed in seeds], axis=0) for of in (runs, baseline)]
    config = next(run.config for run in plan.runs if run.setting == runs[min(seeds)].setting)
    return protocol.equal_loss_steps(evaluated_steps(config), *curves)


def _loss(plan: Plan, found: Result) -> float:
    return statistics.fmean(found.losses[-plan.late_evaluations :])


def _interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the ends of Student's interval."""
    n, mean = len(differences), statistics.fmean(differences)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    reach = quantile * _deviation(differences) / math.sqrt(n)
    return mean, mean - reach, mean + reach


def table(plan: Plan, summaries: Sequence[Summary]) -> str:
    """A Markdown table of the settings."""
    heads = [_short(field) for field in plan.fields]
    heads += ["runs", "MB sent", "loss", "spread", f"minus {_short(plan.compared)}={plan.baseline}"]
    heads += ["verdict", "pairs", "steps for equal loss"] if plan.margin else []
    rows = [
        (
            *(str(value) for value in s.setting),
            str(s.seeds),
            f"{s.wire_bytes / 1e6:,.0f}",
            f"{s.loss:.4f}",
            f"{s.spread:.4f}" if s.seeds > 1 else "",
            *_comparison(plan, s),
        )
        for s in summaries
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    ruler = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(heads), ruler, *map(line, rows)])


def _comparison(plan: Plan, summary: Summary) -> list[str]:
    """The cells of a row that compare it with its baseline."""
    verdict = summary.verdict
    if summary.setting == plan.baseline_of(summary.setting):
        return [""] * (4 if plan.margin else 1)
    difference = f"{summary.difference:+.4f}"
    if math.isfinite(summary.lower):
        difference += f" ({summary.lower:+.4f} to {summary.upper:+.4f})"
    if not plan.margin:
        return [difference]
    if verdict is None:
        return [difference, "no look yet", "", ""]
    word = verdict.word
    if word == protocol.UNDECIDED:
        needed = verdict.pairs_needed
        word += f": {needed} more pairs" if needed else ": over 1,000 pairs"
    return [difference, word, str(verdict.pairs), f"{summary.equal_loss_steps:.2f}"]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _short(field: str) -> str:
    return field.split(".")[-1]


def _write_csv(
    path: Path,
    plan: Plan,
    columns: type[Result] | type[Summary],
    rows: Sequence[Result] | Sequence[Summary],
    cells: Sequence[Sequence[Any]],
) -> None:
    """A line for each row: its setting, and these cells of the other columns."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*plan.fields, *columns._fields[1:]])
    writer.writerows([*r.setting, *c] for r, c in zip(rows, cells, strict=True))
    files.write(path, text.getvalue())
