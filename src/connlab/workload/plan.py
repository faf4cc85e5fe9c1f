"""When the next request is to start, and for how long there is one: a closed loop's plan and an open loop's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol


class Plan(Protocol):
    """What clients ask before each request; any number of them at a time."""

    @property
    def kind(self) -> str:
        """What it is, in words."""

    @property
    def clients(self) -> int:
        """How many clients there are."""

    @property
    def seconds(self) -> float:
        """How long it lasts at least; 0: until the last request has ended."""

    @property
    def is_open(self) -> bool:
        """Whether requests are to start at moments that do not depend on those before."""

    def next(self, client: int, ended: float | None) -> float | None:
        """When this client's next request is to start; None: there is none. ``ended``: when its last one has."""

    def missed(self, until: float) -> list[float]:
        """The moments before ``until`` at which a request should have started, and no client took it."""

    def share(self, seconds: float, ended: int) -> float:
        """How much of it is done after so many seconds and requests, from 0 to 1."""


class Closed:
    """N clients, each with one request at a time: the next one starts when the last has ended, after a pause."""

    is_open = False

    def __init__(self, clients: int, seconds: float | None, requests: int | None, think: float, ramp: float) -> None:
        self.clients, self._until, self._requests, self._think, self._ramp = clients, seconds, requests, think, ramp
        self.seconds = seconds or 0.0
        self.kind = f"closed loop, {clients} client{'s' if clients > 1 else ''}"
        self._taken, self._lock = 0, threading.Lock()

    def next(self, client: int, ended: float | None) -> float | None:
        """See ``Plan``."""
        moment = self._ramp * client / self.clients if ended is None else ended + self._think
        if self._until is not None and moment >= self._until:
            return None
        with self._lock:
            if self._taken == self._requests:
                return None
            self._taken += 1
        return moment

    def missed(self, until: float) -> list[float]:
        """See ``Plan``: nothing is to start while all clients wait."""
        return []

    def share(self, seconds: float, ended: int) -> float:
        """See ``Plan``."""
        return ended / self._requests if self._requests else seconds / self.seconds


class Open:
    """Requests that start at given moments, whatever became of those before; a client takes the next one when free."""

    is_open = True

    def __init__(self, moments: Sequence[float], clients: int, seconds: float, kind: str) -> None:
        self.clients, self.seconds, self.kind = min(clients, max(len(moments), 1)), seconds, kind
        self._moments, self._taken, self._lock = moments, 0, threading.Lock()

    def next(self, client: int, ended: float | None) -> float | None:
        """See ``Plan``."""
        with self._lock:
            if self._taken == len(self._moments):
                return None
            self._taken += 1
            return self._moments[self._taken - 1]

    def missed(self, until: float) -> list[float]:
        """See ``Plan``."""
        with self._lock:
            left = self._moments[self._taken :]
            self._taken = len(self._moments)
        return [moment for moment in left if moment < until]

    def share(self, seconds: float, ended: int) -> float:
        """See ``Plan``."""
        return seconds / (self.seconds or self._moments[-1] or seconds)
