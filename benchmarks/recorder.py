"""What recording costs: CPU seconds with and without a recorder, beside the load's, in one run.

    uv run python benchmarks/recorder.py [--rounds 6] [--transactions 120000] [--clients 1000]

Throughput on a shared machine is too noisy to show two percent; CPU seconds of processes are less so. Two loads of
pgbench, rounds without and with a recorder in turn:

direct   8 clients on PostgreSQL
crowd    1,000 clients in transaction mode behind a PgBouncer with 20 server connections

The load is the CPU seconds of pgbench, PostgreSQL and PgBouncer. The recorder's are those of this process (which does
nothing else, and whose rounds without a recorder are taken off), of the backend that answers it alone, and what
SHOW takes of PgBouncer, measured while there is no load. "Difference" is what all of them together took more of
CPU for each transaction in rounds with a recorder, and "resolution" is how far the medians of the odd and the even
rounds without a recorder lie apart: a difference below it cannot be told from none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from connlab import PgBouncer, Postgres, Recorder
from connlab.programs import find_postgres
from connlab.recorder.servers import APPLICATION

PROGRAMS = find_postgres()
GOAL = 2.0
SCRIPT = "\\set id random(1, 1000)\nselect * from accounts where id = :id;\n"
IDLE = 8.0
Node = Postgres | PgBouncer


class Cost(NamedTuple):
    """CPU seconds of one round, and for how long it went."""

    load: float
    python: float
    backend: float
    lasted: float


def used(node: Node) -> float:
    """CPU seconds of all processes that the node has had."""
    total, ended = 0.0, []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd().startswith(node._program.directory):
                times = process.cpu_times()
                total += times.user + times.system
                ended.append(times.children_user + times.children_system)
    return total + max(ended, default=0.0)  # the first process has waited for those that ended


def recorders_backend(pg: Postgres) -> psutil.Process:
    """The process that answers the recorder."""
    return psutil.Process(pg.value(f"select pid from pg_stat_activity where application_name = '{APPLICATION}'"))


def pgbench(node: Node, script: Path, clients: int, transactions: int) -> float:
    """Run the load; returns the CPU seconds of pgbench itself."""
    each = max(transactions // clients, 1)
    before = os.times()
    command = [PROGRAMS.bin / "pgbench", "-n", "-f", script, "-c", clients, "-j", 2, "-t", each, node.dsn]
    environment = {"PATH": os.environ["PATH"], **PROGRAMS.environment}
    ran = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env=environment)
    assert f"{clients * each}/{clients * each}" in ran.stdout, f"not all transactions:\n{ran.stdout}{ran.stderr}"
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def one_round(pg: Postgres, bouncer: PgBouncer, load: tuple[Node, Path, int, int], *, record: bool) -> Cost:
    """Run the load once, with a recorder or without."""
    with Recorder(pg, bouncer) if record else contextlib.nullcontext():
        backend = recorders_backend(pg) if record else None
        before, own, began = used(pg) + used(bouncer), time.process_time(), time.monotonic()
        answered = sum(backend.cpu_times()[:2]) if backend else 0.0
        client = pgbench(*load)
        own, lasted = time.process_time() - own, time.monotonic() - began
        answered = sum(backend.cpu_times()[:2]) - answered if backend else 0.0
        servers = used(pg) + used(bouncer) - before - answered
    return Cost(client + servers, own, answered, lasted)


def show_costs(pg: Postgres, bouncer: PgBouncer) -> float:
    """CPU seconds a second that a recorder takes of a PgBouncer that has nothing else to do."""

    def idle() -> float:
        before = used(bouncer)
        time.sleep(IDLE)
        return (used(bouncer) - before) / IDLE

    alone = idle()
    with Recorder(pg, bouncer):
        return max(idle() - alone, 0.0)


def compare(
    name: str, pg: Postgres, bouncer: PgBouncer, load: tuple[Node, Path, int, int], rounds: int, show: float
) -> None:
    """Print a line of the table for one load."""
    without, with_one = [], []
    one_round(pg, bouncer, load, record=True)
    for _ in range(rounds):
        without.append(one_round(pg, bouncer, load, record=False))
        with_one.append(one_round(pg, bouncer, load, record=True))
    idle = statistics.median(cost.python for cost in without)
    base = statistics.median(cost.load for cost in without)
    own = statistics.median(
        100 * (cost.python - idle + cost.backend + show * cost.lasted) / (cost.load - show * cost.lasted)
        for cost in with_one
    )
    difference = (
        100 * (statistics.median(cost.load + cost.python + cost.backend for cost in with_one) - idle - base) / base
    )
    halves = [statistics.median(cost.load for cost in without[first::2]) for first in (0, 1)]
    resolution = 100 * abs(halves[0] - halves[1]) / base
    lasted = statistics.median(cost.lasted for cost in with_one)
    python = statistics.median(cost.python for cost in with_one) - idle
    backend = statistics.median(cost.backend for cost in with_one)
    print(
        f"{name:24}{lasted:8.1f}{base:8.2f}{python:10.3f}{backend:10.3f}{show * lasted:10.3f}"
        f"{own:10.2f} %{difference:+10.1f} %{resolution:10.1f} %"
    )


def main(rounds: int, transactions: int, clients: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder, Postgres.start(max_connections=50) as pg:
        script = Path(folder) / "script.sql"
        script.write_text(SCRIPT)
        bouncer = pg.pgbouncer(pool_mode="transaction", default_pool_size=20, max_client_conn=clients + 50)
        show = show_costs(pg, bouncer)
        print(
            f"PostgreSQL {pg.version}, PgBouncer {bouncer.version}, {os.cpu_count()} cores, {rounds} rounds of each,"
            f" interleaved; medians; CPU seconds\n"
            f"{'load':24}{'lasts s':>8}{'load':>8}{'python':>10}{'backend':>10}{'SHOW':>10}"
            f"{'recorder':>12}{'difference':>12}{'resolution':>12}"
        )
        compare("8 clients, direct", pg, bouncer, (pg, script, 8, transactions), rounds, show)
        crowd = (bouncer, script, clients, transactions)
        compare(f"{clients} behind PgBouncer", pg, bouncer, crowd, rounds, show)
        print(f"goal for the recorder: {GOAL} % or less")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--transactions", type=int, default=120_000)
    parser.add_argument("--clients", type=int, default=1000)
    options = parser.parse_args()
    main(max(options.rounds, 4), options.transactions, options.clients)
