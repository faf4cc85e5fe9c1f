"""Figures for what one measures side by side: bars made of parts, and curves over one axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from connlab.errors import SettingError
from connlab.figures import colours, style
from connlab.figures.picture import Picture
from connlab.figures.words import joined, number

PALETTE = (colours.WORKING, colours.WAITING, colours.OTHER, colours.IN_TRANSACTION, colours.LOCK)
MARKERS = "osD^v"
ROOM = 0.055
"""The share of the axis that a part needs to carry its number."""


def bars(
    rows: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    xlabel: str,
    look: str = "Compare the lengths.",
) -> Picture:
    """A horizontal bar for each name, made of parts that add up; its sum stands at its end.

    A part of several has its number inside, where it has the room; where there is one bar alone, in the legend.

    ``xlabel`` names what is measured, with its unit.

    Raises SettingError for no rows, for a row without parts, and for a part that is negative or no number.

    Example:
        ``bars({"trust": {"client": 0.7, "server": 3.0}}, title="CPU", xlabel="milliseconds for each connection")``
    """
    parts = _parts(rows)
    widest = max(sum(row.values()) for row in rows.values()) or 1
    with style.house_style():
        made, (axis,) = style.figure(1.2 + 0.42 * len(rows) + (0.25 if len(parts) > 1 else 0))
        style.head(made, title)
        starts = [0.0] * len(rows)
        for part, colour in zip(parts, itertools.cycle(PALETTE), strict=False):
            values = [row.get(part, 0.0) for row in rows.values()]
            label = part if len(rows) > 1 else f"{part}: {number(values[0])}"
            axis.barh(list(rows), values, left=starts, color=colour, edgecolor="white", height=0.62, label=label)
            if len(rows) > 1:
                _write_inside(axis, starts, values, widest, [sum(map(bool, row.values())) for row in rows.values()])
            starts = [start + value for start, value in zip(starts, values, strict=True)]
        _write_sums(axis, starts, widest)
        axis.set_xlim(0, widest * 1.13)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(xlabel)
        if len(parts) > 1:
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(parts), borderaxespad=0.2)
    return Picture(made, alt=_told_bars(rows, xlabel), look=look)


def _parts(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not rows or not all(rows.values()):
        raise SettingError("bars takes a dict from names to dicts of parts, such as {'trust': {'client': 0.7}}")
    for name, row in rows.items():
        for part, value in row.items():
            if not (math.isfinite(value) and value >= 0):
                raise SettingError(f"bars takes numbers from 0 up; {name}, {part} is {value!r}")
    return list(dict.fromkeys(part for row in rows.values() for part in row))


def _write_inside(
    axis: Axes, starts: Sequence[float], values: Sequence[float], widest: float, parts: Sequence[int]
) -> None:
    for place, (start, value) in enumerate(zip(starts, values, strict=True)):
        if parts[place] > 1 and value >= ROOM * widest:  # of a bar in one part, the sum says it already
            axis.text(start + value / 2, place, number(value), ha="center", va="center", color="white", fontsize=8.5)


def _write_sums(axis: Axes, sums: Sequence[float], widest: float) -> None:
    for place, value in enumerate(sums):
        axis.text(value + 0.008 * widest, place, number(value), va="center", fontweight="bold")


def _told_bars(rows: Mapping[str, Mapping[str, float]], xlabel: str) -> str:
    told = [f"bars, {xlabel}"]
    for name, row in rows.items():
        each = ", ".join(f"{part} {number(value)}" for part, value in row.items())
        told.append(f"{name}: {each}" + (f", together {number(sum(row.values()))}" if len(row) > 1 else ""))
    return joined(told)


def curves(
    at: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    look: str = "Compare the slopes.",
) -> Picture:
    """A line for each name over the same places ``at`` on the x axis; both axes begin at 0.

    Lines differ in colour and in marker. Raises SettingError for fewer than two places, for no line, and for a line
    that has not one finite number for each place.

    Example:
        ``curves([0, 45, 90], {"RSS": rss, "PSS": pss}, title="Memory", xlabel="connections", ylabel="MB")``
    """
    if len(at) < 2 or not lines:
        raise SettingError("curves takes two places or more, and a dict from names to as many numbers")
    for name, values in lines.items():
        if len(values) != len(at) or not all(map(math.isfinite, values)):
            raise SettingError(f"curves takes a finite number for each of {len(at)} places; {name} has {list(values)}")
    with style.house_style():
        made, (axis,) = style.figure(3.4)
        style.head(made, title)
        for (name, values), colour, marker in zip(
            lines.items(), itertools.cycle(PALETTE), itertools.cycle(MARKERS), strict=False
        ):
            axis.plot(at, values, color=colour, marker=marker, markersize=5, linewidth=2, label=name)
        axis.set_xlim(0, max(at) * 1.03)
        axis.set_ylim(0, max(map(max, lines.values())) * 1.1)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        axis.legend(loc="upper left")
    return Picture(made, alt=_told_curves(at, lines, xlabel, ylabel), look=look)


def _told_curves(at: Sequence[float], lines: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> str:
    told = [f"{ylabel} over {xlabel}, {len(lines)} line{'s' if len(lines) > 1 else ''}"]
    for name, values in lines.items():
        told.append(
            f"{name}: "
            + ", ".join(f"{number(place)}: {number(value)}" for place, value in zip(at, values, strict=True))
        )
    return joined(told)
