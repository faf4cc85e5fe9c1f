"""What to ask PostgreSQL and PgBouncer, and how to read the answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from psycopg.conninfo import make_conninfo
from psycopg.pq.abc import PGresult

from connlab.node import Node
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres
from connlab.relay import Relay

APPLICATION = "connlab recorder"
# Stay out of the learner's log and statistics, and take nobody's time limit.
CALM = (
    "-c log_statement=none -c log_min_duration_statement=-1 -c log_duration=off -c log_min_duration_sample=-1"
    " -c statement_timeout=0 -c idle_session_timeout=0 -c jit=off -c pg_stat_statements.track=none"
    " -c auto_explain.log_min_duration=-1"
)
STATES = ("active", "idle", "idle in transaction", "idle in transaction (aborted)", "starting", "unknown")
STATE_OF = {"fastpath function call": "active", "disabled": "unknown", None: "starting"}
PREPARE = """
    prepare connlab_sample as
    select state, wait_event_type, application_name = 'connlab recorder', count(*)
    from pg_stat_activity
    where backend_type = 'client backend'
      and (application_name not like 'connlab%' or application_name = 'connlab recorder')
    group by 1, 2, 3
"""
LIMITS = """
    select current_setting('max_connections'), current_setting('superuser_reserved_connections'),
           coalesce(current_setting('reserved_connections', true), '0')
"""
# What an answer's row calls it: SHOW STATS_TOTALS.
TOTALS = {"xact_count": "transactions", "query_count": "queries", "wait_time": "waited seconds"}


class Hold(NamedTuple):
    """A client of PgBouncer at one moment: the server connection that it holds (None: it waits for one)."""

    client: str
    server: str | None


class ServerSource(Protocol):
    """A server as the recorder sees it."""

    name: str
    kind: str
    counters: frozenset[str]
    setup: tuple[str, ...]
    queries: tuple[str, ...]
    holds: list[Hold]

    def conninfo(self) -> str:
        """Where to connect."""

    def refused(self, message: str) -> None:
        """What the server said when it let us not in."""

    def begin(self, answers: Sequence[PGresult]) -> None:
        """Take in the answers to ``setup``."""

    def read(self, answers: Sequence[PGresult]) -> Mapping[str, float]:
        """The metrics in the answers to ``queries``."""


class PostgresSource:
    """pg_stat_activity: client backends other than connlab's, by state and wait event type, and their limit.

    The connection is one of a WAL sender with a database, which runs SQL, takes none of the slots that
    ``max_connections`` counts, and gets in when all of them are taken:
    https://www.postgresql.org/docs/current/protocol-replication.html and …/runtime-config-replication.html. A server
    with ``max_wal_senders = 0`` gets an ordinary superuser's connection, and a limit that is one lower.
    """

    kind = "postgres"
    counters: frozenset[str] = frozenset()
    setup: tuple[str, ...] = (LIMITS, PREPARE)
    queries: tuple[str, ...] = ("execute connlab_sample",)

    def __init__(self, node: Node) -> None:
        self.name = node.label if isinstance(node, Postgres) else f"PostgreSQL through {node.label}"
        self._node, self._as_wal_sender = node, True
        self._limits = (0, 0)
        self.holds: list[Hold] = []

    def conninfo(self) -> str:
        """A superuser's connection string."""
        replication = {"replication": "database"} if self._as_wal_sender else {}
        return make_conninfo(self._node.admin_dsn, application_name=APPLICATION, options=CALM, **replication)

    def refused(self, message: str) -> None:
        """No WAL sender to be had: come as anybody next time."""
        if "max_wal_senders" in message:
            self._as_wal_sender = False

    def begin(self, answers: Sequence[PGresult]) -> None:
        """The limits, which hold until the next restart."""
        maximum, *reserved = (int(answers[0].get_value(0, column) or 0) for column in range(3))
        self._limits = (maximum, sum(reserved))

    def read(self, answers: Sequence[PGresult]) -> Mapping[str, float]:
        """Backends by state (``active``), by state and wait event type (``active: Lock``), and limits."""
        values = dict.fromkeys(STATES, 0.0)
        own = 0.0
        for state, wait, is_own, count in _rows(answers[0]):
            if is_own == "t":
                own += float(count or 0)
                continue
            state = STATE_OF.get(state, state) or "unknown"
            detail = f"{state}: {wait or 'no wait'}"
            values[state] = values.get(state, 0.0) + float(count or 0)
            values[detail] = values.get(detail, 0.0) + float(count or 0)
        maximum, reserved = self._limits
        values["total"] = sum(values[state] for state in STATES)
        return values | {"max_connections": maximum, "reserved": reserved, "limit": maximum - reserved - own}


