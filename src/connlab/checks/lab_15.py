"""The checks of lab 15: callers that give up and come again, and what they leave running behind a PgBouncer.

The learner writes ``orphans(server, console)``, which tells abandoned queries from others; ``start(dsn)`` and
``ask(app, user_id)``, which gives up in order; the same for asyncio, ``start_async`` and ``ask_async``;
``protect(server, console)`` for clients that are killed; and ``ask_again(app, attempt)``, which tries again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import psycopg

from connlab.checks import lab_15_texts as texts
from connlab.checks.abandoned import LongQuery, Watch, active, in_a_loop, queued, retrying, scripted, until
from connlab.checks.answers import LONGEST, Answer, Problem, problems
from connlab.checks.drivers import call, load
from connlab.checks.errors import Hangs
from connlab.checks.lab_15_scene import (
    End,
    Scene,
    kill_clients,
    longer_than_allowed,
    orders_locked,
    reports_role,
    scene_of,
    service,
)
from connlab.checks.pools import kept_after_requests
from connlab.checks.protection import unprotected
from connlab.checks.sandbox import Pending, Sandbox
from connlab.checks.trial import Trial, check
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres

Function = Callable[..., Any]

POOL = 2
"""Server connections that PgBouncer may open for the service."""
PATIENCE = 0.3
"""Seconds that a caller waits; the notebook says the same."""
BACK = 5 * PATIENCE
"""Seconds after which a caller that gives up must be back, on a busy machine too."""
SOON = 0.7
"""Seconds that a query may go on running which was cancelled."""
GONE = 1.5
"""Seconds that the query of a killed client may go on."""
ORPHANS = 3
TRIES, SPARE, SHARE = 3, 3, 0.2
"""Attempts of one request at most; retries that are free, and for each request of the service."""
SLACK = 2
"""Retries more than that: counters in many threads may be a little off."""
WITHIN = 6.0
"""Seconds that a round of requests may take."""
REPORTS = "reports"
"""The role of the nightly report."""


def _fast() -> bool:
    return os.environ.get("CONNLAB_FAST") == "1"


# --- the checks ---------------------------------------------------------------------------------------------


@check("Abandoned queries are told from the others")
def finds(trial: Trial, orphans: Function, pg: Postgres) -> None:
    """Write `orphans`: the process ids of the service's backends that work for a client which has gone."""
    with (
        service(trial, pg, POOL, orphans=orphans) as (box, bouncer),
        scene_of(trial, pg, bouncer, ORPHANS) as scene,
    ):
        found = _pids(trial, box.do(WITHIN, call, "orphans", pg.admin_dsn, bouncer.admin_dsn), scene)
        trial.expect(
            f"the {ORPHANS} backends whose clients have gone, and no other",
            scene.about(found),
            found == scene.orphans,
            scene.look(found),
        )
        for pid in scene.orphans:
            pg.rows(f"select pg_terminate_backend({pid})")
        until(lambda: not scene.orphans & set(active(trial.sessions)), WITHIN)
        found = _pids(trial, box.do(WITHIN, call, "orphans", pg.admin_dsn, bouncer.admin_dsn), scene)
        trial.expect(
            "none, now that these have been ended, though other queries still run",
            scene.about(found),
            not found,
            scene.look(found),
        )


@check("A caller that gives up leaves no query behind")
def cancels(trial: Trial, start: Function, ask: Function, pg: Postgres) -> None:
    """Write `start` and `ask`: the row, or after 0.3 seconds a TimeoutError and no query that goes on."""
    with service(trial, pg, POOL, start=start, ask=ask) as (box, bouncer):
        _start(trial, box, "start", bouncer)
        _gives_up(trial, box, "ask", "ask", pg, bouncer, (texts.BACK, texts.LEFT, texts.RETURNS))
        _answered(trial, box, "ask", pg)
        _not_cut_short(trial, box, pg)


