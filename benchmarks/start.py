"""How long until a query comes back, beside two peers, in one run; and what an idle pair takes of memory.

    uv run --group bench python benchmarks/start.py [--rounds 9] [--no-crowd] [--docker]

Measured from the call to the first answer of a SCRAM login, rounds interleaved:

connlab         Postgres.start() and pg.pgbouncer(), a query through PgBouncer: two servers
initdb          initdb, pg_ctl start and a query, with the same PostgreSQL programs: one server, without a pooler
pytest-postgresql   its executor (which its fixtures use), with the same programs: one server, without a pooler

and with --docker, where an engine and the images are:

connlab, docker     the same pair in containers: two servers
PostgresContainer   testcontainers' own, from postgres:18: one server, without a pooler

Peers get their best case: they write to memory where connlab does, initdb does not sync, pg_ctl waits no longer than
it must, testcontainers starts no reaper. The goal is set against PostgresContainer as its documentation shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg

from connlab import PgBouncer, Postgres, places
from connlab.account import server_account
from connlab.programs import find_postgres

PROGRAMS = find_postgres()
ACCOUNT = server_account()
GOAL_RATIO, GOAL_MEMORY = 0.25, 40


def ask(dsn: str) -> None:
    """One login, one query."""
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def seconds(action: Callable[[], None]) -> float:
    """Wall-clock seconds of ``action``."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def connlab_pair(backend: str = "local") -> float:
    """Seconds to the first answer through PgBouncer."""
    began = time.perf_counter()
    with Postgres.start(backend=backend) as pg:
        ask(pg.pgbouncer(pool_mode="transaction").dsn)
        return time.perf_counter() - began


def connlab_docker_alone() -> float:
    """Seconds to the first answer of PostgreSQL in a container, without a pooler."""
    began = time.perf_counter()
    with Postgres.start(backend="docker") as pg:
        ask(pg.dsn)
        return time.perf_counter() - began


def connlab_first_ever() -> float:
    """The same in a new process with no initialised directory in the cache, imports not counted."""
    code = (
        "import time, shutil, psycopg; from connlab import Postgres, places;"
        "shutil.rmtree(places.cache_dir() / 'templates', ignore_errors=True);"
        "began = time.perf_counter(); pg = Postgres.start(backend='local'); bouncer = pg.pgbouncer();"
        "psycopg.connect(bouncer.dsn).execute('select 1'); print(time.perf_counter() - began); pg.stop()"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory where connlab's servers would run, owned by the user that servers run as."""
    with tempfile.TemporaryDirectory(prefix="peer-", dir=places.run_root().parent) as name:
        path = Path(name)
        if ACCOUNT:
            os.chown(path, ACCOUNT.pw_uid, ACCOUNT.pw_gid)
        yield path


def program(*command: object) -> None:
    """Run one of PostgreSQL's programs as the user that servers run as."""
    subprocess.run(
        [str(PROGRAMS.bin / str(command[0])), *map(str, command[1:])],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": os.environ["PATH"], **PROGRAMS.environment},
        **({"user": ACCOUNT.pw_uid, "group": ACCOUNT.pw_gid, "extra_groups": []} if ACCOUNT else {}),  # type: ignore
    )


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def initdb_and_pg_ctl() -> float:
    """Seconds to the first answer of a server made from nothing."""
    with scratch() as path:
        port, data = free_port(), path / "data"
        (path / "pw").write_text("secret")
        (path / "pw").chmod(0o644)
        began = time.perf_counter()
        program("initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", f"--pwfile={path}/pw", "--no-sync")
        program("pg_ctl", "-D", data, "-w", "-l", path / "log", "-o", f"-p {port} -k {path} -h 127.0.0.1", "start")
        try:
            ask(f"postgresql://postgres:secret@127.0.0.1:{port}/postgres")
            return time.perf_counter() - began
        finally:
            program("pg_ctl", "-D", data, "-m", "immediate", "stop")


def pytest_postgresql() -> float:
    """Seconds to the first answer of pytest-postgresql's executor.

    It cannot drop root by itself: as root it runs in a child process that has dropped it.
    """
    with scratch() as path:
        code = PEER.format(bin=PROGRAMS.bin, path=path, port=free_port(), account=ACCOUNT and ACCOUNT[2:4])
        ran = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**os.environ, **PROGRAMS.environment, "HOME": str(path), "TMPDIR": str(path)},
        )
        return float(ran.stdout)


PEER = """
import os, time, psycopg
from pytest_postgresql.executors.proc import PostgreSQLExecutor
psycopg.connect, psycopg.conninfo.make_conninfo("")
if {account}:
    os.setgroups([]), os.setgid({account}[1]), os.setuid({account}[0])
executor = PostgreSQLExecutor(
    executable="{bin}/pg_ctl", host="127.0.0.1", port={port}, datadir="{path}/data", unixsocketdir="{path}",
    logfile="{path}/log", startparams="-w", dbname="tests", user="postgres", password="secret",
)
began = time.perf_counter()
with executor:
    psycopg.connect("postgresql://postgres:secret@127.0.0.1:{port}/postgres").execute("select 1")
    print(time.perf_counter() - began)
"""


