"""The one style of all pictures."""

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
