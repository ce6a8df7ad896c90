"""The tables of docs/quality.md are those of the results files beside it."""

import csv

import pytest

from caat_jax.sweep import plan as sweep_plan
from caat_jax.sweep import report
from configs import sweep, sweep_half, sweep_quarter, sweep_wires
from tests.command_line import REPOSITORY

PAGE = (REPOSITORY / "docs/quality.md").read_text()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("sweep", sweep),
        ("half", sweep_half),
        ("quarter", sweep_quarter),
        ("wires", sweep_wires),
    ],
)
def test_tables_are_those_of_the_results(name, module):
    plan = sweep_plan.resolve(module.get_config())
    with (REPOSITORY / f"docs/quality/{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(plan.runs)
    results = []
    for run, row in zip(plan.runs, rows, strict=True):
        settings = {field: str(value) for field, value in run.settings.items()}
        assert {field: row[field] for field in settings} == settings
        numbers = [int(row[column]) for column in ("seed", "tokens", "wire_bytes")]
        results.append(report.Result(run.setting, *numbers, float(row["loss"])))
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
