"""The checks of lab 13: a shop with seven leaks among healthy functions.

The learner writes ``lost(shop, function, *arguments)``, a test helper; ``leaks()``, which names the requests that lose
a connection; and mends functions of the notebook's ``GIVEN``. What leaks, and what a mended function must answer, is
found by running the functions as given: nothing of it stands here.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from connlab.checks import shops
from connlab.checks.answers import Answer, Problem, problems
from connlab.checks.borrowers import Borrowed
from connlab.checks.drivers import call
from connlab.checks.sandbox import Sandbox
from connlab.checks.sessions import PERIOD, opened
from connlab.checks.trial import Trial, check
from connlab.postgres import Postgres

Function = Callable[..., Any]
Functions = Mapping[str, Function]
Requests = Mapping[str, Mapping[str, tuple[Any, ...]]]
"""For each function what may be asked of it, under a name for the case."""

SIZE = 4
"""Connections that the shop may have."""
MORE = 3 * SIZE
"""Requests that are answered, one after the other, where nothing is lost."""
CREW = 4
WITHIN = 6.0
"""Seconds that a round of requests may take."""
CLOSING = 0.2
"""Seconds in which the server notices that a client has gone."""

READ = "Read the error, from its end, and the line that it came from."
SHOP = (
    "The check makes a `Shop` of its own, with four connections. If the server has no slot left for it, shops of the "
    "notebook are still open: close their pools (`shop.pool.close()`)."
)
PATHS = (
    "Follow this call through the function, from the line that borrows to the line that it left the function by: which "
    "line on that way gives the connection back? The end of `with shop.pool.connection()` and a `finally` lie on every "
    "way."
)
CANCELLED = (
    "Here an error came that the function does not expect, at a statement where none was expected. An `except` for some "
    "kinds of error gives the connection back after these. What must happen after every error belongs into `finally`, "
    "or at the end of `with shop.pool.connection()`."
)
TERMINATED = (
    "The connection was dead, so every further call on it raises an error as well, `conn.rollback()` too: what stands "
    "behind such a line is not reached. A dead connection must go back all the same, or the pool does not replace it. "
    "`finally`, with nothing before `putconn` that can fail, or `with shop.pool.connection()`."
)
UNCOMMITTED = (
    "The change is gone: a connection that comes back in a transaction is rolled back by the pool. Commit before it goes "
    "back: at the end of `with shop.pool.connection()`, or of `with conn:`, or with `conn.commit()`."
)
HALF = (
    "A part of a request that failed has stayed. Its statements belong into one transaction: all of them or none. With "
    "`autocommit`, each is one of its own."
)
UNEQUAL = (
    "To mend a leak is to change who gives the connection back, and when. Whoever calls the function must not notice: "
    "compare yours with the one that was given, statement by statement."
)
POOLS_STATE = (
    "What you set on a connection goes back to the pool with it, and the next one to borrow it works with it: in "
    "`autocommit`, a transaction of his is none. Leave it unset, or set it back before the connection is returned."
)
OPENED = (
    "More connections were opened than the pool has places. Either the function connects past the pool, or it closes "
    "what it borrowed, so that the pool must open another one for every request. Give it back open."
)
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
    "referred to it any more. The pool was not told. Look at what becomes of `conn` where the function ends early, or "
    "by an exception.",
    "idle": "An idle session that is not in the pool has an owner, and is in no transaction: somebody keeps it for "
    "later. Look for a connection that is put somewhere.",
    "idle in transaction": "Who is in a transaction has begun something, and has not ended it: a `with` block whose end "
    "has not come yet, for example.",
}


# --- the checks ---------------------------------------------------------------------------------------------


@check("A call that loses connections is told from one that does not")
def sees_losses(trial: Trial, Shop: Function, lost: Function, pg: Postgres) -> None:
    """Write `lost`: it calls the function, and returns how many more connections are out of the pool than before."""
    cases: list[tuple[str, int, Function, tuple[Any, ...], int, str]] = [
        ("a call that gives its connection back", 0, shops.gives_back, (), 0, BEFORE_AND_AFTER),
        ("a call that keeps two", 0, shops.keeps, (2,), 2, BEFORE_AND_AFTER),
        ("a call that fails, and gives its connection back", 0, shops.fails_and_gives_back, (), 0, ERRORS),
        ("a call that fails, and keeps one", 0, shops.keeps_and_fails, (), 1, ERRORS),
        ("a call that closes its connection and does not give it back", 0, shops.closes, (), 1, ACCOUNT),
        ("a healthy call, after others have lost two", 2, shops.gives_back, (), 0, EARLIER),
        ("a call that gives a broken connection back", 0, shops.throws_away, (), 0, REPLACED),
    ]
    with trial.sandbox(pg, Shop=Shop, lost=lost) as box:
        shops.furnish(pg)
        for what, before, function, arguments, wanted, look in cases:
            dsn = shops.dsn_of(pg, shops.MENDED)
            answer = box.do(WITHIN, shops.judged, dsn, before, function, arguments)
            raised = answer.problem is not None
            trial.expect(
                f"{wanted} for {what}",
                str(answer.problem) if raised else f"{answer.value!r}",
                not raised and type(answer.value) is int and answer.value == wanted,
                (ERRORS if look is ERRORS else READ) if raised else look,
            )


BEFORE_AND_AFTER = (
    "Return a number: how many connections are out after the call, less those that were out before it. A connection is "
    "out when the pool counts it (`pool_size`) and cannot lend it (`pool_available`): see `shop.pool.get_stats()`."
)
ERRORS = (
    "`lost` is asked about connections. Whatever the call raises is no answer to that: catch it, and count then."
)
ACCOUNT = (
    "The server shows nothing of a connection that was closed, and the pool still has it in its books: count there."
)
EARLIER = (
    "What was out before the call is not this call's doing: count before it, too."
)
REPLACED = (
    "The pool got this one back, found it broken, and opens another one in the background. For a moment it has none to "
    "lend. Wait a little before you call it lost: look again and again, a third of a second long."
)


@check("The requests that lose a connection")
def finds_them(
    trial: Trial, Shop: Function, GIVEN: Functions, REQUESTS: Requests, leaks: Function, pg: Postgres
) -> None:
    """Write `leaks`: it returns pairs such as `("order", "no money")`, the requests that lose a connection."""
    with trial.sandbox(pg, Shop=Shop, leaks=leaks, **GIVEN) as box:
        answer, pairs = box.do(WITHIN, shops.named)
        if answer.problem:
            trial.expect("`leaks()` returns", str(answer.problem), False, READ)
        known = {(name, case) for name, cases in REQUESTS.items() for case in cases}
        strange = sorted(set(pairs or []) - known)
        trial.expect(
            "pairs of a function and one of its cases, as they stand in `REQUESTS`",
            f"{strange[0]!r}" if strange else "no pairs" if pairs is None else f"{len(pairs)} pairs",
            pairs is not None and not strange,
            'Return a list such as `[("order", "no money"), ("report", "quick")]`, with the spelling of `REQUESTS`.',
        )
        losses = _losses(trial, box, pg, REQUESTS)
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
    _mended(trial, Shop, GIVEN, REQUESTS, mended, pg)


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
    _mended(trial, Shop, GIVEN, REQUESTS, mended, pg)


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
    with _whole_shop(trial, Shop, GIVEN, mended, pg) as box:
        for function, what, look in (
            ("pg_cancel_backend", "cancelled", CANCELLED),
            ("pg_terminate_backend", "ended, with their connections,", TERMINATED),
        ):
            _open(trial, box, pg, shops.MENDED, quiet=True)
            interruptions = shops.Interruptions(pg, trial.sessions, function)
            calls = _first_cases(REQUESTS)
            with interruptions.run():
                _, out = box.do(WITHIN, shops.requests, calls, CREW)
            trial.expect(
                f"every connection back after requests that were {what} while they waited for the server",
                f"{_missing(out)} after {len(calls)} requests and {interruptions.number} calls of `{function}`",
                not out and interruptions.number > 0,
                look,
            )
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
    with _whole_shop(trial, Shop, GIVEN, mended, pg) as box:
        _open(trial, box, pg, shops.MENDED, quiet=True)
        calls = _first_cases(REQUESTS)
        box.do(WITHIN, shops.requests, calls, CREW, in_turn=True)
        pg.restart()
        answers, out = box.do(WITHIN, shops.requests, [*calls, *calls], CREW, in_turn=True)
        trial.expect("every connection back after a restart of the server", _missing(out), not out, TERMINATED)
        failed, last = problems(answers), answers[SIZE + len(calls) // 2 :]
        trial.expect(
            f"at most {SIZE} failed requests, one for each dead connection, and then none",
            f"{len(failed)} of {len(answers)} failed, {len(problems(last))} of the last {len(last)}"
            f"{_first(problems(last) or failed)}",
            len(failed) <= SIZE and not problems(last),
            DEAD,
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
    shops.furnish(pg)
    whole = False
    for name, cases in requests.items():
        for case, arguments in cases.items():
            if not whole:
                _open(trial, box, pg, shops.GIVEN, quiet=True)
            before = len(trial.sessions.now())
            _, out = box.do(WITHIN, shops.request, name, arguments)
            found[name, case] = Loss(name, len(out), _seen(trial, before, len(out)))
            whole = not out
    return found


def _seen(trial: Trial, before: int, number: int) -> tuple[str, ...]:
    """What the server shows of ``number`` connections, where it had ``before`` sessions."""
    if not number:
        return ()
    deadline = time.monotonic() + CLOSING
    while len(rows := trial.sessions.now()) > before - number and time.monotonic() < deadline:
        time.sleep(PERIOD)
    open_ = max(0, number - (before - len(rows)))
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


# --- mending ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One request, and what it gave."""

    case: str
    answer: Answer
    data: dict[str, Any]

    def __str__(self) -> str:
        """The outcome, in words."""
        return f"raises `{self.answer.problem.name}`" if self.answer.problem else f"returns `{self.answer.value!r}`"


