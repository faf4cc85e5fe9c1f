"""The checks of lab 07: an application that relies on its session, moved behind a PgBouncer in transaction mode.

The learner writes ``start(dsn, direct_dsn)``, which returns whatever the application keeps, and one function for each
thing that the application does. ``schema`` is the SQL that makes its tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, LiteralString

from connlab.checks import lab_07_looks as looks
from connlab.checks.answers import Answer, problems
from connlab.checks.drivers import call
from connlab.checks.lab_07_case import WITHIN, Case, case, first
from connlab.checks.lab_07_listener import (
    begin_to_listen,
    expect_heard,
    expect_listens_again,
    expect_none_dropped,
    expect_silence,
)
from connlab.checks.lab_07_nightly import (
    expect_closed,
    expect_dead_worker_leaves_nothing,
    expect_false_at_once,
    expect_free,
    expect_one_worker,
)
from connlab.checks.trial import Trial, check
from connlab.postgres import Postgres

Function = Callable[..., Any]

CLIENTS = 4
HELD = (
    "while another client holds one of two server connections",
    "while another client holds the other server connection",
)
FREE = "from four threads, on both server connections in turn"
ONE_FREE = "from one thread, on both server connections in turn"
LINE = "while other clients wait in line for the same server connection"
REFUSED = re.compile(r'prepared statement "[^"]*" (?:already exists|does not exist)')


# --- the checks ---------------------------------------------------------------------------------------------


@check("Statements go on when the server connection changes")
def statements(trial: Trial, start: Function, rate_of: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `rate_of`, so that every call works on whatever server connection it gets."""
    with case(trial, pg, schema, start=start, rate_of=rate_of) as it:
        wanted, mark = _rates(pg), pg.mark()
        asked = [(currency,) for currency in wanted] * 16
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                given = it.load("rate_of", asked, CLIENTS)
            it.answered(given, when)
            it.same(given, wanted.__getitem__)
        pg.rows("update rate set rate = rate + 1")
        given = it.load("rate_of", asked, CLIENTS)
        it.answered(given, FREE)
        it.same(given, _rates(pg).__getitem__, "the new rates, after a change of all of them", looks.STALE)
        refused = len(REFUSED.findall(pg.log(since=mark)))
        expected = "no error about a prepared statement in the server's log"
        trial.expect(expected, f"{refused}", refused == 0, looks.RETRIED)
        it.mode.end_one()
        failed = problems(it.load("rate_of", asked, CLIENTS))
        trial.expect(
            f"after the end of one server connection at most 1 of {len(asked)} calls fails",
            f"{len(failed)} failed{first(failed)}",
            len(failed) <= 1,
            it.meaning(failed[0]) if failed else "-",
        )
        it.none_past()


