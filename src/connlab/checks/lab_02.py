"""The checks of lab 02: a request handler with a pool, held against the one that connects for every request.

The learner writes ``start(dsn)``, which returns whatever the service keeps, ``handle(app, user_id)``, which answers
one request, and ``stop(app)``.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from connlab.checks.answers import Answer, Problem, problems
from connlab.checks.drivers import call, crew, is_none, load
from connlab.checks.errors import CheckError, Hangs
from connlab.checks.pools import kept_after_requests, kept_while_stuck
from connlab.checks.sandbox import Sandbox
from connlab.checks.sessions import Crowd, locked, opened
from connlab.checks.trial import Trial, check
from connlab.postgres import Postgres

Function = Callable[..., Any]

MOST = 8
"""Connections that the service may have."""
AT_ONCE = 4
"""Requests that it must be able to work on at the same time."""
FACTOR = 3
"""How many times faster than with a connection for each request."""
CREW = 4
"""Threads of the service that go on over a restart of the server."""
CROWD = 32
BAD_REQUESTS = 3 * MOST
WITHIN = 6.0
"""Seconds that a round of requests may take."""
SOON = 3.0
"""Seconds that a round may take whose requests fail at once."""

ONCE = (
    "Connections must outlive the request: make them once, in `start`, and have `handle` borrow one. A pool that is "
    "made in `handle` is worse than a connection that is."
)
LEAK = (
    "A request that fails must give its connection back too. Follow the path of the exception through `handle`: which "
    "line gives the connection back, and is it reached? `with pool.connection() as conn:` or `finally` reaches it."
)
LOOP = (
    "`handle` does not come to an end at this line: a loop that tries again without end, or a wait that nobody ends. A "
    "query that the server refuses is refused each time: let the error go on to the caller."
)
SHORT = (
    "Requests waited for a connection until the pool's `timeout` was over, though each request gave its connection "
    "back. So many at once have to wait longer than that: give them more time (`timeout`), or let more of them through "
    f"(`max_size`, up to {MOST})."
)
ALONE = (
    "Requests waited for a connection, and the pool has none at all: the server sees no session of it. Does `start` "
    "give it the DSN as it got it, and open it?"
)
SHARED = (
    "A connection does one thing at a time: requests that share one stand in line for it, and one slow query holds up "
    "all others. Give each request a connection of its own for as long as it works."
)
NARROW = (
    "Your pool lets {} through at a time, and the other requests wait for their turn. The service may have "
    f"{MOST} connections: let more of them through (`max_size`)."
)
NOTHING = (
    "`start` has returned None, so that is what `handle` gets as `app`. Return from `start` what the service keeps."
)
UNCHANGED = (
    "Let psycopg's error through as it is: do not turn it into another one, and let the server judge the user. The "
    "caller tells by its class whether the request was nonsense or the service is broken."
)
BROKEN = (
    "The connection came back inside a failed transaction, and the next request got it like that. Before a connection "
    "goes back, end its transaction: `conn.rollback()`. `with pool.connection()` does so."
)
CLOSED = (
    "The pool is open from `open=True` (or `pool.open()`) to `pool.close()`. `with ConnectionPool(…) as pool:` closes "
    "it at the end of its block, also when the block ends by `return`: what `start` returns must be open."
)
PAUSES = (
    "A request may fail after a restart, but none may wait for long. With `check=`, psycopg_pool tries the dead "
    "connections one after the other, with a pause that doubles each time, while the request waits. Without it each "
    "dead connection costs one failed request, and nobody waits."
)
READ = "Read the error, from its end, and the line that it came from."
SERVER = "Start the server of this lab with `log_connections=True`: the check counts connections in its log."


def _fast() -> bool:
    return os.environ.get("CONNLAB_FAST") == "1"


# --- the checks ---------------------------------------------------------------------------------------------


@check("Faster than a connection for every request")
def faster(trial: Trial, slow_handle: Function, start: Function, handle: Function, pg: Postgres) -> None:
    """Write `start` and `handle`: the same answers as `slow_handle`, in a third of the time or less."""
    with trial.sandbox(pg, slow_handle=slow_handle, start=start, handle=handle) as box:
        _start(trial, box, pg)
        slow, pooled = _side_by_side(box, pg)
        _all_answered(trial, box, pooled, {given.arguments[-1]: given.value for given in slow})
        mark, users = pg.mark(), _users(40)
        box.do(WITHIN, load, "handle", users, 1, on="app")
        _expect_few_opened(trial, opened(pg, mark), len(users))
        ratio = _median(slow) / _median(pooled)
        trial.expect(
            f"a median latency at least {FACTOR} times lower than that of `slow_handle`",
            f"{ratio:.1f} times lower: {1000 * _median(pooled):.2f} ms against {1000 * _median(slow):.2f} ms, "
            f"{len(pooled)} requests each, in turn",
            ratio >= FACTOR,
            "No new connection, and still slow: what does `handle` do besides its one query? Every statement is a "
            "round trip, and what `start` can do once need not be done for every request.",
        )


@check("No more connections than the service may have")
def bounded(trial: Trial, start: Function, handle: Function, pg: Postgres) -> None:
    """Write `start` and `handle`, with at most eight connections however many requests come at once."""
    with trial.sandbox(pg, start=start, handle=handle) as box:
        crowd, answers = _crowd(trial, box, pg)
        if not crowd.sessions:  # it is no merit to have none
            _all_answered(trial, box, answers)
        trial.expect(
            f"at most {MOST} sessions while {CROWD} requests are waiting for the database",
            f"{_sessions(crowd)}{_first(answers)}",
            crowd.sessions <= MOST,
            f"The service may have {MOST} connections; the server has `max_connections` = "
            f"{pg.value('show max_connections')} for everybody. Limit the pool (`max_size`), and let requests wait for "
            "their turn. A connection for each thread is no limit.",
        )
        _all_answered(trial, box, answers)


@check("Several requests at once")
def many_threads(trial: Trial, start: Function, handle: Function, pg: Postgres) -> None:
    """Write `start` and `handle` so that many threads can use them, with at least four requests in the server."""
    with trial.sandbox(pg, start=start, handle=handle) as box:
        crowd, answers = _crowd(trial, box, pg)
        _all_answered(trial, box, answers)
        trial.expect(
            f"{AT_ONCE} or more of {CROWD} requests in the server at the same time",
            f"{crowd.at_once} at a time, on {_sessions(crowd)}",
            crowd.at_once >= AT_ONCE,
            SHARED if crowd.at_once < 2 else NARROW.format(crowd.at_once),
        )


@check("A request that fails gives its connection back")
def gives_back(trial: Trial, start: Function, handle: Function, pg: Postgres) -> None:
    """Write `start` and `handle` so that a request which fails raises its error, and harms no other request."""
    with trial.sandbox(pg, start=start, handle=handle) as box:
        _start(trial, box, pg)
        try:
            failing = box.do(SOON, load, "handle", [("no number",)] * BAD_REQUESTS, 4, on="app")
        except Hangs as hang:
            trial.expect(f"{BAD_REQUESTS} errors, each at once", *_stuck(trial, hang))
            raise
        _errors_arrive(trial, box, failing)
        good = box.do(WITHIN, load, "handle", _users(3 * MOST), MOST, on="app")
        _all_answered(trial, box, good, after=f"after {BAD_REQUESTS} that failed")
        _none_in_transaction(trial)


@check("A dead connection is replaced")
def survives(trial: Trial, start: Function, handle: Function, pg: Postgres) -> None:
    """Write `start` and `handle` so that the service works again by itself after a restart of the server."""
    with trial.sandbox(pg, start=start, handle=handle) as box:
        _start(trial, box, pg)
        _all_answered(trial, box, box.do(WITHIN, crew, "handle", _users(2 * MOST), CREW, "app"))
        pg.restart()
        try:
            after = box.do(WITHIN, crew, "handle", _users(3 * MOST), CREW, "app", in_turn=True)
        except Hangs as hang:
            trial.expect(f"{3 * MOST} requests after a restart, done within {WITHIN:g} s", f"{hang}", False, PAUSES)
            raise
        failed, last = len(problems(after)), after[-MOST:]
        trial.expect(
            f"after a restart of the server at most {MOST} failed requests, one for each dead connection, and then "
            "none",
            f"{failed} of {len(after)} failed, {len(problems(last))} of the last {MOST}{_first(after)}",
            failed <= MOST and not problems(last),
            "A connection that has failed must not be used again: throw it away and open another one. psycopg_pool "
            "does so for what comes back broken (`conn.broken`); a connection that you keep yourself, you must replace "
            "yourself.",
        )


@check("Nothing is left open")
def closes(trial: Trial, start: Function, handle: Function, stop: Function, pg: Postgres) -> None:
    """Write `stop`: after it, the service has no connection any more."""
    with trial.sandbox(pg, start=start, handle=handle, stop=stop) as box:
        _start(trial, box, pg)
        _all_answered(trial, box, box.do(WITHIN, load, "handle", _users(2 * MOST), 4, on="app"))
        stopped = box.do(WITHIN, call, "stop", on="app")
        trial.expect("`stop` returns", _outcome(stopped), stopped.problem is None, "Read the error, from its end.")
        left = trial.sessions.fewest(2)
        trial.expect(
            "no session of the service on the server after `stop`",
            f"{left} left, though the program still runs",
            left == 0,
            "Close what `start` has opened, all of it: `pool.close()`. Otherwise the connections stay until the "
            "program ends, and with every deployment two generations of them are open.",
        )


# --- what they share ----------------------------------------------------------------------------------------


def _users(number: int) -> list[tuple[int]]:
    return [(1 + at * 31 % 1000,) for at in range(number)]


def _start(trial: Trial, box: Sandbox, pg: Postgres) -> None:
    begun = box.do(WITHIN, call, "start", pg.dsn, keep="app")
    if begun.problem:
        trial.expect("`start(dsn)` returns", str(begun.problem), False, "Read the error, from its end.")


def _side_by_side(box: Sandbox, pg: Postgres) -> tuple[list[Answer], list[Answer]]:
    """The same requests to both, in turn, so that what disturbs one disturbs the other; the first round warms up."""
    slow: list[Answer] = []
    pooled: list[Answer] = []
    mark = pg.mark()
    for at in range(5 if _fast() else 20):
        users = _users(10)
        one = box.do(WITHIN, load, "slow_handle", [(pg.dsn, user) for (user,) in users], 1)
        other = box.do(WITHIN, load, "handle", users, 1, on="app")
        slow, pooled = (slow + one, pooled + other) if at else (slow, pooled)
    if not opened(pg, mark):
        raise CheckError(SERVER)
    return slow, pooled


def _crowd(trial: Trial, box: Sandbox, pg: Postgres) -> tuple[Crowd, list[Answer]]:
    """Requests that all wait for the same lock, then go on: what the server sees meanwhile, and the answers."""
    _start(trial, box, pg)
    with locked(pg, "orders"):
        pending = box.begin(load, "handle", _users(CROWD), CROWD, on="app")
        most = trial.sessions.most(0.6 if _fast() else 1.5)
    return most, pending.result(WITHIN)


def _sessions(crowd: Crowd) -> str:
    return f"{crowd.sessions} session{'s' if crowd.sessions != 1 else ''}"


def _median(answers: Sequence[Answer]) -> float:
    return statistics.median(answer.seconds for answer in answers)


def _outcome(answer: Answer) -> str:
    return str(answer.problem) if answer.problem else "it did"


def _first(answers: Sequence[Answer]) -> str:
    """The first error, as the end of a sentence; empty without one."""
    found = problems(answers)
    return f"; the first error was {found[0]}" if found else ""


def _all_answered(
    trial: Trial, box: Sandbox, answers: Sequence[Answer], wanted: dict[Any, Any] | None = None, after: str = ""
) -> None:
    failed = problems(answers)
    trial.expect(
        f"{len(answers)} requests{f' {after}' if after else ''}, {len(answers)} answers",
        f"{len(answers) - len(failed)} answers{_first(answers)}",
        not failed,
        _meaning(trial, box, failed[0]) if failed else "-",
    )
    if wanted is not None:
        other = next((each for each in answers if each.value != wanted.get(each.arguments[-1])), None)
        trial.expect(
            "the same answers as those of `slow_handle`",
            f"{other.value!r} for user {other.arguments[-1]}, instead of {wanted[other.arguments[-1]]!r}"
            if other
            else "the same",
            other is None,
            "Return the row as `fetchone()` gives it.",
        )


def _stuck(trial: Trial, hang: Hangs) -> tuple[str, bool, str]:
    """What was measured, and what to look at, when requests that fail do not come to an end."""
    if kept_while_stuck(hang, trial.sessions):
        return f"{hang}, waiting", False, LEAK
    return f"{hang}", False, LOOP


def _meaning(trial: Trial, box: Sandbox, problem: Problem, other: str = READ) -> str:
    """What to look at for an error that a good request got."""
    if problem.name == "InFailedSqlTransaction":
        return BROKEN
    if "PoolTimeout" in problem.kinds:
        return _timed_out(trial, box)
    if problem.name == "PoolClosed":
        return CLOSED
    if "slots are reserved" in problem.message or "too many clients" in problem.message:
        return f"The server has no slot left for your connections: the service may have {MOST}. {ONCE}"
    if "NoneType" in problem.message and box.do(WITHIN, is_none, "app"):
        return NOTHING
    return other


def _timed_out(trial: Trial, box: Sandbox) -> str:
    if kept_after_requests(box):
        return f"Requests waited for a connection, and none came. {LEAK}"
    return SHORT if trial.sessions.now() else ALONE


def _expect_few_opened(trial: Trial, number: int, requests: int) -> None:
    trial.expect(
        f"at most {MOST} new connections for {requests} requests",
        f"{number}",
        number <= MOST,
        ONCE,
    )


def _errors_arrive(trial: Trial, box: Sandbox, failing: Sequence[Answer]) -> None:
    wrong = [each for each in failing if not each.problem or "DataError" not in each.problem.kinds]
    problem = wrong[0].problem if wrong else None
    returned = f"{len(wrong)} did not: {wrong[0].value!r} was returned" if wrong and not problem else "each did"
    trial.expect(
        f"{len(failing)} requests for the user 'no number', each raising the server's error (a `psycopg.DataError`)",
        f"{len(wrong)} did not: {problem}" if problem else returned,
        not wrong,
        _meaning(trial, box, problem, UNCHANGED)
        if problem
        else "An error that nobody hears of is worse than one: let it go on to the caller.",
    )


def _none_in_transaction(trial: Trial) -> None:
    states = [row["state"] for row in trial.sessions.now()]
    held = sum("in transaction" in (state or "") for state in states)
    trial.expect(
        "no session that is still in a transaction",
        f"{held} of {len(states)}",
        held == 0,
        "A transaction that nobody ends holds its locks and its snapshot for as long as the connection lies in the "
        "pool. End it before the connection goes back: commit after success, rollback after an error.",
    )
