"""The tables of docs/quality.md are those of the results files beside it."""

import csv

import pytest

from caat_jax.sweep import plan as sweep_plan
from caat_jax.sweep import report
from configs import (
    equivalence,
    equivalence_rates,
    sweep,
    sweep_half,
    sweep_quarter,
    sweep_wires,
)
from tests.command_line import REPOSITORY

PAGE = (REPOSITORY / "docs/quality.md").read_text()


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


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("equivalence", equivalence),
        ("equivalence_rates", equivalence_rates),
        ("sweep", sweep),
        ("half", sweep_half),
        ("quarter", sweep_quarter),
        ("wires", sweep_wires),
    ],
)
def test_tables_are_those_of_the_results(name, module):
    plan = sweep_plan.resolve(module.get_config())
    results = results_of(name, plan)
    assert len(results) == (40 if name == "equivalence" else len(plan.runs))
    assert report.table(plan, report.summarise(plan, results)) in PAGE


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
    assert f"{predicted:+.4f}" in PAGE and f"{uniform:+.4f}" in PAGE
    assert sum(map(sum, module.BY_SENSITIVITY)) == budget * len(rows) / 4