@check("No tenant reads another's rows")
def tenants(trial: Trial, start: Function, invoices: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `invoices`: each tenant reads its own rows, and who has set nothing reads none."""
    with case(trial, pg, schema, ONE_MORE_TENANT, start=start, invoices=invoices) as it:
        wanted = _invoices(pg)
        asked = [(tenant, "customer|o'neil") for tenant in wanted] * 6
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                given = it.load("invoices", asked)
            _expect_own_rows(it, given, wanted, when)
            _expect_nobody_reads(it, "afterwards", looks.BEHIND)
        for clients, when in ((CLIENTS, FREE), (1, ONE_FREE)):
            _expect_own_rows(it, it.load("invoices", asked, clients), wanted, when)
            _expect_nobody_reads(it, "afterwards", looks.BEHIND)
        with it.mode.held(0), it.mode.watched(SEEN) as rows:
            given = it.load("invoices", asked)
        _expect_own_rows(it, given, wanted, LINE)
        _expect_read_none(it, rows, "meanwhile", looks.MEANWHILE)
        it.raised(it.load("invoices", [(tenant, "(") for tenant in wanted] * 4, CLIENTS), "DataError")
        _expect_nobody_reads(it, "after calls that failed", looks.BEHIND_ERROR)
        it.none_past()


@check("The report's settings are the report's alone")
def settings(trial: Trial, start: Function, report: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `report`: the report runs with its settings, and no other query does."""
    with case(trial, pg, schema, REPORTS_ARE_LOGGED, NOT_LOGGED, start=start, report=report) as it:
        mark = pg.mark()
        wanted = {user: _report(pg, user) for user in (10, 100, 1000)}
        asked = [(user,) for user in wanted] * 3
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                given, failing = it.load("report", asked), it.load("report", [("no number",)] * 2)
            _expect_report(it, given, when)
            it.raised(failing, "DataError")
            _expect_usual(it, it.mode.each(SET), "after reports, the last of which failed", looks.BEHIND_ERROR)
        for clients, when in ((CLIENTS, FREE), (1, ONE_FREE)):
            given = it.load("report", asked, clients)
            _expect_report(it, given, when)
            it.same(given, wanted.__getitem__)
            _expect_usual(it, it.mode.each(SET), "after all reports", looks.BEHIND)
        with it.mode.held(0), it.mode.watched(SET) as found:
            given = it.load("report", asked)
        _expect_report(it, given, LINE)
        _expect_usual(it, found, "while reports run", looks.MEANWHILE)
        _expect_none_with_the_role(it)
        _expect_logged(it, mark, 5 * len(asked))
        it.none_past()


@check("An import in one piece")
def imports(trial: Trial, start: Function, import_rates: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `import_rates`: every import is complete or fails, and leaves nothing behind."""
    with case(trial, pg, schema, start=start, import_rates=import_rates) as it:
        for which, when in enumerate(HELD):
            good, bad = _batch(f"A{which}"), [*_batch(f"B{which}"), ("BAD", FAULTS[which])]
            with it.mode.held(which):
                failing, given = it.load("import_rates", [(bad,)]), it.load("import_rates", [(good,)])
            it.raised(failing, "IntegrityError", "violates")
            _expect_imported(it, given, f"{when}, after one that failed")
            _expect_rows_of(it, bad, 0)
        batches = [(_batch(f"C{at}"),) for at in range(3 * CLIENTS)]
        _expect_imported(it, it.load("import_rates", batches, CLIENTS), FREE)
        left = pg.value("select count(*) from pg_class where relpersistence = 't' and relkind = 'r'")
        trial.expect("no temporary table on a server connection afterwards", f"{left} left", left == 0, looks.LEFT)
        it.none_past()


@check("One worker at the nightly job")
def nightly(trial: Trial, start: Function, close_day: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `close_day`: one worker does the job, the others say False, and the lock is free afterwards."""
    one_day = f"create unique index {looks.ONE_DAY} on closing (day)"
    with case(trial, pg, schema, one_day, start=start, close_day=close_day) as it:
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                expect_closed(it, f"2026-01-0{which + 1}", when)
        with it.mode.held(0) as other:
            other.execute(f"select pg_try_advisory_xact_lock({looks.NIGHTLY})")
            expect_false_at_once(it, "2026-01-03")
        expect_one_worker(it, "2026-01-04")
        it.raised([it.box.do(WITHIN, call, "close_day", "no day", on="app")], "DataError")
        expect_free(it, "after a job that failed")
        expect_dead_worker_leaves_nothing(it, "2026-01-05")
        expect_closed(it, "2026-01-06", "after all that")
        it.none_past()


@check("Every notification arrives")
def notifications(trial: Trial, start: Function, listen: Function, events: Function, schema: str, pg: Postgres) -> None:
    """Write `start`, `listen` and `events`: each notification arrives, with one session of the server for it."""
    with case(trial, pg, schema, start=start, listen=listen, events=events) as it:
        begin_to_listen(it)
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                expect_heard(it, [f"invoice {which}-{at}" for at in range(3)], when)
        expect_heard(it, [f"invoice free-{at}" for at in range(4)], "while `events` waits", at_once=False)
        expect_silence(it)
        expect_none_dropped(it, [f"invoice many-{at}" for at in range(4)])
        past = it.mode.past()
        trial.expect("one connection past PgBouncer, the listener's", f"{past}", past == 1, looks.PAST)
        expect_listens_again(it)


# --- tenants ------------------------------------------------------------------------------------------------

Rows = list[tuple[Any, ...]]


ONE_MORE_TENANT = (
    "insert into invoice select 'o''neil', at, 'o''neil ' || at, 10 * at from generate_series(1, 2) as at;"
)
SEEN: LiteralString = "select coalesce(string_agg(tenant, ', '), '') from invoice"


def _rates(pg: Postgres) -> dict[str, Any]:
    return {row["currency"]: row["rate"] for row in pg.rows("select currency, rate from rate")}


def _invoices(pg: Postgres) -> dict[str, Rows]:
    """The rows of each tenant."""
    found: dict[str, Rows] = {}
    for row in pg.rows("select tenant, number, amount from invoice order by tenant, number"):
        found.setdefault(row["tenant"], []).append(tuple(row.values()))
    return found


def _expect_own_rows(it: Case, answers: Sequence[Answer], wanted: dict[str, Rows], when: str) -> None:
    expected, failed = f"each tenant reads its own rows, {when}", problems(answers)
    read = [(each.arguments[0], each.value) for each in answers if not each.problem]
    for _, value in read:
        if not _are_rows(value):
            it.trial.expect("a list of rows, as `fetchall()` gives it", f"{value!r}", False, looks.FORM)
    foreign = [(tenant, rows) for tenant, rows in read if any(row[0] != tenant for row in rows)]
    for tenant, rows in foreign:
        others = [row[0] for row in rows if row[0] != tenant]
        measured = f"tenant {tenant} read {len(others)} rows of {others[0]}; so it went in {len(foreign)} of "
        it.trial.expect(expected, f"{measured}{len(answers)} calls", False, looks.LEAK)
    for tenant, rows in read:
        if rows != wanted[tenant]:
            measured = f"tenant {tenant} read {len(rows)} of its {len(wanted[tenant])} rows"
            it.trial.expect(expected, measured, False, looks.NO_ROWS)
    it.trial.expect(
        expected,
        f"{len(answers) - len(failed)} of {len(answers)} calls did{first(failed)}",
        not failed,
        it.meaning(failed[0]) if failed else "-",
    )


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, tuple) and row for row in value)


