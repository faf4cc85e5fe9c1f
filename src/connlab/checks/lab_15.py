"""The checks of lab 15: callers that give up and come again, and what they leave running behind a PgBouncer.

The learner writes ``orphans(server, console)``, which tells abandoned queries from others; ``start(dsn)`` and
``ask(app, user_id)``, which gives up in order; the same for asyncio, ``start_async`` and ``ask_async``;
``protect(server, console)`` for clients that are killed; and ``ask_again(app, attempt)``, which tries again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import psycopg

from connlab.checks import lab_15_texts as texts
from connlab.checks.abandoned import (
    LongQuery,
    Watch,
    active,
    in_a_loop,
    retrying,
    scripted,
    until,
)
from connlab.checks.answers import LONGEST, Answer
from connlab.checks.drivers import call, load
from connlab.checks.lab_15_callers import (
    PATIENCE,
    POOL,
    WITHIN,
    answered,
    first,
    gives_up,
    is_fast,
    not_cut_short,
    not_timed_out,
    nothing_stays,
    returns,
    starts,
    users,
    warm_up,
    within_pool,
)
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
from connlab.checks.protection import not_yet_read, unprotected
from connlab.checks.sandbox import Sandbox
from connlab.checks.trial import Trial, check
from connlab.postgres import Postgres

Function = Callable[..., Any]

GONE = 1.5
"""Seconds that the query of a killed client may go on."""
ORPHANS = 3
SPARE, EACH = 3, 5
"""Retries that are free, and for how many requests of the service there is one more."""
SLACK = 2
"""Retries more than that: counters in many threads may be a little off."""
REPORTS = "reports"
"""The role of the nightly report."""


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
        starts(trial, box, "start", bouncer)
        gives_up(trial, box, "ask", "ask", pg, bouncer, (texts.BACK, texts.LEFT, texts.RETURNS))
        answered(trial, box, "ask", pg)
        not_cut_short(trial, box, "ask", pg)
        nothing_stays(trial, bouncer)


@check("A task that is cancelled leaves no query behind")
def cancels_tasks(trial: Trial, start_async: Function, ask_async: Function, pg: Postgres) -> None:
    """Write the coroutines `start_async` and `ask_async`: who awaits them cancels after 0.3 seconds."""
    with service(trial, pg, POOL, start_async=start_async, ask_async=ask_async) as (box, bouncer):
        # Who waits for a connection leaves first, so that none gets one in the moment in which it leaves: psycopg's
        # cancel could then be there before the query, and would do nothing.
        box.do(WITHIN, in_a_loop, "ask_async", PATIENCE / 2, "ask_briefly")
        box.do(WITHIN, in_a_loop, "ask_async", PATIENCE, "ask_async")
        box.do(WITHIN, in_a_loop, "start_async", None, "start_async")
        starts(trial, box, "start_async", bouncer)
        gives_up(
            trial, box, "ask_async", "ask_briefly", pg, bouncer, (texts.BLOCKS, texts.LEFT_BY_TASK, texts.SWALLOWED)
        )
        answered(trial, box, "ask_async", pg)
        not_cut_short(trial, box, "ask_async", pg)
        nothing_stays(trial, bouncer)


@check("The server ends the query of a killed client")
def protects(trial: Trial, protect: Function, pg: Postgres) -> None:
    """Write `protect`: afterwards no query goes on for long whose client was killed, and no other is cut short."""
    with (
        service(trial, pg, POOL, protect=protect) as (box, bouncer),
        unprotected(pg),
        reports_role(pg, REPORTS) as report_dsn,
    ):
        warm_up(bouncer)
        warm = {row["pid"] for row in trial.sessions.now()}
        with LongQuery(bouncer.dsn, PATIENCE * 0.8, again=True) as meanwhile:
            until(lambda: active(trial.sessions), WITHIN)
            answer = box.do(WITHIN, call, "protect", pg.admin_dsn, bouncer.admin_dsn)
            meanwhile.enough()
        returns(trial, "`protect(server, console)` returns", answer)
        with ExitStack() as stack:
            report = stack.enter_context(
                LongQuery(report_dsn, longer_than_allowed(report_dsn, 0.8 if is_fast() else 3))
            )
            request = stack.enter_context(LongQuery(bouncer.dsn, PATIENCE * 0.8))
            ended = list(kill_clients(trial, bouncer, 3 if is_fast() else 6, GONE))
            longest = max(end.seconds for end in ended)
            trial.expect(
                f"the query of a client that was killed ends within {GONE:g} s ({len(ended)} killed)",
                f"{longest:.2f} s, the longest" if longest < GONE else "one still ran then",
                longest < GONE,
                _why_alive(max(ended, key=lambda end: end.seconds), warm, pg),
            )
            for what, query, look in (
                (f"a request that takes {request.seconds:.2f} s is answered", request, texts.IMPATIENT),
                (f"so is one that was under way while `{protect.__name__}` was called", meanwhile, texts.CUT),
                (f"a report of {report.seconds:g} s, in the role `{REPORTS}`, is answered", report, texts.REPORT),
            ):
                problem = query.problem()
                trial.expect(what, f"`{type(problem).__name__}: {problem}`" if problem else "it was", not problem, look)


@check("Callers try again, and the server does not notice")
def retries(trial: Trial, start: Function, ask: Function, ask_again: Function, pg: Postgres) -> None:
    """Write `ask_again`: it tries again after a TimeoutError, three times in all, and within the service's budget."""
    with service(trial, pg, POOL, start=start, ask=ask, ask_again=ask_again) as (box, bouncer):
        starts(trial, box, "start", bouncer)
        _tries_by_script(trial, box)
        starts(trial, box, "start", bouncer)
        _budget_by_script(trial, box)
        starts(trial, box, "start", bouncer)
        box.do(WITHIN, load, "ask", users(2 * POOL), 2 * POOL, on="app")
        callers = 12 if is_fast() else 24
        allowed = SPARE + callers // EACH
        with orders_locked(trial, pg), Watch(trial.sessions) as watch:
            answers, attempts = box.do(WITHIN, retrying, users(callers), callers)
        trial.expect(
            f"after a new `start`, at most {callers + allowed + SLACK} attempts for {callers} requests at once that "
            f"all give up: the first of each, {allowed} again, and {SLACK} that counters may miss in many threads",
            f"{len(attempts)} attempts",
            len(attempts) <= callers + allowed + SLACK,
            texts.BUDGET.format(_most_tries(attempts)),
        )
        wrong = not_timed_out(answers)
        trial.expect(
            f"{callers} times a TimeoutError, in the end",
            f"{callers - len(wrong)} times{first(wrong)}",
            not wrong,
            texts.IN_THE_END,
        )
        within_pool(trial, watch)
        answered(trial, box, "ask", pg)


