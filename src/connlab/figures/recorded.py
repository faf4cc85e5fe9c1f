"""The timeline: what happened at the same moments in the pool, in PgBouncer and in PostgreSQL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from connlab.errors import SettingError
from connlab.figures import colours, style
from connlab.figures.lanes import FAR, LANES, Lane, Layer, summed
from connlab.figures.picture import Picture
from connlab.figures.words import course_of, joined, number
from connlab.recorder import Gap, Mark, Recorder, Series

LABEL_WIDTH = 0.013
"""What a letter of a mark's label takes of the axis' width, about."""
ROWS = 3
CROSSES = 10
"""Points that a row of crosses needs between a lane and its title."""


class Track:
    """A source with its lane, and its values between two moments."""

    def __init__(self, series: Series, since: float, until: float) -> None:
        self.source, self.lane, self.gaps = series.source, LANES[series.kind], series.gaps
        self.given_limit = math.inf
        self.failures: list[float] = []
        times, columns = series.columns(since)
        shown = slice(0, sum(1 for at in times if at <= until))
        self.times = np.clip(np.asarray(times[shown]), since, until)
        self.columns = {metric: values[shown] for metric, values in columns.items()}

    def values(self, layer: Layer) -> list[float]:
        """The layer's values at ``times``."""
        return summed(self.columns, layer, len(self.times))

    @property
    def limit(self) -> float:
        """The limit that was given, or the newest that was recorded; infinite when there is none."""
        if math.isfinite(self.given_limit):
            return self.given_limit
        known = [value for value in self.columns.get(self.lane.limit or "", ()) if not math.isnan(value)]
        return known[-1] if known else math.inf

    @property
    def top(self) -> float:
        """The highest that bands and lines get."""
        heights = [np.asarray(self.values(layer)) for layer in self.lane.bands]
        lines = [np.asarray(self.values(layer)) for layer in self.lane.lines]
        found = [*lines, np.sum(heights, axis=0)] if heights else lines
        return max((float(np.nanmax(values)) for values in found if np.isfinite(values).any()), default=0.0)


def timeline(
    rec: Recorder,
    *,
    title: str = "What happened, on one clock",
    look: str = "Look at what changes in every lane at the same moment.",
    since: float = 0.0,
    until: float | None = None,
    limits: Mapping[str, float] | None = None,
    failures: Mapping[str, Sequence[float]] | None = None,
) -> Picture:
    """A lane for each recorded source: pools, PgBouncers, PostgreSQLs; marks, limits and gaps drawn.

    ``since`` and ``until``: seconds of the recording to show. Bands are stacked connections; an orange line is the
    clients that wait for one. A hatched stretch is one in which the source did not answer.

    ``limits``: a source's name and the limit to draw in its lane, such as a PgBouncer's pool size, which the recorder
    does not know. ``failures``: a source's name and the seconds (``rec.now()``) at which somebody was refused there or
    gave up: a cross each, and their number in the legend.

    Raises SettingError when nothing was recorded then, and for a source that was not recorded.

    Example:
        ``timeline(rec, look="Look at the orange line: it begins when the grey band is gone.")``
    """
    end = rec.now() if until is None else until
    tracks = [Track(series, since, end) for series in rec.series]
    if not end > since or not any(len(track.times) for track in tracks):
        raise SettingError(f"nothing was recorded between {since:g} s and {end:g} s")
    for name, limit in (limits or {}).items():
        _named(tracks, name).given_limit = limit
    for name, moments in (failures or {}).items():
        _named(tracks, name).failures = sorted(at for at in moments if since <= at <= end)
    marks = [mark for mark in rec.marks if since <= mark.seconds <= end]
    with style.house_style():
        made, axes = style.figure(0.9 + 1.75 * len(tracks), rows=len(tracks))
        style.head(made, title)
        for axis, track in zip(axes, tracks, strict=True):
            _draw(axis, track, end)
        axes[-1].set_xlim(since, end)
        axes[-1].set_xlabel("seconds since the recording began")
        _draw_marks(axes, marks, since, end, above=20 + (CROSSES if tracks[0].failures else 0))
    return Picture(made, alt=_alternative(tracks, marks, end), look=look)


def _named(tracks: Sequence[Track], name: str) -> Track:
    found = next((track for track in tracks if track.source == name), None)
    if found is None:
        raise SettingError(f"{name!r} was not recorded; there is {', '.join(track.source for track in tracks)}")
    return found


