"""One session that is in the way: it holds a lock, sits idle in a transaction, or takes long."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from connlab.configuration import did_you_mean
from connlab.errors import ConnlabError, SettingError
from connlab.faults.fault import Connection, Fault, check_seconds, connect, cut, transaction

CANCEL_WITHIN = 3.0
TABLES = "select tablename from pg_tables where schemaname not in ('pg_catalog', 'information_schema')"


@contextlib.contextmanager
def hold_row_lock(dsn: str, table: str, id: object, *, column: str = "id") -> Iterator[Fault]:
    """Lock one row, as an update that nobody commits does; released when the block is left.

    What it does::

        conn = psycopg.connect(dsn)
        conn.execute("select 1 from accounts where id = %s for update nowait", [id])   # and no commit

    ``table`` may have its schema before it ("public.accounts"). Raises SettingError for a table or row that is not
    there, ConnlabError for a row that somebody else has locked and for a server that lets nobody in.

    Example:
        ``with faults.hold_row_lock(pg.dsn, "accounts", 7): …``
    """
    with transaction(dsn, "hold_row_lock") as connection:
        pid = _pid(connection)
        _lock(connection, table, column, id)
        yield Fault(f"locked the row {column} = {id} of {table}", [pid])


@contextlib.contextmanager
def idle_in_transaction(dsn: str, query: str = "select 1") -> Iterator[Fault]:
    """Run ``query`` and do nothing more: neither commit nor rollback, until the block is left.

    What it does::

        conn = psycopg.connect(dsn)
        conn.execute(query)   # psycopg opens a transaction first

    The locks that ``query`` takes are held as long: ``"select * from accounts limit 1"`` makes an ALTER TABLE wait.
    Raises SettingError for a query that fails or ends the transaction, ConnlabError for a server that lets nobody in.

    Example:
        ``with faults.idle_in_transaction(bouncer.dsn) as fault: print(fault)``
    """
    with transaction(dsn, "idle_in_transaction") as connection:
        pid = _pid(connection)
        _run(connection, query)
        yield Fault("idle in a transaction", [pid])


@contextlib.contextmanager
def slow_query(dsn: str, seconds: float) -> Iterator[Fault]:
    """Have a query run for ``seconds``; cancelled when the block is left before.

    What it does, in a thread::

        conn = psycopg.connect(dsn, autocommit=True)
        conn.execute("select pg_sleep(%s)", [seconds])

    It has been sent when the block begins. An error that ends it before (a timeout, a kill) is in ``fault.error``.
    Through PgBouncer ``fault.pids`` has PgBouncer's number for the client, not the server's.
    Raises SettingError for a wrong time, ConnlabError for a server that lets nobody in.

    Example:
        ``with faults.slow_query(pg.dsn, 30): …``
    """
    wanted = check_seconds("slow_query", seconds)
    with contextlib.closing(connect(dsn, "slow_query", autocommit=True)) as connection:
        fault = Fault(f"a query of {wanted:g} s", [connection.info.backend_pid])
        left = threading.Event()
        thread = threading.Thread(target=_sleep, args=[connection, wanted, fault, left], name="slow_query")
        wire = socket.socket(fileno=os.dup(connection.fileno()))
        with wire:
            thread.start()
            try:
                _await_sent(connection, thread)
                yield fault
            finally:
                left.set()
                _end(connection, thread, wire)


def _pid(connection: Connection) -> int:
    """The server process of this transaction, also behind a PgBouncer, which tells clients another number."""
    row = connection.execute("select pg_backend_pid()").fetchone()
    assert row is not None
    return int(row[0])


def _run(connection: Connection, query: str) -> None:
    if not isinstance(query, str):
        raise SettingError(f"idle_in_transaction takes a query as text, not {query!r}")
    try:
        connection.execute(query.encode())
    except psycopg.Error as problem:
        raise SettingError(f"idle_in_transaction cannot run {query!r}: {problem}") from problem
    if connection.info.transaction_status != TransactionStatus.INTRANS:
        raise SettingError(f"{query!r} ends its transaction, so that nothing would be idle in one")


def _lock(connection: Connection, table: str, column: str, id: object) -> None:
    where = f"{table} where {column} = {id!r}"
    query = sql.SQL("select 1 from {} where {} = %s for update nowait")
    names = sql.Identifier(*str(table).split(".")), sql.Identifier(column)
    try:
        found = connection.execute(query.format(*names), [id]).fetchone()
    except psycopg.errors.LockNotAvailable as problem:
        raise ConnlabError(f"somebody has locked {where} already") from problem
    except psycopg.errors.UndefinedTable as problem:
        connection.rollback()
        tables = [str(row[0]) for row in connection.execute(TABLES)]
        hint = did_you_mean(str(table), tables) or f"there is {', '.join(sorted(tables))}"
        raise SettingError(f"there is no table {table}; {hint}") from problem
    except psycopg.Error as problem:
        raise SettingError(f"cannot lock {where}: {problem}") from problem
    if found is None:
        raise SettingError(f"there is no row to lock: {where} finds nothing")


def _sleep(connection: Connection, seconds: float, fault: Fault, left: threading.Event) -> None:
    try:
        connection.execute("select pg_sleep(%s)", [seconds])
    except psycopg.Error as problem:
        if not left.is_set():
            fault.error = problem


def _await_sent(connection: Connection, thread: threading.Thread) -> None:
    while thread.is_alive() and connection.info.transaction_status != TransactionStatus.ACTIVE:
        time.sleep(0.001)


def _end(connection: Connection, thread: threading.Thread, wire: socket.socket) -> None:
    """Cancel the query; if nobody answers, cut the connection, so that the thread ends."""
    with contextlib.suppress(psycopg.Error):
        connection.cancel_safe(timeout=CANCEL_WITHIN)
        thread.join(CANCEL_WITHIN)
    if thread.is_alive():
        cut(wire)
    thread.join()
