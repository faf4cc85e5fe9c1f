"""What the checks of lab 15 measure of callers: how they give up, and whether they are answered afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from connlab.checks import lab_15_texts as texts
from connlab.checks.abandoned import Watch, active, in_transactions, queued, until
from connlab.checks.answers import Answer, Problem, problems
from connlab.checks.drivers import call, load
from connlab.checks.errors import Hangs
from connlab.checks.lab_15_scene import orders_locked
from connlab.checks.pools import kept_after_requests
from connlab.checks.sandbox import Pending, Sandbox
from connlab.checks.trial import Trial
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres

POOL = 2
"""Server connections that PgBouncer may open for the service."""
PATIENCE = 0.3
"""Seconds that a caller waits; the notebook says the same."""
BACK = 2 * PATIENCE
"""Seconds after which a caller that gives up must be back, in one of ``ROUNDS``."""
QUEUED = 0.4 * PATIENCE
"""Seconds by which a caller may be later that has waited for a connection first."""
ROUNDS = 3
"""What is late in all of them is so because of the learner's code, and not because the machine is busy."""
SOON = 0.7
"""Seconds that a query may go on running which was cancelled."""
WITHIN = 6.0
"""Seconds that a round of requests may take."""
# What a SET has left on a server connection.
TIMEOUTS = "select name, setting from pg_settings where name like '%\\_timeout' and setting is distinct from reset_val"


def is_fast() -> bool:
    """Whether the tests run it, with less repetition."""
    return os.environ.get("CONNLAB_FAST") == "1"


def gives_up(
    trial: Trial, box: Sandbox, name: str, others: str, pg: Postgres, bouncer: PgBouncer, looks: tuple[str, str, str]
) -> None:
    """Callers that all get no answer: when they are back, with what, and what still runs then.

    ``looks``: for callers that are late, for queries that are left, and for what is returned in place of an error.
    """
    callers = 8 if is_fast() else 16
    box.do(WITHIN, load, name, users(2 * POOL), 2 * POOL, on="app")  # a pool that is still opening is another matter
    for _ in range(ROUNDS):
        with orders_locked(trial, pg), Watch(trial.sessions) as watch:
            # Two are served; the others come while these wait, and leave later, or, with less patience, before.
            after = PATIENCE / 3 if name == others else PATIENCE / 10
            pending = box.begin(queued, users(callers), (name, POOL), others, after)
            queue = 0
            for _ in range(3):  # all have come by then
                time.sleep(PATIENCE / 3)
                queue = max(queue, _waiting(bouncer))
            answers, hang = _in_time(pending, 5 * PATIENCE)  # the callers may have begun a little later
            until(lambda: not active(trial.sessions), SOON)
            left = len(active(trial.sessions))
        done = answers or pending.result(WITHIN)
        late = [each for each in done if each.seconds > BACK]
        served, longest = (max(each.seconds for each in some) for some in (done[:POOL], done[POOL:]))
        if hang or watch.most > POOL or (not late and longest < served + QUEUED):
            break
    trial.expect(
        f"{callers} callers wait {PATIENCE:g} s at the most; on a busy machine, where that takes a little longer, "
        f"{BACK:g} s in one of {ROUNDS} rounds",
        f"{max(served, longest):.2f} s, the longest"
        + (f": {len(late)} were too late{f', in {hang.place}' if hang and hang.place else ''}" if late else ""),
        not late,
        texts.QUEUE.format(queue) if queue else texts.NO_LIMIT if hang and hang.in_pool else looks[0],
    )
    if name == others:
        trial.expect(
            f"the same for those that wait for a connection first: at most {QUEUED:g} s more than the first {POOL}",
            f"{longest:.2f} s, and {served:.2f} s for the first {POOL}",
            longest < served + QUEUED,
            texts.QUEUE.format(queue) if queue else texts.TWICE,
        )
    wrong = not_timed_out(done)
    trial.expect(
        f"{callers} times a TimeoutError",
        f"{callers - len(wrong)} times{first(wrong)}",
        not wrong,
        _raises(wrong, looks[2]),
    )
    within_pool(trial, watch)
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


def not_timed_out(answers: Sequence[Answer]) -> list[Answer]:
    """The answers that are no TimeoutError."""
    return [each for each in answers if not each.problem or "TimeoutError" not in each.problem.kinds]


