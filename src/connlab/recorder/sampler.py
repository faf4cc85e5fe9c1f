"""The thread that samples: one clock, one thread, any number of sources that cannot hold each other up."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from connlab.recorder.link import Link

STOP_WITHIN = 5.0


class Sampler:
    """Calls ``read`` and ticks the ``links`` every ``interval`` seconds, in a thread of its own.

    A tick that comes late is not made up for: a burst of samples would say nothing new.
    """

    def __init__(self, interval: float, read: Callable[[float], None], links: Sequence[Link]) -> None:
        self._interval, self._read, self._links = interval, read, links
        self._stopping = False
        self._bell, self._button = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="connlab-recorder", daemon=True)
        self._pid = os.getpid()
        self._problem: Exception | None = None

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and its connections; prompt whatever the servers do. Twice is no error.

        Raises what has ended the thread before its time.
        """
        if self._stopping or os.getpid() != self._pid:
            return  # a forked child has no such thread, and the connections are its parent's
        self._stopping = True
        self._button.send(b"x")
        self._thread.join(STOP_WITHIN)
        self._bell.close()
        self._button.close()
        if self._problem is not None:
            raise self._problem

    @property
    def running(self) -> bool:
        """Whether it samples."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._sample()
        except Exception as problem:  # no thread that samples may end unheard
            self._problem = problem
        finally:
            for link in self._links:
                link.close()

    def _sample(self) -> None:
        tick = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if now >= tick:
                self._tick(now)
                tick += self._interval * (1 + int((now - tick) / self._interval))
            self._wait(tick)

    def _tick(self, now: float) -> None:
        for link in self._links:
            link.tick(now)
        self._read(now)

    def _wait(self, until: float) -> None:
        """Until the next tick, or somebody's answer."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        links = {}
        for link in self._links:
            if wanted := link.wanted():
                poll.register(*wanted)
                links[wanted[0]] = link
        for descriptor, _ in poll.poll(max((until - time.monotonic()) * 1000, 0)):
            if descriptor in links:
                links[descriptor].advance(time.monotonic())
