"""The live timeline's picture: SVG text, made for little CPU (matplotlib takes thirty times as much)."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from connlab.figures import colours
from connlab.figures.lanes import FAR, LANES, Lane, Layer, summed
from connlab.recorder import Recorder, Series

WIDTH, LANE, GUTTER, LEFT = 640, 92, 34, 40
POINTS = 200
"""Steps in a lane at most."""
Columns = dict[str, list[float]]


def drawing(rec: Recorder, window: float) -> str:
    """The last ``window`` seconds as HTML: the newest values as text, and an SVG of a lane for each source."""
    now = rec.now()
    lanes = [_Drawn(row, series, now, window) for row, series in enumerate(rec.series)]
    height = len(lanes) * (LANE + GUTTER) + 22
    marks = [(mark.seconds, mark.text) for mark in rec.marks if mark.seconds > now - window]
    parts = [*(lane.svg() for lane in lanes), *_marks(marks, now, window, height), *_axis(window, height)]
    label = html.escape("; ".join(f"{lane.series.source}: {_said(lane.series, lane.columns)}" for lane in lanes))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" viewBox="0 0 {WIDTH + 60} {height}"'
        f' style="max-width:{WIDTH + 60}px;background:white" font-family="sans-serif" font-size="12">'
        f"{''.join(parts)}</svg>"
    )


def _x(at: float, now: float, window: float) -> float:
    return round(LEFT + WIDTH * (1 - (now - at) / window), 1)


def _stepped(series: Series, now: float, window: float) -> tuple[list[float], Columns]:
    """The tail of a series in ``POINTS`` steps or fewer, on a grid of time that does not move with the window.

    Of the samples in a step the last one counts, for all bands together: they are of one moment. Of the clients
    that wait it is the highest number.
    """
    times, columns = series.columns(now - window)
    lane = LANES[series.kind]
    last = [
        row
        for row in range(len(times))
        if row + 1 == len(times) or _step(times[row + 1], window) > _step(times[row], window)
    ]
    first = [0, *(row + 1 for row in last[:-1])] if last else []
    kept = {metric: [column[row] for row in last] for metric, column in columns.items()}
    steps = {layer.label: summed(kept, layer, len(last)) for layer in lane.bands}
    for layer in lane.lines:
        values = summed(columns, layer, len(times))
        steps[layer.label] = [_highest(values[low : high + 1]) for low, high in zip(first, last, strict=True)]
    limit = columns.get(lane.limit or "", ())
    steps["limit"] = [limit[-1]] if limit else []
    return [max(times[row], now - window) for row in first], steps


def _step(at: float, window: float) -> int:
    return int(at * POINTS / window)


def _highest(values: Sequence[float]) -> float:
    """NaN when any is: a gap is never painted over."""
    return math.nan if any(map(math.isnan, values)) else max(values)


class _Drawn:
    """One lane: where its steps lie on the page, and what is drawn of them."""

    def __init__(self, row: int, series: Series, now: float, window: float) -> None:
        self.series, self.lane = series, LANES[series.kind]
        times, self.columns = _stepped(series, now, window)
        self.xs = [_x(at, now, window) for at in times]
        self.ends = [*self.xs[1:], float(LEFT + WIDTH)][: len(self.xs)]
        self.top = row * (LANE + GUTTER) + GUTTER
        self.limit = self.columns["limit"][0] if self.columns["limit"] else math.inf
        highest = _top(self.lane, self.columns)
        self.shows_limit = self.limit <= FAR * max(highest, 1)
        self.scale = LANE / max(highest, self.limit if self.shows_limit else 1, 1)

    def svg(self) -> str:
        """Title, legend, bands from the bottom up, lines, limit, and the ends of the y axis."""
        return "".join(
            [self._title(), *self._legend(), *self._bands(), *map(self._line, self.lane.lines), self._axis()]
        )

    def _title(self) -> str:
        named = self.series.source in (self.lane.title, "pool")
        name = html.escape(self.lane.title if named else f"{self.series.source} ({self.lane.title})")
        why = html.escape(self.series.gaps[-1].why) if self.series.in_gap else ""
        return (
            f'<text x="{LEFT}" y="{self.top - 19}" font-weight="bold">{name}</text>'
            f'<text x="{LEFT + WIDTH}" y="{self.top - 19}" text-anchor="end" fill="{colours.WAITING}">{why}</text>'
            f'<rect x="{LEFT}" y="{self.top}" width="{WIDTH}" height="{LANE}" fill="#FAFAFA"/>'
        )

    def _legend(self) -> Iterator[str]:
        """Colour, name and newest value, each value in an element of its own for whoever reads the page."""
        x, y, source = float(LEFT), self.top - 4, html.escape(self.series.source)
        for layer in (*self.lane.bands, *self.lane.lines):
            values, label = self.columns[layer.label], html.escape(layer.label)
            always = layer in (self.lane.bands[0], *self.lane.lines)
            if always or any(value > 0 for value in values):
                yield f'<rect x="{x:.0f}" y="{y - 9}" width="10" height="10" fill="{layer.colour}"/>'
                yield f'<text x="{x + 14:.0f}" y="{y}">{label} <tspan font-weight="bold" data-source="{source}"'
                yield f' data-metric="{label}">{_newest(values)}</tspan></text>'
                x += 14 + 6.2 * (len(layer.label) + 6)
        if math.isfinite(self.limit):
            yield f'<text x="{x:.0f}" y="{y}">limit {self.limit:.0f}</text>'

    def _bands(self) -> Iterator[str]:
        base = [0.0] * len(self.xs)
        for layer in self.lane.bands:
            heights = self.columns[layer.label]
            path = "".join(map(self._block, _blocks(self.xs, self.ends, base, heights)))
            yield f'<path d="{path}" fill="{layer.colour}" shape-rendering="crispEdges"/>'
            base = [low + height for low, height in zip(base, heights, strict=True)]

    def _block(self, block: Block) -> str:
        height = block.height * self.scale
        return f"M{block.start} {self._y(block.low):.1f}v{-height:.1f}H{block.end}v{height:.1f}Z"

    def _line(self, layer: Layer) -> str:
        path, pen = [], "M"
        for x, end, value in zip(self.xs, self.ends, self.columns[layer.label], strict=True):
            known = not math.isnan(value)
            path += [f"{pen}{x} {self._y(value):.1f}H{end}"] if known else []
            pen = "L" if known else "M"
        return f'<path d="{"".join(path)}" fill="none" stroke="{layer.colour}" stroke-width="2"/>'

    def _axis(self) -> str:
        y = self._y(self.limit) if self.shows_limit else 0
        line = (
            f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="black" stroke-dasharray="6 3"/>'
        )
        return (
            f'<text x="{LEFT - 5}" y="{self.top + 10}" text-anchor="end">{LANE / self.scale:.0f}</text>'
            f'<text x="{LEFT - 5}" y="{self.top + LANE}" text-anchor="end">0</text>{line if self.shows_limit else ""}'
        )

    def _y(self, value: float) -> float:
        return self.top + LANE - value * self.scale


class Block(NamedTuple):
    """A stretch of a band in which nothing changes."""

    start: float
    end: float
    low: float
    height: float


def _blocks(
    starts: Sequence[float], ends: Sequence[float], lows: Sequence[float], heights: Sequence[float]
) -> list[Block]:
    """Stretches above 0 (NaN is not), neighbours of the same height joined: the text is shorter by far."""
    blocks: list[Block] = []
    for block in map(Block, starts, ends, lows, heights):
        if blocks and blocks[-1][1:] == (block.start, block.low, block.height):
            blocks[-1] = blocks[-1]._replace(end=block.end)
        elif block.height > 0:
            blocks.append(block)
    return blocks


def _top(lane: Lane, columns: Columns) -> float:
    stacked = [sum(values) for values in zip(*(columns[layer.label] for layer in lane.bands), strict=True)]
    lines = [value for layer in lane.lines for value in columns[layer.label]]
    return max((value for value in (*stacked, *lines) if not math.isnan(value)), default=0.0)


def _newest(values: Sequence[float]) -> str:
    return f"{values[-1]:.0f}" if values and values[-1] == values[-1] else "?"


def _said(series: Series, columns: Columns) -> str:
    lane = LANES[series.kind]
    layers: tuple[Layer, ...] = (*lane.bands, *lane.lines)
    return ", ".join(f"{layer.label} {_newest(columns[layer.label])}" for layer in layers)


def _marks(marks: Sequence[tuple[float, str]], now: float, window: float, height: int) -> Iterator[str]:
    for at, text in marks:
        x = _x(at, now, window)
        yield f'<line x1="{x}" x2="{x}" y1="0" y2="{height - 20}" stroke="black" stroke-dasharray="2 2"/>'
        place = f'x="{x + 3}"' if x < WIDTH / 2 else f'x="{x - 3}" text-anchor="end"'
        yield f'<text {place} y="10" font-size="11">{html.escape(text)}</text>'


def _axis(window: float, height: int) -> Iterator[str]:
    for place in (0, 0.25, 0.5, 0.75, 1):
        seconds = window * (place - 1)
        words = "now" if place == 1 else f"{seconds:g} s"
        yield f'<text x="{LEFT + WIDTH * place:.0f}" y="{height - 6}" text-anchor="middle">{words}</text>'