@check("A task that is cancelled leaves no query behind")
def cancels_tasks(trial: Trial, start_async: Function, ask_async: Function, pg: Postgres) -> None:
    """Write the coroutines `start_async` and `ask_async`: who awaits them cancels after 0.3 seconds."""
    with service(trial, pg, POOL, start_async=start_async, ask_async=ask_async) as (box, bouncer):
        # Who waits for a connection leaves first, so that none gets one in the moment in which it leaves: psycopg's
        # cancel could then be there before the query, and would do nothing.
        box.do(WITHIN, in_a_loop, "ask_async", PATIENCE / 2, "ask_briefly")
        box.do(WITHIN, in_a_loop, "ask_async", PATIENCE, "ask_async")
        box.do(WITHIN, in_a_loop, "start_async", None, "start_async")
        _start(trial, box, "start_async", bouncer)
        _gives_up(
            trial, box, "ask_async", "ask_briefly", pg, bouncer, (texts.BLOCKS, texts.LEFT_BY_TASK, texts.SWALLOWED)
        )
        _answered(trial, box, "ask_async", pg)


@check("The server ends the query of a killed client")
def protects(trial: Trial, protect: Function, pg: Postgres) -> None:
    """Write `protect`: afterwards no query goes on for long whose client was killed, and no other is cut short."""
    with (
        service(trial, pg, POOL, protect=protect) as (box, bouncer),
        unprotected(pg),
        reports_role(pg, REPORTS) as report_dsn,
    ):
        _warm(bouncer)
        warm = {row["pid"] for row in trial.sessions.now()}
        answer = box.do(WITHIN, call, "protect", pg.admin_dsn, bouncer.admin_dsn)
        _returns(trial, "`protect(server, console)` returns", answer)
        with ExitStack() as stack:
            report = stack.enter_context(LongQuery(report_dsn, longer_than_allowed(report_dsn, 0.8 if _fast() else 3)))
            request = stack.enter_context(LongQuery(bouncer.dsn, PATIENCE * 0.8))
            ended = list(kill_clients(trial, bouncer, 3 if _fast() else 6, GONE))
            longest = max(end.seconds for end in ended)
            trial.expect(
                f"the query of a client that was killed ends within {GONE:g} s ({len(ended)} killed)",
                f"{longest:.2f} s, the longest" if longest < GONE else "one still ran then",
                longest < GONE,
                _why_alive(max(ended, key=lambda end: end.seconds), warm, pg),
            )
            for what, query, look in (
                (f"a request that takes {request.seconds:.2f} s is answered", request, texts.IMPATIENT),
                (f"a report of {report.seconds:g} s, in the role `{REPORTS}`, is answered", report, texts.REPORT),
            ):
                problem = query.problem()
                trial.expect(what, f"`{type(problem).__name__}: {problem}`" if problem else "it was", not problem, look)


@check("Callers try again, and the server does not notice")
def retries(trial: Trial, start: Function, ask: Function, ask_again: Function, pg: Postgres) -> None:
    """Write `ask_again`: it tries again after a TimeoutError, three times in all, and within the service's budget."""
    with service(trial, pg, POOL, start=start, ask=ask, ask_again=ask_again) as (box, bouncer):
        _start(trial, box, "start", bouncer)
        box.do(WITHIN, load, "ask", _users(2 * POOL), 2 * POOL, on="app")
        spent = _tries_by_script(trial, box)
        callers = 12 if _fast() else 24
        allowed = callers + SPARE + int(SHARE * (callers + 2)) - spent
        with orders_locked(trial, pg), Watch(trial.sessions) as watch:
            pending = box.begin(retrying, _users(callers), callers)
            asked, _ = _in_time(pending, 2 * BACK)
        answers, attempts = asked or pending.result(WITHIN)
        trial.expect(
            f"at most {allowed + SLACK} attempts for {callers} requests that all give up: the first of each, "
            f"{allowed - callers} again, and {SLACK} that counters may miss in many threads",
            f"{len(attempts)} attempts",
            len(attempts) <= allowed + SLACK,
            texts.BUDGET.format(*[_most_tries(attempts)] * 2) if asked else texts.ENDLESS.format(2 * BACK),
        )
        wrong = _not_timed_out(answers)
        trial.expect(
            f"{callers} times a TimeoutError, in the end",
            f"{callers - len(wrong)} times{_first(wrong)}",
            not wrong,
            texts.IN_THE_END,
        )
        _within_pool(trial, watch)
        _answered(trial, box, "ask", pg)


# --- giving up ----------------------------------------------------------------------------------------------


