"""What the learner's pools show: whether connections are out that nobody works with."""

from __future__ import annotations

import gc
import time

from psycopg_pool.base import BasePool

from connlab.checks.drivers import Learner
from connlab.checks.errors import Hangs
from connlab.checks.sandbox import Sandbox
from connlab.checks.sessions import Sessions

SETTLES = 1.0
"""Seconds that a pool may take to put away what came back last."""
STILL = 0.5
"""Seconds without a change that make a session one that nobody works with."""


def lent(learner: Learner) -> int:
    """A driver: how many connections the pools of psycopg_pool have lent, when no request runs any more."""
    deadline = time.monotonic() + SETTLES
    while (out := sum(map(_lent, _pools()))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return out


def _pools() -> list[BasePool]:
    return [each for each in gc.get_objects() if issubclass(type(each), BasePool) and not each.closed]


def _lent(pool: BasePool) -> int:
    """The pool's own account: the server does not see a connection that was lost, for Python closes what nobody has.

    The size includes connections that the pool is still trying to open, so it is at most what it has opened.
    """
    stats = pool.get_stats()
    opened = stats.get("connections_num", 0) - stats.get("connections_errors", 0)
    return min(stats.get("pool_size", 0) - stats.get("pool_available", 0), opened)


def kept_after_requests(box: Sandbox) -> int:
    """How many connections did not come back, now that every request has ended."""
    return box.do(10 * SETTLES, lent)


def kept_while_stuck(hang: Hangs, sessions: Sessions) -> bool:
    """Whether requests wait for connections that somebody has kept: nothing moves, and they wait at a pool, or a
    transaction is open.

    Requests that are busy, such as in a loop that does not end, move their sessions.
    """
    before = sessions.now()
    time.sleep(STILL)
    after = sessions.now()
    in_transaction = any((row["state"] or "").startswith("idle in transaction") for row in after)
    return before == after and (hang.in_pool or in_transaction)
