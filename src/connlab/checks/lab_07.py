"""The checks of lab 07: an application that relies on its session, moved behind a PgBouncer in transaction mode.

The learner writes ``start(dsn, direct_dsn)``, which returns whatever the application keeps, and one function for each
thing that the application does. ``schema`` is the SQL that makes its tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import psycopg

from connlab.checks.answers import Answer, Problem, problems
from connlab.checks.drivers import Learner, call, load
from connlab.checks.errors import Hangs
from connlab.checks.lab_07_looks import (
    ANOTHER_PROGRAM,
    BEHIND,
    BEHIND_ERROR,
    BOTH_AT_IT,
    DEAF,
    DEAF_ELSE,
    DEAF_FOREVER,
    DEAF_TRANSACTION,
    HALF,
    LEAK,
    LEFT_TABLE,
    LOCK_LEFT,
    NIGHTLY,
    NO_ROWS,
    NOT_AT_IT,
    NOT_SET,
    PAST,
    UNCHANGED,
    WAITED,
    meaning,
)
from connlab.checks.sandbox import Sandbox
from connlab.checks.sessions import locked
from connlab.checks.transaction_mode import TransactionMode, application
from connlab.checks.trial import Trial, check
from connlab.postgres import Postgres

Function = Callable[..., Any]

TABLES = ("invoice", "rate", "closing")
WITHIN = 10.0
"""Seconds that a round of calls may take."""
CLIENTS = 4
WORKERS = 3
AT_ONCE_WITHIN = 1.5
"""Seconds that a worker has to say that another one is at the job."""
ARRIVES_WITHIN = 2.0
HELD = (
    "while another client holds one of two server connections",
    "while another client holds the other server connection",
)
FREE = "from four threads, on both server connections in turn"

# --- the checks ---------------------------------------------------------------------------------------------


@check("Statements go on when the server connection changes")
def statements(trial: Trial, start: Function, rate_of: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `rate_of`, so that every call works on whatever server connection it gets."""
    with application(trial, pg, schema, TABLES, start=start, rate_of=rate_of) as (box, mode):
        _start(trial, box, mode, pg)
        wanted = {row["currency"]: row["rate"] for row in pg.rows("select currency, rate from rate")}
        asked = [(currency,) for currency in wanted] * 16
        for which, when in enumerate(HELD):
            with mode.held(which):
                _all_answered(trial, box.do(WITHIN, load, "rate_of", asked, CLIENTS, on="app"), when)
        given = box.do(WITHIN, load, "rate_of", asked, CLIENTS, on="app")
        _all_answered(trial, given, FREE)
        _expect_same(trial, given, wanted.__getitem__)
        mode.end_one()
        after = box.do(WITHIN, load, "rate_of", asked, CLIENTS, on="app")
        _expect_at_most_one_failed(trial, after)
        _expect_none_past(trial, mode)


