"""What requests do with the connection that the learner's ``handle`` lends them, and drivers that send them.

It is imported in the learner's process, so it imports little.
"""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
from psycopg import sql
from psycopg_pool import ConnectionPool

from connlab.checks.answers import Answer
from connlab.checks.drivers import Learner
from connlab.checks.probes import SHORT, End, left_behind, sleeps, until

Connection = psycopg.Connection[tuple[Any, ...]]

LONG = 5.0
REPORT, HANGS = 0.45, 2.0
"""Seconds of a report, and of a statement that no limit would end."""
COLUMN = "note_of_lab_14"
MIGRATION = f"alter table orders add column {COLUMN} text"
_asked: list[float] = []
QUICKLY = 100
"""Milliseconds of the limits that a request sets for its own transaction, to run into them at once."""


class Work:
    """One request, as ``handle(app, work)`` calls it; plain data, which comes back with what happened to it.

    Kinds, each with what ``seconds`` or ``row`` say: ``reads`` orders; ``writes`` a row of accounts; ``halves`` the
    same and fails; ``holds`` the connection and does nothing with it; ``stuck`` in a transaction of many short
    statements; ``sleeps`` in one statement. And those that end at once: ``slow``, ``locked``, ``idle``, ``long`` run
    into a limit of their own, ``lost`` ends its server process, ``wrong`` is refused.
    """

    def __init__(self, kind: str, seconds: float = 0.0, row: int = 0, over: threading.Event | None = None) -> None:
        self.kind, self.seconds, self.row, self.over = kind, seconds, row, over
        self.called = False
        self.error = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "over": None}  # an event stays in its process

    def __call__(self, conn: Connection) -> Any:
        """Do it; what it returns is what ``handle`` has to return with 200."""
        self.called = True
        try:
            return getattr(self, f"_{self.kind}")(conn)
        except psycopg.Error as error:
            self.error = f"`{type(error).__name__}`, SQLSTATE {error.sqlstate}"
            raise

    def _reads(self, conn: Connection) -> int:
        row = conn.execute("select count(*) from orders where user_id = %s", [self.row]).fetchone()
        assert row is not None
        return int(row[0])

    def _writes(self, conn: Connection) -> None:
        conn.execute("update accounts set balance = balance + 1 where id = %s", [self.row])

    def _halves(self, conn: Connection) -> None:
        self._writes(conn)
        self._wrong(conn)

    def _wrong(self, conn: Connection) -> None:
        conn.execute("select no_such_column from orders")

    def _holds(self, conn: Connection) -> None:
        conn.execute("select 1")
        (self.over or threading.Event()).wait(self.seconds)

    def _sleeps(self, conn: Connection) -> None:
        conn.execute("select pg_sleep(%s)", [self.seconds])

    def _stuck(self, conn: Connection) -> None:
        began = time.perf_counter()
        while time.perf_counter() - began < self.seconds:
            conn.execute("select pg_sleep(%s)", [SHORT])

    def _lost(self, conn: Connection) -> None:
        conn.execute("select pg_terminate_backend(pg_backend_pid())")
        conn.execute("select 1")

    def _slow(self, conn: Connection) -> None:
        self._limit(conn, "statement_timeout")
        self._sleeps(conn)

    def _locked(self, conn: Connection) -> None:
        self._limit(conn, "lock_timeout")
        self._writes(conn)

    def _idle(self, conn: Connection) -> None:
        self._limit(conn, "idle_in_transaction_session_timeout")
        time.sleep(self.seconds)
        conn.execute("select 1")

    def _long(self, conn: Connection) -> None:
        self._limit(conn, "transaction_timeout")
        self._sleeps(conn)

    def _limit(self, conn: Connection, name: str) -> None:
        conn.execute(sql.SQL("set local {} = {}").format(sql.Identifier(name), QUICKLY))


def work_of(answer: Answer) -> Work:
    """The request of an answer of ``handle``, with what happened to it."""
    work = answer.arguments[0]
    assert isinstance(work, Work)
    return work


def status(answer: Answer) -> int | None:
    """The status that ``handle`` has answered with; None for an exception, or something that is no (status, value)."""
    value = answer.value
    if isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], int):
        return value[0]
    return None


def shown(answer: Answer) -> str:
    """What was answered, after how long."""
    what = f"{answer.problem}" if answer.problem else f"`{answer.value!r}`"
    return f"{what} after {answer.seconds:.2f} s"


# --- drivers ------------------------------------------------------------------------------------------------


def crowd(learner: Learner, number: int, patient: float, given: float) -> tuple[list[Answer], list[Answer], int]:
    """So many requests hold a connection each, one of them only for ``patient`` seconds; then as many again come.

    These get ``given`` seconds to be served or turned away, all but one. With how many of them got a connection in it.
    """
    over = threading.Event()
    with ThreadPoolExecutor(2 * number) as threads:

        def begin(seconds: float) -> tuple[Work, Future[Answer]]:
            work = Work("holds", seconds, over=over)
            return work, threads.submit(learner.call, "handle", work, on="app")

        first = [begin(seconds) for seconds in [patient, *[LONG] * (number - 1)]]
        until(lambda: all(work.called or future.done() for work, future in first), given)
        later = [begin(LONG) for _ in range(number)]
        until(lambda: sum(future.done() for _, future in later) >= number - 1, given)
        served = sum(work.called for work, _ in later)
        over.set()
        return [future.result() for _, future in first], [future.result() for _, future in later], served


def watch_pools(_: Learner) -> None:
    """Note from now on how long each request asks its pool to wait; ``patience`` says it."""
    getconn = ConnectionPool.getconn

    def noting(pool: ConnectionPool[Any], timeout: float | None = None) -> Any:
        _asked.append(pool.timeout if timeout is None else timeout)
        return getconn(pool, timeout)

    setattr(ConnectionPool, "getconn", noting)  # noqa: B010, a method cannot be assigned to


def patience(_: Learner) -> float | None:
    """The longest that a request has asked its pool to wait; None if none has asked one of psycopg_pool's."""
    return max(_asked, default=None)


def face_silence(learner: Learner, dsn: str) -> tuple[Answer, Answer | None]:
    """Start the service in front of a pooler that says nothing, and ask it."""
    threading.Thread(target=_tidy, daemon=True).start()
    begun = learner.call("start", dsn, keep="silent")
    return begun, None if begun.problem else learner.call("handle", Work("reads", row=7), on="silent")


def exceptional(learner: Learner, server: str, pooler: str) -> tuple[Answer, list[str], End, Answer, Answer]:
    """A report through ``pooler``; after it what is left there, and a statement of another client's.

    Meanwhile a report that hangs, through the service kept as "other", and a migration.
    """
    with ThreadPoolExecutor(3) as threads:
        hangs = threads.submit(learner.call, "report", _report(HANGS), on="other")
        migration = threads.submit(learner.call, "migrate", server, MIGRATION)
        good = learner.call("report", _report(REPORT), on="app")
        return good, left_behind(pooler, 1), sleeps(pooler, HANGS), hangs.result(), migration.result()


def _report(seconds: float) -> str:
    return f"with slow as materialized (select pg_sleep({seconds})) select count(*), max(id) from users, slow"


def _tidy() -> None:
    """Free what nobody uses: psycopg closes a connection that was given up when Python frees it, which may be later."""
    while True:
        gc.collect()
        time.sleep(0.2)
