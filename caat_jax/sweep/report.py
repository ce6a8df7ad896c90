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
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from caat_jax import figures, files
from caat_jax.communication import traced_programs
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.devices import sharding
from caat_jax.figures import COLOURS
from caat_jax.sweep import protocol
from caat_jax.sweep.plan import Plan, Run
from caat_jax.sweep.protocol import Verdict
from caat_jax.training.metrics import json_number
from caat_jax.training.step import Programs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUNS_FOLDER = "runs"
RESULT_FILE = "result.json"
RESULTS_FILE = "results.csv"
SUMMARY_FILE = "summary.csv"

CONFIDENCE = 0.95

_LEGEND_CHARACTERS = 170  # that fit side by side, about


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
    """Of the runs that are done."""
    results = []
    for run in plan.runs:
        with contextlib.suppress(FileNotFoundError):
            found = files.read_json(run_folder(workdir, run) / RESULT_FILE, dict)
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
    _plot(plan, summaries, results, workdir)
    return table(plan, summaries)


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


def evaluated_steps(config: Config) -> list[int]:
    """After which steps of a run its validation loss is measured."""
    train = config.train
    return [*range(train.eval_every, train.steps, train.eval_every), train.steps]


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


@figures.style()
def _plot(
    plan: Plan, summaries: Sequence[Summary], results: Sequence[Result], workdir: Path
) -> None:
    """`sweep.png`: the loss by setting, over the steps, and over the bytes sent."""
    from matplotlib.ticker import EngFormatter

    figure = figures.new(15, 5.8)
    by_value, over_steps, over_bytes = figure.subplots(1, 3)
    _plot_by_value(by_value, plan, summaries)
    place = plan.fields.index(plan.compared)
    values = list(dict.fromkeys(s.setting[place] for s in summaries))
    others = list(dict.fromkeys(_others(plan, s.setting) for s in summaries))
    for summary in summaries:
        config = next(run.config for run in plan.runs if run.setting == summary.setting)
        steps = evaluated_steps(config)
        losses = np.mean([r.losses for r in results if r.setting == summary.setting], axis=0)
        look = dict(
            color=COLOURS[values.index(summary.setting[place]) % len(COLOURS)],
            linestyle=("-", "--", ":", "-.")[others.index(_others(plan, summary.setting)) % 4],
            label=_label(plan.fields, summary.setting),
            linewidth=1.5,
        )
        over_steps.plot(steps, losses, **look)
        sent = [wire_bytes(config, step) for step in steps]
        over_bytes.plot(sent, losses, **look)
    last = [s.loss for s in summaries if math.isfinite(s.loss)]
    for panel in (over_steps, over_bytes):
        if last:
            # The first losses are high and alike: they would hide the differences.
            low, high = min(last), max(last)
            panel.set_ylim(low - 0.02 * low, high + max(0.25 * high, high - low))
    over_steps.set(xlabel="step", title="Validation loss over the steps")
    over_bytes.set(
        xlabel="bytes that one of S devices sent",
        title="The same over the bytes sent",
        xscale="log",
    )
    handles, labels = over_steps.get_legend_handles_labels()
    columns = max(1, _LEGEND_CHARACTERS // max(map(len, labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    over_bytes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    over_steps.xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in (by_value, over_steps, over_bytes):
        panel.set_ylabel("nats per token")
    figures.save(figure, workdir / "sweep.png")


def _plot_by_value(panel: "Axes", plan: Plan, summaries: Sequence[Summary]) -> None:
    """The last loss against the compared field, a line for each setting of the other fields."""
    place = plan.fields.index(plan.compared)
    values = list(dict.fromkeys(s.setting[place] for s in summaries))
    numeric = all(isinstance(value, int | float) for value in values)
    at = {value: value if numeric else n for n, value in enumerate(values)}
    lines: dict[tuple, list[Summary]] = {}
    for summary in summaries:
        lines.setdefault(_others(plan, summary.setting), []).append(summary)
    for number, (others, line) in enumerate(lines.items()):
        line.sort(key=lambda s: at[s.setting[place]])
        names = [field for field in plan.fields if field != plan.compared]
        panel.errorbar(
            [at[s.setting[place]] for s in line],
            [s.loss for s in line],
            yerr=[s.spread for s in line],
            label=textwrap.fill(_label(names, others), 40) or None,
            capsize=3,
            **figures.line(number),
        )
    if not numeric:
        panel.set_xticks(list(at.values()), [str(value) for value in values], fontsize=8)
    panel.set(xlabel=_short(plan.compared), title="Last validation loss; bars: spread over seeds")
    if len(plan.fields) > 1:
        panel.legend(fontsize=8)


def _others(plan: Plan, setting: tuple[Any, ...]) -> tuple[Any, ...]:
    place = plan.fields.index(plan.compared)
    return setting[:place] + setting[place + 1 :]


def _label(fields: Sequence[str], values: Sequence[Any]) -> str:
    return ", ".join(f"{_short(f)}={v}" for f, v in zip(fields, values, strict=True))