@check("No tenant reads another's rows")
def tenants(trial: Trial, start: Function, invoices: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `invoices`: each tenant reads its own rows, and who has set nothing reads none."""
    with application(trial, pg, schema, TABLES, start=start, invoices=invoices) as (box, mode):
        _start(trial, box, mode, pg)
        wanted = _invoices(pg)
        asked = [(tenant, "customer") for tenant in wanted] * 8
        for which, when in enumerate(HELD):
            with mode.held(which):
                given = box.do(WITHIN, load, "invoices", asked, 1, on="app")
            _expect_own_rows(trial, given, wanted, when)
            _expect_nobody_reads(trial, mode, "afterwards", BEHIND)
        _expect_own_rows(trial, box.do(WITHIN, load, "invoices", asked, CLIENTS, on="app"), wanted, FREE)
        _expect_nobody_reads(trial, mode, "afterwards", BEHIND)
        failing = [(tenant, "(") for tenant in wanted] * 4
        _expect_errors(trial, box.do(WITHIN, load, "invoices", failing, CLIENTS, on="app"), "DataError")
        _expect_nobody_reads(trial, mode, "after calls that failed", BEHIND_ERROR)
        _expect_none_past(trial, mode)


@check("The report's settings are the report's alone")
def settings(trial: Trial, start: Function, report: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `report`: the report runs with its settings, and no other query does."""
    with application(trial, pg, schema, TABLES, start=start, report=report) as (box, mode):
        _start(trial, box, mode, pg)
        usual = _settings(mode)[0]
        asked = [(user,) for user in (10, 100, 1000)] * 3
        wanted = {user: _report(pg, user) for user in (10, 100, 1000)}
        for which, when in enumerate(HELD):
            with mode.held(which):
                given = box.do(WITHIN, load, "report", asked, 1, on="app")
                failing = box.do(WITHIN, load, "report", [("no number",)] * 2, 1, on="app")
            _expect_report(trial, given, when)
            _expect_errors(trial, failing, "DataError")
            _expect_usual(trial, mode, usual, "after reports, the last of which failed", BEHIND_ERROR)
        given = box.do(WITHIN, load, "report", asked * 2, CLIENTS, on="app")
        _expect_report(trial, given, FREE)
        _expect_same(trial, given, wanted.__getitem__)
        _expect_usual(trial, mode, usual, "after all reports", BEHIND)
        _expect_none_past(trial, mode)


@check("An import in one piece")
def imports(trial: Trial, start: Function, import_rates: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `import_rates`: every import is complete or fails, and leaves nothing behind."""
    with application(trial, pg, schema, TABLES, start=start, import_rates=import_rates) as (box, mode):
        _start(trial, box, mode, pg)
        for which, when in enumerate(HELD):
            good, bad = _batch(f"A{which}"), [*_batch(f"B{which}"), ("BAD", -1)]
            with mode.held(which):
                failing = box.do(WITHIN, load, "import_rates", [(bad,)], 1, on="app")
                given = box.do(WITHIN, load, "import_rates", [(good,)], 1, on="app")
            _expect_errors(trial, failing, "IntegrityError")
            _expect_imported(trial, pg, given, f"{when}, after one that failed")
            _expect_rows_of(trial, pg, bad, 0)
        batches = [(_batch(f"C{at}"),) for at in range(3 * CLIENTS)]
        _expect_imported(trial, pg, box.do(WITHIN, load, "import_rates", batches, CLIENTS, on="app"), FREE)
        left = pg.value("select count(*) from pg_class where relpersistence = 't' and relkind = 'r'")
        trial.expect("no temporary table on a server connection afterwards", f"{left} left", left == 0, LEFT_TABLE)
        _expect_none_past(trial, mode)


@check("One worker at the nightly job")
def nightly(trial: Trial, start: Function, close_day: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `close_day`: one worker does the job, the others say False, and the lock is free afterwards."""
    with application(trial, pg, schema, TABLES, start=start, close_day=close_day) as (box, mode):
        _start(trial, box, mode, pg)
        for which, when in enumerate(HELD):
            with mode.held(which):
                _expect_closed(trial, pg, box, f"2026-01-0{which + 1}", when)
        with mode.held(0) as other:
            other.execute(f"select pg_try_advisory_xact_lock({NIGHTLY})")
            _expect_false_at_once(trial, box)
        _expect_one_worker(trial, pg, box)
        given = box.do(WITHIN, call, "close_day", "no day", on="app")
        _expect_errors(trial, [given], "DataError")
        _expect_free(trial, pg, "after a job that failed")
        _expect_dead_worker_leaves_nothing(trial, pg, box)
        _expect_closed(trial, pg, box, "2026-01-06", "after all that")
        _expect_none_past(trial, mode)


@check("Every notification arrives")
def notifications(trial: Trial, start: Function, listen: Function, events: Function, schema: str, pg: Postgres) -> None:
    """Write `start`, `listen` and `events`: each notification arrives, with one session of the server for it."""
    with application(trial, pg, schema, TABLES, start=start, listen=listen, events=events) as (box, mode):
        _start(trial, box, mode, pg)
        _listen(trial, box)
        for which, when in enumerate(HELD):
            with mode.held(which):
                sent = _notify(mode, f"{which}", 3)
                _expect_heard(trial, box, mode, sent, when)
        sent = _notify(mode, "free", 4)
        _expect_heard(trial, box, mode, sent, "from clients on both server connections")
        past = mode.past()
        trial.expect("one connection past PgBouncer, the listener's", f"{past}", past == 1, PAST)
        _expect_listens_again(trial, pg, box, mode)


# --- what they share ----------------------------------------------------------------------------------------


def _start(trial: Trial, box: Sandbox, mode: TransactionMode, pg: Postgres) -> None:
    begun = box.do(WITHIN, call, "start", mode.dsn, pg.dsn, keep="app")
    if begun.problem:
        trial.expect("`start(dsn, direct_dsn)` returns", f"{begun.problem}", False, meaning(begun.problem))


def _all_answered(trial: Trial, answers: Sequence[Answer], when: str) -> None:
    failed = problems(answers)
    trial.expect(
        f"{_many(len(answers), 'call')} {when}, {_many(len(answers), 'answer')}",
        f"{_many(len(answers) - len(failed), 'answer')}{_first(failed)}",
        not failed,
        meaning(failed[0]) if failed else "-",
    )


def _expect_same(trial: Trial, answers: Sequence[Answer], wanted: Callable[..., Any]) -> None:
    """The answers are those of a direct connection, as ``wanted`` says for a call's arguments."""
    other = next((each for each in answers if each.value != wanted(*each.arguments)), None)
    trial.expect(
        "the same answers as on a direct connection",
        f"{other.value!r} instead of {wanted(*other.arguments)!r}" if other else "the same",
        other is None,
        "Return what the colleague's function returns, in the same form.",
    )


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _first(failed: Sequence[Problem]) -> str:
    return f"; the first error was {failed[0]}" if failed else ""


def _expect_value(trial: Trial, answer: Answer, wanted: Any, expected: str, look: str) -> None:
    trial.expect(
        expected,
        f"{answer.problem or repr(answer.value)}",
        not answer.problem and answer.value is wanted,
        meaning(answer.problem) if answer.problem else look,
    )


def _expect_errors(trial: Trial, answers: Sequence[Answer], kind: str) -> None:
    """Each of the calls fails, with the server's error."""
    wrong = next((each for each in answers if not each.problem or kind not in each.problem.kinds), None)
    returned = f"{wrong.problem or f'{wrong.value!r} was returned'}" if wrong else "it did"
    trial.expect(
        f"a query that the server refuses raises its error (a `psycopg.{kind}`)",
        returned,
        wrong is None,
        meaning(wrong.problem, UNCHANGED) if wrong and wrong.problem else UNCHANGED,
    )


def _expect_at_most_one_failed(trial: Trial, answers: Sequence[Answer]) -> None:
    failed = problems(answers)
    trial.expect(
        f"after the end of one server connection at most 1 of {len(answers)} calls fails",
        f"{len(failed)} failed{_first(failed)}",
        len(failed) <= 1,
        meaning(failed[0]) if failed else "-",
    )


def _expect_none_past(trial: Trial, mode: TransactionMode) -> None:
    past = mode.past()
    trial.expect("no connection past PgBouncer", f"{past}", past == 0, PAST)


# --- tenants ------------------------------------------------------------------------------------------------


def _invoices(pg: Postgres) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of each tenant."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for row in pg.rows("select tenant, number, amount from invoice order by tenant, number"):
        found.setdefault(row["tenant"], []).append(tuple(row.values()))
    return found


def _expect_own_rows(
    trial: Trial, answers: Sequence[Answer], wanted: dict[str, list[tuple[Any, ...]]], when: str
) -> None:
    foreign = [(tenant, found) for tenant, each in _read(answers) for found in [_foreign(tenant, each)] if found]
    expected = f"each tenant reads its own rows, {when}"
    if foreign:
        tenant, (whose, rows) = foreign[0]
        measured = f"tenant {tenant} read {rows} rows of {whose}; so it went in {len(foreign)} of {len(answers)} calls"
        trial.expect(expected, measured, False, LEAK)
    if not (failed := problems(answers)):
        for tenant, rows in _read(answers):
            if rows != wanted[tenant]:
                measured = f"tenant {tenant} read {_size(rows)} of its {len(wanted[tenant])} rows"
                trial.expect(expected, measured, False, NO_ROWS)
    trial.expect(
        expected,
        f"{len(answers) - len(failed)} of {len(answers)} calls did{_first(failed)}",
        not failed,
        meaning(failed[0]) if failed else "-",
    )


def _read(answers: Sequence[Answer]) -> Iterator[tuple[str, Any]]:
    return ((each.arguments[0], each.value) for each in answers if not each.problem)


def _foreign(tenant: str, rows: Any) -> tuple[str, int] | None:
    """Whose rows the tenant read that are not its own, and how many."""
    others = [row[0] for row in rows if row[0] != tenant] if isinstance(rows, list) and all(rows) else []
    return (others[0], len(others)) if others else None


def _size(rows: Any) -> str:
    return f"{len(rows)}" if isinstance(rows, list) else f"{rows!r} instead"


def _expect_nobody_reads(trial: Trial, mode: TransactionMode, when: str, look: str) -> None:
    rows = mode.each("select coalesce(string_agg(tenant, ' '), '') from invoice")
    seen = max((each.split() for each in rows), key=len)
    trial.expect(
        f"a client that has set nothing reads no row {when}",
        f"it read {len(seen)} rows of {', '.join(sorted(set(seen)))}" if seen else "it read none",
        not seen,
        look,
    )


# --- the report ---------------------------------------------------------------------------------------------

ITS_SETTINGS = ("64MB", "30s")


def _settings(mode: TransactionMode) -> list[str]:
    """What a client that has set nothing finds, on each server connection."""
    return mode.each("select current_setting('work_mem') || ', ' || current_setting('statement_timeout')")


def _report(pg: Postgres, user: int) -> tuple[Any, ...]:
    row = pg.rows(f"select count(*), sum(amount) from orders where user_id <= {user}")[0]
    return (*row.values(), *ITS_SETTINGS)


def _expect_report(trial: Trial, answers: Sequence[Answer], when: str) -> None:
    _all_answered(trial, answers, when)
    ran = [each.value[2:] for each in answers if isinstance(each.value, tuple) and len(each.value) == 4]
    other = next((each for each in ran if each != ITS_SETTINGS), None)
    trial.expect(
        f"each report runs with `work_mem` {ITS_SETTINGS[0]} and `statement_timeout` {ITS_SETTINGS[1]}",
        f"{sum(each != ITS_SETTINGS for each in ran)} of {len(ran)} ran with {' and '.join(map(str, other))}"
        if other
        else "they did",
        other is None,
        NOT_SET,
    )


def _expect_usual(trial: Trial, mode: TransactionMode, usual: str, when: str, look: str) -> None:
    found = _settings(mode)
    other = next((each for each in found if each != usual), usual)
    trial.expect(
        f"a client that has set nothing runs with {usual} {when}",
        f"with {other}",
        other == usual,
        look,
    )


# --- the import ---------------------------------------------------------------------------------------------


def _batch(name: str) -> list[tuple[str, int]]:
    return [(f"{name}{at}", at + 1) for at in range(5)]


def _expect_imported(trial: Trial, pg: Postgres, answers: Sequence[Answer], when: str) -> None:
    _all_answered(trial, answers, when)
    _expect_same(trial, answers, len)
    for each in answers:
        _expect_rows_of(trial, pg, each.arguments[0], len(each.arguments[0]))


def _expect_rows_of(trial: Trial, pg: Postgres, batch: Sequence[tuple[str, Any]], wanted: int) -> None:
    names = ", ".join(f"'{currency}'" for currency, _ in batch)
    found = pg.value(f"select count(*) from rate where currency in ({names})")
    if found != wanted:
        how = "failed" if not wanted else "returned"
        trial.expect(f"{wanted} of {len(batch)} rates of an import that {how} in the table", f"{found}", False, HALF)


# --- the nightly job ----------------------------------------------------------------------------------------


def set_off(learner: Learner, name: str, arguments: Sequence[tuple[Any, ...]], on: str, seconds: float) -> list[Answer]:
    """A driver: a call for each of ``arguments``, in threads; the answers that are there when all are, or after
    ``seconds``."""
    threads = ThreadPoolExecutor(len(arguments))
    begun = [threads.submit(learner.call, name, *given, on=on) for given in arguments]
    learner.kept["set off"] = [*learner.kept.get("set off", []), *begun]
    done, _ = wait(begun, timeout=seconds)
    return [each.result() for each in done]


def finish(learner: Learner) -> list[Answer]:
    """A driver: the answers of all that was set off, when they are there."""
    return [each.result() for each in learner.kept["set off"]]


def _expect_closed(trial: Trial, pg: Postgres, box: Sandbox, day: str, when: str) -> None:
    _expect_value(trial, box.do(WITHIN, call, "close_day", day, on="app"), True, f"True for a day, {when}", LOCK_LEFT)
    _expect_times(trial, pg, day, 1)
    _expect_free(trial, pg, "afterwards")


def _expect_false_at_once(trial: Trial, box: Sandbox) -> None:
    expected = "False at once, while another program is at the job"
    try:
        given = box.do(ARRIVES_WITHIN, call, "close_day", "2026-01-03", on="app")
    except Hangs as hang:
        trial.expect(expected, f"{hang}", False, WAITED)
        raise
    _expect_value(trial, given, False, expected, ANOTHER_PROGRAM)


def _expect_times(trial: Trial, pg: Postgres, day: str, wanted: int) -> None:
    times = pg.value(f"select count(*) from closing where day = '{day}'")
    if times != wanted:
        trial.expect(f"the day {wanted} time in `closing`", f"{times} times", False, NOT_AT_IT)


def _expect_free(trial: Trial, pg: Postgres, when: str) -> None:
    held = pg.value("select count(*) from pg_locks where locktype = 'advisory'")
    trial.expect(f"the lock is free {when}", "it is" if not held else f"{held} held", held == 0, LOCK_LEFT)


def _expect_one_worker(trial: Trial, pg: Postgres, box: Sandbox) -> None:
    """The first worker waits inside the job, on its server connection, while the others ask."""
    day, others = "2026-01-04", WORKERS - 1
    with locked(pg, "closing"):
        box.do(WITHIN, set_off, "close_day", [(day,)], "app", 0)
        _at_the_job(pg)
        given = box.do(WITHIN, set_off, "close_day", [(day,)] * others, "app", AT_ONCE_WITHIN)
        at_it = _at_the_job(pg)
        trial.expect(f"one of {WORKERS} workers at the job at a time", f"{at_it}", at_it == 1, BOTH_AT_IT)
        _all_answered(trial, given, "of workers while one is at it")
        said = [each.value for each in given]
        trial.expect(
            f"the other {others} say False at once",
            f"{len(said)} said {' and '.join(map(repr, said)) or 'nothing'}",
            said == [False] * others,
            WAITED,
        )
    done = sum(each.value is True for each in box.do(WITHIN, finish))
    trial.expect("one worker says True", f"{done} did", done == 1, NOT_AT_IT)
    _expect_times(trial, pg, day, 1)
    _expect_free(trial, pg, "after the job")


def _at_the_job(pg: Postgres) -> int:
    """How many sessions wait for the table in the job; waits a moment for the first."""
    query = "select count(*) from pg_locks where not granted and relation = 'closing'::regclass"
    deadline = time.monotonic() + 2
    while not (found := pg.value(query)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(found)


def _expect_dead_worker_leaves_nothing(trial: Trial, pg: Postgres, box: Sandbox) -> None:
    """The server connection of a worker dies in the middle of the job."""
    with locked(pg, "closing"):
        pending = box.begin(call, "close_day", "2026-01-05", on="app")
        _at_the_job(pg)
        pg.rows(
            "select pg_terminate_backend(pid, 5000) from pg_locks where not granted and relation = 'closing'::regclass"
        )
    given = pending.result(WITHIN)
    trial.expect(
        "a worker whose server connection dies gets an error (a `psycopg.OperationalError`)",
        f"{given.problem or repr(given.value)}",
        given.problem is not None and "OperationalError" in given.problem.kinds,
        UNCHANGED,
    )
    _expect_free(trial, pg, "after its death")


# --- notifications ------------------------------------------------------------------------------------------


def _listen(trial: Trial, box: Sandbox) -> None:
    begun = box.do(WITHIN, call, "listen", on="app", keep="listener")
    if begun.problem:
        trial.expect("`listen(app)` returns", f"{begun.problem}", False, meaning(begun.problem))


def _notify(mode: TransactionMode, name: str, times: int) -> list[str]:
    """Notifications that other clients send through PgBouncer: each of them from the next one of two."""
    sent = [f"invoice {name}-{at}" for at in range(times)]
    with psycopg.connect(mode.dsn, autocommit=True, prepare_threshold=None) as client:
        for payload in sent:
            client.execute("select pg_notify('invoice', %s)", [payload])
    return sent


def _expect_heard(trial: Trial, box: Sandbox, mode: TransactionMode, sent: Sequence[str], when: str) -> None:
    given = box.do(WITHIN, call, "events", len(sent), ARRIVES_WITHIN, on="listener")
    heard = given.value if isinstance(given.value, list) else []
    trial.expect(
        f"{len(sent)} notifications, sent {when}, arrive within {ARRIVES_WITHIN:g} s",
        f"{given.problem}" if given.problem else f"{sum(each in heard for each in sent)} arrived",
        heard == [*sent],
        meaning(given.problem) if given.problem else _why_deaf(trial, mode),
    )


def _why_deaf(trial: Trial, mode: TransactionMode) -> str:
    own = mode.past_it(trial.sessions.now())
    if any((row["state"] or "").startswith("idle in transaction") for row in own):
        return DEAF_TRANSACTION
    return DEAF_ELSE if own else DEAF


def _expect_listens_again(trial: Trial, pg: Postgres, box: Sandbox, mode: TransactionMode) -> None:
    """The listener's session dies: its caller must learn of it, or it must listen again by itself."""
    for row in mode.past_it(trial.sessions.now()):
        pg.rows(f"select pg_terminate_backend({row['pid']}, 5000)")
    given = box.do(WITHIN, call, "events", 1, 0.3, on="listener")
    if given.problem:
        told = "OperationalError" in given.problem.kinds
        trial.expect(
            "`events` raises a `psycopg.OperationalError` when its session has ended, or listens again",
            f"{given.problem}",
            told,
            DEAF_FOREVER,
        )
        _listen(trial, box)
    sent = _notify(mode, "again", 1)
    given = box.do(WITHIN, call, "events", len(sent), ARRIVES_WITHIN, on="listener")
    trial.expect(
        "after the end of its session, and `listen` again where `events` raised an error, 1 notification arrives",
        f"{given.problem or given.value!r}",
        given.value == sent,
        DEAF_FOREVER,
    )
