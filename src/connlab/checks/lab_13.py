"""The checks of lab 13: a shop with seven leaks among healthy functions.

The learner writes ``lost(shop, function, *arguments)``, a test helper; ``leaks(dsn)``, which names the requests that
lose a connection; and mends functions of the notebook's ``GIVEN``. What leaks, and what a mended function must answer,
is found by running the functions as given: nothing of it stands here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from connlab.checks import shops
from connlab.checks.answers import Problem, problems
from connlab.checks.mended import (
    CREW,
    MORE,
    NOT_GIVEN,
    PATHS,
    READ,
    SIZE,
    WITHIN,
    Function,
    Functions,
    Requests,
    first_of,
    mended_functions,
    missing,
    opened_shop,
    unchanged,
    when_gone,
    whole_pool,
    whole_shop,
)
from connlab.checks.sandbox import Sandbox
from connlab.checks.trial import Trial, check
from connlab.postgres import Postgres

BEFORE_AND_AFTER = (
    "Return a number: how many connections are out after the call, less those that were out before it. A connection is "
    "out when the pool counts it (`pool_size`) and cannot lend it (`pool_available`): see `shop.pool.get_stats()`."
)
ERRORS = "`lost` is asked about connections. Whatever the call raises is no answer to that: catch it, and count then."
ACCOUNT = (
    "The server shows nothing of a connection that was closed, and the pool still has it in its books: count there."
)
EARLIER = "What was out before the call is not this call's doing: count before it, too."
REPLACED = (
    "The pool got this one back, found it broken, and opens another one in the background. For a moment it has none to "
    "lend. Wait a little before you call it lost: look again and again, a third of a second long."
)
CANCELLED = (
    "Here an error came that the function does not expect. An `except` for some kinds of error gives the connection "
    "back after these alone. What must happen after every error belongs into `finally`, or at the end of "
    "`with shop.pool.connection()`."
)
TERMINATED = (
    "The connection was dead, and a dead one behaves differently: `conn.rollback()` raises an error, so that the line "
    "behind it is not reached, and `conn.close()` does nothing. It must go back all the same, or the pool does not "
    "replace it: in a `finally` with nothing before `putconn` that can fail, or by `with shop.pool.connection()`."
)
SLOTS = (
    "The server has 20 slots, and each `Shop` takes four of them until its pool is closed: `shop.pool.close()`, after "
    "each request."
)
THE_CHECKS = "`leaks` gets one argument, the DSN of a database with a shop's data: make each `Shop(dsn)` with it."
PYTHONS = (
    "This error does not come from the server or the pool. Something is left of an earlier request that this function "
    "does not expect: on the connection that it borrowed, or in what the program remembers, half changed."
)
MEASURING = 45.0
"""Seconds that the learner's `leaks` may take."""
DEAD = (
    "A connection that has failed must not be used again. Whatever is kept from one request to the next outlives the "
    "restart, a dead connection too; what goes back to the pool is replaced by it."
)
SEEN = {
    "": "no session of it",
    "idle": "a session that is `idle`, like a healthy one",
    "idle in transaction": "a session that is `idle in transaction`",
    "idle in transaction (aborted)": "a session that is `idle in transaction (aborted)`",
}
WHERE_TO_LOOK = {
    "": "A connection without a session has been closed: by `close()`, or by Python, when nothing in the program "
    "referred to it any more. The pool was not told. Look at what becomes of `conn` at each end of the function: "
    "`return`, the last line, an exception.",
    "idle": "An idle session that is not in the pool has an owner, and is in no transaction: somebody keeps it for "
    "later. Look for a connection that is put somewhere.",
    "idle in transaction": "Who is in a transaction has begun something and not ended it: a `with` block whose end has "
    "not come yet, for example.",
}


# --- the checks ---------------------------------------------------------------------------------------------


