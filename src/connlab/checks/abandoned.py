"""Callers that give up, clients that are killed, and what of theirs still runs in the server."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self

import psycopg

from connlab.checks.answers import Answer
from connlab.checks.drivers import Learner
from connlab.checks.sessions import Sessions
from connlab.errors import NodeStopped

PERIOD = 0.02
# What a client program does that knows no end: asks, waits, and asks again. Its DSN stands in no list of processes.
CLIENT = """
import os
import psycopg
with psycopg.connect(os.environ["DSN"], autocommit=True) as conn:
    while True:
        try:
            conn.execute(os.environ["QUERY"])
        except psycopg.errors.QueryCanceled:
            pass
"""


def until(met: Callable[[], object], within: float) -> bool:
    """Wait for ``met()`` to be true; whether it was, within that time."""
    deadline = time.monotonic() + within
    while not met():
        if time.monotonic() > deadline:
            return False
        time.sleep(PERIOD / 2)
    return True


def active(sessions: Sessions) -> dict[int, str]:
    """The queries that run now for the learner's code and the check, by the backend's process id."""
    return {row["pid"]: row["query"] for row in sessions.now() if row["state"] == "active"}


class Watch:
    """Counts the queries that run at one moment, from a thread, for the length of a ``with`` block."""

    def __init__(self, sessions: Sessions) -> None:
        self.most = 0
        """The largest number so far."""
        self._sessions, self._over = sessions, threading.Event()
        self._thread = threading.Thread(target=self._look, name="connlab-watch", daemon=True)

    def _look(self) -> None:
        with contextlib.suppress(psycopg.Error, NodeStopped):  # the check itself will say that the server is down
            while not self._over.wait(PERIOD):
                self.most = max(self.most, len(active(self._sessions)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def in_transactions(dsn: str, clients: int, query: str) -> list[list[tuple[Any, ...]]]:
    """What the query answers to clients whose transactions are open together: so each has another connection."""
    with contextlib.ExitStack() as stack:
        conns = [stack.enter_context(psycopg.connect(dsn, prepare_threshold=None)) for _ in range(clients)]
        return [conn.execute(query).fetchall() for conn in conns]


class LongQuery:
    """A query that takes ``seconds``, and a client that waits for it; cancelled when the ``with`` block is left.

    ``again``: when it is answered, the client asks once more, until that is ``enough()``.
    """

    def __init__(self, dsn: str, seconds: float, again: bool = False) -> None:
        self.seconds, self._dsn = seconds, dsn
        self._enough = threading.Event()
        if not again:
            self._enough.set()
        self._conn: psycopg.Connection | None = None
        self._problem: psycopg.Error | None = None
        self._thread = threading.Thread(target=self._run, name="connlab-long-query", daemon=True)

    def enough(self) -> None:
        """Wait for the answer that is due, and ask no more."""
        self._enough.set()
        self._thread.join()

    def problem(self) -> psycopg.Error | None:
        """What it ended with; waits for the end."""
        self._thread.join()
        return self._problem

    def _run(self) -> None:
        try:
            with psycopg.connect(self._dsn, autocommit=True) as self._conn:
                while True:
                    self._conn.execute("select pg_sleep(%s)", [self.seconds])
                    if self._enough.is_set():
                        break
        except psycopg.Error as problem:
            self._problem = problem

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        if self._thread.is_alive() and self._conn:
            with contextlib.suppress(psycopg.Error):
                self._conn.cancel_safe(timeout=2)
        self._thread.join(2)


class Killed:
    """A client program that waits for a query which takes a minute; killed with SIGKILL, at the end in any case."""

    _numbers = itertools.count(1)

    def __init__(self, dsn: str) -> None:
        self.mark = f"/* client {next(self._numbers)} of {os.getpid()} */"
        """Stands in its query."""
        self._dsn = dsn

    def kill(self) -> None:
        """End it with SIGKILL: it can say nothing to anybody."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        query = f"{self.mark} select pg_sleep(60)"
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env={**os.environ, "DSN": self._dsn, "QUERY": query, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the learner's stop button is not for it
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


# --- in the learner's process -------------------------------------------------------------------------------


def in_a_loop(learner: Learner, name: str, patience: float | None, known_as: str) -> None:
    """A driver: from now on ``known_as`` calls the coroutine ``name`` in an event loop of a thread, and waits for it.

    What takes longer than ``patience`` is cancelled, and the call raises TimeoutError.
    """
    loop = learner.kept.get("loop")
    if loop is None:
        loop = learner.kept["loop"] = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
    learner.code[known_as] = _waiting(learner.code[name], loop, patience)


def queued(
    learner: Learner, arguments: Sequence[tuple[Any, ...]], first: tuple[str, int], others: str, after: float
) -> list[Answer]:
    """A driver: calls on "app", all at once. ``first``: a name, and how many go by it; the others come ``after`` it."""
    name, number = first
    with ThreadPoolExecutor(len(arguments)) as threads:
        calls = [threads.submit(learner.call, name, *given, on="app") for given in arguments[:number]]
        time.sleep(after)
        calls += [threads.submit(learner.call, others, *given, on="app") for given in arguments[number:]]
        return [each.result() for each in calls]


def _waiting(
    function: Callable[..., Any], loop: asyncio.AbstractEventLoop, patience: float | None
) -> Callable[..., Any]:
    async def run(arguments: tuple[Any, ...]) -> Any:
        async with asyncio.timeout(patience):
            value = function(*arguments)
            if not inspect.isawaitable(value):
                raise TypeError(f"it is no coroutine: write `async def {function.__name__}`")
            if inspect.iscoroutine(result := await value):
                result.close()
                raise TypeError(f"it returns a coroutine: `await` is missing after `return` in `{function.__name__}`")
            return result

    return lambda *arguments: asyncio.run_coroutine_threadsafe(run(arguments), loop).result()


def retrying(learner: Learner, arguments: Sequence[tuple[Any, ...]], clients: int) -> tuple[list[Answer], list[Any]]:
    """A driver: ``ask_again`` with attempts that call ``ask``; the answers, and for each attempt whose it was."""
    attempts: list[Any] = []

    def once(given: tuple[Any, ...]) -> Answer:
        def attempt() -> Any:
            attempts.append(given[0])
            return learner.code["ask"](learner.kept["app"], *given)

        return replace(learner.call("ask_again", attempt, on="app"), arguments=given)

    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(once, arguments)), attempts


def scripted(learner: Learner, outcomes: Sequence[str]) -> tuple[Answer, list[float]]:
    """A driver: ``ask_again`` with an attempt that has these outcomes in turn, then the last one again and again.

    An outcome is the name of an error to raise, of Python or of psycopg, or else a value to return. The answer, and
    the moments at which the attempts began.
    """
    times: list[float] = []

    def attempt() -> Any:
        times.append(time.perf_counter())
        outcome = outcomes[min(len(times), len(outcomes)) - 1]
        if error := {"TimeoutError": TimeoutError}.get(outcome, getattr(psycopg.errors, outcome, None)):
            raise error(f"{outcome}, for the check")
        return outcome

    return replace(learner.call("ask_again", attempt, on="app"), arguments=()), times
