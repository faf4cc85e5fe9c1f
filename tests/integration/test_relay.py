"""A relay is the network between a client and a server, with faults that a lesson switches on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from connlab import Postgres, Relay, SettingError


@pytest.fixture(scope="module")
def pg() -> Iterator[Postgres]:
    with Postgres.start() as server:
        yield server


@pytest.fixture(params=["postgres", "pgbouncer"])
def relay(pg: Postgres, request: pytest.FixtureRequest) -> Iterator[Relay]:
    node = pg if request.param == "postgres" else pg.pgbouncer()
    with node.relay() as relay:
        yield relay


def query_in_thread(conn: psycopg.Connection) -> threading.Thread:
    thread = threading.Thread(target=lambda: conn.execute("select 1"), daemon=True)
    thread.start()
    return thread


def seconds(conn: psycopg.Connection) -> float:
    began = time.perf_counter()
    conn.execute("select 1")
    return time.perf_counter() - began


def test_queries_go_through_it_with_the_passwords_of_the_node_behind(relay: Relay) -> None:
    with psycopg.connect(relay.dsn) as conn:
        assert conn.execute("select current_user").fetchone() == ("app",)
        assert conn.info.port == relay.address.port


def test_a_delay_is_added_in_each_direction_and_taken_back(relay: Relay) -> None:
    with psycopg.connect(relay.dsn, autocommit=True) as conn:
        without = min(seconds(conn) for _ in range(5))
        with relay.settings(delay_ms=40):
            assert min(seconds(conn) for _ in range(3)) >= without + 0.08 - 0.005
        assert min(seconds(conn) for _ in range(5)) < without + 0.04


def test_a_mute_direction_holds_an_open_connection_until_it_speaks_again(relay: Relay) -> None:
    with psycopg.connect(relay.dsn, autocommit=True) as conn:
        with relay.settings(to_client=False):
            thread = query_in_thread(conn)
            thread.join(0.3)
            assert thread.is_alive()
        thread.join(10)
        assert not thread.is_alive()


def test_a_frozen_relay_accepts_connections_and_answers_nobody(relay: Relay) -> None:
    relay.freeze()
    with pytest.raises(psycopg.OperationalError, match="timeout expired"):
        psycopg.connect(relay.dsn, connect_timeout=2)
    relay.thaw()
    psycopg.connect(relay.dsn, connect_timeout=10).close()


def test_drop_resets_what_is_open_and_serves_the_next(relay: Relay) -> None:
    with psycopg.connect(relay.dsn, autocommit=True) as conn:
        assert relay.drop() == 1
        with pytest.raises(psycopg.OperationalError):
            conn.execute("select 1")
    psycopg.connect(relay.dsn).close()


def test_a_killed_relay_refuses_and_comes_back_at_its_address(relay: Relay) -> None:
    address = relay.address
    relay.kill()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(relay.dsn)
    relay.restart()
    assert relay.address == address
    psycopg.connect(relay.dsn).close()


def test_a_server_that_is_down_behind_it_looks_like_a_closed_connection(relay: Relay) -> None:
    with Postgres.start() as other, other.relay() as front:
        other.kill()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(front.dsn, connect_timeout=5)
        assert "cannot be reached" in front.log()


def test_it_stops_with_the_node_behind() -> None:
    with Postgres.start() as pg:
        relay = pg.pgbouncer().relay()
    assert not relay.running
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(relay.dsn)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"delay": 5}, "did you mean delay_ms"),
        ({"delay_ms": "5"}, "milliseconds"),
        ({"delay_ms": -1}, "milliseconds"),
        ({"to_client": "no"}, "True .* or False"),
    ],
)
def test_a_wrong_setting_says_what_is_right(pg: Postgres, setting: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pg.relay(**setting)  # type: ignore[arg-type]
