"""A fault does what it says while its block runs, and afterwards the world is as it was, whatever happened inside."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from conftest import Start
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine

from connlab import ConnlabError, NodeStopped, PgBouncer, Postgres, SettingError, faults
from connlab.faults.fault import ANSWER_WITHIN

WITHIN = 20.0
STATES = "select state from pg_stat_activity where pid = any(array{}::int[])"


STATES_OF = {"in_transaction": ["idle in transaction"] * 2, "autocommit": ["idle"] * 2, "closed": [], "collected": []}


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def states(server: Postgres, fault: faults.Fault) -> list[str]:
    return [row["state"] for row in server.rows(STATES.format(list(fault.pids)))]


def free(pool: ConnectionPool, n: int, timeout: float = 5) -> bool:
    """Whether the pool can lend ``n`` working connections at once."""
    with contextlib.ExitStack() as stack:
        try:
            lent = [stack.enter_context(pool.connection(timeout=timeout)) for _ in range(n)]
        except PoolTimeout:
            return False
        return [conn.execute("select 1").fetchone() for conn in lent] == [(1,)] * n


@pytest.fixture
def pool(server: Postgres) -> Iterator[ConnectionPool]:
    with ConnectionPool(server.dsn, min_size=3, max_size=3, timeout=1) as pool:
        pool.wait()
        yield pool


@pytest.fixture
def engine(server: Postgres) -> Iterator[Engine]:
    engine = create_engine(server.dsn.replace("postgresql://", "postgresql+psycopg://"), pool_size=2, max_overflow=1)
    yield engine
    engine.dispose()


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    names = {thread.name for thread in set(threading.enumerate()) - before}
    assert not {name for name in names if name.startswith(("slow_query", "Thread-"))}


# --- leak ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STATES_OF)
def test_each_kind_of_leak_starves_the_pool_and_looks_different_in_the_server(
    server: Postgres, pool: ConnectionPool, kind: Any
) -> None:
    with faults.leak(pool, 2, kind) as fault:
        assert (fault.count, len(set(fault.pids))) == (2, 2)
        until(lambda: states(server, fault) == STATES_OF[kind])
        with pool.connection(timeout=5), pytest.raises(PoolTimeout), pool.connection(timeout=0.2):
            pass


@pytest.mark.parametrize("kind", ["in_transaction", "autocommit", "closed"])
@pytest.mark.parametrize("autocommit", [False, True])
def test_the_pool_has_all_back_as_they_were(server: Postgres, kind: Any, autocommit: bool) -> None:
    kwargs = {"autocommit": autocommit}
    with ConnectionPool(server.dsn, min_size=2, max_size=2, kwargs=kwargs) as pool:
        with faults.leak(pool, 2, kind) as fault:
            until(lambda: states(server, fault) == STATES_OF[kind])
        assert free(pool, 2)
        with pool.connection() as one, pool.connection() as other:
            assert (one.autocommit, other.autocommit) == (autocommit, autocommit)


def test_a_collected_connection_never_comes_back(pool: ConnectionPool) -> None:
    with faults.leak(pool, 1, "collected"):
        pass
    gc.collect()
    assert free(pool, 2)
    assert not free(pool, 3, timeout=0.5)


def test_a_leak_of_none_leaves_the_pool_alone(pool: ConnectionPool) -> None:
    with faults.leak(pool, 0) as fault:
        assert fault.count == 0
        assert free(pool, 3)


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_an_exception_passes_and_the_pool_has_all_back(pool: ConnectionPool, problem: type[BaseException]) -> None:
    with pytest.raises(problem), faults.leak(pool, 3):
        raise problem
    assert free(pool, 3)


@pytest.mark.parametrize("kind", ["in_transaction", "autocommit", "closed"])
def test_a_server_killed_meanwhile(start: Start, kind: Any) -> None:
    pg = start()
    with ConnectionPool(pg.dsn, min_size=2, max_size=2, timeout=10, check=ConnectionPool.check_connection) as pool:
        with faults.leak(pool, 2, kind):
            pg.kill()
        pg.restart()
        until(lambda: free(pool, 2))


def test_a_server_that_stays_frozen_does_not_keep_the_block(start: Start) -> None:
    pg = start()
    with ConnectionPool(pg.dsn, min_size=2, max_size=2, timeout=10) as pool:
        with faults.leak(pool, 2):
            pg.freeze()
        pg.thaw()
        until(lambda: free(pool, 2))


def test_a_pool_closed_meanwhile_gets_nothing_open_back(server: Postgres) -> None:
    pool = ConnectionPool(server.dsn, min_size=1, max_size=1, open=True)
    with faults.leak(pool) as fault:
        pool.close()
    until(lambda: not states(server, fault))


def test_one_who_cannot_borrow_all_returns_what_it_has(pool: ConnectionPool) -> None:
    with pool.connection():
        with pytest.raises(ConnlabError, match="2 of 3"), faults.leak(pool, 3, timeout=0.2):
            pass
        assert free(pool, 2)


@pytest.mark.parametrize(("kind", "seen"), [("in_transaction", "idle in transaction"), ("autocommit", "idle")])
def test_an_engine_leaks_what_it_has_lent(server: Postgres, engine: Engine, kind: Any, seen: str) -> None:
    pool: Any = engine.pool
    with faults.leak(engine, 3, kind) as fault:
        assert pool.checkedout() == 3
        assert states(server, fault) == [seen] * 3
    assert pool.checkedout() == 0
    with engine.connect() as conn:
        assert conn.get_isolation_level() == "READ COMMITTED"
        assert conn.exec_driver_sql("select 1").scalar_one() == 1


def test_an_engine_whose_server_is_killed_meanwhile(start: Start) -> None:
    pg = start()
    engine = create_engine(pg.dsn.replace("postgresql://", "postgresql+psycopg://"), pool_pre_ping=True)
    with faults.leak(engine, 2):
        pg.kill()
    pg.restart()
    with engine.connect() as conn:
        assert conn.exec_driver_sql("select 1").scalar_one() == 1
    engine.dispose()


def test_what_cannot_leak_is_refused(server: Postgres, pool: ConnectionPool, engine: Engine) -> None:
    returns: ConnectionPool[Any] = ConnectionPool(server.dsn, open=False, close_returns=True)
    unlike = AsyncConnectionPool(server.dsn, open=False)
    refused: list[tuple[Any, Any, Any, str]] = [
        (pool, 4, "closed", "max_size=3"),
        (pool, -1, "closed", "whole number"),
        (pool, 1, "lost", "kind is 'in_transaction'"),
        (returns, 1, "closed", "close_returns"),
        (engine, 4, "autocommit", "max_overflow = 3"),
        (engine, 1, "closed", "takes back"),
        (unlike, 1, "closed", "not AsyncConnectionPool"),
    ]
    for thing, n, kind, message in refused:
        with pytest.raises(SettingError, match=message), faults.leak(thing, n, kind):
            pass


# --- sessions -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["PostgreSQL", "PgBouncer"])
def dsn(request: pytest.FixtureRequest, server: Postgres, bouncer: PgBouncer) -> str:
    return server.dsn if request.param == "PostgreSQL" else bouncer.dsn


def lock_table(dsn: str, timeout: str) -> None:
    with psycopg.connect(dsn, options=f"-c lock_timeout={timeout}") as conn:
        conn.execute("lock table accounts in access exclusive mode")


def lock(dsn: str, id: int) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute("select 1 from accounts where id = %s for key share nowait", [id])  # for update alone keeps it off


def test_a_row_lock_keeps_others_off_that_row_alone(dsn: str) -> None:
    with faults.hold_row_lock(dsn, "accounts", 7):
        with pytest.raises(psycopg.errors.LockNotAvailable):
            lock(dsn, 7)
        lock(dsn, 8)
    lock(dsn, 7)


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_a_row_lock_ends_with_an_exception(dsn: str, problem: type[BaseException]) -> None:
    with pytest.raises(problem) as kept, faults.hold_row_lock(dsn, "public.accounts", 7):
        raise problem
    lock(dsn, 7)
    assert kept.tb, "the traceback keeps what the garbage collector would close"


def test_a_row_lock_is_released_when_the_block_is_left_and_that_is_soon(server: Postgres) -> None:
    began = time.monotonic()
    with psycopg.connect(server.dsn, autocommit=True) as other:
        for _ in range(20):
            with faults.hold_row_lock(server.dsn, "accounts", 7):
                pass
            other.execute("select 1 from accounts where id = 7 for update nowait")
    assert time.monotonic() - began < 10 * ANSWER_WITHIN, "each waited for the deadline of a server that is silent"


@pytest.mark.parametrize(
    ("table", "id", "message"),
    [
        ("acounts", 7, "did you mean accounts"),
        ("zzz", 7, "there is accounts, orders, users"),
        ("accounts", 10**6, "id = 1000000 finds nothing"),
        ("accounts", "seven", "cannot lock accounts where id = 'seven'"),
    ],
)
def test_a_row_that_is_not_there(server: Postgres, table: str, id: object, message: str) -> None:
    with pytest.raises(SettingError, match=message), faults.hold_row_lock(server.dsn, table, id):
        pass
    assert not server.value("select count(*) from pg_stat_activity where state = 'idle in transaction'")


def test_a_row_that_somebody_has_locked(server: Postgres) -> None:
    taken = pytest.raises(ConnlabError, match="locked accounts where id = 7 already")
    with faults.hold_row_lock(server.dsn, "accounts", 7), taken, faults.hold_row_lock(server.dsn, "accounts", 7):
        pass


def test_idle_in_transaction_holds_what_its_query_took(server: Postgres, dsn: str) -> None:
    with faults.idle_in_transaction(dsn, "select * from accounts limit 1") as fault:
        assert states(server, fault) == ["idle in transaction"]
        with pytest.raises(psycopg.errors.LockNotAvailable):
            lock_table(server.dsn, "200ms")
    lock_table(server.dsn, "10s")


@pytest.mark.parametrize(
    ("query", "message"), [("selec", "cannot run 'selec'"), ("commit", "ends its transaction"), (5, "as text")]
)
def test_a_query_that_leaves_nobody_idle_in_a_transaction(server: Postgres, query: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message), faults.idle_in_transaction(server.dsn, query):
        pass


def test_a_slow_query_runs_and_is_cancelled_on_leaving(server: Postgres) -> None:
    began = time.monotonic()
    with faults.slow_query(server.dsn, 300) as fault:
        until(lambda: states(server, fault) == ["active"])
    until(lambda: states(server, fault) == [])
    assert time.monotonic() - began < 100
    assert fault.error is None


def test_a_slow_query_tells_what_ended_it(server: Postgres) -> None:
    with faults.slow_query(server.dsn, 300) as fault:
        until(lambda: states(server, fault) == ["active"])
        server.value(f"select pg_cancel_backend({fault.pids[0]})")
        until(lambda: fault.error)
    assert isinstance(fault.error, psycopg.errors.QueryCanceled)


def test_a_slow_query_through_a_pooler_leaves_nothing(server: Postgres, bouncer: PgBouncer) -> None:
    running = "select count(*) from pg_stat_activity where state = 'active' and query like 'select pg_sleep%'"
    with pytest.raises(KeyboardInterrupt), faults.slow_query(bouncer.dsn, 300):
        until(lambda: server.value(running) == 1)
        raise KeyboardInterrupt
    until(lambda: server.value(running) == 0)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "5", True])
def test_a_wrong_time(server: Postgres, seconds: Any) -> None:
    with pytest.raises(SettingError, match="number of seconds"), faults.slow_query(server.dsn, seconds):
        pass


@pytest.mark.parametrize(
    "fault",
    [
        lambda dsn: faults.hold_row_lock(dsn, "accounts", 7),
        faults.idle_in_transaction,
        lambda dsn: faults.slow_query(dsn, 300),
    ],
    ids=["hold_row_lock", "idle_in_transaction", "slow_query"],
)
class TestSessions:
    """What all faults of one session promise."""

    @pytest.mark.parametrize("verb", ["kill", "stop", "freeze"])
    def test_a_server_that_goes_meanwhile(self, start: Start, fault: Any, verb: str) -> None:
        pg = start()
        with fault(pg.dsn):
            getattr(pg, verb)()

    def test_it_prints_what_it_did(self, server: Postgres, fault: Any) -> None:
        with fault(server.dsn) as did:
            assert str(did.pids[0]) in str(did)
            began = server.value(f"select backend_start from pg_stat_activity where pid = {did.pids[0]}")
            assert began <= did.since <= server.value("select now()")

    def test_a_server_that_is_not_there(self, start: Start, fault: Any) -> None:
        pg = start()
        pg.kill()
        with pytest.raises(ConnlabError, match="does the server run"), fault(pg.dsn):
            pass

    def test_something_else_than_a_dsn(self, server: Postgres, fault: Any) -> None:
        with pytest.raises(SettingError, match=r"a DSN such as pg\.dsn"), fault(server):
            pass


# --- slots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [0, 2])
def test_saturate_takes_all_slots_but_those_it_leaves(start: Start, leave: int) -> None:
    pg = start(max_connections=62, superuser_reserved_connections=2)
    admin = psycopg.connect(pg.admin_dsn, autocommit=True)
    with faults.saturate(pg, leave) as fault, contextlib.ExitStack() as others:
        assert fault.count == 59 - leave  # the administrator has one of sixty
        for _ in range(leave):
            others.enter_context(psycopg.connect(pg.dsn))
        with pytest.raises(psycopg.OperationalError, match="remaining connection slots"):
            psycopg.connect(pg.dsn)
        assert pg.value("select 1") == 1
    assert not admin.execute(STATES.format(list(fault.pids))).fetchall()
    admin.close()
    with contextlib.ExitStack() as others:  # at once, all of them
        for _ in range(60):
            others.enter_context(psycopg.connect(pg.dsn))


def test_saturate_counts_slots_that_others_have(start: Start) -> None:
    pg = start(max_connections=12, superuser_reserved_connections=2)
    with psycopg.connect(pg.dsn):
        with faults.saturate(pg) as fault:
            assert fault.count == 9
        with pytest.raises(SettingError, match="only 9 slots were free"), faults.saturate(pg, leave=10):
            pass


@pytest.mark.parametrize("verb", ["kill", "stop", "freeze"])
def test_a_saturated_server_that_goes_meanwhile(start: Start, verb: str) -> None:
    pg = start(max_connections=12)
    with faults.saturate(pg):
        getattr(pg, verb)()


def test_saturate_is_for_a_server_that_runs(start: Start, bouncer: PgBouncer) -> None:
    pg = start()
    with pytest.raises(SettingError, match="takes a PostgreSQL"), faults.saturate(bouncer):  # type: ignore[arg-type]
        pass
    with pytest.raises(SettingError, match="leave"), faults.saturate(pg, leave=-1):
        pass
    pg.kill()
    with pytest.raises(NodeStopped), faults.saturate(pg):
        pass


# --- servers ------------------------------------------------------------------------------------------------------


def answers(node: Postgres | PgBouncer) -> bool:
    with psycopg.connect(node.dsn, connect_timeout=10) as conn:
        return conn.execute("select 1").fetchone() == (1,)


def test_killed_is_down_and_comes_back(node: Postgres | PgBouncer) -> None:
    with pytest.raises(KeyboardInterrupt), faults.killed(node):
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(node.dsn)
        raise KeyboardInterrupt
    assert answers(node)


def test_killed_leaves_alone_what_was_restarted_or_stopped_meanwhile(start: Start) -> None:
    pg = start()
    with faults.killed(pg):
        pg.restart()
        began = pg.value("select pg_postmaster_start_time()")
    assert pg.value("select pg_postmaster_start_time()") == began
    with faults.killed(pg):
        pg.stop()
    assert not pg.running


def test_frozen_is_silent_and_goes_on(node: Postgres | PgBouncer) -> None:
    with psycopg.connect(node.dsn, autocommit=True) as conn:
        thread = threading.Thread(target=conn.execute, args=["select 1"], daemon=True)
        with pytest.raises(ValueError), faults.frozen(node):
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
            raise ValueError
        thread.join(WITHIN)
        assert not thread.is_alive()


@pytest.mark.parametrize("verb", ["kill", "stop", "thaw"])
def test_frozen_takes_what_happens_meanwhile(start: Start, verb: str) -> None:
    pg = start()
    with faults.frozen(pg):
        getattr(pg, verb)()
    assert pg.running == (verb == "thaw")


def test_nested_faults_of_one_server_are_refused(start: Start) -> None:
    pg = start()
    with faults.frozen(pg):
        for again in (faults.frozen, faults.killed, faults.restarting):
            with pytest.raises(NodeStopped, match="frozen"), again(pg):
                pass
        with pytest.raises(NodeStopped, match="frozen"):
            pg.value("select 1")


def test_restarting_happens_while_the_block_runs_and_is_over_after_it(start: Start) -> None:
    pg = start()
    began = pg.value("select pg_postmaster_start_time()")
    conn = psycopg.connect(pg.dsn, autocommit=True)
    with faults.restarting(pg), pytest.raises(psycopg.OperationalError):
        while True:
            conn.execute("select 1")
    assert pg.value("select pg_postmaster_start_time()") > began


def test_restarting_does_not_begin_in_a_block_that_has_ended(start: Start) -> None:
    pg = start()
    began = pg.value("select pg_postmaster_start_time()")
    with pytest.raises(ValueError), faults.restarting(pg, after=60):
        raise ValueError
    assert pg.value("select pg_postmaster_start_time()") == began


def test_restarting_a_server_that_was_stopped_meanwhile(start: Start) -> None:
    pg = start()
    with faults.restarting(pg, after=0.3) as fault:
        pg.stop()
        until(lambda: fault.error)
    assert not pg.running


@pytest.mark.parametrize("fault", [faults.killed, faults.frozen, faults.restarting])
def test_a_fault_of_a_server_is_for_one_that_runs(start: Start, fault: Any) -> None:
    pg = start()
    with pytest.raises(SettingError, match="takes a server"), fault(pg.dsn):
        pass
    pg.stop()
    with pytest.raises(NodeStopped, match="stopped"), fault(pg):
        pass
