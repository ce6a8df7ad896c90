"""A study's plan, written down before its first run: what is asked, and what will answer it."""

import datetime
import json
from pathlib import Path
from typing import Any

from caat_jax import files
from caat_jax.config.stored import difference, from_json, to_json
from caat_jax.errors import InputError
from caat_jax.sweep import protocol
from caat_jax.sweep.plan import Plan

PLAN_FILE = "plan.json"
_DATE = "registered"
_RUN = "run"


def register(plan: Plan, workdir: Path) -> None:
    """Writes DIR/plan.json, unless it is there already; a sweep without a margin has none.

    Raises:
      InputError: another plan is there.
    """
    if not plan.margin:
        return
    path = workdir / PLAN_FILE
    try:
        there = files.read_json(path, dict)
    except FileNotFoundError:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        workdir.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps({_DATE: now, **content(plan)}, indent=2) + "\n")
        return
    expected = json.loads(json.dumps(content(plan)))
    del expected[_RUN]
    differing = [
        f"{name}: registered {there.get(name)}, requested {value}"
        for name, value in expected.items()
        if there.get(name) != value
    ]
    # As configurations: the plan of an older version lacks fields that were added since.
    differing += difference(from_json(there.get(_RUN, {})), plan.runs[0].config)
    if differing:
        raise InputError(
            f"{path} is the plan of another study, registered on {there.get(_DATE)}"
            f" ({'; '.join(differing)}); give another --workdir"
        )


def content(plan: Plan) -> dict[str, Any]:
    """All of the plan but its date."""
    settings = dict.fromkeys(run.setting for run in plan.runs)
    return {
        "metric": "validation loss, nats a token: the mean of the last"
        f" {plan.late_evaluations} evaluations of a run",
        "margin": plan.margin,
        "compared": plan.compared,
        "baseline": plan.baseline,
        "settings": [dict(zip(plan.fields, setting, strict=True)) for setting in settings],
        "seeds": plan.seeds,
        "pairs at each look": list(plan.looks),
        "error of either verdict, one-sided, all looks together": protocol.ERROR,
        "error at each look": protocol.ERROR / len(plan.looks),
        "exclusions": "none; a run whose loss is not finite leaves its setting undecided",
        _RUN: to_json(plan.runs[0].config),
    }