def _mended(
    trial: Trial, Shop: Function, given: Functions, requests: Requests, mended: Functions, pg: Postgres
) -> None:
    originals = {f"given {name}": given[name] for name in mended}
    with trial.sandbox(pg, Shop=Shop, **mended, **originals) as box:
        count = sum(_works(trial, box, pg, name, requests[name]) for name in mended)
    trial.expect("every connection back after each request", f"all, after each of {count}", True, "-")
    trial.expect("answers, errors and data as those of the functions as given", "the same", True, "-")
    trial.expect("connections that lie in the pool as they did when they were new", "they do", True, "-")
    trial.expect(f"at most {SIZE} connections opened, by the pool", f"{SIZE} or fewer, for each function", True, "-")


def _works(trial: Trial, box: Sandbox, pg: Postgres, name: str, cases: Mapping[str, tuple[Any, ...]]) -> int:
    """One mended function; how many requests it has answered."""
    box.do(WITHIN, shops.close_shop)
    shops.furnish(pg)
    mark = pg.mark()
    _open(trial, box, pg, shops.MENDED)
    new = box.do(WITHIN, shops.conditions, SIZE)
    before = shops.data_of(pg, shops.MENDED)
    steps = list(_steps(trial, box, pg, name, cases))
    more = [(name, next(iter(cases.values())))] * MORE
    answers, out = box.do(WITHIN, shops.requests, more, CREW, in_turn=True)
    _back(trial, f"after {MORE} requests of `{name}` from {CREW} threads", out)
    used = box.do(WITHIN, shops.conditions, SIZE)
    connections = opened(pg, mark)
    _as_given(trial, box, pg, name, cases, before, steps)
    failed = problems(answers)
    _demand(trial, f"{MORE} more requests of `{name}`, {MORE} answers", f"{MORE - len(failed)} answers{_first(failed)}",
            not failed, READ)
    _demand(trial, f"connections that lie in the pool as they did when they were new, after `{name}`",
            f"{_condition(used)}; new ones: {_condition(new)}", used == new, POOLS_STATE)
    _demand(trial, f"at most {SIZE} connections opened for `{name}`, by the pool", f"{connections}",
            connections <= SIZE, OPENED)
    return len(steps) + len(answers)


