"""Draws the picture of docs/idea.md: `python docs/idea/draw.py` writes layer.svg and layer.png.

One layer on two of the S shards.  A stream is an upright bar of D channels: what all shards share
is blue, what a shard keeps has the shard's own colour.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from caat_jax import figures

FOLDER = Path(__file__).parent
SHARED, PRIVATE, GREY = figures.COLOURS[0], figures.COLOURS[1:3], figures.COLOURS[6]
ROWS = (3.3, 0.0)  # the lower edges of the two shards' bars
WIDTH, HEIGHT, SHARED_HEIGHT = 0.5, 1.9, 0.95
STREAMS, SUBLAYERS, OUTPUTS, SUMS = (0.0, 4.7, 9.4), (1.5, 6.2), (2.75, 7.45), (3.75, 8.45)
MIDDLE = (ROWS[0] + ROWS[1] + HEIGHT) / 2


def bar(axes: Axes, x: float, row: int, is_output: bool = False) -> None:
    """The channels of one shard; of a sublayer's output, nothing is shared yet."""
    shared_colour = PRIVATE[row] if is_output else SHARED
    for height, bottom, colour, alpha in (
        (SHARED_HEIGHT, shared_bottom(row), shared_colour, 0.55 if is_output else 1.0),
        (HEIGHT - SHARED_HEIGHT, private_bottom(row), PRIVATE[row], 1.0),
    ):
        axes.add_patch(
            Rectangle((x, bottom), WIDTH, height, facecolor=colour, alpha=alpha, edgecolor="white")
        )


def shared_bottom(row: int) -> float:
    """Shared channels are on the side of the other shard, towards which they go."""
    return ROWS[row] + (HEIGHT - SHARED_HEIGHT) * (row == 1)


def private_bottom(row: int) -> float:
    """The rest of the bar."""
    return ROWS[row] + SHARED_HEIGHT * (row == 0)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """From one point to another."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.5,
            shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def sublayer(axes: Axes, number: int) -> None:
    """From the streams before a sublayer, by its sum, to the streams after it."""
    box, output, total = SUBLAYERS[number], OUTPUTS[number], SUMS[number]
    stream, after = STREAMS[number], STREAMS[number + 1]
    for row in range(2):
        middle = ROWS[row] + HEIGHT / 2
        axes.add_patch(
            FancyBboxPatch(
                (box - 0.5, middle - 0.55), 1.0, 1.1, boxstyle="round,pad=0.04",
                facecolor="#f2f2f2", edgecolor=PRIVATE[row],
            )
        )  # fmt: skip
        part = "heads" if number == 0 else "columns"
        text = f"RMSNorm,\n{part} of\nshard {'1S'[row]}"
        axes.text(box, middle, text, ha="center", va="center", fontsize=8)
        arrow(axes, (stream + WIDTH, middle), (box - 0.54, middle), GREY)
        arrow(axes, (box + 0.54, middle), (output, middle), GREY)
        bar(axes, output, row, is_output=True)
        shared = shared_bottom(row) + SHARED_HEIGHT / 2
        private = private_bottom(row) + (HEIGHT - SHARED_HEIGHT) / 2
        towards = 0.22 if row == 0 else -0.22
        arrow(axes, (output + WIDTH, shared), (total - 0.1, MIDDLE + towards), SHARED)
        arrow(axes, (total + 0.1, MIDDLE + towards), (after, shared), SHARED)
        arrow(axes, (output + WIDTH, private), (after, private), PRIVATE[row])
        axes.text(
            (output + WIDTH + after) / 2, private + 0.1, "√S", ha="center", color=PRIVATE[row]
        )
    axes.text(
        total, MIDDLE, "Σ", ha="center", va="center", fontsize=15, color="white",
        bbox=dict(boxstyle="circle,pad=0.18", facecolor=SHARED, edgecolor="none"),
    )  # fmt: skip


def draw(axes: Axes) -> None:
    """The whole layer, with what its parts are called."""
    axes.set(xlim=(-1.5, 10.4), ylim=(-0.75, 6.0), aspect="equal")
    axes.axis("off")
    for row in range(2):
        for x in STREAMS:
            bar(axes, x, row)
        name = f"shard {'1S'[row]}"
        axes.text(-0.2, ROWS[row] + HEIGHT / 2, name, ha="right", va="center", color=PRIVATE[row])
    axes.text(WIDTH / 2, MIDDLE, "⋮", ha="center", va="center", fontsize=16, color=GREY)
    labels = {
        STREAMS[0] + WIDTH / 2: "stream x",
        SUBLAYERS[0]: "attention",
        OUTPUTS[0] + WIDTH / 2: "output y",
        STREAMS[1] + WIDTH / 2: "x + z",
        SUBLAYERS[1]: "MLP",
        OUTPUTS[1] + WIDTH / 2: "output y",
        STREAMS[2] + WIDTH / 2: "x + z",
    }
    for x, label in labels.items():
        axes.text(x, ROWS[0] + HEIGHT + 0.25, label, ha="center", fontweight="bold")
    for text, colour, x in (
        ("p·D channels: summed over the shards, equal on all", SHARED, 0.0),
        ("the rest: each shard's own, never sent", PRIVATE[1], 5.6),
    ):
        axes.add_patch(Rectangle((x, -0.62), 0.22, 0.22, facecolor=colour))
        axes.text(x + 0.32, -0.51, text, va="center")
    axes.add_patch(Rectangle((5.35, -0.62), 0.22, 0.22, facecolor=PRIVATE[0]))
    for number in range(2):
        sublayer(axes, number)


def main() -> None:
    """Writes both files beside this script."""
    with figures.style():
        import matplotlib

        matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "idea"})
        figure = figures.new(9, 5.1)
        draw(figure.subplots())
        figure.savefig(FOLDER / "layer.svg", metadata={"Date": None})
        figures.save(figure, FOLDER / "layer.png")


if __name__ == "__main__":
    main()
