"""What making load costs and how exactly it starts: connlab beside pgbench and locust, in one run.

    uv run --group load python benchmarks/workload.py [--rounds 5] [--seconds 3] [--clients 8]

One server, one query (`select 1`, one round trip: autocommit), rounds of all in turn. Each runs alone, in a process of
its own, whose CPU seconds are measured without its start.

closed   every client sends its next request when the last is answered: requests for a CPU second of the load's process
         (what PostgreSQL uses is not in it, and is the same for all)
arrivals 500 a second, in milliseconds. "late": how far a start is from its planned moment; "distance": how far the time
         between two starts is from what was planned for these two

What each of them does:

pgbench            C, libpq without blocking, one thread; open loop with -R, Poisson. Late is its own "schedule lag"
connlab, own       a Python thread for each client, each with a connection of its own; arrivals at equal distances
connlab, pool      the same through psycopg_pool, as the lessons do
connlab, asyncio   a task for each client, through psycopg_pool's AsyncConnectionPool
locust             a greenlet for each user, psycopg under gevent, its request event fired for each. It has no open
                   loop: 50 users at constant_throughput(10), set off evenly, and one whose request lasts longer than
                   a step waits for it. Late is measured against each user's own even steps from its second request on
                   (it makes that one at once after the first, and keeps the pace from there)
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

RATE = 500
USERS = 50
GOAL = 1.0
Result = dict[str, Any]


# --- each in its own process ------------------------------------------------------------------------------------------


def measured(run: Callable[[], Any]) -> Result:
    """What ``run`` took of this process' CPU; its requests, and how late each was if it is an open loop."""
    before = time.process_time()
    load = run()
    cpu = time.process_time() - before
    assert load.failed == 0, load
    pairs = [(request.intended, request.started) for request in load.requests]
    return {"requests": len(load), "cpu": cpu, "rate": load.throughput, **errors(pairs)}


def errors(pairs: Sequence[tuple[float, float]]) -> Result:
    """How far starts are from the intended moments, and distances between them from the intended distances (ms)."""
    late = [1000 * abs(started - intended) for intended, started in pairs]
    steps = itertools.pairwise(pairs)
    distance = [1000 * abs((after[1] - before[1]) - (after[0] - before[0])) for before, after in steps]
    return {"late": late, "distance": distance}


def own(dsn: str, kind: str, clients: int, seconds: float) -> Result:
    """connlab's threads, each with a connection of its own."""
    import psycopg

    from connlab import closed_loop, open_loop

    opened = [psycopg.connect(dsn, autocommit=True) for _ in range(clients if kind == "closed" else USERS)]
    mine, free = threading.local(), opened.copy()

    def work() -> None:
        if not hasattr(mine, "conn"):
            mine.conn = free.pop()
        mine.conn.execute("select 1")

    def run() -> Any:
        if kind == "closed":
            return closed_loop(work, clients=clients, seconds=seconds)
        return open_loop(work, rate=RATE, seconds=seconds, arrivals="fixed", clients_at_most=USERS)

    found = measured(run)
    for conn in opened:
        conn.close()
    return found


def pool(dsn: str, kind: str, clients: int, seconds: float) -> Result:
    """connlab's threads and a pool."""
    from psycopg_pool import ConnectionPool

    from connlab import closed_loop, open_loop

    size = clients if kind == "closed" else USERS
    with ConnectionPool(dsn, min_size=size, max_size=size, kwargs={"autocommit": True}, open=True) as made:
        made.wait()
        many: Result = {"borrow": made.connection, "seconds": seconds}
        if kind == "closed":
            return measured(lambda: closed_loop(lambda conn: conn.execute("select 1"), clients=clients, **many))
        fixed: Result = {"rate": RATE, "arrivals": "fixed", "clients_at_most": USERS}
        return measured(lambda: open_loop(lambda conn: conn.execute("select 1"), **fixed, **many))


def tasks(dsn: str, kind: str, clients: int, seconds: float) -> Result:
    """connlab's tasks and a pool."""
    from psycopg_pool import AsyncConnectionPool

    from connlab import closed_loop_async, open_loop_async

    size = clients if kind == "closed" else USERS

    async def run() -> Any:
        async with AsyncConnectionPool(
            dsn, min_size=size, max_size=size, kwargs={"autocommit": True}, open=False
        ) as made:
            await made.wait()
            many: Result = {"borrow": made.connection, "seconds": seconds}
            if kind == "closed":
                return await closed_loop_async(lambda conn: conn.execute("select 1"), clients=clients, **many)
            fixed: Result = {"rate": RATE, "arrivals": "fixed", "clients_at_most": USERS}
            return await open_loop_async(lambda conn: conn.execute("select 1"), **fixed, **many)

    return measured(lambda: asyncio.run(run()))


