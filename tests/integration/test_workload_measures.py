"""What a load measures of a real server and a real pool is what happened."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from freezing import FROZEN, freezing
from leftovers import Child, Person
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from connlab import (
    Load,
    Postgres,
    Recorder,
    closed_loop,
    closed_loop_async,
    open_loop,
    open_loop_async,
)

OURS = ("connlab-client", "connlab-alarm")
ACTIVE = "select count(*) from pg_stat_activity where state = 'active' and usename = 'app'"
Start = Callable[..., Postgres]


def one(conn: psycopg.Connection) -> None:
    conn.execute("select 1")


def nap(conn: psycopg.Connection) -> None:
    conn.execute("select pg_sleep(0.05)")


def long_nap(conn: psycopg.Connection) -> None:
    conn.execute("select pg_sleep(60)")


@contextlib.contextmanager
def pool_of(pg: Postgres, size: int, **more: Any) -> Iterator[ConnectionPool]:
    with ConnectionPool(pg.dsn, min_size=size, max_size=size, open=True, **more) as pool:
        pool.wait()
        yield pool


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name.startswith(OURS)] == []


# --- coordinated omission -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_an_open_loop_leaves_no_waiting_out(server: Postgres, kind: str) -> None:
    """Each request that should have started while the server was frozen waited for the rest of that time at least."""
    with freezing(server, 0.5):
        load = _open(server) if kind == "threads" else asyncio.run(_open_async(server))
    frame = load.frame()
    slow = frame[frame.latency_ms >= 1000 * FROZEN * 0.2]
    assert load.succeeded == 150 and len(slow) >= 0.8 * 100 * FROZEN * 0.8
    assert frame.latency_ms.max() >= 1000 * FROZEN * 0.95
    assert load.percentile(80) >= 1000 * FROZEN * 0.1  # a third of all came in that time
    first = slow.iloc[0]
    expected = first.latency_ms - 1000 * (slow.intended - first.intended)  # each one waits for the same moment
    assert (slow.latency_ms >= expected - 30).all()


def _open(pg: Postgres) -> Load:
    with pool_of(pg, 2) as pool:
        return open_loop(one, borrow=pool.connection, rate=100, seconds=1.5, arrivals="fixed", clients_at_most=20)


async def _open_async(pg: Postgres) -> Load:
    async with AsyncConnectionPool(pg.dsn, min_size=2, max_size=2, open=False) as pool:
        await pool.wait()

        async def work(conn: psycopg.AsyncConnection) -> None:
            await conn.execute("select 1")

        return await open_loop_async(work, borrow=pool.connection, rate=100, seconds=1.5, arrivals="fixed")


def test_a_closed_loop_shows_a_frozen_server_once_for_each_client(server: Postgres) -> None:
    with pool_of(server, 3) as pool, freezing(server, 0.5):
        load = closed_loop(one, borrow=pool.connection, clients=3, seconds=1.5, think_seconds=0.01)
    frame = load.frame()
    slow = frame[frame.latency_ms >= 1000 * FROZEN * 0.9]
    assert sorted(slow.client) == [0, 1, 2]
    assert len(frame) > 60 and load.percentile(90) < 1000 * FROZEN * 0.5  # what it hides


# --- waiting and using ----------------------------------------------------------------------------------------------


def test_waiting_for_the_connection_is_told_from_using_it(server: Postgres) -> None:
    with pool_of(server, 1) as pool:
        load = closed_loop(nap, borrow=pool.connection, clients=4, requests=20)
    frame = load.frame()
    queued = frame.iloc[4:-4]  # the first ones find a shorter queue
    assert load.succeeded == 20 and (frame.used_ms >= 50).all()
    assert frame.used_ms.median() < 100
    assert 2.5 * 50 < queued.waited_ms.median() < 6 * 50  # three others are served first
    borrowed = frame.sort_values("borrowed")
    assert (borrowed.borrowed.to_numpy()[1:] >= borrowed.ended.to_numpy()[:-1] - 0.01).all()  # one at a time


def test_a_connection_each_is_waited_for(server: Postgres) -> None:
    load = closed_loop(one, borrow=lambda: psycopg.connect(server.dsn), clients=2, requests=10)
    assert load.succeeded == 10
    assert load.percentile(50, of="waited") > load.percentile(50, of="used")
    assert server.value("select count(*) from pg_stat_activity where usename = 'app'") == 0


def test_an_async_connection_each(server: Postgres) -> None:
    async def work(conn: psycopg.AsyncConnection) -> None:
        await conn.execute("select 1")

    async def connect() -> psycopg.AsyncConnection:
        return await psycopg.AsyncConnection.connect(server.dsn)

    load = asyncio.run(closed_loop_async(work, borrow=connect, clients=2, requests=10))
    assert load.succeeded == 10 and (load.frame().waited_ms > 0).all()


def test_times_are_on_the_recorders_clock(server: Postgres) -> None:
    def fail(conn: psycopg.Connection) -> None:
        conn.execute("select 1/0")

    with pool_of(server, 1) as pool, Recorder(app=pool) as rec:
        time.sleep(0.3)
        before = rec.now()
        load = closed_loop(fail, borrow=pool.connection, requests=1)
        ((at, kind),) = load.error_events(rec)
        assert before < at < rec.now() and kind == "DivisionByZero"


# --- errors ---------------------------------------------------------------------------------------------------------


def the_error(load: Load) -> tuple[str, str | None, str]:
    table = load.errors()
    assert load.failed == len(load) == table["count"].sum()
    return table.error[0], table.sqlstate[0], table.message[0]


def test_a_pool_timeout(server: Postgres) -> None:
    with pool_of(server, 1, timeout=0.2) as pool, pool.connection():
        load = closed_loop(one, borrow=pool.connection, clients=2, requests=4)
    kind, state, text = the_error(load)
    assert (kind, state) == ("PoolTimeout", None) and "couldn't get a connection after 0.20 sec" in text
    frame = load.frame()
    assert frame.borrowed.isna().all() and frame.used_ms.isna().all() and (frame.waited_ms >= 200).all()


def test_a_statement_timeout(server: Postgres) -> None:
    with pool_of(server, 2, kwargs={"options": "-c statement_timeout=100"}) as pool:
        load = closed_loop(long_nap, borrow=pool.connection, clients=2, requests=4)
    assert the_error(load) == ("QueryCanceled", "57014", "canceling statement due to statement timeout")
    assert (load.frame().used_ms >= 99).all()


def test_a_killed_server(start: Start) -> None:
    pg, moments = start(), []

    def kill() -> None:
        moments.append(time.monotonic())
        pg.kill()
        moments.append(time.monotonic())

    with pool_of(pg, 2, timeout=1) as pool:
        killer = threading.Timer(0.4, kill)
        killer.start()
        load = open_loop(one, borrow=pool.connection, rate=50, seconds=1.2, arrivals="fixed")
        killer.join()
    frame = load.frame()
    before, after = (moment - load.began for moment in moments)
    assert len(frame) == 60 and frame[frame.ended < before].error.isna().all() and load.succeeded >= 5
    assert frame[frame.started > after].error.notna().all() and load.failed >= 5
    assert before < load.errors()["first"].min()
    texts = " ".join(load.errors().message)
    assert re.search("terminating connection|closed the connection unexpectedly|reset by peer", texts)


def test_a_refused_connection_has_no_sqlstate_and_keeps_its_text(start: Start) -> None:
    pg = start()
    dsn = pg.dsn
    pg.kill()
    load = closed_loop(one, borrow=lambda: psycopg.connect(dsn), clients=2, requests=4)
    kind, state, text = the_error(load)
    assert (kind, state) == ("OperationalError", None) and "onnection refused" in text
    assert (load.frame().waited_ms > 0).all()


def test_slots_that_run_out(start: Start) -> None:
    pg = start(max_connections=10)  # three are reserved
    load = closed_loop(nap, borrow=lambda: psycopg.connect(pg.dsn), clients=12, requests=12)
    assert load.succeeded >= 1 and load.failed >= 1
    assert all("slots are reserved" in text or "too many clients" in text for text in load.errors().message)


# --- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_a_query_that_does_not_end_is_cancelled_at_the_deadline(server: Postgres, kind: str) -> None:
    if kind == "threads":
        with pool_of(server, 2) as pool:
            load = closed_loop(long_nap, borrow=pool.connection, clients=4, requests=4, deadline=0.5)
    else:
        load = asyncio.run(_stuck_async(server))
    assert load.unfinished == 4 and load.left == 0
    assert server.value(ACTIVE) == 0


async def _stuck_async(pg: Postgres) -> Load:
    async def work(conn: psycopg.AsyncConnection) -> None:
        await conn.execute("select pg_sleep(60)")

    async with AsyncConnectionPool(pg.dsn, min_size=2, max_size=2, open=False) as pool:
        return await closed_loop_async(work, borrow=pool.connection, clients=4, requests=4, deadline=0.5)


def test_a_deadline_holds_while_the_server_is_frozen(start: Start) -> None:
    pg = start()
    with pool_of(pg, 2) as pool:
        pg.freeze()
        began = time.monotonic()
        load = closed_loop(one, borrow=pool.connection, clients=2, requests=4, deadline=0.5)
        lasted = time.monotonic() - began
        pg.thaw()
    assert load.unfinished == 2 and load.left == 0 and lasted < 10


INTERRUPTED = """
from connlab import closed_loop, open_loop
from psycopg_pool import ConnectionPool
with Postgres.start() as pg, ConnectionPool(pg.dsn, min_size=2, max_size=2, open=True) as pool:
    pool.wait()
    def work(conn):
        conn.execute("select 1")
        if {slow}:
            conn.execute("select pg_sleep(60)")
        time.sleep(0.01)
    threading.Timer(1.0, lambda: tell(pg)).start()
    try:
        {call}
    except KeyboardInterrupt as stopped:
        load, notes = stopped.load, stopped.__notes__
    active = pg.value("{active}")
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("connlab-client")]
    tell(pg, threads=left, active=active, done=load.succeeded, cut=load.unfinished, notes=notes)
