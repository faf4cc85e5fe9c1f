"""What several clients or threads did side by side, from when until when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from connlab.errors import SettingError
from connlab.figures import colours, style
from connlab.figures.picture import Picture
from connlab.figures.words import joined, number


class Look(NamedTuple):
    """How a kind of span is drawn: hollow and hatched for what gets nothing done."""

    colour: str
    hatch: str | None = None


MEANINGS = {
    "working": Look(colours.WORKING),
    "waiting": Look(colours.WAITING, "////"),
    "failing": Look(colours.WAITING, "xxxx"),
    "in transaction": Look(colours.IN_TRANSACTION),
    "lock": Look(colours.LOCK, "\\\\\\\\"),
    "opening": Look(colours.OPENING),
    "idle": Look(colours.IDLE),
}
"""What a kind can mean, in the colours of all other figures."""
Spans = Iterable[tuple[str, float, float]]


def spans(
    lanes: Mapping[str, Spans],
    kinds: Mapping[str, str],
    *,
    title: str,
    xlabel: str,
    ylabel: str = "threads",
    look: str = "Look along a lane, then across all of them at one moment.",
    marks: Iterable[tuple[float, str]] = (),
) -> Picture:
    """A lane for each name, with a bar for each ``(kind, from, until)`` in it; ``xlabel`` has the unit of both times.

    ``kinds`` says what each kind means, which decides its colour: one of "working", "waiting", "failing",
    "in transaction", "lock", "opening", "idle". ``marks`` are moments, each with its text.

    Raises SettingError for no lanes, for a kind or a meaning that is not known, and for times that do not rise.

    Example::

        figures.spans(
            {"thread 1": [("query", 0, 100)], "thread 2": [("waits", 0, 100), ("query", 100, 200)]},
            {"query": "working", "waits": "waiting"},
            title="Two threads, one connection",
            xlabel="milliseconds",
        )
    """
    given = {name: list(own) for name, own in lanes.items()}
    _check(given, kinds)
    with style.house_style():
        made, (axis,) = style.figure(1.7 + 0.3 * len(given))
        style.head(made, title)
        for place, own in enumerate(given.values()):
            for kind, start, end in own:
                _draw(axis, place, start, end, MEANINGS[kinds[kind]])
        _draw_marks(axis, marks := list(marks))
        axis.set_yticks(range(len(given)), list(given))
        axis.set_ylim(len(given) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        made.legend(handles=_legend(kinds), loc="outside lower left", ncols=4)
    return Picture(made, alt=_told(given, kinds, marks, xlabel), look=look)


def _check(lanes: Mapping[str, Sequence[tuple[str, float, float]]], kinds: Mapping[str, str]) -> None:
    if not any(lanes.values()):
        raise SettingError("spans takes a dict from lanes to lists of (kind, from, until), and there is none")
    for kind, meaning in kinds.items():
        if meaning not in MEANINGS:
            raise SettingError(f"{kind!r} means {meaning!r}; spans knows {', '.join(MEANINGS)}")
    for name, own in lanes.items():
        for kind, start, end in own:
            if kind not in kinds:
                raise SettingError(f"{name}: spans was not told what {kind!r} means, only {', '.join(kinds)}")
            if not (math.isfinite(start) and math.isfinite(end) and start <= end):
                raise SettingError(f"{name}: {kind} from {start} until {end} is no span")


def _draw(axis: Axes, place: int, start: float, end: float, how: Look) -> None:
    axis.barh(
        place,
        end - start,
        left=start,
        height=0.72,
        color="none" if how.hatch else how.colour,
        edgecolor=how.colour if how.hatch else "white",
        hatch=how.hatch,
        linewidth=0.8 if how.hatch else 0.4,
    )


def _draw_marks(axis: Axes, marks: Sequence[tuple[float, str]]) -> None:
    for at, text in marks:
        axis.axvline(at, color=colours.TEXT, linewidth=1, linestyle=":")
        where = axis.get_xaxis_transform()
        axis.annotate(text, (at, 1), xycoords=where, xytext=(2, 2), textcoords="offset points", fontsize=8.5)


def _legend(kinds: Mapping[str, str]) -> list[Patch]:
    return [
        Patch(
            facecolor="none" if MEANINGS[meaning].hatch else MEANINGS[meaning].colour,
            edgecolor=MEANINGS[meaning].colour,
            hatch=MEANINGS[meaning].hatch,
            label=kind,
        )
        for kind, meaning in kinds.items()
    ]


def _told(
    lanes: Mapping[str, Sequence[tuple[str, float, float]]],
    kinds: Mapping[str, str],
    marks: Sequence[tuple[float, str]],
    xlabel: str,
) -> str:
    parts = [f"{len(lanes)} lane{'s' if len(lanes) > 1 else ''}, {xlabel}"]
    for name, own in lanes.items():
        each = [_told_kind(kind, [span for span in own if span[0] == kind]) for kind in kinds]
        parts.append(f"{name}: {', '.join(filter(None, each)) or 'nothing'}")
    return joined([*parts, *(f"mark at {number(at)}: {text}" for at, text in marks)])


def _told_kind(kind: str, own: Sequence[tuple[str, float, float]]) -> str:
    if not own:
        return ""
    first, last = min(start for _, start, _ in own), max(end for _, _, end in own)
    times = f"{len(own)} times " if len(own) > 1 else ""
    return f"{times}{kind} from {number(first)} to {number(last)}"