def locust(dsn: str, kind: str, clients: int, seconds: float) -> Result:
    """locust's users, as its manual says for other protocols: a request event for each query."""
    import gevent.monkey

    gevent.monkey.patch_all()
    import gevent
    import psycopg
    from locust import User, constant, constant_throughput, task
    from locust.env import Environment

    users = clients if kind == "closed" else USERS
    numbers, starts = itertools.count(), [[] for _ in range(users)]
    connections = [psycopg.connect(dsn, autocommit=True) for _ in range(users)]

    class Sql(User):  # type: ignore[misc]
        wait_time = constant(0) if kind == "closed" else constant_throughput(RATE / USERS)

        def on_start(self) -> None:
            self.number = next(numbers)
            gevent.sleep(0 if kind == "closed" else 0.5 + self.number / RATE)

        @task  # type: ignore[untyped-decorator]
        def select(self) -> None:
            began = time.monotonic()
            connections[self.number].execute("select 1")
            spent = 1000 * (time.monotonic() - began)
            starts[self.number].append(began)
            self.environment.events.request.fire(
                request_type="SQL", name="select 1", response_time=spent, response_length=0, exception=None, context={}
            )

    environment = Environment(user_classes=[Sql])
    runner = environment.create_local_runner()
    before = time.process_time()
    runner.start(users, spawn_rate=1000)
    gevent.sleep(seconds + (0 if kind == "closed" else 0.5))
    cpu, total = time.process_time() - before, environment.stats.total.num_requests
    runner.quit()
    assert environment.stats.total.num_failures == 0 and total, "locust had failures, or made no request"
    paced = [own[1:] for own in starts]  # the first wait counts from before on_start, and is none
    grids = [[(own[0] + step * USERS / RATE, at) for step, at in enumerate(own)] for own in paced if own]
    each = [errors(grid) for grid in grids]
    merged = {name: [value for one in each for value in one[name]] for name in ("late", "distance")}
    return {"requests": total, "cpu": cpu, "rate": total / seconds, **merged}


def pgbench(dsn: str, kind: str, clients: int, seconds: float) -> Result:
    """pgbench, as connlab runs it; it is a child of this process."""
    from connlab import pgbench as run

    each = int(4000 * seconds / clients) if kind == "closed" else int(RATE * seconds / clients)
    before = os.times()
    load = run(
        dsn,
        "select 1;",
        clients=clients,
        threads=1,
        transactions=each,
        rate=RATE if kind == "arrivals" else None,
        log=kind == "arrivals",
    )
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    pairs = [(request.intended, request.started) for request in load.requests]
    return {"requests": load.succeeded, "cpu": cpu, "rate": load.throughput, **errors(pairs)}


PEERS = {"pgbench": pgbench, "connlab, own": own, "connlab, pool": pool, "connlab, asyncio": tasks, "locust": locust}


# --- side by side -----------------------------------------------------------------------------------------------------


def child(name: str, dsn: str, kind: str, clients: int, seconds: float) -> Result:
    """What ``name`` measures in a process of its own."""
    arguments = ["--child", name, kind, str(clients), str(seconds)]
    environment = {**os.environ, "BENCHMARK_DSN": dsn}
    ran = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{name} failed:\n{ran.stderr}")
    found: Result = json.loads(ran.stdout.splitlines()[-1])
    return found


def share(values: Sequence[float], percent: float) -> float:
    """A percentile: the smallest value that has so many percent at or below it."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * percent // 100), 1).__int__() - 1]


def closed_table(dsn: str, rounds: int, clients: int, seconds: float) -> None:
    """Requests for a CPU second, and how many times locust's in the same round."""
    found = [{name: child(name, dsn, "closed", clients, seconds) for name in PEERS} for _ in range(rounds)]
    per_core = [{name: one["requests"] / one["cpu"] for name, one in round.items()} for round in found]
    print(f"\nclosed loop, {clients} clients{'req/CPU s':>16}{'req/s':>9}{'to locust':>11}{'to pgbench':>12}")
    for name in PEERS:
        here = statistics.median(each[name] for each in per_core)
        rate = statistics.median(round[name]["rate"] for round in found)
        to = [statistics.median(each[name] / each[peer] for each in per_core) for peer in ("locust", "pgbench")]
        print(f"{name:22}{here:18,.0f}{rate:9,.0f}{to[0]:10.2f}x{to[1]:11.2f}x")


def arrivals_table(dsn: str, rounds: int, seconds: float) -> None:
    """Medians over the rounds of each round's median and p99, and the goal."""
    found = [{name: child(name, dsn, "arrivals", 8, seconds) for name in PEERS} for _ in range(rounds)]
    print(
        f"\n{RATE} arrivals a second{'late p50':>13}{'p99':>8}{'distance p50':>15}{'p99':>8}{'n':>8}{'CPU ms/req':>13}"
    )
    medians = {}
    for name in PEERS:
        parts = {
            (part, percent): statistics.median(share(each[name][part], percent) for each in found)
            for part in ("late", "distance")
            for percent in (50, 99)
        }
        medians[name] = parts["late", 50]
        count = sum(len(each[name]["late"]) for each in found)
        cpu = statistics.median(1000 * each[name]["cpu"] / each[name]["requests"] for each in found)
        values = f"{parts['late', 50]:11.3f}{parts['late', 99]:8.2f}{parts['distance', 50]:15.3f}"
        print(f"{name:22}{values}{parts['distance', 99]:8.2f}{count:8,}{cpu:13.3f}")
    for name in ("connlab, own", "connlab, pool"):
        met = "met" if medians[name] < GOAL and medians[name] < medians["locust"] else "NOT met"
        print(f"goal, median under {GOAL:g} ms and ahead of locust: {met} by {name} ({medians[name]:.3f} ms)")


def main(rounds: int, seconds: float, clients: int) -> None:
    """Print both tables."""
    from connlab import Postgres

    with Postgres.start(max_connections=100) as pg:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("psycopg", "locust", "gevent"))
        python = sys.version.split()[0]
        print(f"PostgreSQL and pgbench {pg.version}, {versions}, Python {python}, {os.cpu_count()} cores")
        print(f"{rounds} rounds of {seconds:g} s each, interleaved; medians over the rounds")
        closed_table(pg.dsn, rounds, clients, seconds)
        arrivals_table(pg.dsn, rounds, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, kind, clients, seconds = options.child
        print(json.dumps(PEERS[name](os.environ["BENCHMARK_DSN"], kind, int(clients), float(seconds))))
    else:
        main(options.rounds, options.seconds, options.clients)