"""


@pytest.mark.parametrize("slow", [False, True], ids=["quick", "stuck"])
@pytest.mark.parametrize(
    "call",
    [
        "closed_loop(work, borrow=pool.connection, clients=4, seconds=60)",
        "open_loop(work, borrow=pool.connection, rate=20, seconds=60, clients_at_most=10)",
    ],
    ids=["closed", "open"],
)
def test_an_interrupt_ends_it_and_keeps_what_was_measured(
    backend: str, local_only: None, call: str, slow: bool
) -> None:
    with Child(Person(), INTERRUPTED.format(call=call, slow=slow, active=ACTIVE)) as child:
        child.told()
        sent = time.monotonic()
        child.send(signal.SIGINT)
        told = child.told()
        assert time.monotonic() - sent < 10
        assert told["threads"] == [] and told["active"] == 0
        assert told["cut"] >= 1 if slow else told["done"] > 10
        assert "requests were made until then" in told["notes"][0]
        assert child.ended() == 0, child.errors()


ASYNC_INTERRUPTED = """
import asyncio
from connlab import closed_loop_async
from psycopg_pool import AsyncConnectionPool
with Postgres.start() as pg:
    async def work(conn):
        await conn.execute("select pg_sleep(0.02)")
    async def lesson():
        async with AsyncConnectionPool(pg.dsn, min_size=2, max_size=2, open=False) as pool:
            await pool.wait()
            threading.Timer(1.0, lambda: tell(pg)).start()
            await closed_loop_async(work, borrow=pool.connection, clients=4, seconds=60)
    try:
        asyncio.run(lesson())
    except KeyboardInterrupt as stopped:
        load = stopped.__context__.load
    tell(pg, done=load.succeeded, active=pg.value("{active}"))
"""


def test_an_interrupt_ends_async_load_too(backend: str, local_only: None) -> None:
    with Child(Person(), ASYNC_INTERRUPTED.format(active=ACTIVE)) as child:
        child.told()
        child.send(signal.SIGINT)
        told = child.told()
        assert told["done"] > 10 and told["active"] == 0
        assert child.ended() == 0, child.errors()
