"""Queries that run while a learner's code does something, and what becomes of them."""

from __future__ import annotations

import psycopg
from conftest import Start

from connlab.checks.abandoned import LongQuery, in_transactions, until


def test_transactions_that_are_open_together_have_a_session_each(start: Start) -> None:
    [[(first,)], [(second,)]] = in_transactions(start().dsn, 2, "select pg_backend_pid()")
    assert first != second


def test_a_client_asks_again_until_it_is_enough(start: Start) -> None:
    pg = start()
    begun = "select query_start from pg_stat_activity where usename = 'app' and state = 'active'"
    seen = set[object]()
    with LongQuery(pg.dsn, 0.05, again=True) as query:
        assert until(lambda: seen.update(row["query_start"] for row in pg.rows(begun)) or len(seen) > 1, 10)
        query.enough()
        assert query.problem() is None


def test_a_client_whose_backend_is_ended_tells(start: Start) -> None:
    pg = start()
    end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = 'app' and state = 'active'"
    with LongQuery(pg.dsn, 0.5, again=True) as query:
        assert until(lambda: pg.value(end), 10)
        assert isinstance(query.problem(), psycopg.errors.AdminShutdown)
