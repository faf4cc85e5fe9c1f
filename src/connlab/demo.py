"""A leak, a timeout and a saturated server, for real, in the terminal; then PgBouncer's cure for the last.

The functions under "The lesson" are plain psycopg: the demo prints their source and runs them, so what is
shown is what ran. Every error is caught as it came; when one does not come, the demo fails.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout

from connlab import PgBouncer, Postgres
from connlab.errors import ConnlabError
from connlab.runtime.process import wait_until

MAX_CONNECTIONS = 20
CLIENTS = 40
POOL_SIZE = 5
SLOTS_TAKEN = "remaining connection slots are reserved"
SESSIONS = "select count(*) from pg_stat_activity where usename = 'app'"
STATES = "select state, count(*) as n from pg_stat_activity where usename = 'app' group by state order by n desc"


class DemoFailed(ConnlabError):
    """What the demo announced did not happen."""


# --- The lesson ---------------------------------------------------------------------------------------------


def leak(dsn: str) -> None:
    """Borrow all three connections of a pool and give none back."""
    with ConnectionPool(dsn, min_size=3, max_size=3) as pool:
        borrowed = [pool.getconn() for _ in range(3)]  # and nobody calls pool.putconn(…)
        for conn in borrowed:
            conn.execute("select 1")
        pool.getconn(timeout=0.5)  # the fourth waits for one that does not come back


def timeout(dsn: str) -> None:
    """Give a statement of a minute half a second."""
    with psycopg.connect(dsn) as conn:
        conn.execute("set statement_timeout = '500ms'")
        conn.execute("select pg_sleep(60)")


def connect(dsn: str, clients: int, connected: list[psycopg.Connection]) -> None:
    """Connect until there are as many clients as wanted."""
    while len(connected) < clients:
        connected.append(psycopg.connect(dsn, autocommit=True))


def ask_all_at_once(connected: list[psycopg.Connection]) -> list[int]:
    """Every client asks at the same time which backend serves it."""

    def ask(conn: psycopg.Connection) -> int:
        [(pid, _)] = conn.execute("select pg_backend_pid(), pg_sleep(0.2)").fetchall()
        return int(pid)

    with ThreadPoolExecutor(len(connected)) as threads:
        return list(threads.map(ask, connected))


# --- The show -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peaks:
    """The most that was seen at one moment while the clients were asking."""

    clients: int
    waiting: int
    servers: int
    backends: int
    looks: int


def run() -> None:
    """Show everything. Raises DemoFailed when something announced does not come, and what ``Postgres.start`` raises."""
    began = time.monotonic()
    with _quiet_pool(), Postgres.start(max_connections=MAX_CONNECTIONS) as pg:
        print(f"A real PostgreSQL {pg.version} on {pg.address}, with max_connections = {MAX_CONNECTIONS}.")
        show_leak(pg)
        show_timeout(pg)
        admitted = show_saturation(pg)
        show_cure(pg, admitted)
    print(f"\nDone in {time.monotonic() - began:.1f} s; the servers are stopped and removed.")


def show_leak(pg: Postgres) -> None:
    """Three connections are borrowed for good; the fourth borrower gets PoolTimeout."""
    _title("1. A leak: a pool of 3, and three connections that nobody gives back", leak)
    with _expected(PoolTimeout, lambda: leak(pg.dsn)) as error:
        held = pg.rows(STATES)
        _show(error)
    if sum(row["n"] for row in held) != 3:
        raise DemoFailed(f"PostgreSQL should have seen 3 leaked sessions; it saw {held}")
    print(f"  pg_stat_activity at that moment: {_states(held)}. The server is far from full; the pool is empty.")


def show_timeout(pg: Postgres) -> None:
    """A statement is longer than statement_timeout."""
    _title("2. A timeout: the statement would take a minute, and may take half a second", timeout)
    began = time.monotonic()
    with _expected(psycopg.errors.QueryCanceled, lambda: timeout(pg.dsn), "statement timeout") as error:
        _show(error)
    print(f"  It came after {time.monotonic() - began:.2f} s.")


def show_saturation(pg: Postgres) -> int:
    """More clients than slots; returns how many got in."""
    _until_nobody_is_there(pg)
    _title(f"3. Saturation: {CLIENTS} clients, each with a connection of its own", connect)
    connected: list[psycopg.Connection] = []
    with contextlib.ExitStack() as closing:
        closing.callback(_close, connected)
        with _expected(psycopg.OperationalError, lambda: connect(pg.dsn, CLIENTS, connected), SLOTS_TAKEN) as error:
            sessions = pg.value(SESSIONS)
            _show(error)
        if sessions != len(connected):
            raise DemoFailed(f"{len(connected)} clients are connected; pg_stat_activity says {sessions}")
        reserved = pg.value("show superuser_reserved_connections")
    print(f"  {sessions} of {CLIENTS} clients got in (pg_stat_activity): {MAX_CONNECTIONS} slots, {reserved} reserved.")
    return len(connected)


def show_cure(pg: Postgres, admitted: int) -> None:
    """The same clients through PgBouncer: everybody is answered over a few server connections."""
    _until_nobody_is_there(pg)
    _title(f"4. The cure: the same {CLIENTS} clients through PgBouncer", connect, ask_all_at_once)
    print(f'  bouncer = pg.pgbouncer(pool_mode="transaction", default_pool_size={POOL_SIZE})')
    with pg.pgbouncer(pool_mode="transaction", default_pool_size=POOL_SIZE) as bouncer:
        print(f"  PgBouncer {bouncer.version} on {bouncer.address}; only the DSN in the code is another.\n")
        answers, peaks = _served(pg, bouncer)
    _check_cure(answers, peaks)
    print(f"  {len(answers)} of {CLIENTS} clients were answered, by {len(set(answers))} backends (pg_backend_pid).")
    print(f"  The largest figures of {peaks.looks} looks while they were asking, not all of one moment:")
    print(f"    SHOW POOLS        {peaks.clients} clients; {peaks.waiting} waiting; {peaks.servers} servers")
    print(f"    pg_stat_activity  {peaks.backends} sessions of these clients, where {admitted} had filled PostgreSQL")


def _served(pg: Postgres, bouncer: PgBouncer) -> tuple[list[int], Peaks]:
    connected: list[psycopg.Connection] = []
    with contextlib.ExitStack() as closing:
        closing.callback(_close, connected)
        connect(bouncer.dsn, CLIENTS, connected)
        with ThreadPoolExecutor(1) as thread:
            answers = thread.submit(ask_all_at_once, connected)
            peaks = _watch(pg, bouncer, answers)
        return answers.result(), peaks


def _watch(pg: Postgres, bouncer: PgBouncer, asking: Future[list[int]]) -> Peaks:
    clients = waiting = servers = backends = looks = 0
    while not asking.done():
        pool = next(row for row in bouncer.rows("SHOW POOLS") if row["user"] == "app")
        clients = max(clients, pool["cl_active"] + pool["cl_waiting"])
        waiting = max(waiting, pool["cl_waiting"])
        servers = max(servers, pool["sv_active"] + pool["sv_idle"] + pool["sv_used"])
        backends = max(backends, pg.value(SESSIONS))
        looks += 1
        time.sleep(0.02)
    return Peaks(clients, waiting, servers, backends, looks)


def _check_cure(answers: list[int], peaks: Peaks) -> None:
    if len(answers) != CLIENTS or peaks.clients != CLIENTS:
        raise DemoFailed(f"{CLIENTS} clients should have been connected and answered: {len(answers)} answers, {peaks}")
    if not 0 < peaks.backends <= POOL_SIZE or not peaks.waiting:
        raise DemoFailed(f"{POOL_SIZE} server connections should have done, with clients waiting for them: {peaks}")


# --- Plumbing -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _expected(kind: type[Exception], happens: Callable[[], object], text: str = "") -> Iterator[Exception]:
    """Run ``happens`` and yield the error that it raised; raises DemoFailed when there was none or another.

    While the error is held, its traceback keeps the function's variables: leaked connections are open until the end
    of the block.
    """
    try:
        happens()
    except kind as error:
        if text not in str(error):
            raise DemoFailed(f"expected {_name(kind)} with the words {text!r}, got: {error}") from None
        yield error
        traceback.clear_frames(error.__traceback__)
    except Exception as error:
        raise DemoFailed(f"expected {_name(kind)}, got {_name(type(error))}: {error}") from error
    else:
        raise DemoFailed(f"expected {_name(kind)}, but no error came")


def _title(title: str, *functions: Callable[..., object]) -> None:
    print(f"\n{title}\n")
    for function in functions:
        print(textwrap.indent(inspect.getsource(function), "    "))


def _show(error: Exception) -> None:
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    print(f"  {_name(type(error))}{f' (SQLSTATE {state})' if state else ''}")
    print(textwrap.indent(str(error).strip(), "    "))


def _name(kind: type[Exception]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _states(rows: list[dict[str, object]]) -> str:
    return ", ".join(f"{row['n']} sessions {row['state']}" for row in rows)


def _until_nobody_is_there(pg: Postgres) -> None:
    """PostgreSQL notices a closed connection a moment later."""
    if not wait_until(lambda: pg.value(SESSIONS) == 0, 10, pause=0.02):
        raise DemoFailed(f"sessions of the part before are still there: {pg.rows(STATES)}")


def _close(connected: list[psycopg.Connection]) -> None:
    for connection in connected:
        connection.close()


@contextlib.contextmanager
def _quiet_pool() -> Iterator[None]:
    """The pool also logs its troubles; here they are printed as errors."""
    logger = logging.getLogger("psycopg.pool")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
