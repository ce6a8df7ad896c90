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
_LEGEND_CHARACTERS = 120  # that fit side by side, about
_GREY = COLOURS[6]
_ASIDE = 0.08  # between points of one value, of the distance between values that are no numbers
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
      curves: a line each in the others; where all have one evaluation, a point over the bytes.
      output: a path.
    """
    from matplotlib.ticker import EngFormatter

    figure = figures.new(12, 4.8)
    are_points = all(len(curve.steps) == 1 for curve in curves.values())
    by_value, *over_steps, over_bytes = figure.subplots(1, 2 if are_points else 3)
    looks = _looks(plan, summaries)
    _plot_by_value(by_value, plan, summaries, looks)
    for setting, (colour, style, marker) in looks.items():
        curve = curves[setting]
        look = dict(color=colour, linestyle=style, linewidth=1.5, marker=marker * are_points)
        for panel in over_steps:
            panel.plot(curve.steps, curve.losses, **look)
        over_bytes.plot(curve.sent, curve.losses, **look, label=_label(plan.fields, setting))
    for panel in over_steps:
        panel.set(xlabel="step", title="Validation loss over the steps")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    over_bytes.set(
        xlabel="bytes that one of S devices sent", title="Validation loss over the bytes sent"
    )
    if are_points:
        over_bytes.set_xlim(left=0)
    else:
        over_bytes.set_xscale("log")
    over_bytes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
    last = [curve.losses[-1] for curve in curves.values() if math.isfinite(curve.losses[-1])]
    if last and not are_points:
        # The first losses are high and alike: they would hide the differences.
        low, high = min(last), max(last)
        for panel in (*over_steps, over_bytes):
            panel.set_ylim(low - 0.02 * low, high + max(0.25 * high, high - low))
    for panel in figure.axes:
        panel.set_ylabel("nats per token")
    handles, labels = over_bytes.get_legend_handles_labels()
    # A column for each value of the compared field, if so many fit.
    fit = max(1, _LEGEND_CHARACTERS // (4 + max(map(len, labels))))
    columns = min(fit, len({colour for colour, *_ in looks.values()}))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figures.save(figure, output)


def _looks(plan: Plan, summaries: Sequence["Summary"]) -> dict[_Setting, tuple[str, str, str]]:
    """Colour, line and marker of each setting, by the compared value; too many share theirs."""
    place = plan.fields.index(plan.compared)
    values = list(dict.fromkeys(s.setting[place] for s in summaries))
    others = list(dict.fromkeys(_others(plan, s.setting) for s in summaries))
    looks = {}
    for summary in sorted(summaries, key=lambda s: values.index(s.setting[place])):
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
    for number, line in enumerate(lines.values()):
        aside = 0 if numeric else _ASIDE * (number - (len(lines) - 1) / 2)
        xs = [at[summary.setting[place]] + aside for summary in line]
        style = looks[line[0].setting][1]
        panel.plot(xs, [s.loss for s in line], color=_GREY, linestyle=style, linewidth=1)
        for x, summary in zip(xs, line, strict=True):
            colour, _, marker = looks[summary.setting]
            look = dict(color=colour, marker=marker, elinewidth=1.2, capsize=3)
            panel.errorbar(x, summary.loss, summary.spread, **look)
    if not numeric:
        names = [textwrap.fill(_words(plan.compared, value), 16) for value in values]
        panel.set_xticks(list(at.values()), names, fontsize=figures.SMALL)
        panel.margins(x=0.15)
    late = plan.late_evaluations
    title = "Last validation loss" if late == 1 else f"Mean of last {late} losses"
    title += " ± deviation over seeds"
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