def _expect_nobody_reads(it: Case, when: str, look: str) -> None:
    _expect_read_none(it, it.mode.each(SEEN), when, look)


def _expect_read_none(it: Case, rows: Iterable[str], when: str, look: str) -> None:
    seen = max((each.split(", ") if each else [] for each in rows), key=len, default=[])
    it.trial.expect(
        f"a client that has set nothing reads no row {when}",
        f"it read {len(seen)} rows of {', '.join(sorted(set(seen)))}" if seen else "it read none",
        not seen,
        look,
    )


# --- the report ---------------------------------------------------------------------------------------------

ITS_SETTINGS = ("64MB", "30s")


USUAL = "4MB and 0"
"""What the server has, and so whoever has set nothing."""
SET: LiteralString = "select current_setting('work_mem') || ' and ' || current_setting('statement_timeout')"
NOT_LOGGED = """
alter table if exists orders disable row level security, no force row level security;
drop policy if exists report_runs on orders;
drop function if exists report_runs;
"""
REPORTS_ARE_LOGGED = """
create function report_runs() returns boolean language plpgsql as $$ begin
    raise log 'orders are read with % and %', current_setting('work_mem'), current_setting('statement_timeout');
    return true;
end $$;
create policy report_runs on orders using ((select report_runs()));
alter table orders enable row level security, force row level security;
"""
"""Each query of the role app that reads `orders` leaves a line in the log: only its own session knows its settings."""
LOGGED = re.compile(r"LOG: +orders are read with (\S+) and (\S+)")


def _report(pg: Postgres, user: int) -> tuple[Any, ...]:
    row = pg.rows(f"select count(*), sum(amount) from orders where user_id <= {user}")[0]
    return (*row.values(), *ITS_SETTINGS)


def _expect_report(it: Case, answers: Sequence[Answer], when: str) -> None:
    it.answered(answers, when)
    ran = [each.value[2:] for each in answers if isinstance(each.value, tuple) and len(each.value) == 4]
    others = [each for each in ran if each != ITS_SETTINGS]
    it.trial.expect(
        f"each report runs with `work_mem` {ITS_SETTINGS[0]} and `statement_timeout` {ITS_SETTINGS[1]}",
        f"{len(others)} of {len(ran)} ran with {' and '.join(map(str, others[0]))}" if others else "they did",
        not others,
        looks.NOT_SET,
    )


def _expect_usual(it: Case, found: Iterable[str], when: str, look: str) -> None:
    other = next((each for each in found if each != USUAL), USUAL)
    expected = f"a client that has set nothing runs with `work_mem` and `statement_timeout` {USUAL}, {when}"
    it.trial.expect(expected, f"with {other}", other == USUAL, look)


def _expect_none_with_the_role(it: Case) -> None:
    settings = "select string_agg(array_to_string(setconfig, ', '), ', ') from pg_db_role_setting"
    found = it.pg.value(f"{settings} where setrole = 'app'::regrole")
    if found:
        it.trial.expect("no settings that stay with the role", f"{found}", False, looks.WITH_ROLE)


def _expect_logged(it: Case, mark: int, reports: int) -> None:
    ran = LOGGED.findall(it.pg.log(since=mark))
    good = sum(each == ITS_SETTINGS for each in ran)
    it.trial.expect(
        f"the server ran {reports} queries for {reports} reports, all with both settings",
        f"{len(ran)}, {good} of them with both",
        good == len(ran) and good >= reports,
        looks.MADE_UP,
    )


# --- the import ---------------------------------------------------------------------------------------------


FAULTS = (-1, None)
"""Rates that the table refuses."""


def _batch(name: str) -> list[tuple[str, int]]:
    return [(f"{name}{at}", at + 1) for at in range(5)]


def _expect_imported(it: Case, answers: Sequence[Answer], when: str) -> None:
    it.answered(answers, when, "import")
    others = [each.value for each in answers if each.value != len(each.arguments[0])]
    expected = f"each import writes its own {len(answers[0].arguments[0])} rates, and returns their number"
    it.trial.expect(expected, f"one returned {others[0]!r}" if others else "they did", not others, looks.MIXED)
    for each in answers:
        _expect_rows_of(it, each.arguments[0], len(each.arguments[0]))


def _expect_rows_of(it: Case, batch: Sequence[tuple[str, Any]], wanted: int) -> None:
    names = ", ".join(f"'{currency}'" for currency, _ in batch)
    found = it.pg.value(f"select count(*) from rate where currency in ({names})")
    if found != wanted:
        how = "returned" if wanted else "failed"
        expected = f"{wanted} of the {len(batch)} rates of an import that {how} are in the table"
        it.trial.expect(expected, f"{found}", False, looks.HALF)