def postgres_container(**variables: str) -> float:
    """Seconds to the first answer of testcontainers' PostgresContainer, published on 127.0.0.1."""
    from testcontainers.community.postgres import PostgresContainer
    from testcontainers.core.config import testcontainers_config

    testcontainers_config.ryuk_disabled = True
    port = free_port()
    container = PostgresContainer("postgres:18", driver=None).with_envs(**variables)
    container.ports["5432/tcp"] = ("127.0.0.1", port)
    began = time.perf_counter()
    with container:
        ask(f"postgresql://test:test@127.0.0.1:{port}/test")
        return time.perf_counter() - began


def pss_megabytes(directories: list[str]) -> float:
    """Sum of the proportional set sizes of all processes whose working directory lies in ``directories``."""
    total = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd().startswith(tuple(directories)):
                total += process.memory_full_info().pss
    return total / 2**20


def crowd(pairs: int) -> tuple[float, float]:
    """Start ``pairs`` at once; seconds until the last one has answered, and megabytes for each pair."""

    def start(_: int) -> tuple[Postgres, PgBouncer]:
        pg = Postgres.start(backend="local")
        bouncer = pg.pgbouncer(pool_mode="transaction")
        ask(bouncer.dsn)
        return pg, bouncer

    began = time.perf_counter()
    with ThreadPoolExecutor(pairs) as threads:
        nodes = list(threads.map(start, range(pairs)))
    took = time.perf_counter() - began
    directories = [node._program.directory for pair in nodes for node in pair]
    memory = pss_megabytes(directories) / pairs
    for pg, _ in nodes:
        pg.stop()
    return took, memory


Ways = dict[str, Callable[[], float]]


def interleaved(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one of each that does not count: imports, the watchdog."""
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
    return times


def show(times: dict[str, list[float]]) -> float:
    """Print the table, and the ratio of the first way to the fastest other, whose seconds are returned."""
    medians = {name: statistics.median(found) for name, found in times.items()}
    ours = next(iter(medians))
    peers = [name for name in medians if not name.startswith("connlab")]
    fastest = min(medians[name] for name in peers)
    print(f"{'seconds to the first answer':36}{'median':>8}{'min':>8}{'max':>8}{'ratio':>8}")
    for name, found in times.items():
        print(f"{name:36}{medians[name]:8.3f}{min(found):8.3f}{max(found):8.3f}{medians[name] / fastest:8.2f}")
    print(f"ratio to the fastest peer: {medians[ours] / fastest:.2f} (goal {GOAL_RATIO} or less)")
    return fastest


def compare(rounds: int) -> None:
    """Local servers beside their peers."""
    first_ever = connlab_first_ever()
    print(f"PostgreSQL {PROGRAMS.version} ({PROGRAMS.source}), {os.cpu_count()} cores, {rounds} rounds, interleaved")
    ways: Ways = {
        "connlab, warm (two servers)": connlab_pair,
        "initdb + pg_ctl (one server)": initdb_and_pg_ctl,
        "pytest-postgresql (one server)": pytest_postgresql,
    }
    fastest = show(interleaved(ways, rounds))
    print(f"{'connlab, first ever (two servers)':36}{first_ever:8.3f}{'':16}{first_ever / fastest:8.2f}")


def compare_docker(rounds: int) -> None:
    """Containers beside their peer."""
    ways: Ways = {
        "connlab, docker (two servers)": lambda: connlab_pair("docker"),
        "connlab, docker (PostgreSQL alone)": connlab_docker_alone,
        "PostgresContainer (one server)": postgres_container,
        "PostgresContainer, initdb --no-sync": lambda: postgres_container(POSTGRES_INITDB_ARGS="--no-sync"),
    }
    print(f"\nin containers, {rounds} rounds, interleaved")
    show(interleaved(ways, rounds))


def crowds() -> None:
    """Print time and memory for several pairs at once."""
    print(f"\n{'pairs at once':>14}{'seconds':>10}{'MB a pair (PSS)':>18}")
    for pairs in (1, 5, 10, 20):
        took, memory = crowd(pairs)
        goal = f"   (goal {GOAL_MEMORY} or less)" if pairs == 1 else ""
        print(f"{pairs:14}{took:10.2f}{memory:18.1f}{goal}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-crowd", action="store_true", help="leave out several pairs at once")
    parser.add_argument("--docker", action="store_true", help="containers too")
    options = parser.parse_args()
    compare(max(options.rounds, 7))
    if options.docker:
        compare_docker(max(options.rounds, 7))
    if not options.no_crowd:
        crowds()
