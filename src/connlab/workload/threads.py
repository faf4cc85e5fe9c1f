"""Runs a plan with a thread for each client."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import CoroutineType
from typing import Any

import psycopg

from connlab.workload.load import Load
from connlab.workload.plan import Plan
from connlab.workload.progress import Bar
from connlab.workload.request import Request
from connlab.workload.run import GRACE, Run, Stopped, at_deadline, interrupted

Work = Callable[..., object]
Borrow = Callable[[], AbstractContextManager[Any]]
SLICE = 0.05
"""A client that is to sleep longer than this can be woken; the rest is one sleep, which is the most exact."""
LOOK = 0.1


def run(plan: Plan, work: Work, borrow: Borrow | None, deadline: float) -> Load:
    """Run ``plan`` to its end, or to ``deadline`` seconds after its start."""
    crew = Crew(plan, work, borrow)
    try:
        crew.start()
        crew.wait(deadline)
    except BaseException as problem:  # an interrupt, for the greatest part
        load = crew.load("was interrupted")
        load.left = crew.stop()
        interrupted(problem, load)
        raise
    load = crew.load(at_deadline(deadline))
    load.left = crew.stop()
    return load


class Crew(Run):
    """The threads of a run."""

    def __init__(self, plan: Plan, work: Work, borrow: Borrow | None) -> None:
        super().__init__(plan)
        self._work, self._borrow = work, borrow
        self._connections: list[Any] = [None] * plan.clients
        self._go, self._stopping = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        # Not Thread.is_alive and join: a join that is interrupted takes a thread for ended that runs
        # (https://github.com/python/cpython/issues/90882, Python 3.11).
        self._alive: set[int] = set()
        self._none_alive, self._lock = threading.Event(), threading.Lock()

    def start(self) -> None:
        """Start all threads, then the clock."""
        for number in range(self.plan.clients):
            name = f"connlab-client-{number}"
            thread = threading.Thread(target=self._client, args=[number], name=name, daemon=True)
            self._alive.add(number)
            try:
                thread.start()
            except RuntimeError:  # the system gives no more threads
                self._has_ended(number)
                raise
            self._threads.append(thread)
        self.set_off()
        self._go.set()

    def wait(self, deadline: float) -> None:
        """Return when every thread has ended, and at the deadline."""
        with Bar(self.plan.kind) as bar:
            while (left := deadline - self.now()) > 0 and not self._none_alive.wait(min(left, LOOK)):
                bar.show(self.plan.share(self.now(), self.ended()), self.ended())

    def stop(self) -> int:
        """End what runs: no new request, queries cancelled, sockets shut. Returns how many threads live on."""
        self._stopping.set()
        self._go.set()
        for sharper in (None, _cancel, _shut):
            if sharper:
                _all_at_once(sharper, [self._connections[number] for number in sorted(self._alive)])
            if self._none_alive.wait(GRACE):
                break
        for thread in self._threads if self._none_alive.is_set() else ():
            thread.join()
        return len(self._alive)

    # --- in a thread ----------------------------------------------------------------------------------------

    def _client(self, number: int) -> None:
        try:
            self._go.wait()
            self._requests_of(number)
        finally:
            self._has_ended(number)

    def _has_ended(self, number: int) -> None:
        with self._lock:
            self._alive.discard(number)
            if not self._alive:
                self._none_alive.set()

    def _requests_of(self, number: int) -> None:
        own, ended = self.requests[number], None
        while (moment := self.plan.next(number, ended)) is not None:
            request = Request(number, moment, borrows=self._borrow is not None)
            own.append(request)
            if not self._sleep_until(moment):
                return
            self._make(request)
            ended = request.ended

    def _sleep_until(self, moment: float) -> bool:
        """False when the run is to stop."""
        while (left := moment - self.now()) > 0:
            if left <= SLICE:
                time.sleep(left)
            elif self._stopping.wait(left - SLICE):
                return False
        return not self._stopping.is_set()

    def _make(self, request: Request) -> None:
        self.started(request)
        try:
            if self._borrow is None:
                _must_be_done(self._work())
            else:
                with self._borrow() as connection:
                    request.borrowed = self.now()
                    self._use(request.client, connection)
        except BaseException as problem:  # a learner's sys.exit() too: it ends this request and nothing else
            request.failed(problem)
        request.ended = self.now()

    def _use(self, client: int, connection: Any) -> None:
        self._connections[client] = connection
        try:
            if self._stopping.is_set():
                raise Stopped
            _must_be_done(self._work(connection))
        finally:
            self._connections[client] = None


def _must_be_done(result: object) -> None:
    if isinstance(result, CoroutineType):
        result.close()
        raise TypeError(
            "work returned a coroutine, which nobody has run: await closed_loop_async(…), open_loop_async(…)"
        )


def _all_at_once(act: Callable[[Any], None], connections: Iterable[Any]) -> None:
    """Each in a thread of its own: a server that does not answer makes each of them wait."""
    ours = [connection for connection in connections if isinstance(connection, psycopg.Connection)]
    threads = [threading.Thread(target=act, args=[connection], daemon=True) for connection in ours]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * GRACE)


def _cancel(connection: psycopg.Connection[Any]) -> None:
    with contextlib.suppress(psycopg.Error):
        connection.cancel_safe(timeout=GRACE)


def _shut(connection: psycopg.Connection[Any]) -> None:
    """Whoever waits for its answer gets an error at once. A descriptor of our own: libpq keeps and closes its own."""
    with contextlib.suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.shutdown(socket.SHUT_RDWR)
