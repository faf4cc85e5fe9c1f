"""What pools in this process know about themselves, read without asking anybody and without a lock.

psycopg_pool and SQLAlchemy publish less than a lesson needs, and one figure that misleads: ``requests_waiting`` keeps
the clients that have timed out. So this module looks at private attributes. tests/integration/test_recorder_pools.py
fails when a release renames one of them, and pyproject.toml bounds the versions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from connlab.errors import SettingError

COUNTERS = frozenset({"requests", "errors"})


class PoolSource(Protocol):
    """A pool that can be read at any moment."""

    name: str

    def read(self) -> Mapping[str, float] | None:
        """``in use``, ``idle``, ``connecting``, ``waiting`` and ``size limit``; psycopg_pool also ``COUNTERS``.

        None for a pool that is closed or not open yet, of which nothing can be said.
        """


class PsycopgPool:
    """A psycopg_pool: ConnectionPool, AsyncConnectionPool or one of their null variants."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.name: str = pool.name

    def read(self) -> Mapping[str, float] | None:
        """Connections by what they do, clients that wait now, and totals."""
        pool = self._pool
        if pool.closed:
            return None
        stats = pool.get_stats()
        idle, size = stats["pool_available"], stats["pool_size"]
        connecting = min(self._in_the_making(), size - idle)
        return {
            "in use": max(size - idle - connecting, 0),
            "idle": idle,
            "connecting": max(connecting, 0),
            "waiting": sum(map(_waits, pool._waiting.copy())),
            "size limit": pool.max_size,
            "requests": stats.get("requests_num", 0),
            "errors": stats.get("requests_errors", 0),
        }

    def _in_the_making(self) -> int:
        """Connections that ``pool_size`` counts and nobody has: being opened, to be opened later, being reset."""
        pool = self._pool
        later = (getattr(task.action, "__self__", None) for task in pool._sched._queue.copy())
        busy = sum(1 for worker in pool._workers if _is_alive(worker)) - _idle_workers(pool._tasks)
        return max(busy, 0) + _connections(_queued(pool._tasks)) + _connections(later)


def _waits(client: Any) -> bool:
    """Whether a place in the queue still has somebody in it.

    One who has timed out stays in the queue with an error; one whom an interrupt threw out has left no trace but
    that nobody is waiting on the condition any more.
    """
    return client.conn is None and client.error is None and bool(client._cond._waiters)


def _queued(tasks: Any) -> list[Any]:
    queue = getattr(tasks, "queue", None)  # queue.Queue; asyncio.Queue keeps it private
    return list((tasks._queue if queue is None else queue).copy())


def _idle_workers(tasks: Any) -> int:
    return len(tasks.not_empty._waiters) if hasattr(tasks, "not_empty") else _pending(tasks)


def _is_alive(worker: Any) -> bool:
    return worker.is_alive() if hasattr(worker, "is_alive") else not worker.done()


def _connections(tasks: Iterable[Any]) -> int:
    return sum(type(task).__name__ in ("AddConnection", "ReturnConnection") for task in tasks)


class SqlalchemyPool:
    """The QueuePool of a SQLAlchemy engine, sync or async, also when ``dispose`` has put another in its place."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.name = "SQLAlchemy"
        if not hasattr(self._queue_pool(), "checkedout"):
            kind = type(self._queue_pool()).__name__
            raise SettingError(f"a recorder cannot read a {kind}: it keeps no count; use QueuePool or leave it out")

    def read(self) -> Mapping[str, float] | None:
        """Connections by what they do, and clients that wait now. One being opened counts as in use."""
        pool = self._queue_pool()
        limit = pool.size() + pool._max_overflow if pool._max_overflow >= 0 else float("inf")
        return {
            "in use": max(pool.checkedout(), 0),
            "idle": pool.checkedin(),
            "connecting": 0,
            "waiting": self._waiting(pool._pool),
            "size limit": limit,
        }

    def _queue_pool(self) -> Any:
        return getattr(self._engine, "pool", self._engine)

    def _waiting(self, queue: Any) -> int:
        if hasattr(queue, "not_empty"):
            return len(queue.not_empty._waiters)
        made = vars(queue).get("_queue")  # made by the first who asks
        return _pending(made) if made is not None else 0


def _pending(queue: Any) -> int:
    return sum(1 for getter in queue._getters.copy() if not getter.done())


def pool_source(thing: object) -> PoolSource | None:
    """How to read ``thing`` if it is a pool or an engine; None if it is neither.

    Raises SettingError for a SQLAlchemy pool that keeps no count.
    """
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

    if isinstance(thing, ConnectionPool | AsyncConnectionPool):
        return PsycopgPool(thing)
    return SqlalchemyPool(thing) if _is_sqlalchemy(thing) else None


def _is_sqlalchemy(thing: object) -> bool:
    """Whoever has an engine has imported SQLAlchemy, so this need not."""
    if "sqlalchemy" not in sys.modules:
        return False
    from sqlalchemy.engine import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import Pool

    return isinstance(thing, Engine | AsyncEngine | Pool)
