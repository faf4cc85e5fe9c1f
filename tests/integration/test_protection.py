"""What a learner's code sets on the server is gone after the check, and what was set before it is there again."""

from __future__ import annotations

import pytest
from conftest import Start

from connlab import Postgres
from connlab.checks.protection import not_yet_read, stored, unprotected

INTERVAL, TIMEOUT = "client_connection_check_interval", "statement_timeout"


@pytest.fixture
def pg(start: Start) -> Postgres:
    server = start()
    server.rows(f"alter system set {TIMEOUT} = '7min'")
    server.rows("alter system set work_mem = '5MB'")
    server.rows("select pg_reload_conf()")
    for owner in ("role app", "database shop", "role app in database shop", "role all"):
        server.rows(f"alter {owner} set {INTERVAL} = '7s'")
    server.rows("alter role app set application_name = 'a \"name\" = it''s'")
    return server


def test_nothing_protects_the_server_meanwhile(pg: Postgres) -> None:
    with unprotected(pg):
        assert pg.value(f"show {TIMEOUT}") == "0"
        assert [name for _, name in stored(pg)] == ["application_name"]


def test_everything_is_as_before(pg: Postgres, capsys: pytest.CaptureFixture[str]) -> None:
    roles, file = stored(pg), pg.value("select pg_read_file('postgresql.auto.conf')")
    assert len(roles) == 5
    with pytest.raises(ZeroDivisionError), unprotected(pg):
        pg.rows("alter system set work_mem = '6MB'")
        pg.rows(f"alter role app set {TIMEOUT} = '1s'")
        pg.rows("alter role app set application_name = 'other'")
        pg.rows(f"alter database shop set {INTERVAL} = '1s'")
        pg.rows("alter role postgres in database postgres set lock_timeout = '1s'")
        raise ZeroDivisionError
    assert stored(pg) == roles
    assert pg.value("select pg_read_file('postgresql.auto.conf')") == file
    assert (pg.value("show work_mem"), pg.value(f"show {TIMEOUT}")) == ("5MB", "7min")
    assert capsys.readouterr().out == ""


def test_what_is_written_and_not_read_is_found(pg: Postgres) -> None:
    with unprotected(pg):
        assert not_yet_read(pg) is None
        pg.rows(f"alter system set {INTERVAL} = '8s'")
        assert not_yet_read(pg) == (INTERVAL, "8s")
        pg.rows(f"alter system reset {INTERVAL}")
