"""The checks of lab 07: an application that relies on its session, moved behind a PgBouncer in transaction mode.

The learner writes ``start(dsn, direct_dsn)``, which returns whatever the application keeps, and one function for each
thing that the application does. ``schema`` is the SQL that makes its tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from connlab.checks import lab_07_looks as looks
from connlab.checks.answers import Answer, Problem, problems
from connlab.checks.drivers import Learner, call, is_none
from connlab.checks.errors import Hangs
from connlab.checks.lab_07_case import WITHIN, Case, case, first
from connlab.checks.sessions import locked
from connlab.checks.trial import Trial, check
from connlab.postgres import Postgres

Function = Callable[..., Any]

CLIENTS = 4
WORKERS = 3
AT_ONCE_WITHIN = 2.5
"""Seconds that a worker has to say that another one is at the job."""
BEGINS_WITHIN = 5.0
"""Seconds that a worker has to begin the job."""
ARRIVES_WITHIN = 2.0
"""Seconds that a notification has to arrive."""
HELD = (
    "while another client holds one of two server connections",
    "while another client holds the other server connection",
)
FREE = "from four threads, on both server connections in turn"


# --- the checks ---------------------------------------------------------------------------------------------


@check("Statements go on when the server connection changes")
def statements(trial: Trial, start: Function, rate_of: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `rate_of`, so that every call works on whatever server connection it gets."""
    with case(trial, pg, schema, start=start, rate_of=rate_of) as it:
        wanted = {row["currency"]: row["rate"] for row in pg.rows("select currency, rate from rate")}
        asked = [(currency,) for currency in wanted] * 16
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                it.answered(it.load("rate_of", asked, CLIENTS), when)
        given = it.load("rate_of", asked, CLIENTS)
        it.answered(given, FREE)
        it.same(given, wanted.__getitem__)
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
    with case(trial, pg, schema, start=start, invoices=invoices) as it:
        wanted = _invoices(pg)
        asked = [(tenant, "customer") for tenant in wanted] * 8
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                given = it.load("invoices", asked)
            _expect_own_rows(it, given, wanted, when)
            _expect_nobody_reads(it, "afterwards", looks.BEHIND)
        _expect_own_rows(it, it.load("invoices", asked, CLIENTS), wanted, FREE)
        _expect_nobody_reads(it, "afterwards", looks.BEHIND)
        it.raised(it.load("invoices", [(tenant, "(") for tenant in wanted] * 4, CLIENTS), "DataError")
        _expect_nobody_reads(it, "after calls that failed", looks.BEHIND_ERROR)
        it.none_past()


