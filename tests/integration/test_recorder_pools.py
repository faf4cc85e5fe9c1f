"""What the recorder says of pools is what is so. Fails when a release renames what it looks at."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool, NullConnectionPool, PoolTimeout
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine
from sqlalchemy.exc import TimeoutError as SqlalchemyTimeout
from sqlalchemy.ext.asyncio import create_async_engine

from connlab import Postgres, Recorder

WITHIN = 10.0
Expected = dict[str, float]


def last(rec: Recorder, source: str = "app") -> Expected:
    """The newest values of a source."""
    series = next(series for series in rec.series if series.source == source)
    return {metric: values[-1] for metric, values in series.columns()[1].items()}


def await_values(rec: Recorder, **expected: float) -> None:
    """Wait until the newest sample says so; `in_use` stands for "in use"."""
    wanted = {name.replace("_", " "): value for name, value in expected.items()}
    deadline = time.monotonic() + WITHIN
    while (seen := {name: last(rec).get(name) for name in wanted}) != wanted:
        assert time.monotonic() < deadline, f"waited for {wanted}, saw {seen}"
        time.sleep(0.01)


def highest(rec: Recorder, metric: str) -> float:
    frame = rec.frame()
    return float(frame[(frame.source == "app") & (frame.metric == metric)].value.max())


@contextlib.contextmanager
def waiters(borrow: Callable[[], object], number: int) -> Iterator[list[BaseException]]:
    """Threads that try to borrow; what it raised for them."""
    raised: list[BaseException] = []

    def try_to() -> None:
        try:
            borrow()
        except Exception as problem:
            raised.append(problem)

    threads = [threading.Thread(target=try_to) for _ in range(number)]
    for thread in threads:
        thread.start()
    yield raised
    for thread in threads:
        thread.join()


@pytest.fixture
def pool(server: Postgres) -> Iterator[ConnectionPool]:
    with ConnectionPool(server.dsn, min_size=2, max_size=2, open=True) as pool:
        pool.wait()
        yield pool


def test_borrowed_and_idle(pool: ConnectionPool) -> None:
    with Recorder(app=pool, interval=0.01) as rec:
        await_values(rec, in_use=0, idle=2, waiting=0, connecting=0, size_limit=2)
        with pool.connection():
            await_values(rec, in_use=1, idle=1, waiting=0, connecting=0)
        await_values(rec, in_use=0, idle=2, requests=1, errors=0)


def test_waiters_who_timed_out_wait_no_more(pool: ConnectionPool) -> None:
    with Recorder(app=pool, interval=0.01) as rec, pool.connection(), pool.connection():
        with waiters(lambda: pool.getconn(timeout=0.6), 3) as raised:
            await_values(rec, in_use=2, idle=0, waiting=3)
        assert [type(problem) for problem in raised] == [PoolTimeout] * 3
        assert pool.get_stats()["requests_waiting"] == 3  # what the pool itself goes on saying
        await_values(rec, waiting=0, in_use=2, errors=3)


def test_a_waiter_thrown_out_by_an_interrupt_waits_no_more(pool: ConnectionPool) -> None:
    """As when a learner stops a cell that waits for a connection."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Recorder(app=pool, interval=0.01) as rec, pool.connection(), pool.connection():
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                pool.getconn(timeout=30)
            assert highest(rec, "waiting") == 1
            await_values(rec, waiting=0, in_use=2)
            pool._waiting.clear()  # or the pool would give a connection to the one who is gone
    finally:
        signal.signal(signal.SIGALRM, before)


def test_connections_that_are_not_there_are_not_in_use(server: Postgres) -> None:
    """A pool counts the connections that it tries to open in its size."""
    with server.relay() as relay:
        relay.kill()  # refuses from now on
        with ConnectionPool(relay.dsn, min_size=3, max_size=3, open=True) as pool, Recorder(app=pool) as rec:
            assert pool.get_stats()["pool_size"] == 3
            await_values(rec, connecting=3, in_use=0, idle=0)
            relay.restart()
            await_values(rec, connecting=0, in_use=0, idle=3)


def test_connections_that_a_mute_server_keeps_waiting_are_not_in_use(server: Postgres) -> None:
    with server.relay(to_client=False) as relay, contextlib.ExitStack() as rest:
        pool = ConnectionPool(relay.dsn, min_size=2, max_size=2, open=True, kwargs={"connect_timeout": 60})
        rest.callback(pool.close)
        with Recorder(app=pool) as rec:
            await_values(rec, connecting=2, in_use=0, idle=0)
        relay.kill()


