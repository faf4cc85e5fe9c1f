"""The samples of one source: a column of numbers for each metric, on the recording's clock."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping
from typing import NamedTuple

NOTHING = float("nan")


class Gap(NamedTuple):
    """A stretch in which a source gave no answer: from when until when (None: it still lasts), and why."""

    source: str
    start: float
    end: float | None
    why: str


class Series:
    """What one source said, in seconds since the recording's start. One thread writes, any may read.

    A metric that an answer leaves out is 0 then (a wait event that nobody waits for). A gap is one row of NaN at
    its beginning: nothing is known from there to the next row.
    """

    def __init__(self, source: str, kind: str, counters: frozenset[str] = frozenset()) -> None:
        self.source, self.kind, self.counters = source, kind, counters
        self._times = array("d")
        self._columns: dict[str, array[float]] = {}
        self._gaps: list[Gap] = []
        self._lock = threading.Lock()

    def add(self, seconds: float, values: Mapping[str, float]) -> None:
        """Add an answer; ends the gap that there may be."""
        with self._lock:
            for metric in values.keys() - self._columns.keys():
                self._columns[metric] = self._unseen()
            self._times.append(seconds)
            for metric, column in self._columns.items():
                column.append(values.get(metric, 0.0))
            self._end_gap(seconds)

    def gap(self, seconds: float, why: str) -> None:
        """Say that nothing is known from ``seconds`` on; the first reason of a gap is the one that counts."""
        with self._lock:
            if self.in_gap:
                return
            self._times.append(seconds)
            for column in self._columns.values():
                column.append(NOTHING)
            self._gaps.append(Gap(self.source, seconds, None, why))

    @property
    def in_gap(self) -> bool:
        """Whether the last thing known is that nothing is known."""
        return bool(self._gaps) and self._gaps[-1].end is None

    @property
    def gaps(self) -> list[Gap]:
        """The gaps so far."""
        with self._lock:
            return list(self._gaps)

    def __len__(self) -> int:
        return len(self._times)

    def columns(self, since: float = float("-inf")) -> tuple[array[float], dict[str, array[float]]]:
        """Copies of the times, and of each metric's values, from the last row before ``since`` on."""
        with self._lock:
            first = self._row_before(since)
            return self._times[first:], {metric: column[first:] for metric, column in self._columns.items()}

    def _row_before(self, since: float) -> int:
        first = len(self._times)
        while first > 0 and self._times[first - 1] >= since:
            first -= 1
        return max(first - 1, 0)

    def _unseen(self) -> array[float]:
        """A new metric's past: 0 where there was an answer, nothing where there was none."""
        past = array("d", bytes(8 * len(self._times)))
        starts = {gap.start for gap in self._gaps}
        for row, seconds in enumerate(self._times):
            if seconds in starts:
                past[row] = NOTHING
        return past

    def _end_gap(self, seconds: float) -> None:
        if self.in_gap:
            self._gaps[-1] = self._gaps[-1]._replace(end=seconds)
