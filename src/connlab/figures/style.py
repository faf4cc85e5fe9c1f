"""The one look of the course's figures, which leaves the notebook's own matplotlib settings alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from connlab.figures.colours import TEXT

WIDTH = 8.5
"""Inches; fits a notebook's output at 100 %."""

_RULES: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "connlab",
    "path.simplify": True,
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Draw in the course's look, whatever the notebook has set, and leave its settings as they are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RULES)  # type: ignore[arg-type]
        yield


def figure(height: float, *, rows: int = 1, ratios: list[float] | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of the course's width that pyplot knows nothing of, and its axes from top to bottom, one x axis."""
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = made.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)
    return made, [row[0] for row in axes]


def head(made: Figure, title: str) -> None:
    """The figure's title, at its left edge."""
    made.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
