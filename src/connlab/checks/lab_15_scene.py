"""What lab 15 sets up: a service behind PgBouncer, abandoned queries among others, and a role for a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from connlab.checks import lab_15_texts as texts
from connlab.checks.abandoned import Killed, active, until
from connlab.checks.errors import CheckError
from connlab.checks.sandbox import Sandbox
from connlab.checks.sessions import locked
from connlab.checks.trial import Trial
from connlab.node import new_password, url
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres
from connlab.template import DATABASE

WITHIN = 6.0
"""Seconds that a query may take to reach the server."""


@contextmanager
def service(trial: Trial, pg: Postgres, pool: int, **code: Callable[..., Any]) -> Iterator[tuple[Sandbox, PgBouncer]]:
    """The learner's functions in a process of their own, and a PgBouncer whose pool is ``pool``.

    The process ends first: what it still does when the check is over does not find its PgBouncer gone.
    """
    with ExitStack() as after, trial.sandbox(pg, **code) as box:
        yield box, after.enter_context(pg.pgbouncer(pool_mode="transaction", default_pool_size=pool))


@contextmanager
def orders_locked(trial: Trial, pg: Postgres) -> Iterator[None]:
    """Every query of the service's waits, for the length of the block."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(pg, "orders", within=2))
        except psycopg.errors.LockNotAvailable:
            held = sum((row["state"] or "").startswith("idle in transaction") for row in trial.sessions.now())
            trial.expect("no transaction is open when all requests have been answered", f"{held}", False, texts.OPEN)
        yield


@dataclass(frozen=True)
class Scene:
    """Backends of each kind, by process id."""

    orphans: set[int]
    healthy: set[int]
    """Active ones whose clients wait for the answer."""
    others: set[int]
    """Of other roles, which come past PgBouncer."""
    resting: set[int]
    """Of the service's, that run no query."""
    before: set[int]
    """Those that were there before: of no interest."""

    def about(self, found: set[int]) -> str:
        """Which kinds were found, in words."""
        rest = found & self.resting
        asked = found - self.orphans - self.healthy - self.others - rest
        kinds = {
            f"{len(found & self.orphans)} of the {len(self.orphans)}": True,
            f"{len(found & self.healthy)} whose client is waiting": found & self.healthy,
            f"{len(found & self.others)} of another role": found & self.others,
            f"{len(rest)} that run no query": rest,
            f"{len(asked)} of the session that asked": asked,
        }
        return ", ".join(text for text, there in kinds.items() if there)

    def look(self, found: set[int]) -> str:
        """Where to look for the first kind that is wrong."""
        if found & self.resting:
            return texts.IDLE
        if found - self.orphans - self.healthy:
            return texts.OTHERS
        if found & self.healthy:
            return texts.HEALTHY
        return texts.MISSED


@contextmanager
def scene_of(trial: Trial, pg: Postgres, bouncer: PgBouncer, orphans: int) -> Iterator[Scene]:
    """Old and new queries whose clients wait, abandoned ones between them, a session at rest, and an administrator."""
    with ExitStack() as stack:
        ours = {row["pid"] for row in trial.sessions.now()}
        before = {row["pid"] for row in pg.rows("select pid from pg_stat_activity")} - ours
        sent: list[int] = []

        def send(dsn: str) -> psycopg.Connection:
            conn = psycopg.connect(dsn, autocommit=True)
            stack.callback(conn.close)
            conn.pgconn.send_query(b"select pg_sleep(60)")
            return conn

        def served() -> int:
            """The backend of the newest query."""
            if not until(lambda: set(active(trial.sessions)) - set(sent), WITHIN):
                raise CheckError("a query has not reached the server")
            sent.extend(set(active(trial.sessions)) - set(sent))
            return sent[-1]

        send(bouncer.dsn)
        healthy, abandoned = {served()}, set()
        for _ in range(orphans):
            conn = send(bouncer.dsn)
            abandoned.add(served())
            conn.close()
        send(bouncer.dsn)
        healthy.add(served())
        stack.callback(psycopg.connect(pg.dsn).close)
        resting = {row["pid"] for row in trial.sessions.now()} - set(sent)
        administrator = send(pg.admin_dsn)
        stack.callback(administrator.cancel_safe)
        yield Scene(abandoned, healthy, {administrator.info.backend_pid}, resting, before)


@contextmanager
def reports_role(pg: Postgres, role: str) -> Iterator[str]:
    """The DSN of the report's role, which is made where there is none."""
    password = new_password()
    is_new = not pg.value(f"select count(*) from pg_roles where rolname = '{role}'")
    with psycopg.connect(pg.admin_dsn, autocommit=True) as conn:
        if is_new:
            conn.execute(sql.SQL("create role {} login").format(sql.Identifier(role)))
        secret = conn.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
        conn.execute(sql.SQL("alter role {} password {}").format(sql.Identifier(role), secret))
        try:
            yield url(pg.address, role, password, DATABASE)
        finally:
            if is_new:
                conn.execute(sql.SQL("drop owned by {0}; drop role {0}").format(sql.Identifier(role)))


def longer_than_allowed(dsn: str, seconds: float) -> float:
    """How long a query must take to meet the ``statement_timeout`` of this session; ``seconds`` where it has none.

    At most 3: a report may have a limit, if it is a generous one.
    """
    try:
        with psycopg.connect(dsn) as conn:
            allowed = conn.execute("select setting::int from pg_settings where name = 'statement_timeout'").fetchall()
    except psycopg.Error:  # whoever asks for the report will find out
        return seconds
    milliseconds: int = allowed[0][0]
    return max(seconds, min(3.0, 1.3 * milliseconds / 1000))


@dataclass(frozen=True)
class End:
    """How long a query went on after its client had been killed."""

    seconds: float
    pid: int


def kill_clients(trial: Trial, bouncer: PgBouncer, clients: int, gone: float) -> Iterator[End]:
    """Programs ask through PgBouncer; one after the other is killed with SIGKILL while the server works for it.

    The first whose query goes on for ``gone`` seconds ends it.
    """
    with ExitStack() as stack:
        programs = [stack.enter_context(Killed(bouncer.dsn)) for _ in range(clients)]
        while programs:
            program, pid = _served(trial, programs)
            programs.remove(program)
            program.kill()
            killed = time.monotonic()
            until(lambda pid=pid: pid not in active(trial.sessions), gone)  # type: ignore[misc]
            yield (end := End(time.monotonic() - killed, pid))
            if end.seconds > gone:
                break


def _served(trial: Trial, programs: Sequence[Killed]) -> tuple[Killed, int]:
    """One of the programs that the server works for, and the process id of its backend."""
    found: list[tuple[Killed, int]] = []

    def look() -> bool:
        running = active(trial.sessions)
        found.extend((each, pid) for each in programs for pid, query in running.items() if each.mark in query)
        return bool(found)

    if not until(look, WITHIN):
        trial.expect("clients of the service are let in, and served", f"none within {WITHIN:g} s", False, texts.SHUT)
    return found[0]
