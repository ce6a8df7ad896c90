"""The one style of all pictures, and how they are written.

Matplotlib is imported where something is drawn: commands that draw nothing start without it.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caat_jax import files
from caat_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of about equal darkness, and told apart by colour-blind readers (after Okabe and Ito).
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b2559b",
    "#e0a100",
    "#56b4e9",
    "#555555",
    "#8c510a",
)
MARKERS = "osD^vPXh"  # in case the plot is printed in grey
SMALL = 9  # points, of the text inside of a panel

_STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.fontsize": SMALL,
    "legend.title_fontsize": SMALL,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """What is drawn within it, or in a function that it decorates, is in the style."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new(width: float, height: float) -> "Figure":
    """An empty figure of this many inches, within `style`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def line(number: int) -> dict[str, Any]:
    """Colour and markers of the line of this number, for `Axes.plot`; they repeat after 8."""
    return dict(
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        markeredgecolor="white",
        markeredgewidth=0.6,
    )


def png(figure: "Figure") -> bytes:
    """A figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def save(figure: "Figure", output: Path) -> None:
    """Writes the PNG `output`.

    Raises:
      InputError: it cannot be written.
    """
    try:
        files.write(output, png(figure))
    except OSError as error:
        raise InputError(f"the picture {output} cannot be written: {error.strerror}") from None
