"""What the recorder says of servers is what is so, and it goes on whatever they do."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest
from conftest import Start
from psycopg_pool import ConnectionPool

from connlab import ConnlabError, NodeStopped, PgBouncer, Postgres, Recorder

WITHIN = 15.0
LOCK_ONE = "select * from users where id = 1 for update"


def last(rec: Recorder, source: str) -> dict[str, float]:
    series = next(series for series in rec.series if series.source == source)
    return {metric: values[-1] for metric, values in series.columns()[1].items()}


def await_values(rec: Recorder, source: str, **expected: float) -> None:
    """Wait until the newest sample says so; `idle_in_transaction` stands for "idle in transaction"."""
    await_metrics(rec, source, {name.replace("_", " "): value for name, value in expected.items()})


def await_metrics(rec: Recorder, source: str, wanted: dict[str, float]) -> None:
    deadline = time.monotonic() + WITHIN
    while (seen := {name: last(rec, source).get(name) for name in wanted}) != wanted:
        assert time.monotonic() < deadline, f"waited for {wanted}, saw {seen}"
        time.sleep(0.01)


def samples(rec: Recorder, source: str, since: float) -> int:
    """How many answers a source has given since then."""
    series = next(series for series in rec.series if series.source == source)
    times, columns = series.columns()
    values = columns["answer ms"] if "answer ms" in columns else columns["in use"]
    return sum(1 for at, value in zip(times, values, strict=True) if at > since and not math.isnan(value))


@contextlib.contextmanager
def clients(dsn: str, number: int) -> Iterator[list[psycopg.Connection]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(contextlib.closing(psycopg.connect(dsn, autocommit=True, prepare_threshold=None)))
            for _ in range(number)
        ]


# --- PostgreSQL ---------------------------------------------------------------------------------------------


def test_backends_by_state_and_wait_event(server: Postgres) -> None:
    with Recorder(server, interval=0.02) as rec, clients(server.dsn, 4) as (holder, waiter, broken, _):
        await_metrics(rec, "PostgreSQL", {"idle": 4, "active": 0, "total": 4})
        holder.execute("begin")
        holder.execute(LOCK_ONE)
        broken.execute("begin")
        with contextlib.suppress(psycopg.DataError):
            broken.execute("select 1/0")
        thread = threading.Thread(target=waiter.execute, args=[LOCK_ONE])
        thread.start()
        await_metrics(
            rec,
            "PostgreSQL",
            {
                "active": 1,
                "active: Lock": 1,
                "idle": 1,
                "idle in transaction": 1,
                "idle in transaction (aborted)": 1,
                "total": 4,
            },
        )
        holder.execute("rollback")
        thread.join()
        await_metrics(rec, "PostgreSQL", {"active": 0, "active: Lock": 0, "idle": 3})


def test_connlabs_own_connections_are_left_out_and_take_no_slot(start: Start) -> None:
    pg = start(max_connections=8, superuser_reserved_connections=3)
    with Recorder(pg, interval=0.02) as rec:
        assert last(rec, "PostgreSQL")["total"] == 0
        limit = int(last(rec, "PostgreSQL")["limit"])
        assert (limit, last(rec, "PostgreSQL")["max_connections"], last(rec, "PostgreSQL")["reserved"]) == (5, 8, 3)
        with clients(pg.dsn, limit):
            with pytest.raises(psycopg.OperationalError, match="reserved"):
                psycopg.connect(pg.dsn)
            await_values(rec, "PostgreSQL", total=limit, idle=limit)
            assert pg.value("select count(*) from pg_stat_activity where backend_type = 'client backend'") == limit + 1


def test_it_gets_in_when_every_slot_is_taken_also_the_superusers(start: Start) -> None:
    pg = start(max_connections=6, superuser_reserved_connections=2)
    with clients(pg.dsn, 4), clients(pg.admin_dsn, 2):
        with pytest.raises(psycopg.OperationalError, match="too many clients"):
            psycopg.connect(pg.admin_dsn)
        with Recorder(pg, interval=0.02) as rec:
            await_values(rec, "PostgreSQL", total=6)


def test_a_server_without_wal_senders_is_recorded_with_a_limit_that_is_one_lower(start: Start) -> None:
    pg = start(max_connections=10, superuser_reserved_connections=3, max_wal_senders=0, wal_level="minimal")
    with Recorder(pg, interval=0.02) as rec:
        await_values(rec, "PostgreSQL", total=0, limit=6)
        with clients(pg.dsn, 6):
            await_values(rec, "PostgreSQL", total=6, limit=6)
            with pytest.raises(psycopg.OperationalError, match="reserved"):
                psycopg.connect(pg.dsn)


def test_it_leaves_no_trace_in_the_log(start: Start) -> None:
    pg = start(log_statement="all", log_min_duration_statement=0)
    mark = pg.mark()
    with Recorder(pg, interval=0.02) as rec, clients(pg.dsn, 1) as (client,):
        client.execute("select 'the learner''s'")
        await_values(rec, "PostgreSQL", total=1)
    assert "the learner" in pg.log(mark) and "pg_stat_activity" not in pg.log(mark)


# --- PgBouncer ----------------------------------------------------------------------------------------------


@pytest.fixture
def two(start: Start) -> PgBouncer:
    """A PgBouncer with two server connections, in transaction mode."""
    return start().pgbouncer(pool_mode="transaction", default_pool_size=2)


def test_clients_that_are_active_idle_and_waiting(two: PgBouncer) -> None:
    with Recorder(two, interval=0.02) as rec, clients(two.dsn, 5) as (first, second, third, *_):
        await_values(rec, "PgBouncer", clients_active=0, clients_idle=5, clients_waiting=0, servers_active=0)
        assert two.rows("SHOW POOLS")[-1]["cl_active"] == 5  # what PgBouncer calls active
        for client in (first, second):
            client.execute("begin")
            client.execute("select 1")
        thread = threading.Thread(target=third.execute, args=["select 1"])
        thread.start()
        await_values(rec, "PgBouncer", clients_active=2, clients_idle=2, clients_waiting=1, servers_active=2)
        await_values(rec, "PgBouncer", servers_idle=0)
        time.sleep(0.1)
        assert last(rec, "PgBouncer")["longest wait s"] > 0.05
        first.execute("commit")
        second.execute("commit")
        thread.join()
        await_values(rec, "PgBouncer", clients_active=0, clients_idle=5, clients_waiting=0, servers_idle=2)


def test_totals_are_differenced_at_once(two: PgBouncer) -> None:
    """SHOW STATS says 0 for its averages until a minute is over."""
    with Recorder(two, interval=0.02) as rec, clients(two.dsn, 1) as (client,):
        before = last(rec, "PgBouncer")["queries"]
        for _ in range(200):
            client.execute("select 1")
        await_metrics(rec, "PgBouncer", {"queries": before + 200})
        time.sleep(0.2)  # a window of the rates below
    rates = rec.rates(every=0.1)
    rates = rates[rates.metric == "queries per second"]
    assert rates.value.max() > 100
    grown = last(rec, "PgBouncer")["queries"]
    assert (rates.value * rates.seconds.diff()).sum() <= grown


def test_who_holds_which_server_connection(two: PgBouncer) -> None:
    with Recorder(two, interval=0.02, holds=True) as rec, clients(two.dsn, 3) as (first, second, third):
        pids = []
        for client in (first, second):
            client.execute("begin")
            pids.append(client.execute("select pg_backend_pid()").fetchone()[0])
        both = rec.now()  # before, the second waited for its server connection to be opened
        thread = threading.Thread(target=third.execute, args=["select 1"])
        thread.start()
        await_values(rec, "PgBouncer", clients_waiting=1)
        time.sleep(0.1)
        first.execute("commit")
        second.execute("commit")
        thread.join()
        released = rec.now()
        time.sleep(0.3)
    holds = rec.holds()
    holds = holds[holds.seconds > both]
    assert holds.seconds.max() < released + 0.2  # who is idle holds nothing
    asked = holds[holds.server.isna()]
    held = holds[holds.server.notna()]
    assert list(holds.columns) == ["seconds", "source", "client", "server"]
    assert set(held.server) == {f"pid {pid}" for pid in pids} and asked.client.nunique() == 1
    assert (held[held.seconds == asked.seconds.iloc[0]].groupby("server").client.nunique() == 1).all()


def test_two_bouncers_are_told_apart(start: Start) -> None:
    pg = start()
    sessions, transactions = pg.pgbouncer(pool_mode="session"), pg.pgbouncer(pool_mode="transaction")
    with Recorder(pg, sessions, tx=transactions, interval=0.02) as rec, clients(transactions.dsn, 2):
        assert [series.source for series in rec.series] == ["PgBouncer", "tx", "PostgreSQL"]
        await_values(rec, "tx", clients_idle=2)
        await_values(rec, "PgBouncer", clients_idle=0)


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", ["PostgreSQL", "PgBouncer"])
def test_a_frozen_server_is_a_gap_of_its_own_and_nobody_elses(start: Start, silent: str) -> None:
    pg = start()
    bouncer = pg.pgbouncer()
    node: Postgres | PgBouncer = pg if silent == "PostgreSQL" else bouncer
    other = "PgBouncer" if silent == "PostgreSQL" else "PostgreSQL"
    with (
        ConnectionPool(pg.dsn, min_size=1, open=True) as pool,
        Recorder(pg, bouncer, app=pool, interval=0.02) as rec,
    ):
        node.freeze()
        frozen = rec.now()
        time.sleep(3)  # longer than the recorder's patience with one connection
        thawed = rec.now()
        assert samples(rec, silent, frozen + 0.1) == 0
        assert samples(rec, other, frozen) > 20 and samples(rec, "app", frozen) > 20
        node.thaw()
        await_answer(rec, silent, thawed)
    assert {gap.source for gap in rec.gaps} == {silent}
    gap = rec.gaps[0]
    assert gap.start < frozen + 0.5 and gap.end is not None and gap.end >= thawed and gap.why == "no answer"
    frame = rec.frame()
    inside = frame[(frame.source == silent) & (frame.seconds > frozen + 0.1) & (frame.seconds < thawed)]
    assert inside.value.isna().all()


def test_an_answer_that_comes_too_late_to_say_of_which_moment_it_is_does_not_count(start: Start) -> None:
    pg = start()
    with Recorder(pg, interval=0.02) as rec:
        pg.freeze()
        time.sleep(1)
        thawed = rec.now()
        pg.thaw()
        await_answer(rec, "PostgreSQL", thawed)
    frame = rec.frame()
    assert frame[frame.metric == "answer ms"].value.max() <= 500 and len(rec.gaps) == 1


def await_answer(rec: Recorder, source: str, since: float) -> None:
    deadline = time.monotonic() + WITHIN
    while not samples(rec, source, since):
        assert time.monotonic() < deadline, f"{source} has not answered again"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["PostgreSQL", "PgBouncer"])
def test_a_restart_and_a_kill_are_gaps_with_a_reason(start: Start, kind: str) -> None:
    pg = start()
    node: Postgres | PgBouncer = pg if kind == "PostgreSQL" else pg.pgbouncer()
    with Recorder(node, interval=0.02) as rec:
        node.restart()
        await_answer(rec, kind, rec.now())
        node.kill()
        time.sleep(0.3)
        node.restart()
        await_answer(rec, kind, rec.now())
    assert len(rec.gaps) == 2 and all(gap.end is not None and gap.why for gap in rec.gaps)
    assert rec.gaps[1].end - rec.gaps[1].start >= 0.2  # type: ignore[operator]


def test_a_mute_network_is_a_gap_until_it_speaks_again(server: Postgres) -> None:
    backends = "select pid from pg_stat_activity where application_name = 'connlab recorder'"
    with server.relay() as relay, Recorder(relay, direct=server, interval=0.02) as rec:
        before = {row["pid"] for row in server.rows(backends)}
        name = next(series.source for series in rec.series if series.source != "direct")
        assert name == "PostgreSQL through relay"
        with relay.settings(to_client=False):
            muted = rec.now()
            time.sleep(3)
            assert samples(rec, name, muted + 0.2) == 0 and samples(rec, "direct", muted) > 20
        await_answer(rec, name, rec.now())
        assert {row["pid"] for row in server.rows(backends)} - before  # it had given the mute connection up


@pytest.mark.parametrize("state", ["running", "frozen", "connecting to a frozen one", "killed"])
def test_stopping_is_prompt_whatever_the_server_does(start: Start, state: str) -> None:
    pg = start()
    if state == "connecting to a frozen one":
        pg.freeze()
    rec = Recorder(pg).start()
    if state == "frozen":
        pg.freeze()
        time.sleep(0.2)
    if state == "killed":
        pg.kill()
    began = time.monotonic()
    rec.stop()
    assert time.monotonic() - began < 2 and not rec.running
    rec.stop()
    pg.thaw()


def test_nothing_is_left_after_it(server: Postgres) -> None:
    def traces() -> tuple[int, int, int]:
        threads = sum(thread.name == "connlab-recorder" for thread in threading.enumerate())
        files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        own = server.value("select count(*) from pg_stat_activity where application_name = 'connlab recorder'")
        return threads, files, own

    before = traces()
    with contextlib.suppress(ZeroDivisionError), Recorder(server):
        assert traces() != before
        raise ZeroDivisionError
    deadline = time.monotonic() + WITHIN
    while traces() != before and time.monotonic() < deadline:  # the backend ends after we have hung up
        time.sleep(0.01)
    assert traces() == before


def test_marks_and_a_frame_on_one_clock(server: Postgres) -> None:
    with ConnectionPool(server.dsn, min_size=1, open=True) as pool, Recorder(server, app=pool) as rec:
        time.sleep(0.3)
        mark = rec.mark("leak starts")
        time.sleep(0.3)
        now = time.monotonic() - rec.began
    frame = rec.frame()
    assert rec.marks == [mark] and 0.3 <= mark.seconds <= now
    assert list(frame.columns) == ["seconds", "source", "kind", "metric", "value"]
    assert set(frame.kind) == {"pool", "postgres"} and frame.seconds.between(0, rec.now()).all()
    for _, metric in frame.groupby(["source", "metric"]):
        assert metric.seconds.is_monotonic_increasing


def test_samples_come_at_the_interval(server: Postgres) -> None:
    """On a busy machine some are late; none comes in a burst to make up for it."""
    with ConnectionPool(server.dsn, min_size=1, open=True) as pool, Recorder(app=pool, interval=0.05) as rec:
        time.sleep(1.5)
    times, _ = rec.series[0].columns()
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert 10 <= len(times) <= 31 and sorted(steps)[len(steps) // 2] > 0.04


def test_a_stopped_server_and_a_second_start_are_refused(start: Start) -> None:
    pg = start()
    with Recorder(pg) as rec, pytest.raises(ConnlabError, match="records once"):
        rec.start()
    pg.stop()
    with pytest.raises(NodeStopped, match="was stopped"):
        Recorder(pg)


def test_what_ends_the_thread_is_heard(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    with ConnectionPool(server.dsn, min_size=1, open=True) as pool:
        rec = Recorder(app=pool).start()
        monkeypatch.setattr(pool, "get_stats", lambda: {})
        time.sleep(0.3)
        with pytest.raises(KeyError, match="pool_available"):
            rec.stop()