def test_a_closed_pool_is_a_gap(server: Postgres) -> None:
    pool = ConnectionPool(server.dsn, min_size=1, open=False)
    with Recorder(app=pool, interval=0.01) as rec:
        pool.open()
        await_values(rec, idle=1)
        pool.close()
        time.sleep(0.1)
    first, second = rec.gaps
    assert {first.why, second.why} == {"the pool is closed"}
    assert first.end is not None and second.end is None


def test_a_null_pool(server: Postgres) -> None:
    with NullConnectionPool(server.dsn, max_size=2, open=True) as pool, Recorder(app=pool, interval=0.01) as rec:
        with pool.connection():
            await_values(rec, in_use=1, idle=0, connecting=0)
        await_values(rec, in_use=0, idle=0, connecting=0)


def test_an_async_pool(server: Postgres) -> None:
    async def lesson() -> None:
        async with AsyncConnectionPool(server.dsn, min_size=1, max_size=1, open=False) as pool:
            await pool.wait()
            with Recorder(app=pool, interval=0.01) as rec:
                async with pool.connection():
                    waiting = [asyncio.create_task(pool.getconn(timeout=1)) for _ in range(2)]
                    await asyncio.sleep(0)
                    await asyncio.to_thread(await_values, rec, in_use=1, idle=0, waiting=2, connecting=0)
                    raised = await asyncio.gather(*waiting, return_exceptions=True)
                    assert [type(problem) for problem in raised] == [PoolTimeout] * 2
                    await asyncio.to_thread(await_values, rec, in_use=1, waiting=0)
                await asyncio.to_thread(await_values, rec, in_use=0, idle=1, waiting=0, connecting=0)

    asyncio.run(lesson())


@pytest.fixture
def engine(server: Postgres) -> Iterator[Engine]:
    url = server.dsn.replace("postgresql://", "postgresql+psycopg://")
    engine = create_engine(url, pool_size=1, max_overflow=1, pool_timeout=0.6)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("what", ["engine", "pool"])
def test_sqlalchemy(engine: Engine, what: str) -> None:
    with Recorder(app=engine if what == "engine" else engine.pool, interval=0.01) as rec:
        await_values(rec, in_use=0, idle=0, waiting=0, size_limit=2)
        with engine.connect(), engine.connect():
            with waiters(engine.connect, 2) as raised:
                await_values(rec, in_use=2, idle=0, waiting=2)
            assert [type(problem) for problem in raised] == [SqlalchemyTimeout] * 2
            await_values(rec, in_use=2, waiting=0)
        await_values(rec, in_use=0, idle=1)


def test_a_sqlalchemy_engine_after_dispose(engine: Engine) -> None:
    with Recorder(app=engine, interval=0.01) as rec:
        engine.dispose()
        with engine.connect():
            await_values(rec, in_use=1, idle=0)


def test_an_async_sqlalchemy_engine(server: Postgres) -> None:
    async def lesson() -> None:
        url = server.dsn.replace("postgresql://", "postgresql+psycopg://")
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=1)
        with Recorder(app=engine, interval=0.01) as rec:
            await asyncio.to_thread(await_values, rec, in_use=0, waiting=0)
            async with engine.connect():
                waiting = asyncio.create_task(engine.connect().start())
                await asyncio.sleep(0)
                await asyncio.to_thread(await_values, rec, in_use=1, waiting=1)
                with pytest.raises(SqlalchemyTimeout):
                    await waiting
                await asyncio.to_thread(await_values, rec, in_use=1, waiting=0)
            await asyncio.to_thread(await_values, rec, in_use=0, idle=1)
        await engine.dispose()

    asyncio.run(lesson())


def test_pools_go_by_their_own_names_or_by_keyword(server: Postgres, pool: ConnectionPool) -> None:
    with (
        ConnectionPool(server.dsn, min_size=1, name="reports", open=True) as reports,
        Recorder(reports, app=pool) as rec,
    ):
        assert [series.source for series in rec.series] == ["reports", "app"]


def test_a_borrower_of_a_dead_connection_is_no_gap(server: Postgres, pool: ConnectionPool) -> None:
    with Recorder(app=pool, interval=0.01) as rec:
        with contextlib.suppress(psycopg.OperationalError), pool.connection() as conn:
            server.rows(f"select pg_terminate_backend({conn.info.backend_pid})")
            conn.execute("select 1")
        await_values(rec, in_use=0, idle=2, connecting=0)
    assert rec.gaps == []