@check("A call that loses connections is told from one that does not")
def sees_losses(trial: Trial, Shop: Function, lost: Function, pg: Postgres) -> None:
    """Write `lost`: it calls the function, and returns how many more connections are out of the pool than before."""
    cases: list[tuple[str, int, Function, tuple[Any, ...], str]] = [
        ("a call that gives its connection back", 0, shops.gives_back, (), BEFORE_AND_AFTER),
        ("a call that keeps two", 0, shops.keeps, (2,), BEFORE_AND_AFTER),
        ("a call that fails, and gives its connection back", 0, shops.fails_and_gives_back, (), ERRORS),
        ("a call that fails, and keeps one", 0, shops.keeps_and_fails, (), ERRORS),
        ("a call that closes its connection and does nothing else with it", 0, shops.closes, (), ACCOUNT),
        ("a healthy call, after others have lost two", 2, shops.gives_back, (), EARLIER),
        ("a call that gives a broken connection back", 0, shops.throws_away, (), REPLACED),
    ]
    with trial.sandbox(pg, Shop=Shop, lost=lost) as box:
        _furnish(pg)
        for what, before, function, arguments, look in cases:
            dsn = shops.dsn_of(pg, shops.MENDED)
            answer, wanted = box.do(WITHIN, shops.judged, dsn, before, function, arguments)
            raised = answer.problem is not None
            trial.expect(
                f"{wanted} for {what}",
                str(answer.problem) if raised else f"{answer.value!r}",
                not raised and type(answer.value) is int and answer.value == wanted,
                (ERRORS if look is ERRORS else READ) if raised else look,
            )


@check("The requests that lose a connection")
def finds_them(
    trial: Trial, Shop: Function, GIVEN: Functions, REQUESTS: Requests, leaks: Function, pg: Postgres
) -> None:
    """Write `leaks`: it returns pairs of a function and a case of `REQUESTS`, the requests that lose a connection."""
    with trial.sandbox(pg, Shop=Shop, leaks=leaks, **GIVEN) as box:
        _furnish(pg)
        answer, pairs = box.do(MEASURING, shops.named, shops.dsn_of(pg, shops.MENDED))
        trial.sessions.end()  # what it has lost may hold locks
        if answer.problem:
            trial.expect("`leaks(dsn)` returns", str(answer.problem), False, _of_leaks(answer.problem))
        known = {(name, case) for name, cases in REQUESTS.items() for case in cases}
        strange = sorted(set(pairs or []) - known)
        trial.expect(
            "pairs of a function and one of its cases, as they stand in `REQUESTS`",
            f"not in `REQUESTS`: {', '.join(map(repr, strange))}"
            if strange
            else "no pairs"
            if pairs is None
            else f"{len(pairs)} pairs",
            pairs is not None and not strange,
            'Return a list such as `[("a function", "a case"), ("another function", "a case")]`, with the spelling of '
            "`REQUESTS`.",
        )
        losses = _losses(trial, box, pg, REQUESTS)
        if not any(loss.number for loss in losses.values()):
            trial.expect("functions in `GIVEN` of which some lose connections", "none does", False, NOT_GIVEN)
        accused = [losses[pair] for pair in pairs or []]
        _none_is_accused_falsely(trial, accused, {loss.name for loss in losses.values() if loss.number})
        missed = [loss for pair, loss in losses.items() if loss.number and pair not in (pairs or [])]
        _none_is_missed(trial, missed, accused, len(losses) - len(accused))


@check("A connection back on every path")
def every_path(
    trial: Trial,
    Shop: Function,
    GIVEN: Functions,
    REQUESTS: Requests,
    balance: Function,
    order: Function,
    correct: Function,
    report: Function,
    pg: Postgres,
) -> None:
    """Mend `balance`, `order`, `correct` and `report`: as given, without the leak."""
    mended = {"balance": balance, "order": order, "correct": correct, "report": report}
    mended_functions(trial, Shop, GIVEN, REQUESTS, mended, pg)


