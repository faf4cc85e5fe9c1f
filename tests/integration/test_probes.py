"""What the checks' probes see of a server, of PgBouncer, and of a client that nobody answers."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import psycopg
import pytest

from connlab import Postgres
from connlab.checks.ladder import LongReader, queued, reading
from connlab.checks.limits import ALSO, REQUIRED, Limits, expect_sum, limits_of
from connlab.checks.probes import (
    End,
    Silent,
    abandons,
    best,
    ended,
    forgets,
    known_limits,
    left_behind,
    many_short,
    row_locked,
    sleeps,
    unlimited,
    until,
    waits_for,
)
from connlab.checks.trial import Trial, Unmet

GIVE_UP = 0.5


@pytest.fixture(scope="module")
def pg() -> Iterator[Postgres]:
    with Postgres.start(max_connections=20) as server:
        yield server


def with_limit(pg: Postgres, name: str, milliseconds: int = 100) -> str:
    """A DSN whose sessions have the limit; of the server itself, without a PgBouncer."""
    return f"{pg.dsn}?options=-c%20{name}%3D{milliseconds}"


def test_what_nobody_ends_is_told_so_and_what_is_ended_has_its_sqlstate(pg: Postgres) -> None:
    assert sleeps(pg.dsn, 0.05).name == ""
    assert sleeps(with_limit(pg, "statement_timeout"), 3).sqlstate == "57014"
    with row_locked(pg, 1):
        assert waits_for(with_limit(pg, "lock_timeout"), 1).sqlstate == "55P03"
    assert waits_for(pg.dsn, 1).name == ""


def test_a_transaction_of_short_statements_is_ended_where_the_server_can(pg: Postgres) -> None:
    assert many_short(pg.dsn, 0.1, 0.05).name == ""
    if "transaction_timeout" in known_limits(pg):
        assert many_short(with_limit(pg, "transaction_timeout"), 3, 0.3).sqlstate == "25P04"


def test_a_forgotten_transaction_keeps_its_row_until_it_is_ended(pg: Postgres) -> None:
    end, seconds = forgets(pg, pg.dsn, 2, GIVE_UP)
    assert end.name == "" and seconds >= GIVE_UP
    end, seconds = forgets(pg, with_limit(pg, "idle_in_transaction_session_timeout"), 2, 5)
    assert end.sqlstate == "25P03" and 0.05 < seconds < 5


def test_a_query_goes_on_without_its_client_until_a_limit_ends_it(pg: Postgres) -> None:
    assert abandons(pg, pg.dsn, GIVE_UP) >= GIVE_UP
    assert abandons(pg, with_limit(pg, "statement_timeout"), 5) < 5
    pg.rows("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'")


def test_what_a_client_sets_is_found_by_another_on_the_same_server_connection(pg: Postgres) -> None:
    with pg.pgbouncer(pool_mode="transaction", default_pool_size=1) as bouncer:
        assert left_behind(bouncer.dsn, 1) == []
        with psycopg.connect(bouncer.dsn, autocommit=True) as conn:
            conn.execute("set statement_timeout = 123")
        assert left_behind(bouncer.dsn, 1) == ["statement_timeout = 123ms"]


def test_pgbouncer_ends_a_wait_in_its_queue_if_it_is_told_to(pg: Postgres) -> None:
    for settings, sqlstate in (({"query_wait_timeout": 0.3}, "08P01"), ({}, "")):
        with pg.pgbouncer(pool_mode="transaction", default_pool_size=1, **settings) as bouncer:
            assert queued(pg, bouncer, 2).sqlstate == sqlstate


def test_readers_stand_behind_a_statement_that_waits_for_a_strong_lock(pg: Postgres) -> None:
    undisturbed = LongReader(pg, 0.4, never=0.3)
    with reading(pg, undisturbed) as reads, undisturbed:
        assert undisturbed.over.wait(5), "nobody asks, so it ends after `never`"
    assert reads.ends and not reads.failed and not reads.locked and not undisturbed.asked.is_set()
    in_the_way = LongReader(pg, 0.4, never=5)
    with reading(pg, in_the_way) as reads, in_the_way, unlimited(pg) as conn:
        time.sleep(0.5)  # who comes late finds it there all the same, and for as long
        began = time.perf_counter()
        conn.execute("begin; lock table orders in access exclusive mode; rollback")
        assert time.perf_counter() - began > 0.35
    assert reads.stood > 0.5


def test_limits_are_what_a_new_session_begins_with(pg: Postgres) -> None:
    with unlimited(pg) as conn:
        try:
            conn.execute("alter role app set statement_timeout = '350ms'; alter role app set lock_timeout = 0.25")
            found = limits_of(pg.dsn)
        finally:
            conn.execute("alter role app reset all")
    assert found.seconds["statement_timeout"] == 0.35 and not found.within
    assert "`statement_timeout = 350ms`, `lock_timeout = 0 (off)`" in str(found)
    assert not any(limits_of(pg.admin_dsn).seconds.values())


def test_limits_are_within_the_requirement_to_the_millisecond() -> None:
    assert Limits(dict(REQUIRED)).within and Limits({**REQUIRED, ALSO: 0}).within
    for name, seconds in REQUIRED.items():
        assert not Limits({**REQUIRED, name: seconds + 0.001}).within
        assert not Limits({**REQUIRED, name: 0}).within


def test_the_sum_is_judged_by_numbers_and_not_by_luck() -> None:
    for measured in ([0.3, 0.6, 0.75], [0.31, 0.93, 0.76]):
        with pytest.raises(Unmet):
            expect_sum(Trial("-"), Limits({"transaction_timeout": 0.75}), 0.6, 0.3, measured)
        expect_sum(Trial("-"), Limits({"transaction_timeout": 0.67}), 0.6, 0.3, measured)


def test_a_silent_server_sees_how_long_a_client_waits() -> None:
    with Silent() as server:
        assert ended(lambda: psycopg.connect(server.dsn, connect_timeout=2)).name == "ConnectionTimeout"
        assert until(lambda: bool(gc.collect() >= 0 and server.left), 3)
        assert server.came == 1 and 1.5 < min(server.left) < 5


def test_of_several_ends_the_one_with_the_sqlstate_counts() -> None:
    lost, late, early = End(0.1, "OperationalError"), End(0.9, "X", "25P04"), End(0.7, "X", "25P04")
    assert best([lost, late, early], "25P04") is early
    assert best([lost], "25P04") is lost