def _raises(wrong: Sequence[Answer], returned: str) -> str:
    if not wrong or not wrong[0].problem:
        return returned
    return texts.OTHER_ERROR.get(wrong[0].problem.name, _read(wrong[0].problem))


def _read(problem: Problem) -> str:
    return texts.AWAIT if "'coroutine'" in problem.message or "a coroutine:" in problem.message else texts.READ


def within_pool(trial: Trial, watch: Watch) -> None:
    """No more queries have run at one moment than PgBouncer has server connections."""
    trial.expect(
        f"at most {POOL} active backends at any moment, as many as PgBouncer's pool has",
        f"{watch.most}",
        watch.most <= POOL,
        texts.CLOSED,
    )


def answered(trial: Trial, box: Sandbox, name: str, pg: Postgres) -> None:
    """Requests that could be answered at once are; one round more for a machine that has just been busy."""
    asked = users(16)
    wanted = _wanted(pg)
    for _ in range(3):
        answers = box.do(WITHIN, load, name, asked, 2 * POOL, on="app")
        failed = problems(answers)
        if not all("TimeoutError" in problem.kinds for problem in failed) or not failed:
            break
    trial.expect(
        f"{len(asked)} requests after that, when nothing is slow any more: {len(asked)} answers",
        f"{len(asked) - len(failed)}{f'; the first error was {failed[0]}' if failed else ''}",
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
        return _read(problem)
    return texts.LEAK if kept_after_requests(box) else texts.STRAY


def not_cut_short(trial: Trial, box: Sandbox, name: str, pg: Postgres) -> None:
    """A quick request, then a slower one on the same connection: what was to cancel the first must not hit it."""
    box.do(WITHIN, load, name, users(POOL), POOL, on="app")
    time.sleep(0.4 * PATIENCE)
    with orders_locked(trial, pg):
        pending = box.begin(load, name, users(POOL), POOL, on="app")
        time.sleep(0.75 * PATIENCE)
    early = [each for each in pending.result(WITHIN) if each.problem and each.seconds < 0.9 * PATIENCE]
    trial.expect(
        f"no request gives up before its {PATIENCE:g} s are over",
        f"one did after {early[0].seconds:.2f} s: {early[0].problem}" if early else "none did",
        not early,
        texts.STRAY,
    )


def nothing_stays(trial: Trial, bouncer: PgBouncer) -> None:
    """The server connections, which the next clients get, have no timeout that a request has set."""
    kept = [setting for settings in in_transactions(bouncer.dsn, POOL, TIMEOUTS) for setting in settings]
    trial.expect(
        f"the {POOL} server connections have no timeout of yours when the next client gets them",
        " = ".join(kept[0]) if kept else "none",
        not kept,
        texts.STAYED,
    )


def warm_up(bouncer: PgBouncer) -> None:
    """Have PgBouncer open its server connections: on a busy machine that alone can take a caller's patience."""
    in_transactions(bouncer.dsn, POOL, "select 1")


def starts(trial: Trial, box: Sandbox, name: str, bouncer: PgBouncer) -> None:
    """The learner's function ``name`` makes a new app, which is kept as "app"."""
    warm_up(bouncer)
    returns(trial, f"`{name}(dsn)` returns", box.do(WITHIN, call, name, bouncer.dsn, keep="app"))


def returns(trial: Trial, expected: str, answer: Answer) -> None:
    """The call has ended without an error."""
    if answer.problem:
        trial.expect(expected, str(answer.problem), False, _read(answer.problem))


def users(number: int) -> list[tuple[int]]:
    """The arguments of so many requests."""
    return [(1 + at * 31 % 1000,) for at in range(number)]


def _wanted(pg: Postgres) -> dict[int, tuple[Any, ...]]:
    rows = pg.rows("select user_id, count(*), sum(amount) from orders group by user_id")
    return {row["user_id"]: (row["count"], row["sum"]) for row in rows}


def first(wrong: Sequence[Answer]) -> str:
    """The first of these answers, as the end of a sentence."""
    if not wrong:
        return ""
    return f"; instead {wrong[0].problem or repr(wrong[0].value) + ' was returned'}"