def _steps(
    trial: Trial, box: Sandbox, pg: Postgres, name: str, cases: Mapping[str, tuple[Any, ...]]
) -> Iterator[Step]:
    for case in [next(iter(cases)), *cases]:  # the first one twice: some remember
        answer, out = box.do(WITHIN, shops.request, name, cases[case])
        _back(trial, f"after `{name}`, case '{case}'", out)
        yield Step(case, answer, shops.data_of(pg, shops.MENDED))


def _as_given(
    trial: Trial,
    box: Sandbox,
    pg: Postgres,
    name: str,
    cases: Mapping[str, tuple[Any, ...]],
    before: dict[str, Any],
    steps: Sequence[Step],
) -> None:
    """The same requests of the function as given, on the same data, in a shop of its own."""
    _open(trial, box, pg, shops.GIVEN, quiet=True)
    last = before
    for step in steps:
        answer, _ = box.do(WITHIN, shops.request, f"given {name}", cases[step.case])
        wanted = Step(step.case, answer, shops.data_of(pg, shops.GIVEN))
        what = f"`{name}`, case '{step.case}',"
        _demand(trial, f"{what} {wanted}", _outcome(step), str(wanted) == str(step), _meaning(step.answer.problem))
        other = next((key for key, value in wanted.data.items() if step.data[key] != value), "")
        _demand(
            trial,
            f"{what} leaves the data as the function as given does",
            f"other data, in {other}{_numbers(step.data[other], wanted.data[other])}" if other else "the same",
            not other,
            UNCOMMITTED if step.data == last else HALF if wanted.data == last else UNEQUAL,
        )
        last = step.data