class PgBouncerSource:
    """SHOW POOLS and totals from SHOW STATS_TOTALS, without the console's own; on demand who holds what.

    ``cl_active`` counts clients that do nothing, too. ``sv_active`` counts server connections linked to a client, and
    each link has one client: so many clients are really active. https://www.pgbouncer.org/usage.html#show-pools
    """

    kind = "pgbouncer"
    counters = frozenset(TOTALS.values())
    setup: tuple[str, ...] = ()

    def __init__(self, node: Node, *, holds: bool) -> None:
        self.name = node.label if isinstance(node, PgBouncer) else f"PgBouncer through {node.label}"
        self._node = node
        self.queries: tuple[str, ...] = ("SHOW POOLS", "SHOW STATS_TOTALS")
        if holds:
            self.queries += ("SHOW CLIENTS", "SHOW SERVERS")
        self.holds: list[Hold] = []
        self._servers: dict[str, str] = {}

    def conninfo(self) -> str:
        """The console's connection string."""
        return make_conninfo(self._node.admin_dsn, application_name=APPLICATION)

    def refused(self, message: str) -> None:
        """Nothing to be done differently."""

    def begin(self, answers: Sequence[PGresult]) -> None:
        """There is nothing to take in."""

    def read(self, answers: Sequence[PGresult]) -> Mapping[str, float]:
        """Clients and server connections by what they do, summed over all pools, and totals."""
        pools, totals = answers[:2]
        if len(answers) > 2:
            self._read_holds(*answers[2:])
        return _read_pools(pools) | _read_totals(totals)

    def _read_holds(self, clients: PGresult, servers: PGresult) -> None:
        """One answer has client and link, so the pair is true; the other only says which backend that is."""
        named = _named(servers, "database", "ptr", "remote_pid", "local_port")
        self._servers |= {
            ptr: f"pid {pid}" if pid != "0" else f"port {port}" for base, ptr, pid, port in named if base != "pgbouncer"
        }
        columns = ("database", "state", "link", "application_name", "addr", "port")
        self.holds = [
            Hold(_client_name(application, port), self._servers.get(link, link) if link else None)
            for base, state, link, application, _, port in _named(clients, *columns)
            if base != "pgbouncer" and (link or state == "waiting")
        ]


def _client_name(application: str, port: str) -> str:
    return f"{application} ({port})" if application else f"client {port}"


def _read_pools(answer: PGresult) -> dict[str, float]:
    columns = ("cl_active", "cl_waiting", "sv_active", "sv_idle", "sv_used", "sv_tested", "sv_login")
    sums, longest = dict.fromkeys(columns, 0), 0.0
    for base, seconds, micros, *counts in _named(answer, "database", "maxwait", "maxwait_us", *columns):
        if base == "pgbouncer":
            continue
        longest = max(longest, int(seconds) + int(micros) / 1e6)
        for column, count in zip(columns, counts, strict=True):
            sums[column] += int(count)
    return {
        "clients active": sums["sv_active"],
        "clients idle": max(sums["cl_active"] - sums["sv_active"], 0),
        "clients waiting": sums["cl_waiting"],
        "longest wait s": longest,
        "servers active": sums["sv_active"],
        "servers idle": sums["sv_idle"] + sums["sv_used"],
        "servers tested": sums["sv_tested"],
        "servers login": sums["sv_login"],
    }


def _read_totals(answer: PGresult) -> dict[str, float]:
    sums = dict.fromkeys(TOTALS.values(), 0.0)
    for base, *totals in _named(answer, "database", *TOTALS):
        if base != "pgbouncer":
            for name, total in zip(sums, totals, strict=True):
                sums[name] += float(total)
    sums["waited seconds"] /= 1e6
    return sums


def _rows(answer: PGresult) -> Iterator[tuple[str | None, ...]]:
    for row in range(answer.ntuples):
        values = (answer.get_value(row, column) for column in range(answer.nfields))
        yield tuple(None if value is None else bytes(value).decode() for value in values)


def _named(answer: PGresult, *columns: str) -> Iterator[Sequence[str]]:
    """The values of these columns, row by row: their places differ between PgBouncer's versions."""
    names = [(answer.fname(column) or b"").decode() for column in range(answer.nfields)]
    places = [names.index(column) for column in columns]
    for row in range(answer.ntuples):
        yield [bytes(answer.get_value(row, place) or b"").decode() for place in places]


def server_source(thing: object, *, holds: bool) -> ServerSource | None:
    """How to ask ``thing`` if it is a node; None if it is none. A relay is its server, seen through it."""
    behind = thing
    while isinstance(behind, Relay):
        behind = behind._behind
    if isinstance(behind, Postgres) and isinstance(thing, Node):
        return PostgresSource(thing)
    if isinstance(behind, PgBouncer) and isinstance(thing, Node):
        return PgBouncerSource(thing, holds=holds)
    return None


def unused(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """``names``, numbered where they would clash with each other or with those that are ``taken``."""
    seen = set(taken)
    result = []
    for name in names:
        number, free = 1, name
        while free in seen:
            number += 1
            free = f"{name} {number}"
        seen.add(free)
        result.append(free)
    return result
