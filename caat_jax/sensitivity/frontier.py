"""Loss against predicted time: the best plans for all times, as a table, CSV and picture."""

import csv
import io
import textwrap
from collections.abc import Callable
from typing import NamedTuple

from caat_jax import figures
from caat_jax.config.architecture import SyncFactors
from caat_jax.sensitivity.budget import choose
from caat_jax.sensitivity.cuts import Sensitivity
from caat_jax.sensitivity.link_times import LinkTimes
from caat_jax.sensitivity.plans import Plan, candidates, synchronised
from caat_jax.sensitivity.report import WIDTH

POINTS = 12  # at most: each is measured
COLUMNS = ("speed_up", "seconds", "skipped", "synchronised", "rise", "measured_rise", "factors")


class Point(NamedTuple):
    """The factors of least predicted rise within some time; its fields are COLUMNS."""

    speed_up: float  # predicted, over p = 1
    seconds: float  # predicted, of a step or token
    skipped: int  # sublayers without synchronisation
    synchronised: float  # the mean fraction of channels
    rise: float  # predicted, of the validation loss, in nats a token
    measured_rise: float
    factors: SyncFactors


def frontier(
    sensitivity: Sensitivity, times: LinkTimes, loss: Callable[[SyncFactors], float]
) -> list[Point]:
    """The slowest first, at evenly spaced times; `loss` is that of the model with these factors."""
    some = candidates(sensitivity, times.cost)
    most = sum(sublayer[0].cost for sublayer in some.options)
    allowed = [most * n // (POINTS - 1) for n in reversed(range(POINTS))]
    choices = (choose(some.options, each) for each in allowed)
    points = []
    for choice in dict.fromkeys(tuple(choice) for choice in choices if choice):
        factors = some.sync_factors(choice)
        model = sensitivity.config.with_sync_factors(factors).model
        points.append(
            Point(
                times.speed_up(factors),
                times.seconds(factors),
                sum(width == 0 for pair in model.sync_widths for width in pair),
                synchronised(model),
                some.rise(choice),
                loss(factors) - sensitivity.uncut_loss,
                factors,
            )
        )
    return points


def table(points: list[Point], times: LinkTimes) -> str:
    """For a terminal of 80 columns."""
    sublayers = 2 * len(points[0].factors)
    lines = textwrap.wrap(
        f"{times.description}: predicted milliseconds, speed-up over p = 1, sublayers of"
        f" {sublayers} that send nothing, mean fraction of channels synchronised, and how far the"
        " validation loss rises, predicted and measured:",
        WIDTH,
    )
    lines += ["", f"{'ms':>10}  speed-up   skipped  channels  predicted  measured"]
    for point in points:
        lines.append(
            f"{1000 * point.seconds:>10.4g}  {point.speed_up:>8.3f}  {point.skipped:>8}"
            f"  {point.synchronised:>8.4f}  {point.rise:>+9.4f}  {point.measured_rise:>+8.4f}"
        )
    return "\n".join(lines)


def to_csv(points: list[Point]) -> str:
    """A row a point, with COLUMNS."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([COLUMNS, *points])
    return text.getvalue()


@figures.style()
def to_png(points: list[Point], times: LinkTimes, plan: Plan | None) -> bytes:
    """Predicted and measured rises by predicted speed-up; the plan's measured one apart."""
    figure = figures.new(7, 4.5)
    panel = figure.subplots()
    gains = [point.speed_up for point in points]
    panel.plot(gains, [point.rise for point in points], label="predicted", **figures.line(0))
    panel.plot(gains, [p.measured_rise for p in points], label="measured", **figures.line(1))
    if plan:
        gain = times.speed_up(plan.sync_factors)
        panel.plot([gain], [plan.measured_rise], linestyle="", label="the plan", **figures.line(2))
    panel.set(
        title=times.description,
        xlabel="predicted speed-up over p = 1",
        ylabel="rise of the validation loss, nats per token",
    )
    panel.legend()
    return figures.png(figure)
