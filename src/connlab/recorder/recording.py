"""The recorder as a lesson uses it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from connlab.errors import NodeStopped, SettingError
from connlab.node import Node
from connlab.recorder import frame
from connlab.recorder.link import GAP, Link
from connlab.recorder.pools import COUNTERS, PoolSource, pool_source
from connlab.recorder.sampler import Sampler
from connlab.recorder.series import Gap, Series
from connlab.recorder.servers import Hold, ServerSource, server_source, unused

if TYPE_CHECKING:
    import pandas as pd


class Mark(NamedTuple):
    """An event of the lesson: when, in seconds since the recording's start, and what."""

    seconds: float
    text: str


class Recorder:
    """Samples pools and servers on one clock, from the beginning of a ``with`` block to its end.

    Takes any number of servers (Postgres, PgBouncer, or a Relay to see one through it) and pools (psycopg_pool's,
    sync and async, SQLAlchemy's engines and pools), in any order, and calls them by keyword: ``app=pool``.
    ``interval``: seconds between samples. ``holds=True`` also asks PgBouncer each time which client holds which
    server connection, for ``figures.swimlanes``; with a thousand clients that is a long answer.

    It takes none of the connections that ``max_connections`` counts (see ``recorder.servers.PostgresSource``) and
    goes on while a server is full, restarts or answers nobody: that is a gap in that source, with its reason in
    ``gaps``, and none in the others.

    Raises SettingError for what it cannot record, NodeStopped for a server that was stopped.

    Example:
        >>> from connlab import Postgres, Recorder
        >>> with Postgres.start(max_connections=20) as pg, Recorder(pg, interval=0.02) as rec:
        ...     rec.mark("nothing happens").text
        'nothing happens'
        >>> frame = rec.frame()
        >>> frame[frame.metric == "limit"].value.iloc[-1].item()
        17.0
    """

    def __init__(self, *sources: object, interval: float = 0.05, holds: bool = False, **named: object) -> None:
        self._interval = _checked(interval)
        pools, servers = _sorted_out([*sources, *named.values()], holds=holds)
        names = _names([*pools, *servers], {id(thing): name for name, thing in named.items()})
        self._pools = [(pool, Series(names[id(thing)], "pool", COUNTERS)) for thing, pool in pools]
        self._servers = [(server, Series(names[id(thing)], server.kind, server.counters)) for thing, server in servers]
        self._links = [self._link(server, series) for server, series in self._servers]
        self._sampler = Sampler(self._interval, self._read_pools, self._links)
        self._marks: list[Mark] = []
        self._holds: list[tuple[float, str, list[Hold]]] = []
        self._began: float | None = None
        self._ended: float | None = None

    # --- recording ------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin, and return once each source was asked; ``with`` calls it."""
        if self._began is not None:
            raise SettingError("a recorder records once: make another one")
        self._began = time.monotonic()
        self._sampler.start()
        deadline = self._began + 2 * GAP
        while not all(len(series) for series in self.series) and time.monotonic() < deadline:
            time.sleep(0.002)
        return self

    def stop(self) -> None:
        """End the recording; prompt even when a server answers nobody. What was recorded stays."""
        if self._began is None or self._ended is not None:
            return
        self._ended = self.now()
        self._sampler.stop()

    def mark(self, text: str) -> Mark:
        """Write down that something happens now; figures draw it."""
        mark = Mark(self.now(), text)
        self._marks.append(mark)
        return mark

    def now(self) -> float:
        """Seconds since the start, the clock of all that is recorded; after the end, when that was."""
        return time.monotonic() - self.began if self._ended is None else self._ended

    @property
    def began(self) -> float:
        """What ``time.monotonic()`` said at the start: subtract it from your own times to have them on this clock."""
        if self._began is None:
            raise SettingError("this recorder has not started: with Recorder(…) as rec: …")
        return self._began

    @property
    def running(self) -> bool:
        """Whether it samples now."""
        return self._sampler.running

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- what was recorded ----------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """All samples so far, one value in a row.

        ``seconds``  since the start, when the answer came
        ``source``   its name: your keyword, or "PostgreSQL", "PgBouncer", the pool's own name
        ``kind``     "pool", "pgbouncer" or "postgres"
        ``metric``   see below
        ``value``    a number; NaN at the beginning of a gap, and no row until the gap's end

        *pool*: ``in use``, ``idle``, ``connecting`` (counted by the pool, not there yet), ``waiting`` (clients that
        wait now), ``size limit``; totals ``requests``, ``errors`` (psycopg_pool).
        *pgbouncer*: ``clients active`` (they hold a server connection), ``clients idle``, ``clients waiting``,
        ``longest wait s``, ``servers active``, ``servers idle``, ``servers tested``, ``servers login``; totals
        ``transactions``, ``queries``, ``waited seconds``.
        *postgres*: client backends other than connlab's by state (``active``, ``idle``, ``idle in transaction``,
        ``idle in transaction (aborted)``, ``starting``, ``unknown``), ``total``, by state and wait event type
        (``active: Lock``, ``active: no wait``, …), ``max_connections``, ``reserved`` (slots for superusers and such),
        ``limit`` (the slots left for everybody else).
        Servers: ``answer ms``, from the question to the answer.
        """
        return frame.tidy(self.series)

    def rates(self, every: float = 0.5) -> pd.DataFrame:
        """What the totals grew by, per second, in windows of ``every`` seconds; the columns are those of ``frame``."""
        return frame.rates(self.series, every)

    def holds(self) -> pd.DataFrame:
        """Which client of PgBouncer held which server connection at each sample; needs ``holds=True``.

        Columns ``seconds``, ``source``, ``client``, ``server`` (its backend's pid; None: the client waited for one).
        """
        return frame.held(self._holds)

    @property
    def series(self) -> list[Series]:
        """The recorded series: pools first, then PgBouncers, then PostgreSQLs."""
        servers = [series for _, series in self._servers]
        return [series for _, series in self._pools] + sorted(servers, key=lambda series: series.kind)

    @property
    def marks(self) -> list[Mark]:
        """The marks so far."""
        return list(self._marks)

    @property
    def gaps(self) -> list[Gap]:
        """When a source did not answer, and why, in order of time."""
        return sorted((gap for series in self.series for gap in series.gaps), key=lambda gap: gap.start)

    # --- for the sampler ------------------------------------------------------------------------------------

    def _link(self, server: ServerSource, series: Series) -> Link:
        def answered(at: float, values: Mapping[str, float]) -> None:
            series.add(self._seconds(at), values)
            if server.holds:
                self._holds.append((self._seconds(at), series.source, server.holds))

        def silent(at: float, why: str) -> None:
            series.gap(self._seconds(at), why)

        return Link(server, answered, silent)

    def _read_pools(self, now: float) -> None:
        for pool, series in self._pools:
            values = pool.read()
            if values is None:
                series.gap(self._seconds(now), "the pool is closed")
            else:
                series.add(self._seconds(now), values)

    def _seconds(self, at: float) -> float:
        return at - self.began