@check("The report's settings are the report's alone")
def settings(trial: Trial, start: Function, report: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `report`: the report runs with its settings, and no other query does."""
    with case(trial, pg, schema, start=start, report=report) as it:
        usual = _settings(it)[0]
        wanted = {user: _report(pg, user) for user in (10, 100, 1000)}
        asked = [(user,) for user in wanted] * 3
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                given, failing = it.load("report", asked), it.load("report", [("no number",)] * 2)
            _expect_report(it, given, when)
            it.raised(failing, "DataError")
            _expect_usual(it, usual, "after reports, the last of which failed", looks.BEHIND_ERROR)
        given = it.load("report", asked * 2, CLIENTS)
        _expect_report(it, given, FREE)
        it.same(given, wanted.__getitem__)
        _expect_usual(it, usual, "after all reports", looks.BEHIND)
        it.none_past()


@check("An import in one piece")
def imports(trial: Trial, start: Function, import_rates: Function, schema: str, pg: Postgres) -> None:
    """Write `start` and `import_rates`: every import is complete or fails, and leaves nothing behind."""
    with case(trial, pg, schema, start=start, import_rates=import_rates) as it:
        for which, when in enumerate(HELD):
            good, bad = _batch(f"A{which}"), [*_batch(f"B{which}"), ("BAD", -1)]
            with it.mode.held(which):
                failing, given = it.load("import_rates", [(bad,)]), it.load("import_rates", [(good,)])
            it.raised(failing, "IntegrityError")
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
    with case(trial, pg, schema, start=start, close_day=close_day) as it:
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                _expect_closed(it, f"2026-01-0{which + 1}", when)
        with it.mode.held(0) as other:
            other.execute(f"select pg_try_advisory_xact_lock({looks.NIGHTLY})")
            _expect_false_at_once(it, "2026-01-03")
        _expect_one_worker(it, "2026-01-04")
        it.raised([it.box.do(WITHIN, call, "close_day", "no day", on="app")], "DataError")
        _expect_free(it, "after a job that failed")
        _expect_dead_worker_leaves_nothing(it, "2026-01-05")
        _expect_closed(it, "2026-01-06", "after all that")
        it.none_past()


@check("Every notification arrives")
def notifications(trial: Trial, start: Function, listen: Function, events: Function, schema: str, pg: Postgres) -> None:
    """Write `start`, `listen` and `events`: each notification arrives, with one session of the server for it."""
    with case(trial, pg, schema, start=start, listen=listen, events=events) as it:
        _listen(it)
        for which, when in enumerate(HELD):
            with it.mode.held(which):
                _expect_heard(it, [f"invoice {which}-{at}" for at in range(3)], when)
        _expect_heard(it, [f"invoice free-{at}" for at in range(4)], "from both server connections in turn")
        past = it.mode.past()
        trial.expect("one connection past PgBouncer, the listener's", f"{past}", past == 1, looks.PAST)
        _expect_listens_again(it)


# --- tenants ------------------------------------------------------------------------------------------------

Rows = list[tuple[Any, ...]]


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
    rows = it.mode.each("select coalesce(string_agg(tenant, ' '), '') from invoice")
    seen = max((each.split() for each in rows), key=len)
    it.trial.expect(
        f"a client that has set nothing reads no row {when}",
        f"it read {len(seen)} rows of {', '.join(sorted(set(seen)))}" if seen else "it read none",
        not seen,
        look,
    )


# --- the report ---------------------------------------------------------------------------------------------

ITS_SETTINGS = ("64MB", "30s")


def _settings(it: Case) -> list[str]:
    """What a client that has set nothing finds, on each server connection."""
    return it.mode.each("select current_setting('work_mem') || ' and ' || current_setting('statement_timeout')")


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


def _expect_usual(it: Case, usual: str, when: str, look: str) -> None:
    found = next((each for each in _settings(it) if each != usual), usual)
    expected = f"a client that has set nothing runs with `work_mem` and `statement_timeout` {usual}, {when}"
    it.trial.expect(expected, f"with {found}", found == usual, look)


# --- the import ---------------------------------------------------------------------------------------------


def _batch(name: str) -> list[tuple[str, int]]:
    return [(f"{name}{at}", at + 1) for at in range(5)]


def _expect_imported(it: Case, answers: Sequence[Answer], when: str) -> None:
    it.answered(answers, when)
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


# --- the nightly job ----------------------------------------------------------------------------------------


def set_off(learner: Learner, name: str, arguments: Sequence[tuple[Any, ...]], on: str, seconds: float) -> list[Answer]:
    """A driver: a call for each of ``arguments``, in threads; the answers that are there after ``seconds`` at most."""
    threads = ThreadPoolExecutor(len(arguments))
    begun = [threads.submit(learner.call, name, *given, on=on) for given in arguments]
    learner.kept["set off"] = [*learner.kept.get("set off", []), *begun]
    done, _ = wait(begun, timeout=seconds)
    return [each.result() for each in done]


def finish(learner: Learner) -> list[Answer]:
    """A driver: the answers of all that was set off, when they are there."""
    return [each.result() for each in learner.kept["set off"]]


def _expect_closed(it: Case, day: str, when: str) -> None:
    given = it.box.do(WITHIN, call, "close_day", day, on="app")
    it.says(given, True, f"True for a day, {when}", looks.LOCK_LEFT)
    _expect_once(it, day)
    _expect_free(it, "afterwards")


def _expect_once(it: Case, day: str) -> None:
    times = it.pg.value(f"select count(*) from closing where day = '{day}'")
    if times != 1:
        it.trial.expect("the day is in `closing` once", f"{times} times", False, looks.NOT_AT_IT)


def _expect_free(it: Case, when: str) -> None:
    held = it.pg.value("select count(*) from pg_locks where locktype = 'advisory'")
    it.trial.expect(f"the lock is free {when}", "it is" if not held else f"{held} held", held == 0, looks.LOCK_LEFT)


def _expect_false_at_once(it: Case, day: str) -> None:
    expected = "False at once, while another program is at the job"
    try:
        given = it.box.do(AT_ONCE_WITHIN, call, "close_day", day, on="app")
    except Hangs as hang:
        it.trial.expect(expected, f"{hang}", False, looks.WAITED)
        raise
    it.says(given, False, expected, looks.ANOTHER_PROGRAM)


def _expect_one_worker(it: Case, day: str) -> None:
    """The first worker waits inside the job, on its server connection, while the others ask."""
    others = WORKERS - 1
    with locked(it.pg, "closing"):
        it.box.do(WITHIN, set_off, "close_day", [(day,)], "app", 0)
        _at_the_job(it.pg)
        given = it.box.do(WITHIN, set_off, "close_day", [(day,)] * others, "app", AT_ONCE_WITHIN)
        at_it = _at_the_job(it.pg)
        it.trial.expect(f"one of {WORKERS} workers at the job at a time", f"{at_it}", at_it == 1, looks.BOTH_AT_IT)
        it.answered(given, "of workers while one is at it")
        said = [each.value for each in given]
        it.trial.expect(
            f"the other {others} say False at once",
            f"{len(said)} said {' and '.join(map(repr, said)) or 'nothing'}",
            said == [False] * others,
            looks.WAITED,
        )
    done = sum(each.value is True for each in it.box.do(WITHIN, finish))
    it.trial.expect("one worker says True", f"{done} did", done == 1, looks.NOT_AT_IT)
    _expect_once(it, day)
    _expect_free(it, "after the job")


def _at_the_job(pg: Postgres) -> int:
    """How many sessions wait for the table in the job; waits for the first."""
    query = "select count(*) from pg_locks where not granted and relation = 'closing'::regclass"
    deadline = time.monotonic() + BEGINS_WITHIN
    while not (found := pg.value(query)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(found)


def _expect_dead_worker_leaves_nothing(it: Case, day: str) -> None:
    """The server connection of a worker dies in the middle of the job."""
    waiting = "select pid from pg_locks where not granted and relation = 'closing'::regclass"
    with locked(it.pg, "closing"):
        pending = it.box.begin(call, "close_day", day, on="app")
        _at_the_job(it.pg)
        it.pg.rows(f"select pg_terminate_backend(pid, 5000) from ({waiting}) as worker")
    given = pending.result(WITHIN)
    it.trial.expect(
        "a worker whose server connection dies gets an error (a `psycopg.OperationalError`)",
        f"{given.problem or repr(given.value)}",
        given.problem is not None and "OperationalError" in given.problem.kinds,
        looks.UNCHANGED,
    )
    _expect_free(it, "after its death")


# --- notifications ------------------------------------------------------------------------------------------


def _listen(it: Case) -> None:
    it.returns("listen(app)", it.box.do(WITHIN, call, "listen", on="app", keep="listener"))


def _events(it: Case, many: int, seconds: float) -> Answer:
    return it.box.do(WITHIN, call, "events", many, seconds, on="listener")


def _expect_heard(it: Case, sent: Sequence[str], when: str) -> None:
    it.mode.notify("invoice", sent)
    given = _events(it, len(sent), ARRIVES_WITHIN)
    heard = given.value if isinstance(given.value, list) else []
    it.trial.expect(
        f"{len(sent)} notifications, sent {when}, arrive within {ARRIVES_WITHIN:g} s",
        f"{given.problem}" if given.problem else f"{sum(each in heard for each in sent)} arrived",
        heard == [*sent],
        _meaning(it, given.problem) if given.problem else _why_deaf(it),
    )


def _meaning(it: Case, problem: Problem) -> str:
    nothing = "NoneType" in problem.message and it.box.do(WITHIN, is_none, "listener")
    return looks.NO_LISTENER if nothing else it.meaning(problem)


def _own_sessions(it: Case) -> Iterator[dict[str, Any]]:
    """The learner's sessions that came past PgBouncer."""
    servers = it.mode.pids()
    return (row for row in it.trial.sessions.now() if row["pid"] not in servers)


def _why_deaf(it: Case) -> str:
    states = [row["state"] or "" for row in _own_sessions(it)]
    if any(state.startswith("idle in transaction") for state in states):
        return looks.DEAF_TRANSACTION
    return looks.DEAF_ELSE if states else looks.DEAF


def _expect_listens_again(it: Case) -> None:
    """The listener's session dies: its caller must learn of it, or it must listen again by itself."""
    for row in _own_sessions(it):
        it.pg.rows(f"select pg_terminate_backend({row['pid']}, 5000)")
    given = _events(it, 1, 0.3)
    if given.problem:
        it.trial.expect(
            "`events` raises a `psycopg.OperationalError` when its session has ended, or listens again",
            f"{given.problem}",
            "OperationalError" in given.problem.kinds,
            looks.UNCHANGED,
        )
        _listen(it)
    sent = ["invoice again"]
    it.mode.notify("invoice", sent)
    given = _events(it, 1, ARRIVES_WITHIN)
    it.trial.expect(
        "after the end of its session, and `listen` again where `events` raised an error, 1 notification arrives",
        f"{given.problem or repr(given.value)}",
        given.value == sent,
        looks.DEAF_FOREVER,
    )
