"""What the relay itself adds to a round trip, beside two peers, in one run.

    uv run python benchmarks/relay.py [--rounds 40] [--trips 250] [--clients 8]

Round trips of ``select 1`` on connections that stay open, in blocks that take turns, so that every way sees the same
moments of a noisy machine:

direct        no relay
relay         connlab's, in a thread of this process, no setting changed
C             a proxy of 40 lines of C in a process of its own, two blocking threads a connection: what any proxy costs
threads       the same in Python, in this process: the simplest peer that one would write

The C one is left out where no C compiler is found. First one client, then several at once in threads of this process,
whose Python competes with the relay's. "Added" is the difference of the medians (of the 99th percentiles) to direct;
CPU is what this process and the proxy's take for each round trip more than direct, the server's not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from connlab import Postgres

C_PROXY = r"""
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
static struct sockaddr_in at(int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return a;
}
static void *pass(void *pair) {
    int from = ((int *)pair)[0], to = ((int *)pair)[1];
    static __thread char data[65536];
    for (ssize_t n; (n = read(from, data, sizeof data)) > 0;)
        for (ssize_t done = 0, w; done < n; done += w)
            if ((w = write(to, data + done, n - done)) < 0) return NULL;
    shutdown(to, SHUT_WR);
    return NULL;
}
int main(int count, char **arguments) {
    struct sockaddr_in here = at(0), there = at(atoi(arguments[1]));
    socklen_t size = sizeof here;
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    bind(listener, (struct sockaddr *)&here, size);
    listen(listener, 128);
    getsockname(listener, (struct sockaddr *)&here, &size);
    printf("%d\n", ntohs(here.sin_port));
    fflush(stdout);
    for (;;) {
        int *both = malloc(4 * sizeof(int)), client = accept(listener, NULL, NULL);
        int server = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(server, (struct sockaddr *)&there, sizeof there)) return 1;
        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        both[0] = both[3] = client, both[1] = both[2] = server;
        pthread_t thread;
        pthread_create(&thread, NULL, pass, both);
        pthread_create(&thread, NULL, pass, both + 2);
    }
}
"""


@dataclass
class Way:
    """One way to the server, and what was measured on it."""

    name: str
    dsn: str
    proxy: psutil.Process | None = None
    trips: list[float] = field(default_factory=list)
    cpu: float = 0.0

    def used(self) -> float:
        """CPU seconds of this process and of the proxy's."""
        proxy = sum(self.proxy.cpu_times()[:2]) if self.proxy else 0.0
        return time.process_time() + proxy


@contextlib.contextmanager
def in_c(port: int) -> Iterator[tuple[int, psutil.Process] | None]:
    """The proxy in C; None where nothing compiles it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "proxy.c", Path(folder) / "proxy"
        source.write_text(C_PROXY)
        subprocess.run([compiler, "-O2", "-pthread", "-o", program, source], check=True)
        with subprocess.Popen([program, str(port)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield int(process.stdout.readline()), psutil.Process(process.pid)
            finally:
                process.kill()


@contextlib.contextmanager
def in_threads(port: int) -> Iterator[int]:
    """The proxy in threads of this process."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        threading.Thread(target=accept, args=[listener, port], daemon=True).start()
        yield listener.getsockname()[1]


def accept(listener: socket.socket, port: int) -> None:
    """Serve whoever connects, until the listener is closed."""
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", port))
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pass_on, args=pair, daemon=True).start()


def pass_on(source: socket.socket, target: socket.socket) -> None:
    """Pass bytes on until one side ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def block(connection: psycopg.Connection, trips: int) -> list[float]:
    """Round trips one after another, in seconds."""
    seconds = []
    for _ in range(trips):
        began = time.perf_counter()
        connection.execute("select 1")
        seconds.append(time.perf_counter() - began)
    return seconds


def at_once(connections: list[psycopg.Connection], trips: int) -> list[float]:
    """The same on several connections at the same time, each in a thread."""
    seconds: list[float] = []
    threads = [threading.Thread(target=lambda c=c: seconds.extend(block(c, trips))) for c in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def measure(ways: list[Way], run: Callable[[list[psycopg.Connection], int], list[float]], options: Options) -> None:
    """Fill in ``ways``, a block of each in turn, another one first each time."""
    with contextlib.ExitStack() as stack:
        opened = {
            way.name: [
                stack.enter_context(psycopg.connect(way.dsn, autocommit=True, sslmode="disable"))
                for _ in range(options.clients)
            ]
            for way in ways
        }
        for number in range(-1, options.rounds):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                before = way.used()
                seconds = run(opened[way.name], options.trips)
                if number >= 0:  # the first round is for warming up
                    way.trips += seconds
                    way.cpu += way.used() - before


@dataclass(frozen=True)
class Options:
    """How much of it."""

    rounds: int
    trips: int
    clients: int


def table(title: str, ways: list[Way]) -> None:
    """Print what was measured."""
    print(f"\n{title}, {len(ways[0].trips)} round trips each way, microseconds")
    print(f"{'way':10}{'median':>9}{'p99':>9}{'added median':>15}{'added p99':>12}{'added CPU':>12}")
    base = figures(ways[0])
    for way in ways:
        median, p99, cpu = figures(way)
        print(f"{way.name:10}{median:9.0f}{p99:9.0f}{median - base[0]:15.0f}{p99 - base[1]:12.0f}{cpu - base[2]:12.0f}")


def figures(way: Way) -> tuple[float, float, float]:
    """Median, 99th percentile and CPU of a round trip in microseconds."""
    trips = [seconds * 1e6 for seconds in way.trips]
    return statistics.median(trips), statistics.quantiles(trips, n=100)[98], way.cpu / len(trips) * 1e6


def main(options: Options) -> None:
    """Print both tables."""
    with contextlib.ExitStack() as stack:
        pg = stack.enter_context(Postgres.start())
        port = pg.address.port
        through = [("direct", pg.dsn, None), ("relay", pg.relay().dsn, None)]
        if found := stack.enter_context(in_c(port)):
            through.append(("C", pg.dsn.replace(f":{port}/", f":{found[0]}/"), found[1]))
        threads = stack.enter_context(in_threads(port))
        through.append(("threads", pg.dsn.replace(f":{port}/", f":{threads}/"), None))
        print(f"PostgreSQL {pg.version}, {os.cpu_count()} cores, {options.rounds} rounds, ways in turn")
        for clients, run in ((1, lambda connections, trips: block(connections[0], trips)), (options.clients, at_once)):
            ways = [Way(*way) for way in through]
            measure(ways, run, Options(options.rounds, options.trips, clients))
            table(f"{clients} client{'s' if clients > 1 else ''}", ways)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--trips", type=int, default=250)
    parser.add_argument("--clients", type=int, default=8)
    given = parser.parse_args()
    main(Options(given.rounds, given.trips, given.clients))
