"""What single cuts cost, as a table, as CSV and as a picture."""

import csv
import io
import math
import textwrap
from typing import TYPE_CHECKING

from caat_jax import figures
from caat_jax.sensitivity.cuts import SUBLAYERS, Cut, Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

COLUMNS = ("layer", "sublayer", "sync_factor", "loss", "rise")
WIDTH = 80

_FACTORS_IN_A_LINE = 5  # as many as WIDTH has room for
# In the picture: one sublayer, often in the first layer, may dwarf the others.  So if any rise is
# above the second value, the scale is logarithmic above the first.
_LOGARITHMIC_FROM, _LOGARITHMIC_IF_ABOVE = 0.01, 0.1


def table(sensitivity: Sensitivity) -> str:
    """For a terminal of 80 columns; a dash where a sublayer's own factor is not above the cut."""
    model = sensitivity.config.model
    lines = textwrap.wrap(
        f"step {sensitivity.step}, S={model.tp_shards}, p={model.describe_sync_factors()}:"
        f" validation loss {sensitivity.uncut_loss:.6f} nats per token. It rises by this much when"
        " one sublayer alone is cut to the factor at the head of the column:",
        WIDTH,
    )
    factors = sensitivity.sync_factors()
    for first in range(0, len(factors), _FACTORS_IN_A_LINE):
        some = factors[first : first + _FACTORS_IN_A_LINE]
        heads = "".join(f"{factor:>10g}" for factor in some)
        lines += ["", f"{'layer':>5}  {'sublayer':<9}  {'own':>8}{heads}"]
        for layer, pair in enumerate(model.sync_factors):
            for sublayer, own in zip(SUBLAYERS, pair, strict=True):
                cells = (_cell(sensitivity, Cut(layer, sublayer, factor)) for factor in some)
                lines.append(f"{layer:>5}  {sublayer:<9}  {own:>8g}{''.join(cells)}")
    return "\n".join(lines)


def _cell(sensitivity: Sensitivity, cut: Cut) -> str:
    return f"{sensitivity.rise(cut):>+10.4f}" if cut in sensitivity.cut_losses else f"{'-':>10}"


def to_csv(sensitivity: Sensitivity) -> str:
    """The model without a cut in the first row, which has no layer; then one row a cut."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerow(("", "", "", sensitivity.uncut_loss, 0.0))
    for cut, loss in sensitivity.cut_losses.items():
        writer.writerow((*cut, loss, sensitivity.rise(cut)))
    return text.getvalue()


@figures.style()
def to_png(sensitivity: Sensitivity) -> bytes:
    """A panel for attention and one for the MLP; a line for each of up to 8 factors."""
    model = sensitivity.config.model
    figure = figures.new(12, 5)
    panels = figure.subplots(1, len(SUBLAYERS), sharex=True, sharey=True)
    for panel, sublayer, title in zip(panels, SUBLAYERS, ("Attention", "MLP"), strict=True):
        _plot_sublayer(panel, sensitivity, sublayer)
        panel.set_title(title)
    if any(abs(sensitivity.rise(cut)) > _LOGARITHMIC_IF_ABOVE for cut in sensitivity.cut_losses):
        _scale_logarithmically(panels[0].yaxis)
    panels[0].set_ylabel("rise of the validation loss, nats per token")
    panels[0].legend(title="cut to")
    factors = textwrap.shorten(model.describe_sync_factors(), 100, placeholder=" …")
    figure.suptitle(
        f"One sublayer cut at a time: step {sensitivity.step}, S = {model.tp_shards},"
        f" p = {factors}, validation loss {sensitivity.uncut_loss:.4f}"
    )
    return figures.png(figure)


def _scale_logarithmically(axis: "Axis") -> None:
    """Except around 0, since rises may be negative."""
    from matplotlib.ticker import StrMethodFormatter, SymmetricalLogLocator

    axis.axes.set_yscale("symlog", linthresh=_LOGARITHMIC_FROM)
    axis.set_major_locator(SymmetricalLogLocator(axis.get_transform(), subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _plot_sublayer(panel: "Axes", sensitivity: Sensitivity, sublayer: str) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = range(sensitivity.config.model.layers)
    panel.axhline(0, color="#888888", linewidth=0.8)
    for number, factor in enumerate(sensitivity.sync_factors()):
        cuts = [Cut(layer, sublayer, factor) for layer in layers]
        panel.plot(
            layers,
            [sensitivity.rise(c) if c in sensitivity.cut_losses else math.nan for c in cuts],
            label=f"{factor:g}",
            **figures.line(number),
        )
    panel.set_xlabel("layer")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
