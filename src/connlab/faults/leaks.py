"""Connections that are borrowed from a pool and not returned."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests

from connlab.errors import ConnlabError, SettingError
from connlab.faults.fault import ANSWER_WITHIN, Connection, Fault, check_count, check_seconds, roll_back

Kind = Literal["in_transaction", "autocommit", "closed", "collected"]
HELD = ("in_transaction", "autocommit")
BORROW_WITHIN = 5.0
PID = "select pg_backend_pid()"


@contextlib.contextmanager
def leak(pool: Any, n: int = 1, kind: Kind = "in_transaction", *, timeout: float = BORROW_WITHIN) -> Iterator[Fault]:
    """Borrow ``n`` connections from ``pool`` and do not return them, in one of the ways in which that happens.

    What it does, for a psycopg_pool ``ConnectionPool``::

        conn = pool.getconn()                # n times, and never pool.putconn(conn)
        conn.execute("select …")             # "in_transaction": the server shows idle in transaction
        conn.autocommit = True; conn.execute("select …")   # "autocommit": the server shows idle
        conn.close()                         # "closed": no session is left, the pool counts it all the same
        del conn                             # "collected": the same, by the garbage collector

    and for a SQLAlchemy ``Engine``, "in_transaction" and "autocommit" alone, since it takes back what is closed or
    collected::

        conn = engine.connect(); conn.execute(text("select …"))

    When the block is left the pool has them back; for a closed one it opens another. **It never gets a collected one
    back**: there is nothing left to return, and the pool stays ``n`` smaller until it is closed. Take a pool of
    its own for that.

    Raises SettingError for another kind or pool, and for a pool that could never lend ``n``; ConnlabError when it
    does not lend them within ``timeout`` seconds each, with what was borrowed returned.

    Example:
        ``with faults.leak(pool, 3, "closed") as fault: print(fault)``
    """
    check_count("n", n)
    check_seconds("timeout", timeout)
    lender = _lender(pool, kind)
    lender.check(n)
    borrowed: list[Any] = []
    pids: list[int] = []
    try:
        for _ in range(n):
            borrowed.append(_borrow(lender, len(borrowed), n, timeout))
            pids.append(lender.leave(borrowed[-1], kind))
        if kind == "collected":
            borrowed.clear()
            gc.collect()
        yield Fault(f"leaked {n} connection{'' if n == 1 else 's'} ({kind})", pids)
    finally:
        _return(lender, borrowed)


class Lender(Protocol):
    """What is done with a pool, of whatever make."""

    def check(self, n: int) -> None:
        """Raise SettingError when the pool could never lend ``n``."""

    def borrow(self, timeout: float) -> Any:
        """Borrow a connection; raises what the pool raises."""

    def leave(self, connection: Any, kind: Kind) -> int:
        """Bring it into the state of ``kind``; returns the pid of its server process."""

    def give_back(self, connection: Any, seconds: float) -> None:
        """Return it as it was borrowed, whatever has become of its server, which gets ``seconds`` to answer."""


class PsycopgLender:
    """A psycopg_pool ConnectionPool."""

    def __init__(self, pool: ConnectionPool[Any]) -> None:
        self._pool = pool
        self._autocommit: dict[int, bool] = {}
        """As each was borrowed, by identity: a reference would keep the garbage collector away."""

    def check(self, n: int) -> None:
        """See ``Lender``."""
        if n > self._pool.max_size:
            raise SettingError(f"the pool has max_size={self._pool.max_size} and can never lend {n} connections")

    def borrow(self, timeout: float) -> Connection:
        """See ``Lender``."""
        connection: Connection = self._pool.getconn(timeout)
        self._autocommit[id(connection)] = connection.autocommit
        return connection

    def leave(self, connection: Connection, kind: Kind) -> int:
        """See ``Lender``."""
        if kind == "closed":
            pid = connection.info.backend_pid
            connection.close()
            return pid
        if kind == "collected":
            return connection.info.backend_pid
        connection.autocommit = kind == "autocommit"
        row = connection.execute(PID).fetchone()
        assert row is not None
        return int(row[0])

    def give_back(self, connection: Connection, seconds: float) -> None:
        """See ``Lender``."""
        roll_back(connection, seconds)
        with contextlib.suppress(psycopg.Error):
            connection.autocommit = self._autocommit[id(connection)]
        self._pool.putconn(connection)


class SqlalchemyLender:
    """A SQLAlchemy Engine whose pool has a size."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def check(self, n: int) -> None:
        """See ``Lender``."""
        pool = self._engine.pool
        overflow = getattr(pool, "_max_overflow", -1)
        if overflow >= 0 and (limit := pool.size() + overflow) < n:
            raise SettingError(f"the engine has pool_size + max_overflow = {limit} and can never lend {n} connections")

    def borrow(self, timeout: float) -> Any:
        """See ``Lender``. The engine's own ``pool_timeout`` decides how long."""
        return self._engine.connect()

    def leave(self, connection: Any, kind: Kind) -> int:
        """See ``Lender``."""
        if kind == "autocommit":
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        return int(connection.exec_driver_sql(PID).scalar_one())

    def give_back(self, connection: Any, seconds: float) -> None:
        """See ``Lender``."""
        driver = connection.connection.driver_connection
        if isinstance(driver, psycopg.Connection):
            roll_back(driver, seconds)
            if driver.closed:  # its server has gone, and SQLAlchemy would raise
                connection.invalidate()
        connection.close()


def _lender(pool: Any, kind: str) -> Lender:
    if kind not in get_args(Kind):
        raise SettingError(f"a leak's kind is {', '.join(map(repr, get_args(Kind)))}, not {kind!r}")
    if isinstance(pool, ConnectionPool):
        if kind == "closed" and pool.close_returns:
            raise SettingError("with close_returns=True the pool takes back what is closed: that is no leak")
        return PsycopgLender(pool)
    if _is_engine(pool):
        if kind not in HELD:
            raise SettingError(f"SQLAlchemy takes back what is {kind}: that is no leak; it has {' and '.join(HELD)}")
        return SqlalchemyLender(pool)
    raise SettingError(f"leak takes psycopg_pool's ConnectionPool or SQLAlchemy's Engine, not {type(pool).__name__}")


def _is_engine(pool: object) -> bool:
    """Whoever has an engine has imported SQLAlchemy, so this need not."""
    if "sqlalchemy" not in sys.modules:
        return False
    from sqlalchemy.engine import Engine

    return isinstance(pool, Engine)


def _borrow(lender: Lender, so_far: int, n: int, timeout: float) -> Any:
    try:
        return lender.borrow(timeout)
    except Exception as problem:
        if not isinstance(problem, PoolTimeout | TooManyRequests) and type(problem).__name__ != "TimeoutError":
            raise
        raise ConnlabError(
            f"leak has borrowed {so_far} of {n} connections and gets no more: {problem}; "
            "others have them, or the server does not answer"
        ) from problem


def _return(lender: Lender, borrowed: list[Any]) -> None:
    deadline = time.monotonic() + ANSWER_WITHIN

    def give_back(connection: Any) -> None:
        lender.give_back(connection, max(deadline - time.monotonic(), 0.1))

    with contextlib.ExitStack() as each:  # every one of them, whatever one of them raises
        while borrowed:
            each.callback(give_back, borrowed.pop())