@check("No connection is kept")
def nothing_kept(
    trial: Trial,
    Shop: Function,
    GIVEN: Functions,
    REQUESTS: Requests,
    newest: Function,
    user_name: Function,
    next_page: Function,
    pg: Postgres,
) -> None:
    """Mend `newest`, `user_name` and `next_page`: as given, without the leak."""
    mended = {"newest": newest, "user_name": user_name, "next_page": next_page}
    mended_functions(trial, Shop, GIVEN, REQUESTS, mended, pg)


@check("Interrupted in the middle of a request")
def interrupted(
    trial: Trial,
    Shop: Function,
    GIVEN: Functions,
    REQUESTS: Requests,
    balance: Function,
    order: Function,
    correct: Function,
    report: Function,
    newest: Function,
    user_name: Function,
    next_page: Function,
    pg: Postgres,
) -> None:
    """Mend all seven: a request that somebody cancels, or whose connection is ended, loses no connection either."""
    mended = [balance, order, correct, report, newest, user_name, next_page]
    with whole_shop(trial, Shop, GIVEN, mended, pg) as box:
        for function, what, look in (
            ("pg_cancel_backend", "cancelled", CANCELLED),
            ("pg_terminate_backend", "ended, with their connections,", TERMINATED),
        ):
            opened_shop(trial, box, pg, shops.MENDED, quiet=True)
            new = box.do(WITHIN, shops.conditions, SIZE)
            interruptions = shops.Interruptions(pg, function)
            calls = _first_cases(REQUESTS)
            with interruptions.run():
                _, out = box.do(WITHIN, shops.requests, calls, CREW)
            trial.expect(
                f"every connection back after requests that were {what} while they waited for the server",
                f"after {len(calls)} requests and {interruptions.number} calls of `{function}`: {missing(out)}",
                not out and interruptions.number > 0,
                look,
            )
            unchanged(trial, box, f"requests that were {what}", new)
            _answered_still(trial, box, calls)


