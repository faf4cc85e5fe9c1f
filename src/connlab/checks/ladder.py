"""What the checks of lab 14 set up: the learner's settings in force, a PgBouncer of their own, somebody in the way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import psycopg
from psycopg import sql

from connlab.checks.drivers import call
from connlab.checks.limits import Limits, limits_of
from connlab.checks.probes import End, ended, known_limits, runs, unlimited
from connlab.checks.requests import COLUMN
from connlab.checks.sandbox import Sandbox
from connlab.checks.trial import Trial
from connlab.errors import SettingError, StartError
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres

WITHIN = 8.0
SERVERS = 4
"""Server connections of PgBouncer's pool."""
PERIOD = 0.01
AS_IT_WAS = (
    "alter role all reset all; alter role app reset all; alter role postgres reset all; "
    "alter role app in database shop reset all; alter role postgres in database shop reset all; "
    "alter database shop reset all; alter database postgres reset all; alter role app login"
)
SHORTEST = "Which of your limits is so short that it ends what is ordinary? Look at its unit."
SQL = (
    "The administrator sends your text to PostgreSQL as it is. Read what PostgreSQL says about it. `alter system` and "
    "the configuration would hold for everybody."
)
STARTS = (
    "The check starts PgBouncer with your settings, and its first query must get through. "
    "https://www.pgbouncer.org/config.html says what each takes; times are in seconds."
)
WHOLE = (
    "PgBouncer takes `server_connect_timeout` in whole seconds: anything below 1 counts as 0, so every connection to "
    "the server is given up before it is open. Its other times may be fractions."
)


@contextlib.contextmanager
def in_force(trial: Trial, box: Sandbox, pg: Postgres) -> Iterator[Limits]:
    """Sessions that begin inside the block have what the learner's ``server_settings`` says: those of ``app`` that."""
    text = _given(trial, box, "server_settings", int(pg.version[0]))
    trial.expect(
        "`server_settings` returns SQL as a text",
        f"{'it does' if isinstance(text, str) else repr(text)}",
        isinstance(text, str),
        "Return one string with your statements in it, separated by semicolons.",
    )
    with unlimited(pg) as conn:
        try:
            problem = ended(lambda: conn.execute(text.encode()))
            trial.expect("PostgreSQL takes the SQL", f"{problem}" if problem.name else "it did", not problem.name, SQL)
            with _own_clients(trial):
                yield limits_of(pg.dsn)
        finally:
            conn.execute(AS_IT_WAS)


def given_to_pooler(trial: Trial, box: Sandbox) -> dict[str, Any]:
    """What the learner's ``pooler_settings`` returns."""
    found = _given(trial, box, "pooler_settings")
    trial.expect(
        "`pooler_settings` returns a dict of settings of PgBouncer",
        "it does" if isinstance(found, dict) else repr(found),
        isinstance(found, dict),
        'The names are those of pgbouncer.ini, such as `{"max_client_conn": 200}`.',
    )
    return dict(found)


def _given(trial: Trial, box: Sandbox, name: str, *arguments: Any) -> Any:
    answer = box.do(WITHIN, call, name, *arguments)
    trial.expect(
        f"`{name}` returns",
        str(answer.problem) if answer.problem else "it does",
        answer.problem is None,
        "Read the error, from its end.",
    )
    trial.rows.pop()  # that goes without saying
    return answer.value


@contextlib.contextmanager
def pooler(
    pg: Postgres, trial: Trial, box: Sandbox, settings: dict[str, Any] | None = None, size: int = SERVERS
) -> Iterator[PgBouncer]:
    """A PgBouncer in transaction mode with the settings, stopped when the block is left."""
    wanted = {**(settings or {}), "pool_mode": "transaction", "default_pool_size": size}
    bouncer = None
    try:
        bouncer = pg.pgbouncer(**wanted)
    except (SettingError, StartError, TypeError) as problem:
        reason = problem.reason if isinstance(problem, StartError) else str(problem).splitlines()[0]
        trial.expect("PgBouncer starts with your settings", reason, False, WHOLE if _too_short(wanted) else STARTS)
    assert bouncer is not None
    try:
        with _own_clients(trial):
            yield bouncer
    finally:
        box.quiet()  # the learner's pools will miss this PgBouncer, and say so
        bouncer.stop()


