"""What a load measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from connlab.errors import SettingError
from connlab.percentile import percentile
from connlab.workload.request import UNFINISHED, Part, Request

if TYPE_CHECKING:
    import pandas as pd

    from connlab.recorder import Recorder

LATE = 0.010
"""Seconds after which a start is told as late: well above what a busy machine makes of a sleep."""
PARTS = ("latency", "waited", "used", "late")
KINDS_SHOWN = 4


class Load:
    """What ``closed_loop``, ``open_loop`` or ``pgbench`` measured.

    ``kind``: what ran, in words. ``clients``: how many at most at the same time. ``elapsed``: seconds from the start to
    the end of the last request, and no less than the seconds that were asked for. ``began``: what ``time.monotonic()``
    said at the start, the clock of a recorder too. ``left``: threads that could not be stopped and still run.

    Example:
        >>> load = closed_loop(work, borrow=pool.connection, clients=16, seconds=2.0)
        >>> load
        <closed loop, 16 clients: 1,234 requests in 2.0 s>
        succeeded: 1,230 (615/s); latency: median 25 ms, p95 41 ms, p99 60 ms
        failed: 4, PoolTimeout (couldn't get a connection after 0.05 sec)
    """

    def __init__(
        self, kind: str, requests: Sequence[Request], *, clients: int, began: float, seconds: float = 0, left: int = 0
    ) -> None:
        self.kind, self.clients, self.began, self.left = kind, clients, began, left
        self.requests = sorted(requests, key=lambda request: (request.intended, request.client))
        self.elapsed = max([seconds, *(request.ended for request in self.requests)])

    # --- in numbers -----------------------------------------------------------------------------------------

    @property
    def succeeded(self) -> int:
        """The requests that ended without an error."""
        return sum(request.error is None for request in self.requests)

    @property
    def failed(self) -> int:
        """The requests that ended with an error, or did not end."""
        return len(self.requests) - self.succeeded

    @property
    def unfinished(self) -> int:
        """Those of the failed that had not ended at the deadline, or never begun for want of a free client."""
        return sum(request.error == UNFINISHED for request in self.requests)

    @property
    def throughput(self) -> float:
        """Successful requests a second, over ``elapsed``."""
        return self.succeeded / self.elapsed if self.elapsed else 0.0

    @property
    def latencies(self) -> list[float]:
        """Latency of each successful request in seconds, for ``figures.latencies``."""
        return self._successful("latency")

    def percentile(self, share: float, of: Part = "latency") -> float:
        """A percentile of the successful requests' latency, in milliseconds; NaN when none was successful.

        The smallest measured value that has ``share`` percent of all at or below it; nothing is interpolated. See
        ``connlab.percentile``.
        ``of``: "latency", or a part of it: "late", "waited", "used".

        Raises SettingError for a share that is not above 0 and up to 100.

        Example:
            ``load.percentile(95)``, ``load.percentile(50, of="waited")``
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 100:
            raise SettingError(f"a percentile takes a share above 0, up to 100, not {share!r}: load.percentile(95)")
        if of not in PARTS:
            raise SettingError(f"of takes {', '.join(PARTS)}, not {of!r}")
        ordered = sorted(value for value in self._successful(of) if not math.isnan(value))
        return 1000 * percentile(ordered, share) if ordered else math.nan

    # --- in full --------------------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """Every request, in the order of their intended starts.

        ``client``      which one made it, from 0; -1: none was free until the end
        ``intended``    when it was to start. In a closed loop, when it did: a client intends nothing while it waits
        ``started``     when it did
        ``borrowed``    when it had its connection; NaN when it got none
        ``ended``       when its connection was back, or its error there; of an unfinished one, when it was given up
        ``late_ms``     intended to started: no client was free
        ``waited_ms``   started to borrowed, or to the failure; NaN with ``borrow=None``, and for pgbench
        ``used_ms``     borrowed to ended
        ``latency_ms``  intended to ended: the sum of these three
        ``error``       class of its error; None: it succeeded. "Unfinished": it had not ended at the end of the load
        ``sqlstate``    of the error; None without one, as when connecting fails
        ``message``     of the error, all of it

        Times are seconds since the start, those in _ms milliseconds.
        """
        import pandas as pd

        moments = ("client", "intended", "started", "borrowed", "ended")
        columns = {name: [getattr(request, name) for request in self.requests] for name in moments}
        for name in ("late", "waited", "used", "latency"):
            columns[f"{name}_ms"] = [1000 * getattr(request, name) for request in self.requests]
        for name in ("error", "sqlstate", "message"):
            columns[name] = pd.Series([getattr(request, name) for request in self.requests], dtype=object)  # type: ignore[assignment]
        return pd.DataFrame(columns)

    def errors(self) -> pd.DataFrame:
        """What failed, by kind: ``error``, ``sqlstate``, ``message``, ``count``, and ``first`` and ``last``.

        The last two are the seconds at which the first and the last of them ended. In the order of the first.
        """
        import pandas as pd

        found: dict[tuple[str | None, str | None, str | None], list[float]] = {}
        for request in self.requests:
            if request.error is not None:
                found.setdefault((request.error, request.sqlstate, request.message), []).append(request.ended)
        rows = [(*kind, len(times), min(times), max(times)) for kind, times in found.items()]
        table = pd.DataFrame(rows, columns=["error", "sqlstate", "message", "count", "first", "last"])
        return table.sort_values("first", ignore_index=True)

    def error_events(self, rec: Recorder | None = None) -> list[tuple[float, str]]:
        """When each error came and its class, for ``figures.errors``; on the clock of ``rec`` if that is given.

        Example:
            ``figures.errors(load.error_events(), until=load.elapsed)``
        """
        shift = 0.0 if rec is None else self.began - rec.began
        return [(request.ended + shift, request.error) for request in self.requests if request.error is not None]

    def __len__(self) -> int:
        return len(self.requests)

    def __repr__(self) -> str:
        head = f"<{self.kind}: {len(self):,} requests in {self.elapsed:.1f} s>"
        return "\n".join([head, *filter(None, [self._told_success(), self._told_late(), *self._told_failures()])])

    def _successful(self, part: Part) -> list[float]:
        return [getattr(request, part) for request in self.requests if request.error is None]

    def _told_success(self) -> str:
        if not self.succeeded:
            return "succeeded: none"
        named = (("median", 50), ("p95", 95), ("p99", 99))
        latency = ", ".join(f"{name} {_ms(self.percentile(share))}" for name, share in named)
        return f"succeeded: {self.succeeded:,} ({self.throughput:,.0f}/s); latency: {latency}"

    def _told_late(self) -> str:
        late = sum(request.late > LATE for request in self.requests)
        why = f"all of the {self.clients} clients at most were busy, or this machine was"
        return f"started over {1000 * LATE:.0f} ms late: {late:,} ({why})" if late else ""

    def _told_failures(self) -> list[str]:
        kinds = Counter((each.error, each.message) for each in self.requests if each.error is not None)
        shown = [
            f"failed: {count:,}, {error} ({message})" for (error, message), count in kinds.most_common(KINDS_SHOWN)
        ]
        more = [f"failed: {len(kinds) - KINDS_SHOWN} kinds more, see errors()"] if len(kinds) > KINDS_SHOWN else []
        still = f"{self.left} threads could not be stopped: they run until what they wait for ends"
        return [*shown, *more, *([still] if self.left else [])]


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"
