"""The bench of lab 07: other clients of a PgBouncer in transaction mode, and an application's tables."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from connlab import Postgres
from connlab.checks.drivers import call
from connlab.checks.errors import CheckError
from connlab.checks.sessions import held_up
from connlab.checks.transaction_mode import Disturbed, InUse, Starved, TransactionMode, application, transaction_mode
from connlab.checks.trial import Trial

PID = "select pg_backend_pid()"
SCHEMA = "drop table if exists pot; create table pot (n int); insert into pot values (7)"


@pytest.fixture(scope="module")
def pg() -> Iterator[Postgres]:
    with Postgres.start(max_connections=20, log_connections=True) as server:
        yield server


@pytest.fixture
def mode(pg: Postgres) -> Iterator[TransactionMode]:
    with transaction_mode(pg) as mode:
        yield mode


def connected(dsn: str) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(dsn, autocommit=True, prepare_threshold=None)


def test_a_client_gets_both_server_connections_in_turn_and_one_while_the_other_is_held(mode: TransactionMode) -> None:
    both = set(mode.each(PID))
    assert len(both) == 2 and both == mode.pids()
    with connected(mode.dsn) as client:
        assert {client.execute(PID).fetchone() for _ in range(2)} == {(pid,) for pid in both}
        seen = set()
        for which in (0, 1):
            with mode.held(which) as other:
                got = {client.execute(PID).fetchone() for _ in range(4)}
                assert len(got) == 1 and got | {other.execute(PID).fetchone()} == {(pid,) for pid in both}
                seen |= got
        assert len(seen) == 2


def test_it_keeps_no_prepared_statement_whatever_its_version(mode: TransactionMode) -> None:
    mode.each(PID)
    with (
        psycopg.connect(mode.dsn, autocommit=True, prepare_threshold=0) as client,
        pytest.raises(psycopg.errors.InvalidSqlStatementName),
    ):
        for _ in range(4):
            client.execute("select 1")


def test_connections_past_it_are_counted_and_its_own_are_not(pg: Postgres, mode: TransactionMode) -> None:
    mode.each(PID)
    mode.end_one()
    mode.each(PID)
    assert mode.past() == 0
    for expected in (1, 2):
        connected(pg.dsn).close()
        assert mode.past() == expected


def test_a_server_that_logs_no_connections_is_the_notebooks_mistake() -> None:
    with (
        Postgres.start() as server,
        transaction_mode(server) as mode,
        pytest.raises(CheckError, match="log_connections=True"),
    ):
        mode.past()


def test_a_server_connection_that_somebody_keeps_is_told(pg: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connlab.checks.transaction_mode.WAIT", 1)
    with transaction_mode(pg) as mode, psycopg.connect(mode.dsn) as keeper:
        keeper.execute("select 1")
        with pytest.raises(Starved, match="query_wait_timeout"):
            mode.each(PID)


def test_what_makes_other_clients_fail_is_told(mode: TransactionMode) -> None:
    with connected(mode.dsn) as client:
        for _ in range(2):
            client.execute("set statement_timeout = '20ms'")
            client.execute("select 1")
            with pytest.raises(Disturbed):
                mode.each("select pg_sleep(1)")


@pytest.mark.parametrize("before", ["drop table if exists pot", SCHEMA])
def test_tables_are_new_for_each_check_and_afterwards_as_they_were(pg: Postgres, before: str) -> None:
    pg.rows(before)
    was = pg.value("select to_regclass('pot') is null")
    for _ in range(2):
        with application(Trial("x"), pg, SCHEMA, ["pot"], act=print):
            assert pg.rows("select n from pot") == [{"n": 7}]
            pg.rows("insert into pot values (8)")
    assert pg.value("select to_regclass('pot') is null") == was
    pg.rows("drop table if exists pot")


def test_a_transaction_of_the_notebook_that_uses_the_tables_is_told(pg: Postgres) -> None:
    pg.rows(SCHEMA)
    with psycopg.connect(pg.admin_dsn) as conn:
        conn.execute("select * from pot")
        with pytest.raises(InUse, match="kept them"), application(Trial("x"), pg, SCHEMA, ["pot"], act=print):
            pass
    pg.rows("drop table pot")


NAME = "select current_setting('app.name', true)"


def test_who_asks_all_the_time_sees_what_outlives_a_transaction_however_soon_it_is_set_back(
    mode: TransactionMode,
) -> None:
    """A client that keeps to its transactions is not seen."""
    for local, wanted in (("true", False), ("false", True)):
        with mode.held(0), mode.watched(NAME) as seen, connected(mode.dsn) as client:
            for _ in range(20):
                with client.transaction():
                    client.execute(f"select set_config('app.name', 'mine', {local})")
                client.execute("reset app.name")
        assert seen and ("mine" in seen) == wanted


def test_who_asks_all_the_time_tells_of_a_server_connection_that_somebody_keeps(
    pg: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connlab.checks.transaction_mode.WAIT", 1)
    with (
        transaction_mode(pg) as mode,
        mode.held(0),
        psycopg.connect(mode.dsn) as keeper,
        pytest.raises(Starved),
        mode.watched(PID),
    ):
        keeper.execute("select 1")
        time.sleep(1.5)


def test_what_somebody_has_set_for_the_role_is_gone_before_a_check_and_after_it(pg: Postgres) -> None:
    def left() -> Any:
        return pg.value("select count(*) from pg_db_role_setting")

    pg.rows("alter role app set work_mem = '64MB'")
    with application(Trial("x"), pg, SCHEMA, ["pot"], act=print):
        assert left() == 0
        pg.rows("alter role app in database shop set work_mem = '64MB'")
    assert left() == 0


def test_what_a_check_needs_besides_is_taken_back(pg: Postgres) -> None:
    there = "select to_regclass('besides') is not null"
    for _ in range(2):
        with application(
            Trial("x"), pg, SCHEMA, ["pot"], "create table besides ();", "drop table if exists besides;", act=print
        ):
            assert pg.value(there)
        assert not pg.value(there)


def test_who_inserts_a_key_that_is_held_up_waits_until_it_is_free(pg: Postgres) -> None:
    pg.rows("drop table if exists pot; create table pot (n int unique)")
    waiting = "select count(*) from pg_locks where not granted and locktype = 'transactionid'"
    with ThreadPoolExecutor(1) as thread:
        with held_up(pg, "pot", "1"):
            insert = thread.submit(pg.rows, "insert into pot values (1)")
            deadline = time.monotonic() + 10
            while not pg.value(waiting) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert pg.value(waiting) == 1 and not insert.done()
        insert.result(10)
    assert pg.rows("select n from pot") == [{"n": 1}]
    pg.rows("drop table pot")


def test_what_pools_say_of_a_pgbouncer_that_the_check_has_stopped_is_not_kept(pg: Postgres) -> None:
    def shout(word: str) -> None:
        print(word, flush=True)

    def shout_later(word: str) -> None:
        threading.Timer(0.5, print, [word], {"flush": True}).start()

    trial = Trial("x")
    with application(trial, pg, SCHEMA, ["pot"], now=shout, later=shout_later) as (box, _):
        box.do(5, call, "later", "late")
        box.do(5, call, "now", "early")
        box.quiet()
        time.sleep(1)
        assert box.output == "early"
