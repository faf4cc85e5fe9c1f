"""What the checks of lab 13 need beside the learner's code: a small shop's data, and drivers that use its pool.

The shop has two schemas, so that the functions as given and as mended work on the same data, apart.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row, tuple_row
from psycopg_pool import ConnectionPool, PoolTimeout

from connlab.checks.answers import Answer
from connlab.checks.borrowers import Borrowed, keep_book
from connlab.checks.drivers import Learner
from connlab.checks.sessions import PERIOD
from connlab.postgres import Postgres

GIVEN, MENDED = "lab_13_given", "lab_13_mended"
"""Schemas: one for the functions as given, one for those of the learner."""
Calls = Sequence[tuple[str, tuple[Any, ...]]]

TABLES = """
create table users (
    id bigint generated always as identity primary key, email text not null unique, name text not null
);
create table accounts (
    id bigint generated always as identity primary key, user_id bigint not null references users,
    balance numeric(12, 2) not null default 0 check (balance >= 0)
);
create table orders (
    id bigint generated always as identity primary key, user_id bigint not null references users,
    amount numeric(12, 2) not null, placed_at timestamptz not null default now()
);
create index on orders (user_id);
insert into users (email, name)
select format('user%s@example.com', n), format('User %s', n) from generate_series(1, 50) n;
insert into accounts (user_id, balance) select id, 1000 from users order by id;
insert into orders (user_id, amount) select 1 + n % 50, 5 + n % 95 from generate_series(1, 500) n;
"""
DATA = """
select (select count(*) from {schema}.orders) as "orders",
       (select sum(amount) from {schema}.orders) as "the worth of all orders",
       (select sum(balance) from {schema}.accounts) as "the money in all accounts",
       (select count(*) from {schema}.users) as "users",
       (select md5(string_agg(each, ',' order by each)) from (
           select format('%s %s', user_id, amount) as each from {schema}.orders union all
           select format('%s: %s', user_id, balance) from {schema}.accounts union all
           select format('%s %s', email, name) from {schema}.users) as rows) as "what belongs to whom"
"""
LEFT = """
select format('`%s` of `%s`', name, current_setting(name)) from pg_settings
where source = 'session' and setting is distinct from reset_val and name <> 'transaction_read_only'
and name not in ('transaction_isolation', 'transaction_deferrable')
union all select format('temporary table `%s`', relname) from pg_class
where relnamespace = pg_my_temp_schema() and relkind = 'r' order by 1
"""
"""What a session keeps until it ends."""
MEANWHILE = """
update {schema}.users set name = 'Grace' where id = 42;
update {schema}.accounts set balance = balance + 7 where user_id = 42;
insert into {schema}.orders (user_id, amount) values (1, 500)
"""
"""Others use the shop as well: what was read once is not true for ever."""
TIMED_OUT = "canceling statement due to statement timeout"
BUSY = 4.0
"""Seconds that a busy machine may need."""


# --- the database -------------------------------------------------------------------------------------------


def manager(pg: Postgres) -> psycopg.Connection[dict[str, Any]]:
    """An administrator's connection, for many questions."""
    return psycopg.connect(pg.admin_dsn, application_name="connlab", autocommit=True, row_factory=dict_row)


def furnish(conn: psycopg.Connection[Any]) -> None:
    """Make both schemas anew, 50 users and 500 orders in each."""
    for name in (GIVEN, MENDED):
        schema = sql.Identifier(name)
        with conn.transaction():
            conn.execute(sql.SQL("drop schema if exists {} cascade").format(schema))
            conn.execute(sql.SQL("create schema {} authorization app").format(schema))
            conn.execute(sql.SQL("set local role app; set local search_path = {}").format(schema))
            conn.execute(TABLES)


def dsn_of(pg: Postgres, schema: str) -> str:
    """For the learner's code, which names no schema."""
    return make_conninfo(pg.dsn, options=f"-c search_path={schema}")


