"""A PgBouncer in transaction mode with two server connections, and other clients that take them in turn.

Whoever relies on the state of a session is found out here: with ``server_round_robin`` each transaction of a client
goes to the other server connection, and an other client can hold either of them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, LiteralString

import psycopg

from connlab.checks.errors import CheckError, Trouble
from connlab.checks.sandbox import Sandbox
from connlab.checks.sessions import opened
from connlab.checks.trial import Trial
from connlab.errors import NodeStopped
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres

SERVERS = 2
LOCKED_FOR = 2
"""Seconds that a check waits for tables that somebody uses."""
WAIT = 4
"""Seconds that a client waits for a server connection before PgBouncer turns it away."""
WATCHERS = 2
"""Clients that ask all the time: one waits for the server connection while the other has it."""
ROLE_AS_AT_FIRST = "alter role app reset all; alter role app in database shop reset all;"
"""What somebody has set for the role would be there in each server connection of the checks that follow."""
KEEPS_STATEMENTS = (1, 21)
"""The first PgBouncer with ``max_prepared_statements``: https://www.pgbouncer.org/changelog.html."""
NEW_SERVER = re.compile(r"S-0x\w+: \S+ new connection to server")
NO_LOG = "Start the server of this lab with `log_connections=True`: the check counts connections in its log."
TAKEN = (
    "Somebody keeps a server connection. In transaction mode it goes back when the transaction ends, and not before: "
    "which line of yours ends it, on each path, also that of an exception?"
)


class Starved(Trouble):
    """The server connections did not become free for other clients."""

    def __init__(self) -> None:
        super().__init__(
            f"a server connection for each of {SERVERS} other clients within {WAIT} s, while your code is idle",
            "PgBouncer turned one away (`query_wait_timeout`)",
            TAKEN,
        )


class Disturbed(Trouble):
    """A query of an other client, which has set nothing, fails."""

    def __init__(self, problem: psycopg.Error) -> None:
        super().__init__(
            "a query of another client, which has set nothing, works",
            f"`{type(problem).__name__}: {problem}`",
            "Something that your code set on a server connection is still there, and other clients meet it. What ends "
            "with the transaction, and what does not?",
        )


class InUse(Trouble):
    """A session keeps the tables from being made again."""

    def __init__(self, tables: Sequence[str]) -> None:
        super().__init__(
            f"tables ({', '.join(tables)}) that nobody uses when the check begins",
            f"a session of the notebook kept them for more than {LOCKED_FOR} s",
            "A connection that you have opened in the notebook is still in a transaction that has used them: commit "
            "it, or close the connection.",
        )


class TransactionMode:
    """Other clients of a PgBouncer in transaction mode, and what it and the server say."""

    def __init__(self, pg: Postgres, bouncer: PgBouncer, mark: int) -> None:
        self._pg, self._bouncer, self._mark = pg, bouncer, mark
        self.dsn = bouncer.dsn

    @contextmanager
    def others(self) -> Iterator[list[psycopg.Connection[Any]]]:
        """Two other clients that have set nothing, each in a transaction, on one server connection each."""
        with ExitStack() as stack:
            try:
                found = [self._other(stack) for _ in range(SERVERS)]
            except psycopg.Error as problem:
                raise Starved from problem
            yield [client for _, client in sorted(found, key=lambda each: each[0])]

    def _other(self, stack: ExitStack) -> tuple[int, psycopg.Connection[Any]]:
        client = stack.enter_context(psycopg.connect(self.dsn, prepare_threshold=None, connect_timeout=2 * WAIT))
        return client.execute("select pg_backend_pid()").fetchone()[0], client  # type: ignore[index]

    @contextmanager
    def held(self, which: int) -> Iterator[psycopg.Connection[Any]]:
        """An other client is in a transaction meanwhile, on the first (0) or the second (1) server connection."""
        with self.others() as clients:
            clients[1 - which].rollback()
            yield clients[which]

    def each(self, query: LiteralString) -> list[Any]:
        """The first cell that the query gives to a client that has set nothing, on each of the server connections."""
        with self.others() as clients:
            return [_first_cell(client, query) for client in clients]

    @contextmanager
    def watched(self, query: LiteralString) -> Iterator[set[Any]]:
        """Clients that have set nothing ask all the time meanwhile; the first cells that they got, after the block.

        While one server connection is held, they wait in line for the other one: whoever ends a transaction there
        meets one of them before the next transaction of its own.
        """
        seen, over = set[Any](), threading.Event()
        with ExitStack() as stack:
            clients = [
                stack.enter_context(psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None))
                for _ in range(WATCHERS)
            ]
            threads = stack.enter_context(ThreadPoolExecutor(WATCHERS))
            stack.callback(over.set)
            watching = [threads.submit(_watch, client, query, seen, over) for client in clients]
            yield seen
        for each in watching:
            each.result()

    def notify(self, channel: str, payloads: Sequence[str]) -> None:
        """Send notifications, each in a transaction of its own and so from the next server connection."""
        with psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None) as client:
            for payload in payloads:
                _first_cell(client, "select pg_notify(%s, %s)", channel, payload)

    def end_one(self) -> None:
        """End the session of one server connection, which is idle."""
        with self.others() as clients:
            pid = _first_cell(clients[0], "select pg_backend_pid()")
        self._pg.rows(f"select pg_terminate_backend({pid}, 5000)")

    def past(self) -> int:
        """How many connections of the role app have come past this PgBouncer since it was started."""
        all_of_them = opened(self._pg, self._mark)
        if not all_of_them:
            raise CheckError(NO_LOG)
        return max(0, all_of_them - len(NEW_SERVER.findall(self._bouncer.log())))

    def pids(self) -> set[int]:
        """The process ids of the server connections."""
        return {row["remote_pid"] for row in self._bouncer.rows("SHOW SERVERS")}