def _draw(axis: Axes, track: Track, end: float) -> None:
    lane = track.lane
    same = track.source.lower() in (lane.title.lower(), "pool")
    above = 4 + (CROSSES if track.failures else 0)
    title = axis.set_title(lane.title if same else f"{track.source} ({lane.title})", pad=above)
    title.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # a mark's line passes behind it
    axis.set_ylabel(f"{lane.unit}\nand clients" if lane.lines else lane.unit)
    base = np.zeros(len(track.times))
    handles: list[Patch | Line2D] = []
    for layer in lane.bands:
        height = np.asarray(track.values(layer))
        if np.nansum(height) > 0:
            axis.fill_between(track.times, base, base + height, step="post", color=layer.colour, linewidth=0)
            handles.insert(0, Patch(color=layer.colour, label=layer.label))
        base = base + height
    for layer in lane.lines:
        values = track.values(layer)
        axis.step(track.times, values, where="post", color="white", linewidth=4)  # an edge, to stand out on any band
        axis.step(track.times, values, where="post", color=layer.colour, linewidth=2)
        handles.insert(0, Line2D([], [], color=layer.colour, linewidth=2, label=layer.label))
    handles += _draw_limit(axis, track)
    handles += _draw_failures(axis, track)
    for gap in track.gaps:
        _draw_gap(axis, gap, end)
    axis.set_ylim(0)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.4)


def _draw_limit(axis: Axes, track: Track) -> list[Line2D]:
    if not math.isfinite(track.limit):
        return []
    drawn = track.limit <= FAR * max(track.top, 1)
    label = f"limit: {number(track.limit)}{'' if drawn else ', far above'}"
    if drawn:
        axis.axhline(track.limit, color=colours.LIMIT, linestyle=(0, (4, 2)), linewidth=1.3)
    # An empty line in the legend still tells the number.
    return [Line2D([], [], color=colours.LIMIT, linestyle=(0, (4, 2)) if drawn else "none", label=label)]


def _draw_failures(axis: Axes, track: Track) -> list[Line2D]:
    if not track.failures:
        return []
    look = {"color": colours.WAITING, "marker": "x", "markersize": 7, "markeredgewidth": 2, "linestyle": "none"}
    heights = [1.03] * len(track.failures)  # just above the lane, so that no band, line or limit lies behind
    transform = axis.get_xaxis_transform()
    axis.plot(track.failures, heights, transform=transform, clip_on=False, **look)  # type: ignore[arg-type]
    return [Line2D([], [], label=f"failed: {len(track.failures)}", **look)]  # type: ignore[arg-type]


def _draw_gap(axis: Axes, gap: Gap, end: float) -> None:
    until = end if gap.end is None else min(gap.end, end)
    if until <= gap.start:
        return
    axis.axvspan(gap.start, until, facecolor=colours.GAP, edgecolor="#BBBBBB", hatch="///", linewidth=0, zorder=0.6)
    width = (until - gap.start) / end
    if width > 0.08:
        words = gap.why if width > 0.012 * len(gap.why) else "no answer"
        axis.text(
            (gap.start + until) / 2,
            0.5,
            words,
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="center",
            fontsize=8.5,
            backgroundcolor="white",
        )


def _draw_marks(axes: Sequence[Axes], marks: Sequence[Mark], since: float, end: float, *, above: int) -> None:
    free = [-1.0] * ROWS
    for order, mark in enumerate(marks):
        for axis in axes:
            axis.axvline(mark.seconds, color=colours.TEXT, linewidth=1, linestyle=":")
        place = (mark.seconds - since) / (end - since)
        row = next((row for row in range(ROWS) if free[row] <= place), ROWS - 1)
        width = LABEL_WIDTH * len(mark.text)
        leftwards = place + width > 1
        free[row] = place + (0.01 if leftwards else width)
        axes[0].annotate(
            mark.text,
            (place, 1),
            xycoords="axes fraction",
            xytext=(-3 if leftwards else 3, above + 12 * row),
            textcoords="offset points",
            ha="right" if leftwards else "left",
            fontsize=8.5,
            zorder=1 - order / len(marks) / 2,  # the line down from a later label passes behind an earlier one
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "linestyle": ":", "color": colours.TEXT, "relpos": (int(leftwards), 0)},
        )


def _alternative(tracks: Sequence[Track], marks: Sequence[Mark], end: float) -> str:
    parts = [f"timeline of {end:.1f} seconds in {len(tracks)} {'lane' if len(tracks) == 1 else 'lanes'}"]
    parts += [_told(track, track.lane) for track in tracks]
    parts += [f"marks: {', '.join(f'{mark.text} at {mark.seconds:.1f} s' for mark in marks)}"] if marks else []
    return joined(parts)


def _told(track: Track, lane: Lane) -> str:
    layers = [(layer, track.values(layer)) for layer in (*lane.bands, *lane.lines)]
    told = [course_of(layer.label, track.times, values) for layer, values in layers if np.nansum(values) > 0]
    told += [f"limit {number(track.limit)}"] if math.isfinite(track.limit) else []
    told += [_told_failures(track.failures)] if track.failures else []
    told += [
        f"no answer from {gap.start:.1f} s to {'the end' if gap.end is None else f'{gap.end:.1f} s'} ({gap.why})"
        for gap in track.gaps
    ]
    return f"{track.source}: {'; '.join(told) or 'nothing open'}"


def _told_failures(moments: Sequence[float]) -> str:
    when = f"from {moments[0]:.1f} s to {moments[-1]:.1f} s" if len(moments) > 1 else f"at {moments[0]:.1f} s"
    return f"{len(moments)} failed, {when}"