def _gives_up(
    trial: Trial, box: Sandbox, name: str, others: str, pg: Postgres, bouncer: PgBouncer, looks: tuple[str, str, str]
) -> None:
    """Callers that all get no answer: when they are back, with what, and what still runs then.

    ``looks``: for callers that are late, for queries that are left, and for what is returned in place of an error.
    """
    callers = 8 if _fast() else 16
    box.do(WITHIN, load, name, _users(2 * POOL), 2 * POOL, on="app")  # a pool that is still opening is another matter
    with orders_locked(trial, pg), Watch(trial.sessions) as watch:
        # Two are served; the others come while these wait, and leave later, or, with less patience, before.
        after = PATIENCE / 2 if name == others else PATIENCE / 10
        pending = box.begin(queued, _users(callers), (name, POOL), others, after)
        answers, hang = _in_time(pending, 1.5 * BACK)  # the callers may have begun a little later
        looked, queue = time.perf_counter(), _waiting(bouncer)  # the clock of all processes
        until(lambda: not active(trial.sessions), SOON)
        left = len(active(trial.sessions))
    done = answers or pending.result(WITHIN)
    late = [each for each in done if each.seconds > BACK or (hang and each.began + each.seconds > looked)]
    trial.expect(
        f"{callers} callers are back within {BACK:g} s: none waits longer than {PATIENCE:g} s",
        f"{callers - len(late)} of them{f'; the others were in {hang.place}' if hang and hang.place else ''}",
        not late,
        texts.QUEUE.format(queue) if queue else texts.NO_LIMIT if hang and hang.in_pool else looks[0],
    )
    wrong = _not_timed_out(done)
    trial.expect(
        f"{callers} times a TimeoutError",
        f"{callers - len(wrong)} times{_first(wrong)}",
        not wrong,
        _raises(wrong, looks[2]),
    )
    _within_pool(trial, watch)
    trial.expect(
        f"no query of the service still runs {SOON:g} s after the last caller has gone",
        f"{left}" if left else "none",
        not left,
        looks[1],
    )


def _in_time(pending: Pending[Any], within: float) -> tuple[Any, Hangs | None]:
    """The result if it comes within that time; it can still be asked for after that."""
    try:
        return pending.result(within), None
    except Hangs as hang:
        return None, hang


def _waiting(bouncer: PgBouncer) -> int:
    return sum(row["cl_waiting"] for row in bouncer.rows("SHOW POOLS"))


def _not_timed_out(answers: Sequence[Answer]) -> list[Answer]:
    return [each for each in answers if not each.problem or "TimeoutError" not in each.problem.kinds]


def _raises(wrong: Sequence[Answer], returned: str) -> str:
    if not wrong or not wrong[0].problem:
        return returned
    return texts.OTHER_ERROR.get(wrong[0].problem.name, texts.READ)


def _within_pool(trial: Trial, watch: Watch) -> None:
    trial.expect(
        f"at most {POOL} active backends at any moment, as many as PgBouncer's pool has",
        f"{watch.most}",
        watch.most <= POOL,
        texts.CLOSED,
    )


def _answered(trial: Trial, box: Sandbox, name: str, pg: Postgres) -> None:
    """Requests that could be answered at once are; one round more for a machine that has just been busy."""
    users = _users(16)
    wanted = _wanted(pg)
    for _ in range(3):
        answers = box.do(WITHIN, load, name, users, 2 * POOL, on="app")
        failed = problems(answers)
        if not all("TimeoutError" in problem.kinds for problem in failed) or not failed:
            break
    trial.expect(
        f"{len(users)} requests after that, when nothing is slow any more: {len(users)} answers",
        f"{len(users) - len(failed)}{f'; the first error was {failed[0]}' if failed else ''}",
        not failed,
        _why_failed(box, failed[0]) if failed else "-",
    )
    other = next((each for each in answers if each.value != wanted[each.arguments[-1]]), None)
    trial.expect(
        "each the row that the query gives",
        f"{other.value!r} for user {other.arguments[-1]}, not {wanted[other.arguments[-1]]!r}" if other else "it was",
        other is None,
        texts.ROW,
    )


def _why_failed(box: Sandbox, problem: Problem) -> str:
    if problem.name == "InFailedSqlTransaction":
        return texts.BROKEN
    if problem.name in ("DuplicatePreparedStatement", "InvalidSqlStatementName"):
        return texts.PREPARED
    if "TimeoutError" not in problem.kinds and problem.name != "QueryCanceled":
        return texts.READ
    return texts.LEAK if kept_after_requests(box) else texts.STRAY


