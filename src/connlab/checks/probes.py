"""Clients that run into a fault on purpose: who ended them, with what, after how long, and what the server still has.

They run in the check's process, beside the learner's code, and see what any client of the server sees.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, LiteralString

import psycopg

if TYPE_CHECKING:
    from connlab.postgres import Postgres

Connection = psycopg.Connection[tuple[Any, ...]]

PERIOD = 0.01
SHORT = 0.1
"""Seconds of one of the many short statements of a long transaction."""
LIMITS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")


@dataclass(frozen=True)
class End:
    """How something came to its end: ``name`` is the exception's class, empty where it ended by itself."""

    seconds: float
    name: str = ""
    sqlstate: str = ""
    message: str = ""

    def __str__(self) -> str:
        if not self.name:
            return f"nobody has ended it: it took {self.seconds:.2f} s"
        state = f", SQLSTATE {self.sqlstate}" if self.sqlstate else ""
        return f"`{self.name}`{state}, after {self.seconds:.2f} s: {self.message}"


def ended(act: Callable[[], Any]) -> End:
    """Do it, and say how it ended."""
    began = time.perf_counter()
    try:
        act()
    except psycopg.Error as error:
        message = " ".join(str(error).split())
        return End(time.perf_counter() - began, type(error).__name__, error.sqlstate or "", message)
    return End(time.perf_counter() - began)


def runs(conn: Connection, query: LiteralString, *parameters: Any) -> End:
    """Run the query, and say how it ended."""
    return ended(lambda: conn.execute(query, parameters))


def best(ends: list[End], sqlstate: str) -> End:
    """That of several alike which the machine has disturbed least, of those with that SQLSTATE if there are any.

    Who is just sending when the server ends the session may see a closed connection, and no SQLSTATE.
    """
    return min(ends, key=lambda end: (end.sqlstate != sqlstate, end.seconds))


def known_limits(pg: Postgres) -> tuple[str, ...]:
    """The settings among ``LIMITS`` that this server has: ``transaction_timeout`` came with PostgreSQL 17."""
    return LIMITS if pg.version >= (17,) else LIMITS[:-1]


def unlimited(pg: Postgres) -> Connection:
    """An administrator's connection that no timeout of a role or a database ends."""
    options = " ".join(f"-c {name}=0" for name in known_limits(pg))
    return psycopg.connect(pg.admin_dsn, options=options, application_name="connlab", autocommit=True)


def left_behind(dsn: str, number: int) -> list[str]:
    """The limits that somebody has set, as so many clients of PgBouncer's find them, each on a server connection."""
    query = "select name || ' = ' || setting || coalesce(unit, '') from pg_settings where source = 'session'"
    found: list[str] = []
    with contextlib.ExitStack() as clients, contextlib.suppress(psycopg.Error):
        for _ in range(number):
            client = clients.enter_context(psycopg.connect(dsn))
            found += [str(row[0]) for row in client.execute(query + " and name = any(%s)", [list(LIMITS)])]
    return found


# --- faults -------------------------------------------------------------------------------------------------


def sleeps(dsn: str, seconds: float) -> End:
    """One statement that takes so long."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        return runs(conn, "select pg_sleep(%s)", seconds)


def waits_for(dsn: str, row: int, begun: threading.Event | None = None) -> End:
    """One statement that needs the row of accounts; ``begun`` tells when it is sent."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        (begun or threading.Event()).set()
        return runs(conn, "select 1 from accounts where id = %s for update", row)


def many_short(dsn: str, seconds: float, short: float = SHORT) -> End:
    """A transaction of short statements, one after the other, for so long."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        return ended(lambda: _many_short(conn, seconds, short))


def _many_short(conn: Connection, seconds: float, short: float) -> None:
    began = time.perf_counter()
    with conn.transaction():
        while time.perf_counter() - began < seconds:
            conn.execute("select pg_sleep(%s)", [short])


def pauses(dsn: str, seconds: float) -> End:
    """A transaction that does nothing for so long between two statements."""
    with psycopg.connect(dsn) as conn:

        def act() -> None:
            conn.execute("select 1")
            time.sleep(seconds)
            conn.execute("select 1")

        return ended(act)


def forgets(pg: Postgres, dsn: str, row: int, give_up: float) -> tuple[End, float]:
    """A transaction that has changed a row of accounts and does nothing more.

    How it ended, which its client learns with its next statement, and after how many seconds somebody else got the
    row; that is ``give_up`` when nobody did.
    """
    with psycopg.connect(dsn) as conn, unlimited(pg) as other:
        began = time.perf_counter()
        changed = runs(conn, "update accounts set balance = balance where id = %s", row)
        if changed.name:
            return changed, changed.seconds
        other.execute(f"set lock_timeout = {round(1000 * give_up)}")
        with contextlib.suppress(psycopg.errors.LockNotAvailable):
            other.execute("select 1 from accounts where id = %s for update", [row])
        seconds = time.perf_counter() - began
        return runs(conn, "select 1"), seconds


def abandons(pg: Postgres, dsn: str, give_up: float) -> float:
    """A client that goes away while its query runs: how many seconds the query ran on, up to ``give_up``."""
    name = f"abandoned {uuid.uuid4().hex}"
    conn = psycopg.connect(dsn, autocommit=True)
    began = time.perf_counter()
    conn.pgconn.send_query(f"select pg_sleep(60) /* {name} */".encode())
    conn.pgconn.flush()
    with unlimited(pg) as other:

        def goes_on() -> bool:
            query = "select count(*) from pg_stat_activity where state = 'active' and query like %s"
            return other.execute(query, [f"%/* {name} */"]).fetchone() == (1,)

        until(goes_on, give_up)
        conn.close()
        until(lambda: not goes_on(), give_up)
    return time.perf_counter() - began


@contextlib.contextmanager
def row_locked(pg: Postgres, row: int) -> Iterator[None]:
    """Somebody whom no timeout ends has locked the row of accounts."""
    with unlimited(pg) as conn, conn.transaction(force_rollback=True):
        conn.execute("select 1 from accounts where id = %s for update", [row])
        yield


def until(true: Callable[[], bool], seconds: float) -> bool:
    """Wait for it, so long at most; whether it came."""
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(PERIOD)
    return found


class Silent:
    """A server that lets connections open and says nothing; it sees how long each client waits for it.

    Example:
        ``with Silent() as server: psycopg.connect(server.dsn)``, which ends by its ``connect_timeout``
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.settimeout(0.1)  # so that accepting ends with the block on every system
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(32)
        self._open: list[socket.socket] = []
        self.left: list[float] = []
        """Seconds after which each client that has gone away did so."""

    def __enter__(self) -> Silent:
        self._accepting: Future[None] = self._threads.submit(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._accepting.result()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._threads.shutdown()
        for each in (self._listener, *self._open):
            each.close()

    @property
    def came(self) -> int:
        """How many clients have come."""
        return len(self._open)

    @property
    def dsn(self) -> str:
        """A DSN of it, as an application would have one."""
        return f"postgresql://app:secret@127.0.0.1:{self._listener.getsockname()[1]}/shop"

    def _accept(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                self._open.append(client)
                self._threads.submit(self._listen, client, time.perf_counter())

    def _listen(self, client: socket.socket, began: float) -> None:
        with contextlib.suppress(OSError):
            while client.recv(1 << 12):
                pass
        self.left.append(time.perf_counter() - began)
