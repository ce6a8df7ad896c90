"""A plan's factors as a config file for train.py."""

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

from caat_jax.config.architecture import Architecture
from caat_jax.config.sections import Config
from caat_jax.config.stored import base_fields
from caat_jax.sensitivity.cuts import Sensitivity
from caat_jax.sensitivity.plans import Plan, synchronised
from configs import base


def with_plan(config: Config, plan: Plan) -> Config:
    """The checkpoint's configuration with the plan's factors throughout."""
    train = dataclasses.replace(config.train, sync_schedule=())
    return dataclasses.replace(config, train=train).with_sync_factors(plan.sync_factors)


def file_name(plan: Plan) -> str:
    """Within the workdir."""
    return f"{plan.limit.flag.replace('=', '_')}.py"


def source(plan: Plan, sensitivity: Sensitivity, workdir: Path) -> str:
    """A config file such as configs/tiny.py, that resolves to `with_plan`'s configuration."""
    config = with_plan(sensitivity.config, plan)
    lines = [
        f'"""{_docstring(plan, sensitivity, workdir)}"""',
        "",
        "from configs import base",
        "",
        "",
        "def get_config():",
        "    config = base.get_config()",
    ]
    for name, value in _changed_fields(config):
        lines.append(f"    config.{name} = {_literal(value)}")
    for layer, pair in enumerate(config.model.sync_factors):
        opening = ["    config.model.sync_factor_per_layer = ("] if layer == 0 else []
        lines += [*opening, f"        {pair},  # attention and MLP of layer {layer}"]
    return "\n".join([*lines, "    )", "    return config", ""])


def _docstring(plan: Plan, sensitivity: Sensitivity, workdir: Path) -> str:
    measured = ", ".join(f"{factor:g}" for factor in sensitivity.sync_factors())
    step, before = sensitivity.step, sensitivity.config.model
    train = f"python train.py {shlex.quote(f'--config={workdir / file_name(plan)}')}"
    schedule = shlex.quote(f"(({step}, {_old_factors(before)}),)")
    after = with_plan(sensitivity.config, plan).model
    text = f"""\
{plan.limit.purpose}, where cutting costs the least validation loss.

    {train} --workdir=NEW

trains it from the start. On a copy of the workdir, training resumes from the checkpoint of step
{step} with these factors; MORE is a step above {step}:

    cp -r {shlex.quote(str(workdir))} NEW
    {train} --workdir=NEW --config.train.sync_schedule={schedule} --config.train.steps=MORE

Made by python -m caat_jax.sensitivity --{plan.limit.flag} of that checkpoint in
{workdir}.
Mean over sublayers of the synchronised fraction: {synchronised(after):.6g}.
Rise of the checkpoint's validation loss, in nats per token: {plan.measured_rise:+.6f} measured,
{plan.rise:+.6f} predicted, the sum of the rises that single cuts, to {measured}, were measured to
cause. The other fields are the checkpoint's.
"""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _old_factors(model: Architecture) -> str:
    """One number, where all are the same."""
    factors = {p for pair in model.sync_factors for p in pair}
    return str(factors.pop() if len(factors) == 1 else model.sync_factors)


def _changed_fields(config: Config) -> list[tuple[str, Any]]:
    """The fields that differ from base's, as `section.field` or `seed`, without the factors."""
    defaults = base.get_config()
    sections = base_fields(config)
    seed = sections.pop("seed")
    changed = [("seed", seed)] if seed != defaults.seed else []
    return changed + [
        (f"{section}.{field}", value)
        for section, values in sections.items()
        for field, value in values.items()
        if value != defaults[section][field] and field != "sync_factor_per_layer"
    ]


def _literal(value: Any) -> str:
    """In Python, as `ruff format` would have it; infinity has no literal of its own."""
    if isinstance(value, str):
        return json.dumps(value)
    return 'float("inf")' if value == math.inf else repr(value)
