"""A server whose connection slots are taken."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psycopg

from connlab.errors import ConnlabError, SettingError
from connlab.faults.fault import Connection, Fault, check_count
from connlab.postgres import Postgres

FULL = ("remaining connection slots are reserved", "too many clients")
TRIES = 5
"""A session that has just ended still has its slot: only several refusals in a row mean that none is free."""
GONE_WITHIN = 10.0


@contextlib.contextmanager
def saturate(pg: Postgres, leave: int = 0) -> Iterator[Fault]:
    """Take every slot that an ordinary role can get but ``leave`` of them; given back when the block is left.

    What it does::

        held = []
        while True:
            held.append(psycopg.connect(pg.dsn))   # until: remaining connection slots are reserved …

    The superuser still gets in (``pg.admin_dsn``). ``fault.count`` is how many were taken. The slots are free again
    when the block has been left. Raises SettingError when fewer than ``leave`` are free, and for another node than a
    PostgreSQL, NodeStopped for a server that does not run, ConnlabError for another refusal than a lack of slots.

    Example:
        ``with faults.saturate(pg, leave=2) as fault: print(fault)``
    """
    if not isinstance(pg, Postgres):
        raise SettingError(f"saturate takes a PostgreSQL as Postgres.start() gives it, not {pg!r}")
    check_count("leave", leave)
    limit = int(pg.value("show max_connections"))
    held: list[Connection] = []
    try:
        _take_all(pg, held, limit)
        if leave > len(held):
            raise SettingError(f"leave={leave}, but only {len(held)} slots were free")
        _give_back(pg, [held.pop() for _ in range(leave)])
        pids = [connection.info.backend_pid for connection in held]
        yield Fault(f"took {len(held)} of {limit} slots, left {leave}", pids)
    finally:
        _give_back(pg, held)


def _take_all(pg: Postgres, held: list[Connection], limit: int) -> None:
    refused = 0
    while refused < TRIES and len(held) < limit:
        try:
            held.append(psycopg.connect(pg.dsn, autocommit=True, application_name="saturate", connect_timeout=10))
            refused = 0
        except psycopg.OperationalError as problem:
            if not any(text in str(problem) for text in FULL):
                raise ConnlabError(
                    f"the server refuses for another reason than a lack of slots: {problem}"
                ) from problem
            refused += 1
            time.sleep(0.02)


def _give_back(pg: Postgres, held: list[Connection]) -> None:
    """Close them, and wait until the server has taken note, if it can."""
    pids = [connection.info.backend_pid for connection in held if not connection.closed]
    for connection in held:
        connection.close()
    with contextlib.suppress(ConnlabError, psycopg.Error):
        deadline = time.monotonic() + GONE_WITHIN
        query = f"select count(*) from pg_stat_activity where pid = any(array{pids}::int[])"
        while pids and pg.value(query) and time.monotonic() < deadline:
            time.sleep(0.01)