def _not_cut_short(trial: Trial, box: Sandbox, pg: Postgres) -> None:
    """A quick request, then a slower one on the same connection: what was to cancel the first must not hit it."""
    box.do(WITHIN, load, "ask", _users(POOL), POOL, on="app")
    time.sleep(0.4 * PATIENCE)
    with orders_locked(trial, pg):
        pending = box.begin(load, "ask", _users(POOL), POOL, on="app")
        time.sleep(0.75 * PATIENCE)
    early = [each for each in pending.result(WITHIN) if each.problem and each.seconds < 0.9 * PATIENCE]
    trial.expect(
        f"no request gives up before its {PATIENCE:g} s are over",
        f"one did after {early[0].seconds:.2f} s: {early[0].problem}" if early else "none did",
        not early,
        texts.STRAY,
    )


# --- trying again -------------------------------------------------------------------------------------------


def _tries_by_script(trial: Trial, box: Sandbox) -> int:
    """Two requests whose attempts end as the check wants; how many retries they were."""
    answer, times = box.do(WITHIN, scripted, ["TimeoutError", "row"])
    trial.expect(
        "a request whose first attempt gives up is answered by its second",
        f"{answer.problem or repr(answer.value)}, after {len(times)} attempt{'s' if len(times) != 1 else ''}",
        answer.value == "row" and len(times) == 2,
        texts.AGAIN,
    )
    pause = times[1] - times[0]
    trial.expect("a pause before the second attempt, of 0.02 s or more", f"{pause:.3f} s", pause >= 0.02, texts.PAUSE)
    answer, times = box.do(WITHIN, scripted, ["UndefinedTable", "row"])
    trial.expect(
        "no second attempt after an error that is not a TimeoutError: it goes on to the caller",
        f"{answer.problem or repr(answer.value)}, after {len(times)} attempt{'s' if len(times) != 1 else ''}",
        len(times) == 1 and answer.problem is not None and answer.problem.name == "UndefinedTable",
        texts.HOPELESS,
    )
    return 1


def _most_tries(attempts: Sequence[int]) -> int:
    return max(attempts.count(user) for user in set(attempts))


# --- killed clients -----------------------------------------------------------------------------------------


def _warm(bouncer: PgBouncer) -> None:
    """Have PgBouncer open its server connections: on a busy machine that alone can take a caller's patience."""
    with ExitStack() as stack:
        for _ in range(POOL):
            stack.enter_context(psycopg.connect(bouncer.dsn)).execute("select 1")


def _why_alive(end: End, warm: set[int], pg: Postgres) -> str:
    with psycopg.connect(pg.dsn) as conn:  # as PgBouncer would open one now
        interval, timeout = conn.execute(
            "select current_setting('client_connection_check_interval'), current_setting('statement_timeout')"
        ).fetchall()[0]
    if (interval, timeout) == ("0", "0"):
        return texts.UNPROTECTED
    if end.pid in warm:
        return texts.OLD
    return texts.TOO_LATE.format(interval, timeout)


# --- a scene with abandoned queries -------------------------------------------------------------------------


def _pids(trial: Trial, answer: Answer, scene: Scene) -> set[int]:
    _returns(trial, "`orphans(server, console)` returns", answer)
    value = answer.value
    is_list = isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value)
    if not is_list:
        trial.expect("a list of process ids", f"{value!r}"[:LONGEST], False, texts.LIST)
    pids: set[int] = set(value)
    return pids - scene.before


# --- what they share ----------------------------------------------------------------------------------------


def _start(trial: Trial, box: Sandbox, name: str, bouncer: PgBouncer) -> None:
    _warm(bouncer)
    _returns(trial, f"`{name}(dsn)` returns", box.do(WITHIN, call, name, bouncer.dsn, keep="app"))


def _returns(trial: Trial, expected: str, answer: Answer) -> None:
    if answer.problem:
        trial.expect(expected, str(answer.problem), False, texts.READ)


def _users(number: int) -> list[tuple[int]]:
    return [(1 + at * 31 % 1000,) for at in range(number)]


def _wanted(pg: Postgres) -> dict[int, tuple[Any, ...]]:
    rows = pg.rows("select user_id, count(*), sum(amount) from orders group by user_id")
    return {row["user_id"]: (row["count"], row["sum"]) for row in rows}


def _first(wrong: Sequence[Answer]) -> str:
    """The first of these answers, as the end of a sentence."""
    if not wrong:
        return ""
    return f"; instead {wrong[0].problem or repr(wrong[0].value) + ' was returned'}"
