"""A sweep's results: results.csv, summary.csv, a table for people, and a picture.

`results.csv` has a row for each run, the grid's fields first; the rest is computed from it and from
the runs' metrics.
"""

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
from caat_jax.sweep.plan import Plan, Run
from caat_jax.training.metrics import METRICS_FILE, json_number, read_metrics
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
    loss: float  # of validation, after the last step, nats a token


class Summary(NamedTuple):
    """One setting, over its seeds."""

    setting: tuple[Any, ...]
    seeds: int
    tokens: int
    wire_bytes: int
    loss: float  # mean
    spread: float  # standard deviation over the seeds; nan for one
    difference: float  # mean over the seeds of this loss minus the baseline's of the same seed
    margin: float  # half of the difference's confidence interval; nan for one seed


def run_folder(workdir: Path, run: Run) -> Path:
    """Where a run's checkpoints, metrics and result lie."""
    return workdir / RUNS_FOLDER / run.name


def result(config: Config, loss: float) -> dict[str, Any]:
    """What `result.json` of a finished run holds."""
    train = config.train
    return {
        "loss": json_number(loss),
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


def write(plan: Plan, workdir: Path) -> str:
    """Writes every file of the results; returns the table for people."""
    results = [_read(run, workdir) for run in plan.runs]
    _write_csv(workdir / RESULTS_FILE, [*plan.fields, *Result._fields[1:]], results)
    summaries = summarise(plan, results)
    _write_csv(workdir / SUMMARY_FILE, [*plan.fields, *Summary._fields[1:]], summaries)
    _plot(plan, summaries, results, workdir)
    return table(plan, summaries)


def summarise(plan: Plan, results: Sequence[Result]) -> list[Summary]:
    """Means over the seeds of every setting, and what it costs against the baseline.

    Differences are taken seed by seed: two runs with one seed have the same initial parameters and
    the same batches, so that most of the seed's effect cancels.  The interval is Student's, with
    `CONFIDENCE`.
    """
    by_setting: dict[tuple, dict[int, Result]] = {}
    for found in results:
        by_setting.setdefault(found.setting, {})[found.seed] = found
    place = plan.fields.index(plan.compared)
    summaries = []
    for setting, of_seed in by_setting.items():
        baseline = by_setting[(*setting[:place], plan.baseline, *setting[place + 1 :])]
        losses = [r.loss for r in of_seed.values()]
        differences = [r.loss - baseline[seed].loss for seed, r in of_seed.items()]
        n, some = len(losses), next(iter(of_seed.values()))
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
        summaries.append(
            Summary(
                setting=setting,
                seeds=n,
                tokens=some.tokens,
                wire_bytes=some.wire_bytes,
                loss=statistics.fmean(losses),
                spread=_deviation(losses),
                difference=statistics.fmean(differences),
                margin=float(quantile) * _deviation(differences) / math.sqrt(n),
            )
        )
    return summaries


def table(plan: Plan, summaries: Sequence[Summary]) -> str:
    """A Markdown table of the settings."""
    heads = [_short(field) for field in plan.fields]
    heads += ["runs", "MB sent", "loss", "spread", f"minus {_short(plan.compared)}={plan.baseline}"]
    rows = [
        (
            *(str(value) for value in s.setting),
            str(s.seeds),
            f"{s.wire_bytes / 1e6:,.0f}",
            f"{s.loss:.4f}",
            f"{s.spread:.4f}" if s.seeds > 1 else "",
            _difference(plan, s),
        )
        for s in summaries
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    ruler = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([line(heads), ruler, *map(line, rows)])


def _difference(plan: Plan, summary: Summary) -> str:
    if summary.setting[plan.fields.index(plan.compared)] == plan.baseline:
        return ""
    margin = f" ± {summary.margin:.4f}" if summary.seeds > 1 else ""
    return f"{summary.difference:+.4f}{margin}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _short(field: str) -> str:
    return field.split(".")[-1]


def _read(run: Run, workdir: Path) -> Result:
    found = files.read_json(run_folder(workdir, run) / RESULT_FILE, dict)
    loss = float(found["loss"])
    return Result(run.setting, run.seed, found["tokens"], found["wire_bytes"], loss)


def _write_csv(path: Path, heads: Sequence[str], rows: Sequence[Result | Summary]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(heads)
    writer.writerows([*row.setting, *row[1:]] for row in rows)
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
        runs = [run for run in plan.runs if run.setting == summary.setting]
        steps, losses = _mean_curve(runs, workdir)
        look = dict(
            color=COLOURS[values.index(summary.setting[place]) % len(COLOURS)],
            linestyle=("-", "--", ":", "-.")[others.index(_others(plan, summary.setting)) % 4],
            label=_label(plan.fields, summary.setting),
            linewidth=1.5,
        )
        over_steps.plot(steps, losses, **look)
        sent = [wire_bytes(runs[0].config, int(step)) for step in steps]
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


def _mean_curve(runs: Sequence[Run], workdir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the validation losses' mean over these runs, which differ in their seed."""
    curves = [read_metrics(run_folder(workdir, run) / METRICS_FILE)["eval/loss"] for run in runs]
    return curves[0][0], np.mean([losses for _, losses in curves], axis=0)