@contextlib.contextmanager
def _own_clients(trial: Trial) -> Iterator[None]:
    """Clients of the check's own do nothing that a limit should end, but for what it looks at."""
    try:
        yield
    except psycopg.Error as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        trial.expect("the check's own clients connect, and do something short", f"`{what}`", False, SHORTEST)


def _too_short(settings: dict[str, Any]) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        return float(settings.get("server_connect_timeout", 15)) < 1
    return False


class LongReader:
    """A transaction that has read orders, and is in the way of whoever wants to change the table.

    It ends ``seconds`` after somebody was first seen waiting for it, so nobody can sit it out before he has asked; at
    the latest after ``never`` seconds.
    """

    def __init__(self, pg: Postgres, seconds: float, never: float) -> None:
        self._pg, self._seconds, self._never = pg, seconds, never
        self.asked, self.over = Event(), Event()
        self._left = Event()

    def __enter__(self) -> LongReader:
        self._conn = unlimited(self._pg)
        self._conn.execute("begin")
        self._conn.execute("select count(*) from orders")
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._wait)
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.shutdown()
        self._conn.close()

    def _wait(self) -> None:
        query = "select count(*) from pg_locks where not granted and relation = 'orders'::regclass"
        try:
            deadline = time.monotonic() + self._never
            while not self._left.is_set() and time.monotonic() < deadline:
                if self._conn.execute(query).fetchone() != (0,):
                    self.asked.set()
                    time.sleep(self._seconds)
                    break
                time.sleep(PERIOD)
            self._conn.execute("commit")
        finally:
            self.over.set()


@dataclass
class Reads:
    """What requests have seen that read a table all the time."""

    ends: list[End] = field(default_factory=list)
    locked: list[bool] = field(default_factory=list)
    """At moments one after the other: whether the server had one waiting for a lock."""

    @property
    def failed(self) -> list[End]:
        """Those that got an error."""
        return [end for end in self.ends if end.name]

    @property
    def stood(self) -> float:
        """The part of the time in which a request waited for a lock."""
        return sum(self.locked) / max(len(self.locked), 1)


@contextlib.contextmanager
def reading(pg: Postgres, reader: LongReader) -> Iterator[Reads]:
    """Requests of the service read orders, one after the other, until the reader is over; complete after the block."""
    reads = Reads()

    def read(conn: psycopg.Connection[Any]) -> None:
        while not reader.over.is_set():
            reads.ends.append(runs(conn, "select count(*) from orders where user_id = 7"))
            time.sleep(PERIOD)

    def look(conn: psycopg.Connection[Any], pid: int) -> None:
        query = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
        while not reader.over.is_set():
            row = conn.execute(query, [pid]).fetchone()
            if reader.asked.is_set():
                reads.locked.append(bool(row and row[0]))
            time.sleep(PERIOD)

    with psycopg.connect(pg.dsn, autocommit=True) as conn, unlimited(pg) as other, ThreadPoolExecutor(2) as threads:
        threads.submit(read, conn)
        threads.submit(look, other, conn.info.backend_pid)
        yield reads


@contextlib.contextmanager
def one_column_more(pg: Postgres) -> Iterator[Callable[[], bool]]:
    """Says whether the migration's column is there; it is not, after the block."""
    query = f"select count(*) from information_schema.columns where column_name = '{COLUMN}'"
    try:
        yield lambda: bool(pg.value(query) == 1)
    finally:
        with unlimited(pg) as conn:
            conn.execute(f"alter table orders drop column if exists {COLUMN}")


def queued(pg: Postgres, bouncer: PgBouncer, give_up: float) -> End:
    """How a query ends that finds the only server connection taken, by somebody whom no limit of the role ends."""
    with (
        ThreadPoolExecutor(1) as thread,
        psycopg.connect(bouncer.dsn, autocommit=True) as client,
        psycopg.connect(bouncer.dsn) as holder,
    ):
        for name in known_limits(pg):
            holder.execute(sql.SQL("set local {} = 0").format(sql.Identifier(name)))
        waiting = thread.submit(runs, client, "select 1")
        wait([waiting], give_up)
        holder.rollback()
        return waiting.result()


@contextlib.contextmanager
def held(holders: Sequence[psycopg.Connection[Any]]) -> Iterator[None]:
    """Each of them is in a transaction, so each has a server connection."""
    for conn in holders:
        conn.execute("begin")
    yield
    for conn in holders:
        conn.execute("rollback")