def _outcome(step: Step) -> str:
    return f"it raises {step.answer.problem}" if step.answer.problem else f"it {step}"


def _numbers(found: Any, wanted: Any) -> str:
    return "" if isinstance(wanted, str) else f": {found} instead of {wanted}"


def _meaning(problem: Problem | None) -> str:
    """What to look at for an outcome that is not that of the function as given."""
    if problem is None:
        return UNEQUAL
    if problem.name == "InFailedSqlTransaction":
        return (
            "A statement failed before, on the same connection, and its transaction was not ended. After an error the "
            "transaction must be rolled back before anything else can be done."
        )
    if problem.name == "ValueError" and "can't return connection" in problem.message:
        return "It was given back already. One borrowing, one return: have one line on the way of every path, not two."
    if problem.name == "OperationalError" and "the connection is closed" in problem.message:
        return "The connection had been closed before. Who closes a connection takes it from the next one who needs it."
    return f"{READ} {UNEQUAL}"


def _condition(found: Sequence[tuple[Any, ...]]) -> str:
    words = [
        f"{'autocommit' if autocommit else 'no autocommit'}, {status}, statement_timeout {timeout}, lock_timeout {lock}"
        for autocommit, status, timeout, lock in found
    ]
    return " / ".join(words)


# --- faults -------------------------------------------------------------------------------------------------


def _whole_shop(trial: Trial, Shop: Function, given: Functions, mended: Sequence[Function], pg: Postgres) -> Any:
    names = ("balance", "order", "correct", "report", "newest", "user_name", "next_page")
    shops.furnish(pg)
    return trial.sandbox(pg, Shop=Shop, **{**given, **dict(zip(names, mended, strict=True))})


def _first_cases(requests: Requests) -> list[tuple[str, tuple[Any, ...]]]:
    return [(name, next(iter(cases.values()))) for name, cases in requests.items()]


def _answered_still(trial: Trial, box: Sandbox, calls: shops.Calls) -> None:
    more = list(itertools.islice(itertools.cycle(calls), MORE))
    answers, out = box.do(WITHIN, shops.requests, more, CREW, in_turn=True)
    failed = problems(answers)
    trial.expect(
        f"{MORE} more requests, {MORE} answers",
        f"{MORE - len(failed)} answers{_first(failed)}",
        not failed and not out,
        DEAD,
    )


# --- what they share ----------------------------------------------------------------------------------------


def _open(trial: Trial, box: Sandbox, pg: Postgres, schema: str, quiet: bool = False) -> None:
    begun = box.do(WITHIN, shops.open_shop, shops.dsn_of(pg, schema), quiet)
    if begun.problem:
        trial.expect("`Shop(dsn)` gives a shop", str(begun.problem), False, SHOP)


def _demand(trial: Trial, expected: str, measured: str, good: bool, look: str) -> None:
    """Expect something of one function among many: a row of the card only where it is not met."""
    if not good:
        trial.expect(expected, measured, good, look)


def _back(trial: Trial, when: str, out: Sequence[Borrowed]) -> None:
    _demand(trial, f"every connection back {when}", _missing(out), not out, PATHS)


def _missing(out: Sequence[Borrowed]) -> str:
    if not out:
        return "none is missing"
    return f"{len(out)} {'is' if len(out) == 1 else 'are'} missing; borrowed {out[0]}"


def _first(found: Sequence[Problem]) -> str:
    return f"; the first error was {found[0]}" if found else ""