# --- trying again -------------------------------------------------------------------------------------------


def _scripted(
    trial: Trial, box: Sandbox, expected: str, outcomes: list[str], attempts: int, ending: str, look: str
) -> list[float]:
    """A request whose attempts end as the check wants: how many it makes, and what it ends with; when they began."""
    answer, times = box.do(WITHIN, scripted, outcomes)
    problem = answer.problem
    if ending == "TimeoutError" and len(times) == attempts:
        look = texts.IN_THE_END
    trial.expect(
        expected,
        f"{problem or repr(answer.value)}, after {len(times)} attempt{'s' if len(times) != 1 else ''}",
        len(times) == attempts and (ending in problem.kinds if problem else answer.value == ending),
        texts.READ if problem and not {"TimeoutError", *outcomes} & {*problem.kinds} else look,
    )
    return list(times)


def _tries_by_script(trial: Trial, box: Sandbox) -> None:
    expected = "a request whose first attempt gives up is answered by its second"
    times = _scripted(trial, box, expected, ["TimeoutError", "row"], 2, "row", texts.AGAIN)
    pause = times[1] - times[0]
    trial.expect("a pause before the second attempt, of 0.02 s or more", f"{pause:.3f} s", pause >= 0.02, texts.PAUSE)
    expected = "no second attempt after an error that is not a TimeoutError: it goes on to the caller"
    _scripted(trial, box, expected, ["UndefinedTable", "row"], 1, "UndefinedTable", texts.HOPELESS)


def _budget_by_script(trial: Trial, box: Sandbox) -> None:
    """One request after the other, since a start: the numbers are exact."""
    fails, others = ["TimeoutError"] * 5 + ["row"], 20
    expected = "after a new `start`, a request whose attempts all give up: 3 attempts, then a TimeoutError"
    _scripted(trial, box, expected, fails, 3, "TimeoutError", texts.ENDLESS)
    expected = f"a second one: 2 attempts, with which the {SPARE} retries are spent"
    _scripted(trial, box, expected, fails, 2, "TimeoutError", texts.SPENT)
    expected = f"a third one: 1 attempt, as no retry is left before the request number {EACH}"
    _scripted(trial, box, expected, fails, 1, "TimeoutError", texts.SPENT)
    for _ in range(others):
        box.do(WITHIN, scripted, ["row"])
    expected = f"after {others} requests that were answered, one whose first attempt gives up is answered by its second"
    _scripted(trial, box, expected, ["TimeoutError", "row"], 2, "row", texts.GROWS)


def _most_tries(attempts: Sequence[int]) -> int:
    return max(attempts.count(user) for user in set(attempts))


# --- killed clients -----------------------------------------------------------------------------------------


def _why_alive(end: End, warm: set[int], pg: Postgres) -> str:
    with psycopg.connect(pg.dsn) as conn:  # as PgBouncer would open one now
        interval, timeout = conn.execute(
            "select current_setting('client_connection_check_interval'), current_setting('statement_timeout')"
        ).fetchall()[0]
    if (interval, timeout) == ("0", "0"):
        return texts.UNREAD.format(*unread) if (unread := not_yet_read(pg)) else texts.UNPROTECTED
    if end.pid in warm:
        return texts.OLD
    return texts.TOO_LATE.format(interval, timeout)


# --- a scene with abandoned queries -------------------------------------------------------------------------


def _pids(trial: Trial, answer: Answer, scene: Scene) -> set[int]:
    returns(trial, "`orphans(server, console)` returns", answer)
    value = answer.value
    is_list = isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value)
    if not is_list:
        trial.expect(
            "a list of process ids", (value if isinstance(value, str) else f"{value!r}")[:LONGEST], False, texts.LIST
        )
    pids: set[int] = set(value)
    return pids - scene.before
