"""What the server sees of the learner's code: its sessions, counted from outside."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from connlab.postgres import Postgres

ORDINARY = "select pid, state, state_change, wait_event_type, query from pg_stat_activity where usename = 'app'"
AUTHORIZED = re.compile(r"connection authorized: user=app\b")
PERIOD = 0.02


@dataclass(frozen=True)
class Crowd:
    """The most that was seen at one moment."""

    sessions: int
    """Sessions of the learner's code."""
    at_once: int
    """Of these, how many waited for a lock: requests that were in the server together."""


class Sessions:
    """The sessions of the role app that have come since this was made; the notebook's own do not count."""

    def __init__(self, pg: Postgres) -> None:
        self._pg = pg
        self._before = {row["pid"] for row in pg.rows(ORDINARY)}

    def now(self) -> list[dict[str, Any]]:
        """Each session with ``pid``, ``state``, ``state_change``, ``wait_event_type``."""
        return [row for row in self._pg.rows(ORDINARY) if row["pid"] not in self._before]

    def most(self, seconds: float) -> Crowd:
        """The largest numbers within the next ``seconds``."""
        most, deadline = Crowd(0, 0), time.monotonic() + seconds
        while time.monotonic() < deadline:
            rows = self.now()
            at_once = sum(row["wait_event_type"] == "Lock" for row in rows)
            most = Crowd(max(most.sessions, len(rows)), max(most.at_once, at_once))
            time.sleep(PERIOD)
        return most

    def end(self) -> None:
        """End them: a query runs on in the server when its client has been killed."""
        for row in self.now():
            self._pg.rows(f"select pg_terminate_backend({row['pid']})")

    def fewest(self, seconds: float) -> int:
        """How many are left; waits up to ``seconds`` for there to be none."""
        deadline = time.monotonic() + seconds
        while (left := len(self.now())) and time.monotonic() < deadline:
            time.sleep(PERIOD)
        return left


def opened(pg: Postgres, mark: int) -> int:
    """How many connections of the role app the server has logged since ``mark``; it must run with log_connections."""
    return len(AUTHORIZED.findall(pg.log(since=mark)))


@contextmanager
def locked(pg: Postgres, table: str, within: float = 0) -> Iterator[None]:
    """Nobody reads the table meanwhile: who tries waits in the server.

    ``within`` limits the wait for those who have read it and hold a transaction open, in seconds; 0 is no limit.
    Raises psycopg's LockNotAvailable.
    """
    with psycopg.connect(pg.admin_dsn, application_name="connlab") as conn:
        conn.execute(f"set lock_timeout = {round(1000 * within)}")
        conn.execute(sql.SQL("lock table {} in access exclusive mode").format(sql.Identifier(table)))
        yield
        conn.rollback()


@contextmanager
def held_up(pg: Postgres, table: str, key: str) -> Iterator[None]:
    """Who inserts a row with that key into the table, whose first column is unique, waits and goes on afterwards.

    It waits in the middle of its statement: at a lock on the table it would wait before anything of it has run.
    """
    with psycopg.connect(pg.admin_dsn, application_name="connlab") as conn:
        conn.execute(sql.SQL("insert into {} values (%s)").format(sql.Identifier(table)), [key])
        yield
        conn.rollback()
