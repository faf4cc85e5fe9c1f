"""A relay is the network between a client and a server, with faults that a lesson switches on."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from connlab import NodeStopped, Postgres, Relay, SettingError

WITHIN = 20.0
NUMBERS = "select string_agg(n::text, ',') from generate_series(1, 40000) n"
"""A quarter of a megabyte, of which no piece looks like another."""


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
        ({"jitter_ms": -1}, "milliseconds"),
        ({"jitter_ms": True}, "milliseconds"),
        ({"delay_ms": float("nan")}, "milliseconds"),
        ({"kb_per_s": 0}, "above 0"),
        ({"kb_per_s": "10"}, "above 0"),
        ({"kbps": 10}, "did you mean kb_per_s|it has .*kb_per_s"),
        ({"seed": 1.5}, "whole number"),
    ],
)
def test_a_wrong_setting_says_what_is_right(pg: Postgres, setting: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pg.relay(**setting)  # type: ignore[arg-type]


# --- what changes while connections are open ------------------------------------------------------------------------


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fail(conn: psycopg.Connection) -> None:
    with pytest.raises(psycopg.OperationalError):
        conn.execute("select 1")


def took(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def advisory_locks(pg: Postgres) -> int:
    return int(pg.value("select count(*) from pg_locks where locktype = 'advisory'"))


def sessions(pg: Postgres) -> int:
    return int(pg.value("select count(*) from pg_stat_activity where application_name = 'through the relay'"))


def test_jitter_is_random_and_comes_on_top(relay: Relay) -> None:
    with psycopg.connect(relay.dsn, autocommit=True) as conn:
        without = min(seconds(conn) for _ in range(5))
        with relay.settings(delay_ms=10, jitter_ms=60):
            times = [seconds(conn) for _ in range(15)]
        assert min(times) >= 0.02
        assert max(times) - min(times) > 0.02
        assert min(seconds(conn) for _ in range(5)) < without + 0.02


@pytest.mark.parametrize("settings", [{"jitter_ms": 30}, {"kb_per_s": 1000}, {"delay_ms": 5, "kb_per_s": 2000}])
def test_bytes_keep_their_order(pg: Postgres, relay: Relay, settings: dict[str, float]) -> None:
    numbers = pg.value(NUMBERS)
    with psycopg.connect(relay.dsn, autocommit=True) as conn, relay.settings(**settings):
        assert conn.execute(NUMBERS).fetchone() == (numbers,)
        assert conn.execute("select %s::text = %s::text", [numbers, numbers]).fetchone() == (True,)


def test_bytes_keep_their_order_when_settings_change_in_between(pg: Postgres, relay: Relay) -> None:
    numbers, found = pg.value(NUMBERS), []
    with psycopg.connect(relay.dsn, autocommit=True) as conn:
        thread = threading.Thread(target=lambda: found.extend(conn.execute(NUMBERS).fetchone() or ()))
        with relay.settings(kb_per_s=400):
            thread.start()
            for delay in (20, 0, 5):
                with relay.settings(delay_ms=delay, to_client=delay != 5):
                    thread.join(0.05)
        thread.join(WITHIN)
    assert found == [numbers]


@pytest.mark.parametrize("query", ["select repeat('x', 100000)", "select length(%s)"])
def test_a_slow_line_takes_its_time_in_each_direction(relay: Relay, query: str) -> None:
    arguments = ["x" * 100_000] if "%s" in query else None
    with psycopg.connect(relay.dsn, autocommit=True) as conn:
        with relay.settings(kb_per_s=200):
            slow = took(lambda: conn.execute(query, arguments))
        assert slow >= 0.45
        assert min(took(lambda: conn.execute(query, arguments)) for _ in range(5)) < slow / 2


def test_all_connections_share_the_slow_line_and_take_turns(relay: Relay) -> None:
    with psycopg.connect(relay.dsn, autocommit=True) as big, psycopg.connect(relay.dsn, autocommit=True) as small:
        thread = threading.Thread(target=big.execute, args=["select repeat('x', 200000)"])
        with relay.settings(kb_per_s=100):
            thread.start()
            time.sleep(0.1)
            small.execute("select 1")
            assert thread.is_alive(), "the small one waited for the big one"
            assert took(lambda: small.execute("select repeat('x', 20000)")) >= 1.6 * 0.2
            assert thread.is_alive()
        thread.join(WITHIN)
        assert not thread.is_alive()


def test_a_client_that_does_not_read_stops_the_server(pg: Postgres, relay: Relay) -> None:
    waits = "select count(*) from pg_stat_activity where wait_event = 'ClientWrite'"
    with contextlib.closing(psycopg.connect(relay.dsn, autocommit=True)) as conn:
        conn.pgconn.send_query(b"select repeat('x', 1000) from generate_series(1, 100000)")
        conn.pgconn.flush()
        until(lambda: pg.value(waits) == 1)
        time.sleep(0.3)
        assert pg.value(waits) == 1, "the relay goes on taking what nobody reads"
        while conn.pgconn.is_busy():  # a blocking get_result keeps the interpreter lock, and the relay waits for it
            assert select.select([conn.fileno()], [], [], WITHIN)[0]
            conn.pgconn.consume_input()
        result = conn.pgconn.get_result()
        assert result is not None and result.ntuples == 100_000


def test_mute_to_the_server_keeps_the_query_back_mute_to_the_client_only_the_answer(pg: Postgres) -> None:
    for direction, arrives in (("to_server", 0), ("to_client", 1)):
        with pg.relay() as relay, psycopg.connect(relay.dsn, autocommit=True) as conn:
            thread = threading.Thread(target=conn.execute, args=["select pg_advisory_lock(7)"], daemon=True)
            with relay.settings(**{direction: False}):
                thread.start()
                thread.join(0.3)
                assert thread.is_alive()
                assert advisory_locks(pg) == arrives
            thread.join(WITHIN)
            assert advisory_locks(pg) == 1
        until(lambda: advisory_locks(pg) == 0)


def test_settings_are_told_and_taken_back_each_for_itself(relay: Relay, capsys: pytest.CaptureFixture[str]) -> None:
    slow, jittery = relay.settings(delay_ms=40), relay.settings(jitter_ms=5, seed=3)
    with psycopg.connect(relay.dsn, autocommit=True) as conn:
        with slow:
            jittery.__enter__()
        assert min(seconds(conn) for _ in range(5)) < 0.08, "the delay is still there"
        with relay.settings(kb_per_s=8) as change:
            assert (change.old["jitter_ms"], change.old["seed"]) == ("5", "3")
        jittery.__exit__(None, None, None)
    shown = capsys.readouterr().out
    assert "relay, at once: delay_ms 0 -> 40" in shown
    assert "relay, at once: jitter_ms 0 -> 5, seed None -> 3" in shown
    assert "relay, at once: kb_per_s inf -> 8" in shown


def test_a_mute_relay_restarts_and_is_mute_again(relay: Relay) -> None:
    with relay.settings(to_client=False):
        relay.restart()
        with pytest.raises(psycopg.OperationalError, match="timeout expired"):
            psycopg.connect(relay.dsn, connect_timeout=2)
    psycopg.connect(relay.dsn, connect_timeout=10).close()


# --- how connections end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "close"])
def test_who_waits_hears_that_the_connection_ended(pg: Postgres, relay: Relay, how: Any) -> None:
    problems: list[Exception] = []

    def wait() -> None:
        try:
            conn.execute("select pg_sleep(300)")
        except psycopg.Error as problem:
            problems.append(problem)

    with psycopg.connect(relay.dsn, autocommit=True) as conn:
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        until(lambda: conn.info.transaction_status == TransactionStatus.ACTIVE)
        assert (relay.reset() if how == "reset" else relay.drop("close")) == 1
        thread.join(WITHIN)
    assert "server closed the connection unexpectedly" in str(problems[0])
    pg.value("select count(pg_terminate_backend(pid)) from pg_stat_activity where query like 'select pg_sleep%'")


def test_a_reset_is_one_and_a_close_is_none(relay: Relay) -> None:
    for how in ("reset", "close"):
        with socket.create_connection(relay.address, timeout=WITHIN) as wire:
            until(lambda how=how: relay.drop(how))
            if how == "reset":
                with pytest.raises(ConnectionResetError):
                    wire.recv(1)
            else:
                assert wire.recv(1) == b""


@pytest.mark.parametrize("how", ["reset", "close"])
def test_the_server_hears_it_too(pg: Postgres, how: Any) -> None:
    with pg.relay() as relay, psycopg.connect(relay.dsn, application_name="through the relay"):
        assert sessions(pg) == 1
        relay.drop(how)
        until(lambda: sessions(pg) == 0)


def test_a_silent_drop_is_told_to_nobody_and_serves_the_next(pg: Postgres) -> None:
    with pg.relay() as relay, psycopg.connect(relay.dsn, application_name="through the relay", autocommit=True) as conn:
        assert relay.drop("silent") == 1
        thread = threading.Thread(target=fail, args=[conn], daemon=True)
        thread.start()
        psycopg.connect(relay.dsn, connect_timeout=10).close()
        thread.join(0.3)
        assert thread.is_alive()
        assert sessions(pg) == 1
        assert relay.drop() == 0, "one that is forgotten is open no more"
        relay.kill()
        thread.join(WITHIN)
        assert not thread.is_alive()
    until(lambda: sessions(pg) == 0)


def test_a_client_that_goes_ends_its_session(pg: Postgres) -> None:
    with pg.relay() as relay:
        conn = psycopg.connect(relay.dsn, application_name="through the relay")
        assert sessions(pg) == 1
        conn.close()
        until(lambda: sessions(pg) == 0)
        until(lambda: relay.drop() == 0)


def test_a_client_that_is_cut_off_ends_its_session(pg: Postgres) -> None:
    with pg.relay() as relay:
        conn = psycopg.connect(relay.dsn, application_name="through the relay")
        with socket.socket(fileno=os.dup(conn.fileno())) as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with open(os.devnull) as null:
                os.dup2(null.fileno(), conn.fileno())  # libpq says no goodbye through it
        until(lambda: sessions(pg) == 0)
        assert "ended with ConnectionResetError" in relay.log()
        conn.close()


def test_a_client_that_gave_up_on_a_mute_relay_does_not_disturb_the_others(pg: Postgres) -> None:
    with pg.relay() as relay, psycopg.connect(relay.dsn, autocommit=True) as other:
        gone = psycopg.connect(relay.dsn, application_name="through the relay", autocommit=True)
        with relay.settings(to_client=False):
            gone.pgconn.send_query(b"select 1")
            gone.pgconn.flush()
            gone.close()
            until(lambda: sessions(pg) == 0)  # its answer and the session's end wait in the relay
        assert other.execute("select 1").fetchone() == (1,)
        until(lambda: relay.drop() == 1)


def test_the_end_of_a_session_waits_in_a_mute_direction(pg: Postgres) -> None:
    with pg.relay() as relay, psycopg.connect(relay.dsn, autocommit=True) as conn:
        with relay.settings(to_client=False):
            pg.value(f"select pg_terminate_backend({conn.info.backend_pid})")
            thread = threading.Thread(target=fail, args=[conn], daemon=True)
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        thread.join(WITHIN)
        assert not thread.is_alive()


def test_another_way_to_drop_is_refused(relay: Relay) -> None:
    with pytest.raises(SettingError, match="'reset', 'close', 'silent'"):
        relay.drop("gently")  # type: ignore[arg-type]


def test_many_connect_at_once(pg: Postgres) -> None:
    relay = pg.pgbouncer(pool_mode="transaction", default_pool_size=2, max_client_conn=200).relay()
    answers: list[object] = []

    def ask() -> None:
        with psycopg.connect(relay.dsn, connect_timeout=60) as conn:
            answers.append(conn.execute("select 1").fetchone())

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [(1,)] * 60


def test_a_forked_child_holds_nothing_of_it(pg: Postgres) -> None:
    with pg.relay() as relay, psycopg.connect(relay.dsn, application_name="through the relay"):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                relay.drop()
            except NodeStopped:
                os.write(tell, b"refused")
            time.sleep(60)
            os._exit(0)
        try:
            os.close(tell)
            assert os.read(told, 100) == b"refused"
            relay.kill()
            until(lambda: sessions(pg) == 0)
            with pytest.raises(psycopg.OperationalError, match="refused"):
                psycopg.connect(relay.dsn)
        finally:
            os.close(told)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