@check("The server restarts")
def restarted(
    trial: Trial,
    Shop: Function,
    GIVEN: Functions,
    REQUESTS: Requests,
    balance: Function,
    order: Function,
    correct: Function,
    report: Function,
    newest: Function,
    user_name: Function,
    next_page: Function,
    pg: Postgres,
) -> None:
    """Mend all seven: after a restart of the server each dead connection costs one request, and comes back too."""
    mended = [balance, order, correct, report, newest, user_name, next_page]
    with whole_shop(trial, Shop, GIVEN, mended, pg) as box:
        opened_shop(trial, box, pg, shops.MENDED, quiet=True)
        calls = _first_cases(REQUESTS)
        box.do(WITHIN, shops.requests, calls, CREW, in_turn=True)
        pg.restart()
        answers, out = box.do(WITHIN, shops.requests, [*calls, *calls], CREW, in_turn=True)
        trial.expect("every connection back after a restart of the server", missing(out), not out, TERMINATED)
        failed, last = problems(answers), answers[SIZE + len(calls) // 2 :]
        trial.expect(
            f"at most {SIZE} failed requests, one for each dead connection, and then none",
            f"{len(failed)} of {len(answers)} failed, {len(problems(last))} of the last {len(last)}"
            f"{first_of(problems(last)) or _as_expected(failed)}",
            len(failed) <= SIZE and not problems(last),
            _still(problems(last) or failed),
        )


# --- finding ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What one request does to a new shop."""

    name: str
    number: int
    """Connections that it loses."""
    seen: tuple[str, ...]
    """How the server shows each: the state of a session, or nothing."""


def _losses(trial: Trial, box: Sandbox, pg: Postgres, requests: Requests) -> dict[tuple[str, str], Loss]:
    """Each request once, each in a shop that has lost nothing yet."""
    found: dict[tuple[str, str], Loss] = {}
    whole = False
    for name, cases in requests.items():
        for case, arguments in cases.items():
            if not whole:
                opened_shop(trial, box, pg, shops.GIVEN, quiet=True)
            before = whole_pool(trial)
            _, out = box.do(WITHIN, shops.request, name, arguments)
            found[name, case] = Loss(name, len(out), _seen(trial, box, before, len(out)))
            whole = not out
    return found


def _of_leaks(problem: Problem) -> str:
    """What to look at when `leaks` has failed."""
    if {"PoolTimeout", "OperationalError"} & {problem.name}:
        return f"{READ} {SLOTS}"
    return f"{READ} {THE_CHECKS}" if problem.name == "TypeError" else READ


def _furnish(pg: Postgres) -> None:
    with shops.manager(pg) as conn:
        shops.furnish(conn)


def _seen(trial: Trial, box: Sandbox, before: int, number: int) -> tuple[str, ...]:
    """What the server shows of ``number`` connections, where it had ``before`` sessions."""
    if not number:
        return ()
    rows = when_gone(trial, box.do(WITHIN, shops.open_connections), shops.BUSY)
    open_ = min(number, max(0, number - (before - len(rows))))
    states = sorted((str(row["state"]) for row in rows), key=lambda state: state == "idle")[:open_]
    return (*states, *[""] * (number - open_))


def _none_is_accused_falsely(trial: Trial, accused: Sequence[Loss], leaking: set[str]) -> None:
    innocent = [loss for loss in accused if not loss.number]
    elsewhere = sum(loss.name in leaking for loss in innocent)
    words = [
        f"{elsewhere} of a function that loses one in another case" if elsewhere else "",
        f"{len(innocent) - elsewhere} of a function that loses none at all" if len(innocent) > elsewhere else "",
    ]
    trial.expect(
        "each request that you name loses a connection",
        f"{len(accused) - len(innocent)} of {len(accused)} do"
        + (f"; among the others: {', '.join(filter(None, words))}" if innocent else ""),
        not innocent,
        "How careful a function looks is no measure. Make each request that you name on a new shop, and let `lost` "
        "tell. What comes back in the end is not lost, however long the way.",
    )


def _none_is_missed(trial: Trial, missed: Sequence[Loss], accused: Sequence[Loss], others: int) -> None:
    seen = Counter(state for loss in missed for state in loss.seen)
    shown = ", ".join(f"{SEEN.get(state, state)} ({number})" for state, number in seen.items())
    lost = [state for loss in accused for state in loss.seen]
    trial.expect(
        "no request that you do not name loses one",
        f"{len(missed)} of {others} do"
        + (
            f"; PostgreSQL shows of what they lost: {shown}"
            if missed
            else f"; of the {len(lost)} connections that yours lost, PostgreSQL still shows {sum(map(bool, lost))}"
        ),
        not missed,
        WHERE_TO_LOOK.get(next(iter(seen)), PATHS) if missed else "-",
    )


# --- faults -------------------------------------------------------------------------------------------------


def _first_cases(requests: Requests) -> list[tuple[str, tuple[Any, ...]]]:
    return [(name, next(iter(cases.values()))) for name, cases in requests.items()]


def _answered_still(trial: Trial, box: Sandbox, calls: shops.Calls) -> None:
    more = list(itertools.islice(itertools.cycle(calls), MORE))
    answers, out = box.do(WITHIN, shops.requests, more, CREW, in_turn=True)
    failed = problems(answers)
    trial.expect(
        f"{MORE} more requests, {MORE} answers",
        f"{MORE - len(failed)} answers{first_of(failed)}",
        not failed and not out,
        _still(failed),
    )


def _as_expected(failed: Sequence[Problem]) -> str:
    return f"; as expected, the first error was {failed[0]}" if failed else ""


def _still(failed: Sequence[Problem]) -> str:
    """What to look at when requests fail that should not."""
    return PYTHONS if failed and "Error" not in failed[0].kinds else DEAD
