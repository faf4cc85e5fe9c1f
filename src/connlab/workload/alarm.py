"""Wakes asyncio tasks at their moment, more exactly than the loop itself does."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
from types import TracebackType
from typing import Self


class Alarm:
    """A thread that sleeps until the next moment and then wakes the loop.

    The loop's own timers are late by up to a millisecond: epoll takes whole ones, and asyncio rounds up
    (``EpollSelector.select`` in Python's ``selectors``).

    Example:
        ``with Alarm() as alarm: await alarm.at(time.monotonic() + 0.0025)``
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._order = itertools.count()
        self._asleep: list[tuple[float, int, asyncio.Future[None]]] = []
        self._changed, self._over = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="connlab-alarm", daemon=True)

    async def at(self, moment: float) -> None:
        """Return when ``time.monotonic()`` says ``moment``; at once when it is over."""
        if moment <= time.monotonic():
            return
        woken: asyncio.Future[None] = self._loop.create_future()
        with self._changed:
            entry = (moment, next(self._order), woken)
            heapq.heappush(self._asleep, entry)
            if self._asleep[0] is entry:
                self._changed.notify()
        await woken

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._over:
                left = self._asleep[0][0] - time.monotonic() if self._asleep else None
                if left is None or left > 0:
                    self._changed.wait(left)
                else:
                    self._loop.call_soon_threadsafe(_wake, heapq.heappop(self._asleep)[-1])


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():  # who waited for it may have been cancelled
        woken.set_result(None)