def data_of(conn: psycopg.Connection[dict[str, Any]], schema: str) -> dict[str, Any]:
    """What is in the tables, committed: numbers to show, and a digest of the rest."""
    return conn.execute(DATA.format(schema=schema)).fetchone() or {}


def meanwhile(conn: psycopg.Connection[Any], schema: str) -> None:
    """What others do to the data between two requests."""
    conn.execute(sql.SQL(MEANWHILE).format(schema=sql.Identifier(schema)))


@contextlib.contextmanager
def held(pg: Postgres, order_id: int) -> Iterator[None]:
    """Nobody changes that order meanwhile: who tries waits in the server."""
    with manager(pg) as conn, conn.transaction(force_rollback=True):
        name = sql.Identifier(MENDED, "orders")
        conn.execute(sql.SQL("select 1 from {} where id = %s for update").format(name), [order_id])
        yield


class Interruptions:
    """Interrupts every session of the role app that waits for the shop's tables, which nobody gets meanwhile."""

    def __init__(self, pg: Postgres, function: str) -> None:
        self._dsn, self._over = pg.admin_dsn, threading.Event()
        # In one statement: who has gone on between two must not be met.
        self._query = sql.SQL(
            "select {}(pid) from pg_stat_activity where usename = 'app' and wait_event_type = 'Lock'"
        ).format(sql.Identifier(function))
        self.number = 0
        """How often it has called ``function``."""

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """``function`` (pg_cancel_backend or pg_terminate_backend) meets all who wait, while the block runs."""
        thread = threading.Thread(target=self._interrupt, name="connlab-interruptions", daemon=True)
        with psycopg.connect(self._dsn, application_name="connlab") as conn:
            for table in ("users", "accounts", "orders"):
                name = sql.Identifier(MENDED, table)
                conn.execute(sql.SQL("lock table {} in access exclusive mode").format(name))
            thread.start()
            try:
                yield
            finally:
                self._over.set()
                thread.join()
                conn.rollback()

    def _interrupt(self) -> None:
        with psycopg.connect(self._dsn, application_name="connlab", autocommit=True) as conn:
            while not self._over.wait(PERIOD):
                self.number += len(conn.execute(self._query).fetchall())


# --- drivers ------------------------------------------------------------------------------------------------


def open_shop(learner: Learner, dsn: str, quiet: bool = False) -> Answer:
    """A new shop in the place of the last one. ``quiet``: what psycopg logs is no news to the learner."""
    _at_rest()
    close_shop(learner)
    logging.getLogger("psycopg").setLevel(logging.ERROR if quiet else logging.NOTSET)
    keep_book().clear()
    return learner.call("Shop", dsn, keep="shop")


def close_shop(learner: Learner) -> None:
    """Close its pools; what the shop itself has kept goes with it."""
    learner.kept.pop("shop", None)
    learner.crew.clear()
    for each in _pools():
        each.close()
    gc.collect()  # a shop that keeps a generator that keeps the shop


def _pools() -> list[ConnectionPool]:
    return [each for each in gc.get_objects() if issubclass(type(each), ConnectionPool) and not each.closed]


def open_connections(learner: Learner) -> int:
    """How many connections the process has that are open, in a pool, lost, or kept."""
    return sum(issubclass(type(each), psycopg.Connection) and not each.closed for each in gc.get_objects())


@functools.cache
def _at_rest() -> None:
    """What is there before the first shop need not be looked through each time."""
    gc.collect()
    gc.freeze()


def request(learner: Learner, name: str, arguments: tuple[Any, ...]) -> tuple[Answer, list[Borrowed]]:
    """One request, and what has been borrowed since the shop was opened and is not back."""
    keep_book().begin(name)
    answer = learner.call(name, *arguments, on="shop")
    return answer, keep_book().out()


def requests(
    learner: Learner, calls: Calls, clients: int, in_turn: bool = False
) -> tuple[list[Answer], list[Borrowed]]:
    """Requests from several threads, at once or each after the last one; and what is not back."""
    threads = [ThreadPoolExecutor(1) for _ in range(clients)]
    learner.crew.extend(threads)  # they stay: what is kept for a thread is kept
    begun = (threads[at % clients].submit(request, learner, *each) for at, each in enumerate(calls))
    answers = [each.result()[0] for each in (begun if in_turn else list(begun))]
    return answers, keep_book().out()


