"""The factors that a budget buys, as a config file for train.py.

Predicted rises are sums of the measured costs of single cuts; docs/sensitivity.md says what that
leaves out.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from caat_jax.config.architecture import Architecture
from caat_jax.config.sections import Config
from caat_jax.config.stored import base_fields
from caat_jax.errors import InputError
from caat_jax.sensitivity.budget import Option, channels_allowed, choose
from caat_jax.sensitivity.cuts import SUBLAYERS, Sensitivity
from configs import base


class Plan(NamedTuple):
    """The best factors found for a budget."""

    budget: float  # of the channels, the mean fraction that may be synchronised
    config: Config  # the checkpoint's, with these factors throughout
    rise: float  # predicted, of the validation loss, in nats a token
    uniform_rise: float | None  # with the budget as every sublayer's factor; None: not measured

    @property
    def synchronised(self) -> float:
        """The mean fraction of channels that the factors synchronise."""
        widths = [width for pair in self.config.model.sync_widths for width in pair]
        return sum(widths) / (len(widths) * self.config.model.embed_dim)


def check_budget(budget: float, model: Architecture, sync_factors: Sequence[float]) -> None:
    """Refuses a budget that no choice among a model's own factors and these can meet.

    Raises:
      InputError: it is out of range, or below the smallest factors.
    """
    if not 0 <= budget <= 1:
        raise InputError(f"--budget={budget} is outside [0, 1]")
    owns = [p for pair in model.sync_factors for p in pair]
    smallest = sum(model.sync_width(min(own, *sync_factors)) for own in owns)
    if smallest > channels_allowed(budget, len(owns), model.embed_dim):
        possible = math.ceil(1e6 * smallest / (len(owns) * model.embed_dim)) / 1e6
        raise InputError(
            f"--budget={budget} is below what every sublayer's smallest factor takes; at least"
            f" {possible:g} is possible, or less with smaller factors in --cut_to"
        )


def plan(sensitivity: Sensitivity, budget: float) -> Plan:
    """The factors of least predicted rise, among those measured and each sublayer's own.

    Raises:
      InputError: the budget needs a cut whose loss is not finite.
    """
    model = sensitivity.config.model
    candidates = [
        {own: 0.0}
        | {
            cut.sync_factor: sensitivity.rise(cut)
            for cut in sensitivity.cut_losses
            if (cut.layer, cut.sublayer) == (layer, sublayer)
        }
        for layer, pair in enumerate(model.sync_factors)
        for sublayer, own in zip(SUBLAYERS, pair, strict=True)
    ]
    options = [
        [Option(model.sync_width(factor), rise) for factor, rise in rises.items()]
        for rises in candidates
    ]
    choice = choose(options, channels_allowed(budget, len(options), model.embed_dim))
    if choice is None:
        raise InputError(f"--budget={budget} cannot be met: it takes cuts whose loss is not finite")
    chosen = [list(rises)[taken] for rises, taken in zip(candidates, choice, strict=True)]
    pairs = tuple(zip(chosen[::2], chosen[1::2], strict=True))
    config = sensitivity.config
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, sync_schedule=())
    ).with_sync_factors(pairs)
    return Plan(
        budget,
        config,
        math.fsum(rises[factor] for rises, factor in zip(candidates, chosen, strict=True)),
        _uniform_rise(sensitivity, budget),
    )


def _uniform_rise(sensitivity: Sensitivity, budget: float) -> float | None:
    if budget not in sensitivity.sync_factors():
        return None
    # A sublayer whose own factor is not above the budget has no cut to it, and keeps its own.
    return math.fsum(
        sensitivity.rise(cut) for cut in sensitivity.cut_losses if cut.sync_factor == budget
    )


def file_name(budget: float) -> str:
    """Within the workdir."""
    return f"budget_{budget}.py"


def source(plan: Plan, sensitivity: Sensitivity, workdir: Path) -> str:
    """A config file such as configs/tiny.py, that resolves to `plan.config`."""
    lines = [
        f'"""{_docstring(plan, sensitivity, workdir)}"""',
        "",
        "from configs import base",
        "",
        "",
        "def get_config():",
        "    config = base.get_config()",
    ]
    for name, value in _changed_fields(plan.config):
        lines.append(f"    config.{name} = {_literal(value)}")
    for layer, pair in enumerate(plan.config.model.sync_factors):
        opening = ["    config.model.sync_factor_per_layer = ("] if layer == 0 else []
        lines += [*opening, f"        {pair},  # attention and MLP of layer {layer}"]
    return "\n".join([*lines, "    )", "    return config", ""])


def _docstring(plan: Plan, sensitivity: Sensitivity, workdir: Path) -> str:
    measured = ", ".join(f"{factor:g}" for factor in sensitivity.sync_factors())
    step, before = sensitivity.step, sensitivity.config.model
    train = f"python train.py {shlex.quote(f'--config={workdir / file_name(plan.budget)}')}"
    schedule = shlex.quote(f"(({step}, {_old_factors(before)}),)")
    text = f"""\
Synchronises at most {plan.budget:g} of the channels, where cutting costs the least validation loss.

    {train} --workdir=NEW

trains it from the start. On a copy of the workdir, training resumes from the checkpoint of step
{step} with these factors; MORE is a step above {step}:

    cp -r {shlex.quote(str(workdir))} NEW
    {train} --workdir=NEW --config.train.sync_schedule={schedule} --config.train.steps=MORE

Made by python -m caat_jax.sensitivity --budget={plan.budget} of that checkpoint in
{workdir}.
Mean over sublayers of the synchronised fraction: {plan.synchronised:.6g}.
Predicted rise of the validation loss: {plan.rise:+.6f} nats per token, the sum of the rises that
single cuts, to {measured}, were measured to cause. The other fields are the checkpoint's.
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
