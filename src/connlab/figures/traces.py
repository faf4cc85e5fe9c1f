"""Single events: which client held which server connection when, and which error hit when."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from connlab.errors import SettingError
from connlab.figures import colours, style
from connlab.figures.picture import Picture
from connlab.figures.words import joined
from connlab.recorder import Recorder

MOST_LANES = 40
FEWEST_LANES = 4
"""With fewer the figure is as high as with so many, for the label beside them needs the room."""


class Bar(NamedTuple):
    """A client on a server connection, or waiting for one, from when until when in seconds."""

    client: str
    server: str | None
    start: float
    end: float


def bars(samples: Iterable[tuple[float, str, str | None]], interval: float) -> list[Bar]:
    """What lies between samples of (seconds, client, server): a hold lasts from its first sample to its last.

    It is broken where a sample is missing for two intervals. Samples see what lasted about ``interval`` or longer.
    """
    made: dict[tuple[str, str | None], list[Bar]] = {}
    for seconds, client, server in samples:
        own = made.setdefault((client, server), [])
        if own and seconds - own[-1].end < 1.5 * interval:
            own[-1] = own[-1]._replace(end=seconds + interval)
        else:
            own.append(Bar(client, server, seconds, seconds + interval))
    return sorted(itertools.chain(*made.values()), key=lambda bar: bar.start)


def swimlanes(
    rec: Recorder,
    *,
    source: str | None = None,
    title: str = "Who holds which server connection",
    look: str = "Look along a lane: one server connection serves one client after the other.",
) -> Picture:
    """A lane for each server connection of a PgBouncer, a bar for each client while it holds it; below them who waits.

    Needs a recording with ``Recorder(…, holds=True)``; ``source`` names the PgBouncer if there are several. What lasts
    less than the recorder's interval is seen by chance only.

    Raises SettingError when nothing was held.
    """
    held = rec.holds()
    names = sorted(held.source.unique())
    chosen = source or (names[0] if len(names) == 1 else None)
    if chosen not in names:
        raise SettingError(_no_holds(chosen, names))
    held = held[held.source == chosen]
    servers = [None if server != server or server is None else str(server) for server in held.server]
    made_of = bars(zip(held.seconds, held.client, servers, strict=True), _interval(held.seconds))
    return _draw_lanes(made_of, title, look)


def _no_holds(chosen: str | None, names: Sequence[str]) -> str:
    if not names:
        return "nothing was held: record with Recorder(bouncer, holds=True), while clients work"
    return (
        f"there is no PgBouncer {chosen!r} in the recording" if chosen else f"say source=… : one of {', '.join(names)}"
    )


def _interval(seconds: Iterable[float]) -> float:
    moments = np.unique(np.asarray(list(seconds)))
    return float(np.median(np.diff(moments))) if len(moments) > 1 else 0.05


def _draw_lanes(made_of: Sequence[Bar], title: str, look: str) -> Picture:
    servers = sorted({bar.server for bar in made_of if bar.server}, key=str)
    clients = list(dict.fromkeys(bar.client for bar in made_of))
    waiting = [client for client in clients if any(bar.client == client and not bar.server for bar in made_of)]
    lanes = [*servers, *(f"{client} waits" for client in waiting)][:MOST_LANES]
    colour_of = dict(zip(clients, itertools.cycle(colours.CLIENTS), strict=False))
    number_of = {client: str(place + 1) for place, client in enumerate(clients)}
    span = max(bar.end for bar in made_of) - min(bar.start for bar in made_of)
    with style.house_style():
        made, (axis,) = style.figure(1.3 + 0.34 * max(len(lanes), FEWEST_LANES))
        style.head(made, title)
        for bar in made_of:
            lane = bar.server or f"{bar.client} waits"
            if lane not in lanes:
                continue
            hollow = bar.server is None
            axis.barh(
                lanes.index(lane),
                bar.end - bar.start,
                left=bar.start,
                height=0.72,
                color="none" if hollow else colour_of[bar.client],
                edgecolor=colours.WAITING if hollow else "white",
                hatch="////" if hollow else None,
                linewidth=0.8,
            )
            if not hollow and bar.end - bar.start > span * 0.02:
                centre = (bar.start + bar.end) / 2
                axis.text(centre, lanes.index(lane), number_of[bar.client], ha="center", va="center", color="white")
        axis.set_yticks(range(len(lanes)), [_lane_name(lane, number_of) for lane in lanes])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_ylabel("server connections,\nand who waits" if waiting else "server connections")
        axis.set_xlabel("seconds since the recording began (a number is a client)")
    return Picture(made, alt=_told_lanes(made_of, servers, clients, waiting), look=look)


def _lane_name(lane: str, number_of: dict[str, str]) -> str:
    client = lane.removesuffix(" waits")
    return f"client {number_of[client]} waits" if lane.endswith(" waits") and client in number_of else lane


def _told_lanes(made_of: Sequence[Bar], servers: Sequence[str], clients: Sequence[str], waiting: Sequence[str]) -> str:
    parts = [f"{len(clients)} clients on {len(servers)} server connections"]
    for server in servers[:MOST_LANES]:
        own = [bar for bar in made_of if bar.server == server]
        number = len({bar.client for bar in own})
        busy = sum(bar.end - bar.start for bar in own)
        parts.append(f"{server} served {number} client{'s' if number > 1 else ''}, held for {busy:.1f} s in all")
    parts.append(f"{len(waiting)} of the clients had to wait" if waiting else "nobody was seen waiting")
    return joined(parts)


def errors(
    events: Iterable[tuple[float, BaseException | str]],
    *,
    title: str = "Which error hit when",
    look: str = "Look at when a lane begins: errors come in showers, and each kind has its own.",
    until: float | None = None,
    rec: Recorder | None = None,
) -> Picture:
    """A drop for each error at its second, a lane for each kind; exceptions go by their class, texts by themselves.

    ``until``: where the axis ends, so that a quiet end is seen; ``rec`` adds its marks, and its end if ``until`` is
    left out. No events is a figure too: nothing hit.

    Example:
        ``errors([(0.5, PoolTimeout("…")), (0.7, "TooManyConnections")])``
    """
    hits = sorted((float(at), kind if isinstance(kind, str) else type(kind).__name__) for at, kind in events)
    kinds = list(dict.fromkeys(kind for _, kind in hits))
    end = until if until is not None else rec.now() if rec is not None else hits[-1][0] * 1.05 if hits else 1.0
    marks = rec.marks if rec is not None else []
    with style.house_style():
        made, (axis,) = style.figure(1.5 + 0.6 * max(len(kinds), 1))
        style.head(made, title)
        spread = np.random.default_rng(0)  # the same picture each time
        for lane, kind in enumerate(kinds):
            own = [at for at, name in hits if name == kind]
            heights = lane + spread.uniform(-0.3, 0.3, len(own))
            axis.scatter(own, heights, s=14, color=colours.WAITING, alpha=0.6, linewidths=0, rasterized=len(own) > 2000)
            axis.text(1.01, lane, f"n = {len(own)}", transform=axis.get_yaxis_transform(), va="center")
        for mark in marks:
            axis.axvline(mark.seconds, color=colours.TEXT, linewidth=1, linestyle=":")
            axis.annotate(mark.text, (mark.seconds, 1), xycoords=axis.get_xaxis_transform(), fontsize=8.5, va="bottom")
        axis.set_yticks(range(len(kinds)), [textwrap.fill(kind, 32) for kind in kinds])
        axis.set_ylim(len(kinds) - 0.5 if kinds else 0.5, -0.5)
        axis.set_xlim(0, end)
        axis.set_ylabel("kind of error")
        axis.set_xlabel("seconds since the start")
        axis.grid(axis="y", visible=False)
        if not hits:
            axis.text(0.5, 0.5, "no error", transform=axis.transAxes, ha="center", va="center")
    return Picture(made, alt=_told_errors(hits, kinds, end), look=look)


def _told_errors(hits: Sequence[tuple[float, str]], kinds: Sequence[str], end: float) -> str:
    parts = [f"{len(hits)} errors in {end:.1f} s" if hits else f"no error in {end:.1f} s"]
    for kind in kinds:
        own = [at for at, name in hits if name == kind]
        when = f"from {own[0]:.1f} s to {own[-1]:.1f} s" if len(own) > 1 else f"at {own[0]:.1f} s"
        parts.append(f"{len(own)} times {kind}, {when}")
    return joined(parts)