def _watch(client: psycopg.Connection[Any], query: LiteralString, seen: set[Any], over: threading.Event) -> None:
    while not over.is_set():
        try:
            seen.add(_first_cell(client, query))
        except Disturbed as problem:
            if "query_wait_timeout" in problem.measured:
                raise Starved from problem
            raise


def _first_cell(client: psycopg.Connection[Any], query: LiteralString, *parameters: str) -> Any:
    try:
        return client.execute(query, parameters or None).fetchone()[0]  # type: ignore[index]
    except psycopg.Error as problem:
        raise Disturbed(problem) from problem


@contextmanager
def transaction_mode(pg: Postgres) -> Iterator[TransactionMode]:
    """Start such a PgBouncer; it keeps no prepared statements, whatever its version, and is stopped after the block."""
    mark = pg.mark()
    with pg.pgbouncer(
        pool_mode="transaction", default_pool_size=SERVERS, server_round_robin=1, query_wait_timeout=WAIT
    ) as bouncer:
        if bouncer.version >= KEEPS_STATEMENTS:
            bouncer.rows("SET max_prepared_statements = 0")
        yield TransactionMode(pg, bouncer, mark)


@contextmanager
def application(
    trial: Trial,
    pg: Postgres,
    schema: str,
    tables: Sequence[str],
    also: str = "",
    undo: str = "",
    /,
    **code: Callable[..., Any],
) -> Iterator[tuple[Sandbox, TransactionMode]]:
    """The learner's functions in a process, such a PgBouncer, and ``tables`` that nobody has used, made by ``schema``.

    Both server connections are open. Afterwards the tables are as the notebook made them, or gone where it had none.
    ``also`` is SQL that the check needs besides, and ``undo`` takes that back. The role has no settings of its own.
    """
    first = (ROLE_AS_AT_FIRST, undo)
    afterwards = ""
    try:
        with trial.sandbox(pg, **code) as box:
            there = pg.value(f"select to_regclass('{tables[0]}') is not null")
            try:
                _execute(pg, *first, schema, also)
            except psycopg.errors.LockNotAvailable as problem:
                raise InUse(tables) from problem
            afterwards = schema if there else f"drop table if exists {', '.join(tables)}"
            with transaction_mode(pg) as mode:
                with mode.others():
                    pass
                try:
                    yield box, mode
                finally:
                    box.quiet()  # the learner's pools will miss this PgBouncer, and say so
    finally:
        with suppress(psycopg.Error, NodeStopped):  # a server that is gone has no tables
            _execute(pg, *first, afterwards)


def _execute(pg: Postgres, *scripts: str) -> None:
    timeout = f"-c lock_timeout={LOCKED_FOR}s"
    with psycopg.connect(pg.admin_dsn, autocommit=True, application_name="connlab", options=timeout) as conn:
        for script in scripts:
            conn.execute(script.encode())
