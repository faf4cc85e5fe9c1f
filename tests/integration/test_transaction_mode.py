"""The bench of lab 07: other clients of a PgBouncer in transaction mode, and an application's tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from connlab import Postgres
from connlab.checks.errors import CheckError
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