def _checked(interval: float) -> float:
    if isinstance(interval, bool) or not isinstance(interval, int | float) or not 0.005 <= interval <= 60:
        raise SettingError(f"interval takes seconds from 0.005 to 60, not {interval!r}")
    return float(interval)


Pools = list[tuple[object, PoolSource]]
Servers = list[tuple[object, ServerSource]]


def _sorted_out(things: list[object], *, holds: bool) -> tuple[Pools, Servers]:
    pools: Pools = []
    servers: Servers = []
    for thing in things:
        if server := server_source(thing, holds=holds):
            _must_exist(thing)
            servers.append((thing, server))
        elif pool := pool_source(thing):
            pools.append((thing, pool))
        else:
            known = "Postgres, PgBouncer and Relay, psycopg_pool's pools, SQLAlchemy's engines and pools"
            raise SettingError(f"a recorder takes {known}, not {type(thing).__name__} ({thing!r})")
    if not things:
        raise SettingError("a recorder needs something to record: Recorder(pg, bouncer, pool)")
    return pools, servers


def _must_exist(thing: object) -> None:
    if isinstance(thing, Node) and thing._stopped_log is not None:
        raise NodeStopped(f"this {thing.label} was stopped; start another one before you record it")


def _names(sources: Sequence[tuple[object, PoolSource | ServerSource]], given: Mapping[int, str]) -> dict[int, str]:
    """A name for each source, by the id of what it reads: the caller's, else its own, numbered in a clash."""
    nameless = [(thing, source) for thing, source in sources if id(thing) not in given]
    own = unused([source.name for _, source in nameless], given.values())
    return {**given, **{id(thing): name for (thing, _), name in zip(nameless, own, strict=True)}}
