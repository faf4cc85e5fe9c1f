"""The rungs of lab 14's ladder that PostgreSQL and PgBouncer have: what is expected of each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event

import psycopg

from connlab.checks.answers import Answer
from connlab.checks.errors import Hangs
from connlab.checks.ladder import (
    SERVERS,
    held,
)
from connlab.checks.limits import expect_setting
from connlab.checks.probes import (
    End,
    Silent,
    best,
    ended,
    many_short,
    pauses,
    row_locked,
    runs,
    sleeps,
    until,
    waits_for,
)
from connlab.checks.requests import (
    shown,
    status,
)
from connlab.checks.requirement import (
    A_STATEMENT,
    A_TRANSACTION,
    AGAIN,
    CONNECT,
    GIVE_UP,
    LATE,
    MAPPING,
    MARGIN,
    NOT_SET,
    OTHER,
    PATIENT,
    PAUSE,
    POOL,
    QUEUE,
    SERVER_CONNECT,
    SLACK,
    STATEMENT,
    THIRD,
    TRANSACTION,
    WAITS,
)
from connlab.checks.sandbox import Pending
from connlab.checks.trial import Trial
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres

# --- PostgreSQL's rungs -------------------------------------------------------------------------------------


def ended_by(trial: Trial, what: str, end: End, sqlstate: str, within: float, has: str = "", look: str = "") -> None:
    """Expect that it was ended with this SQLSTATE, in time.

    ``has`` says which limits are set; ``look`` stands instead of what fits how it ended.
    """
    in_time = end.seconds <= within + SLACK
    trial.expect(
        f"{what} is ended with SQLSTATE {sqlstate} after at most {within:g} s ({MARGIN})",
        f"{end}",
        end.sqlstate == sqlstate and in_time,
        look or _why(end, sqlstate, has),
    )


def _why(end: End, sqlstate: str, has: str) -> str:
    why = NOT_SET if not end.name else LATE if end.sqlstate == sqlstate else OTHER
    return f"{has} {why}".strip()


def expect_forgotten(trial: Trial, found: list[tuple[End, float]], has: str) -> None:
    """Expect that a transaction which does nothing more is ended, and that its lock is free then."""
    end, seconds = min(found, key=lambda each: (each[0].sqlstate != "25P03", each[1]))
    trial.expect(
        f"a forgotten transaction is ended with SQLSTATE 25P03, and its lock is free after at most {PAUSE:g} s "
        f"({MARGIN})",
        f"{f'free after {seconds:.2f} s' if seconds < GIVE_UP else f'not free after {GIVE_UP:g} s'}; "
        f"{f'its client got `{end.name}`, SQLSTATE {end.sqlstate}' if end.name else 'its client got no error'}",
        end.sqlstate == "25P03" and seconds <= PAUSE + SLACK,
        _why(end, "25P03", has),
    )


def expect_long(trial: Trial, pg: Postgres, end: End, has: str) -> None:
    """Expect that a transaction of short statements is ended, where the server can do that."""
    if pg.version >= (17,):
        ended_by(trial, "a transaction of many short statements", end, "25P04", TRANSACTION, has)
        return
    trial.expect(
        "(not counted) a transaction of many short statements is ended",
        f"{lacks(pg)}; {end}",
        True,
        "-",
    )


def lacks(pg: Postgres) -> str:
    """What a server before 17 is not counted for."""
    return f"PostgreSQL {pg.version} has no `transaction_timeout`, which came with 17"


def expect_abandoned(trial: Trial, seconds: float, has: str) -> None:
    """Expect that a query does not go on for long when its client has gone."""
    trial.expect(
        f"a query whose client has gone away runs on for at most {STATEMENT:g} s ({MARGIN})",
        f"{seconds:.2f} s" if seconds < GIVE_UP else f"still running after {GIVE_UP:g} s",
        seconds <= STATEMENT + SLACK,
        f"{has} The server does not notice that nobody waits any more. Which limit ends the statement all the same?",
    )


def ordinary(pg: Postgres, dsn: str) -> dict[str, End]:
    """Work that no limit may end, and how it ended: by a limit if that happens each of three times."""
    works: dict[str, Callable[[], End]] = {
        f"a statement that waits {PATIENT:g} s for a lock": lambda: _waits_a_moment(pg, dsn),
        f"a statement of {A_STATEMENT:g} s": lambda: sleeps(dsn, A_STATEMENT),
        f"a pause of {PATIENT:g} s in a transaction": lambda: pauses(dsn, PATIENT),
        f"a transaction of {A_TRANSACTION:g} s": lambda: many_short(dsn, A_TRANSACTION, A_TRANSACTION / 5),
    }
    return {what: _at_last(work) for what, work in works.items()}


def _at_last(work: Callable[[], End]) -> End:
    """A machine that is busy may make a moment longer than a limit allows, once."""
    ends = [work()]
    while ends[-1].name and len(ends) < 3:
        ends.append(work())
    return ends[-1]


def _waits_a_moment(pg: Postgres, dsn: str) -> End:
    with ThreadPoolExecutor(1) as thread:
        with row_locked(pg, 4):
            begun = Event()
            waiting = thread.submit(waits_for, dsn, 4, begun)
            begun.wait(GIVE_UP)
            time.sleep(PATIENT)
        return waiting.result()


# --- PgBouncer's rungs, and silence -------------------------------------------------------------------------


def expect_queue(trial: Trial, bouncer: PgBouncer) -> None:
    """Expect that PgBouncer ends a long wait for a server connection, and no ordinary one."""
    with contextlib.ExitStack() as clients, ThreadPoolExecutor(4) as threads:
        holders, (patient, *others) = (
            [clients.enter_context(psycopg.connect(bouncer.dsn, autocommit=True)) for _ in range(number)]
            for number in (SERVERS, 3)
        )
        with held(holders):
            waiting = threads.submit(runs, patient, "select 1")
            time.sleep(PATIENT)
        good = waiting.result()
        trial.expect(
            f"a query that waits {PATIENT:g} s for a server connection goes through",
            f"{good}" if good.name else f"it did, after {good.seconds:.2f} s",
            not good.name,
            "That is an ordinary queue. Which of your settings ends it, and in which unit does it stand?",
        )
        with held(holders):
            queue = [threads.submit(runs, conn, "select 1") for conn in others]
            wait(queue, GIVE_UP)
    end = best([each.result() for each in queue], "08P01")
    trial.expect(
        f"a query that finds all {SERVERS} server connections taken is ended by PgBouncer (SQLSTATE 08P01) after at "
        f"most {QUEUE:g} s (and its third of a second; {MARGIN})",
        f"{end}",
        end.sqlstate == "08P01" and end.seconds <= QUEUE + THIRD + SLACK,
        "PgBouncer lets queries wait for 120 s unless it is told otherwise: https://www.pgbouncer.org/config.html. It "
        "looks at its queue every third of a second, so a limit may be exceeded by as much.",
    )
    expect_setting(trial, bouncer, "query_wait_timeout", QUEUE)


def expect_silence(trial: Trial, pg: Postgres, bouncer: PgBouncer) -> None:
    """PostgreSQL is frozen: connections to it open, and nobody answers."""
    with psycopg.connect(bouncer.dsn, autocommit=True) as conn:
        conn.execute("select 1")
        bouncer.rows("RECONNECT")
        mark = bouncer.mark()
        pg.freeze()
        try:
            began = time.perf_counter()
            runs(conn, "select 1")
            at_most = SERVER_CONNECT + THIRD + SLACK
            given_up = until(lambda: "closing because: connect timeout" in bouncer.log(mark), at_most)
            seconds = time.perf_counter() - began
        finally:
            pg.thaw()
    trial.expect(
        f"PostgreSQL is silent: PgBouncer gives up a connection to it after at most {SERVER_CONNECT:g} s "
        f"(and its third of a second; {MARGIN})",
        f"{'given up' if given_up else 'not given up'} after {seconds:.2f} s",
        given_up,
        "Until then it waits for this one connection and opens no other. Which setting limits opening a connection to "
        "the server, and what is its default?",
    )
    began = time.perf_counter()
    back = until(lambda: not ended(lambda: _ask(bouncer)).name, AGAIN + THIRD + SLACK)
    trial.expect(
        f"PostgreSQL is back: a query goes through again after at most {AGAIN:g} s ({MARGIN})",
        f"{'after' if back else 'none within'} {time.perf_counter() - began:.2f} s",
        back,
        "After an attempt that failed, PgBouncer lets a while pass before it tries again, and all clients wait "
        "meanwhile. Which setting is that, and what is its default?",
    )
    expect_setting(trial, bouncer, "server_connect_timeout", SERVER_CONNECT)
    expect_setting(trial, bouncer, "server_login_retry", AGAIN)


def _ask(bouncer: PgBouncer) -> None:
    with psycopg.connect(bouncer.dsn, autocommit=True) as conn:
        conn.execute("select 1")


def expect_faced(trial: Trial, facing: Pending[tuple[Answer, Answer | None]], silent: Silent) -> None:
    """Expect what the service did in front of a pooler that says nothing."""
    what = "the pooler is silent: `start` returns, and a request gets 503"
    try:
        begun, answer = facing.result(GIVE_UP)
    except Hangs as hang:
        trial.expect(what, f"{hang}", False, WAITS)
    trial.expect(
        f"{what}, after at most {POOL:g} s ({MARGIN})",
        shown(answer) if answer else f"`start`: {shown(begun)}",
        answer is not None and status(answer) == 503 and answer.seconds <= POOL + SLACK,
        MAPPING if answer and answer.problem else WAITS,
    )
    gone = until(lambda: bool(silent.left), CONNECT + SLACK)
    trial.expect(
        f"an attempt to connect to it is given up after at most {CONNECT:g} s ({MARGIN})",
        f"after {min(silent.left):.2f} s" if gone else f"{silent.came} attempts, none given up",
        gone and min(silent.left) <= CONNECT + SLACK,
        "The caller has his answer; the pool goes on trying behind his back, and each attempt may take minutes. Which "
        "parameter of a connection limits that? "
        "https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS",
    )
