"""The tables of docs/quality.md and quality_studies.md are those of the results files."""

import csv
import shutil

import pytest

from benchmarks import cloze_tasks
from caat_jax.sweep import plan as sweep_plan
from caat_jax.sweep import registration, report
from configs import (
    equivalence,
    equivalence_widths,
    sweep,
    sweep_half,
    sweep_quarter,
    sweep_wires,
)
from tests.command_line import REPOSITORY

PAGES = "".join(
    (REPOSITORY / "docs" / name).read_text() for name in ("quality.md", "quality_studies.md")
)


def results_of(name, plan):
    """Those of the plan's runs that the file has; a decided setting has fewer than planned."""
    with (REPOSITORY / f"docs/quality/{name}.csv").open() as file:
        rows = {tuple(row[f] for f in (*plan.fields, "seed")): row for row in csv.DictReader(file)}
    results = []
    for run in plan.runs:
        row = rows.pop((*map(str, run.setting), str(run.seed)), None)
        if row is not None:
            numbers = (int(row["tokens"]), int(row["wire_bytes"]))
            losses = tuple(map(float, row["losses"].split()))
            results.append(report.Result(run.setting, run.seed, *numbers, losses))
    assert not rows
    return results


def high_rate():
    """That of the study's command with twice the learning rate."""
    config = equivalence.get_config()
    config.run.optimizer.peak_learning_rate = 3e-3
    config.run.optimizer.warmup_steps = 20
    config.grid.model.sync_factor = (1.0, 0.75, 0.5, 0.25, 0.0)
    config.grid.seed = tuple(range(12))
    return config


@pytest.mark.parametrize(
    ("name", "config", "runs"),
    [
        ("equivalence", equivalence.get_config, 28),
        ("equivalence_high_rate", high_rate, 40),
        ("equivalence_widths_128", equivalence_widths.get_config, 12),
        ("sweep", sweep.get_config, 30),
        ("quarter", sweep_quarter.get_config, 12),
        ("wires", sweep_wires.get_config, 27),
    ],
)
def test_tables_are_those_of_the_results(name, config, runs):
    plan = sweep_plan.resolve(config())
    results = results_of(name, plan)
    assert len(results) == runs
    assert report.table(plan, report.summarise(plan, results)) in PAGES


def test_difference_of_the_continued_training():
    """The one that a page quotes of a table that it leaves out."""
    plan = sweep_plan.resolve(sweep_half.get_config())
    summaries = report.summarise(plan, results_of("half", plan))
    (found,) = (s for s in summaries if s.setting == ((), ((600, 1.0),)))
    assert f"{found.difference:+.4f} ({found.lower:+.4f} to {found.upper:+.4f})" in PAGES


def test_cloze_table_is_that_of_the_results():
    plan = sweep_plan.resolve(equivalence.get_config())
    settings = {tuple(map(str, run.setting)): run.setting for run in plan.runs}
    with (REPOSITORY / "docs/quality/cloze.csv").open() as file:
        rows = [
            cloze_tasks.Row(
                settings[tuple(row[field] for field in plan.fields)],
                int(row["seed"]),
                row["task"],
                int(row["questions"]),
                float(row["accuracy"]),
                float(row["standard_error"]),
            )
            for row in csv.DictReader(file)
        ]
    assert cloze_tasks.table(plan, rows) in PAGES


@pytest.mark.parametrize(
    ("name", "config"),
    [("equivalence", equivalence.get_config), ("equivalence_high_rate", high_rate)],
)
def test_registered_plan_is_that_of_the_command(name, config, tmp_path):
    shutil.copy(REPOSITORY / f"docs/quality/{name}_plan.json", tmp_path / registration.PLAN_FILE)
    registration.register(sweep_plan.resolve(config()), tmp_path)


@pytest.mark.parametrize(("module", "budget"), [(sweep_half, 0.5), (sweep_quarter, 0.25)])
def test_budget_is_the_one_that_the_sensitivity_found(module, budget):
    with (REPOSITORY / "docs/quality/sensitivity.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["layer"]]
    rise = {(r["layer"], r["sublayer"], float(r["sync_factor"])): float(r["rise"]) for r in rows}
    predicted = sum(
        rise.get((str(layer), sublayer, factor), 0.0)
        for layer, pair in enumerate(module.BY_SENSITIVITY)
        for sublayer, factor in zip(("attention", "mlp"), pair, strict=True)
    )
    uniform = sum(value for (_, _, factor), value in rise.items() if factor == budget)
    assert f"{predicted:+.4f}" in PAGES and f"{uniform:+.4f}" in PAGES
    assert sum(map(sum, module.BY_SENSITIVITY)) == budget * len(rows) / 4