def conditions(learner: Learner, size: int) -> list[str]:
    """How the connections lie in the pool, ``size`` of them, in words; each way only once."""
    pool, taken = _pools()[0], list[Any]()
    with contextlib.suppress(PoolTimeout):  # what is lost is told elsewhere
        for _ in range(min(size, pool.max_size)):
            taken.append(pool.getconn(BUSY))  # one that broke may still be on its way
    found = {_condition(conn) for conn in taken}
    for conn in taken:
        pool.putconn(conn)
    return sorted(found)


def _condition(conn: psycopg.Connection[Any]) -> str:
    words = ["with `autocommit`" if conn.autocommit else "without `autocommit`"]
    if conn.info.transaction_status != TransactionStatus.IDLE:
        words.append(f"in the state {conn.info.transaction_status.name}")
    for name, usual in (("row_factory", tuple_row), ("isolation_level", None), ("read_only", None)):
        value = getattr(conn, name)
        words += [] if value is usual else [f"with a `{name}` of `{getattr(value, '__name__', value)}`"]
    try:
        with conn.transaction(force_rollback=True), conn.cursor(row_factory=tuple_row) as cursor:
            words += [f"with a {what}" for (what,) in cursor.execute(LEFT).fetchall()]
    except psycopg.Error as error:
        words.append(f"on which a query fails (`{type(error).__name__}`)")
    return "closed" if conn.closed else ", ".join(words)


# --- calls for the learner's `lost` to judge ----------------------------------------------------------------

_KEPT: list[Any] = []


def gives_back(shop: Any) -> None:
    """Healthy."""
    with shop.pool.connection() as conn:
        conn.execute("select 1")


def fails_and_gives_back(shop: Any) -> None:
    """Healthy, with an error."""
    with shop.pool.connection() as conn:
        conn.execute("select 1 / 0")


def throws_away(shop: Any) -> None:
    """Healthy: the pool is told, and opens another one."""
    conn = shop.pool.getconn()
    conn.close()
    shop.pool.putconn(conn)


def keeps(shop: Any, number: int) -> None:
    """Loses connections that the server still sees."""
    for _ in range(number):
        _KEPT.append(shop.pool.getconn())
        _KEPT[-1].execute("select 1")


def keeps_and_fails(shop: Any) -> None:
    """Loses one, with an error."""
    keeps(shop, 1)
    raise ValueError("an error of the function's")


def closes(shop: Any) -> None:
    """Loses one that the server sees no more."""
    shop.pool.getconn().close()


def judged(learner: Learner, dsn: str, before: int, function: Any, arguments: tuple[Any, ...]) -> tuple[Answer, int]:
    """What the learner's `lost` says of one call, on a new shop that has lost ``before``, and what the book says."""
    begun = open_shop(learner, dsn, quiet=True)
    if begun.problem:
        return begun, 0
    keeps(learner.kept["shop"], before)
    known = len(keep_book().out())
    answer = learner.call("lost", function, *arguments, on="shop")
    number = len(keep_book().out()) - known
    close_shop(learner)
    _KEPT.clear()
    return answer, number


def named(learner: Learner, dsn: str) -> tuple[Answer, list[tuple[str, str]] | None]:
    """What the learner's `leaks` returns, as pairs; None when it is in another form. Shops that it left are closed."""
    _at_rest()  # before the learner's pools are there
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    answer = learner.call("leaks", dsn, keep="leaks")
    close_shop(learner)
    value: Any = learner.kept.get("leaks")
    try:
        pairs: Any = value.items() if isinstance(value, dict) else value
        return answer, sorted({(str(name), str(each)) for name, what in pairs for each in _several(what)})
    except (TypeError, ValueError):
        return answer, None


def _several(what: Any) -> Any:
    return [what] if isinstance(what, str) else list(what)
