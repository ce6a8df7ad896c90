"""A sweep as a picture: the loss by setting, over the steps, and over the bytes sent."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from caat_jax import figures
from caat_jax.figures import COLOURS, MARKERS
from caat_jax.sweep.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from caat_jax.sweep.report import Summary

_STYLES = ("-", "--", ":", "-.")
_LEGEND_CHARACTERS = 150  # that fit side by side, about
_GREY = COLOURS[6]
# Of the axis below the first panel; of other fields it is the field's own name.
_NAMES = {
    "model.sync_factor": "p",
    "model.tp_shards": "S",
    "model.sync_factor_per_layer": "",
    "train.sync_schedule": "",
}

_Setting = tuple[Any, ...]  # as `Run.setting`


class Curve(NamedTuple):
    """The loss of a setting at each evaluation."""

    steps: Sequence[int]
    sent: Sequence[int]  # bytes, by one of S devices up to then
    losses: np.ndarray


@figures.style()
def plot(
    plan: Plan,
    summaries: Sequence["Summary"],
    curves: Mapping[_Setting, Curve],
    output: Path,
) -> None:
    """Writes the PNG `output`: a colour for each value of the compared field, a style for the rest.

    Args:
      plan: the sweep.
      summaries: a point each in the first panel.
      curves: a line each in the others.
      output: a path.
    """
    from matplotlib.ticker import EngFormatter

    figure = figures.new(15, 5.8)
    by_value, over_steps, over_bytes = figure.subplots(1, 3)
    looks = _looks(plan, summaries)
    _plot_by_value(by_value, plan, summaries, looks)
    for summary in summaries:
        curve = curves[summary.setting]
        colour, style, _ = looks[summary.setting]
        look = dict(color=colour, linestyle=style, linewidth=1.5)
        label = _label(plan.fields, summary.setting)
        over_steps.plot(curve.steps, curve.losses, **look, label=label)
        over_bytes.plot(curve.sent, curve.losses, **look)
    last = [curve.losses[-1] for curve in curves.values() if math.isfinite(curve.losses[-1])]
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
    # A column for each value of the compared field, if so many fit.
    fit = max(1, _LEGEND_CHARACTERS // (4 + max(map(len, labels))))
    columns = min(fit, len({colour for colour, *_ in looks.values()}))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    over_bytes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    over_steps.xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in (by_value, over_steps, over_bytes):
        panel.set_ylabel("nats per token")
    figures.save(figure, output)


def _looks(plan: Plan, summaries: Sequence["Summary"]) -> dict[_Setting, tuple[str, str, str]]:
    """Colour, line and marker of each setting; they repeat where there are too many."""
    place = plan.fields.index(plan.compared)
    values = list(dict.fromkeys(s.setting[place] for s in summaries))
    others = list(dict.fromkeys(_others(plan, s.setting) for s in summaries))
    looks = {}
    for summary in summaries:
        value = values.index(summary.setting[place])
        other = others.index(_others(plan, summary.setting))
        looks[summary.setting] = (
            COLOURS[value % len(COLOURS)],
            _STYLES[other % len(_STYLES)],
            MARKERS[other % len(MARKERS)],
        )
    return looks


def _plot_by_value(
    panel: "Axes",
    plan: Plan,
    summaries: Sequence["Summary"],
    looks: Mapping[_Setting, tuple[str, str, str]],
) -> None:
    """The last loss against the compared field, a grey line for each setting of the others."""
    place = plan.fields.index(plan.compared)
    values = list(dict.fromkeys(s.setting[place] for s in summaries))
    numeric = all(isinstance(value, int | float) for value in values)
    at = {value: value if numeric else n for n, value in enumerate(values)}
    lines: dict[_Setting, list[Summary]] = {}
    for summary in sorted(summaries, key=lambda s: at[s.setting[place]]):
        lines.setdefault(_others(plan, summary.setting), []).append(summary)
    for line in lines.values():
        style = looks[line[0].setting][1]
        xs, losses = [at[s.setting[place]] for s in line], [s.loss for s in line]
        panel.plot(xs, losses, color=_GREY, linestyle=style, linewidth=1)
    for summary in summaries:
        colour, _, marker = looks[summary.setting]
        x = at[summary.setting[place]]
        look = dict(color=colour, marker=marker, elinewidth=1.2, capsize=3)
        panel.errorbar(x, summary.loss, summary.spread, **look)
    if not numeric:
        names = [textwrap.fill(_words(plan.compared, value), 16) for value in values]
        panel.set_xticks(list(at.values()), names, fontsize=figures.SMALL)
        panel.margins(x=0.15)
    title = "Validation loss at the end; bars: deviation over seeds"
    panel.set(xlabel=_NAMES.get(plan.compared, plan.compared), title=title)


def _others(plan: Plan, setting: _Setting) -> _Setting:
    place = plan.fields.index(plan.compared)
    return setting[:place] + setting[place + 1 :]


def _label(fields: Sequence[str], setting: _Setting) -> str:
    return ", ".join(map(_words, fields, setting))


def _words(field: str, value: Any) -> str:
    """A field's value, for people."""
    if field == "model.sync_factor_per_layer":
        return f"p by layer, {_mean(value)}" if value else "p evenly"
    if field == "train.sync_schedule":
        stages = [f"p = {_mean(p)} to step {until}" for until, p in value]
        return ", ".join(stages) or "from the start"
    if field == "model.sync_factor":
        return f"p = {value:g}"
    if field == "model.tp_shards":
        return f"S = {value}"
    name = field.split(".")[-1].replace("_", " ")
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _mean(factors: float | Sequence) -> str:
    """Of a synchronisation factor, or of one for each layer or sublayer."""
    layers = factors if isinstance(factors, Sequence) else [factors]
    return f"{np.mean([np.mean(layer) for layer in layers]):.2g}"
