"""Functions that were mended, held against those that were given: the connections come back, and nothing else changes.

For the checks of a lab that has a class ``Shop``, made with a DSN, whose functions take the shop as their first
argument; see ``connlab.checks.shops``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from connlab.checks import shops
from connlab.checks.answers import Answer, Problem, problems
from connlab.checks.borrowers import Borrowed
from connlab.checks.sandbox import Sandbox
from connlab.checks.sessions import PERIOD, opened
from connlab.checks.trial import Trial
from connlab.postgres import Postgres

Function = Callable[..., Any]
Functions = Mapping[str, Function]
Cases = Mapping[str, tuple[Any, ...]]
Requests = Mapping[str, Cases]
"""For each function what may be asked of it, under a name for the case."""

SIZE = 4
"""Connections that the shop may have."""
MORE = 3 * SIZE
"""Requests that are answered, one after the other, where nothing is lost."""
CREW = 4
WITHIN = 6.0
"""Seconds that a round of requests may take."""
IMPATIENT = "report"
"""The function whose statements have a timeout. Of others the log is not asked: a container's needs its time."""
CLOSING = 0.2
"""Seconds in which the server notices that a client has gone."""

READ = "Read the error, from its end, and the line that it came from."
SHOP = (
    "The check makes a `Shop` of its own, with four connections. If the server has no slot left for it, shops of the "
    "notebook are still open: close their pools (`shop.pool.close()`)."
)
NOT_GIVEN = (
    "The cell that makes `GIVEN` was run again after you had written functions of these names. Run the cells of the "
    "service again, all of them, from the class `Shop` on, and then your own."
)
PATHS = (
    "Follow this call through the function, from the line that borrows to the line that it left the function by: which "
    "line on that way gives the connection back? The end of `with shop.pool.connection()` and a `finally` lie on every "
    "way. So does the end of `with conn:`, but that gives nothing back."
)
CLOSED = (
    "The server has no session of it any more, so it was closed: by `close()`, or by Python, when nothing referred to "
    "it. Neither tells the pool."
)
HELD = (
    "Its session is still there, so somebody still has it: in a variable or an object that outlives the request, or in "
    "a generator that nobody has read to its end."
)
UNCOMMITTED = (
    "The change is gone: the pool rolls back what comes back in a transaction. Commit before that: at the end of "
    "`with shop.pool.connection()`, or of `with conn:`, or with `conn.commit()`."
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
    "What you set on a connection goes back to the pool with it, and the next one to borrow it works with it: with "
    "`autocommit`, its statements are no longer one transaction; with another `row_factory`, it gets other rows. Leave "
    "it unset (`set local` and `conn.cursor(row_factory=…)` do not stay), or set it back in a `finally`, before the "
    "connection is returned."
)
CHANCES = (
    "The server's log says how often it cancelled a statement of this request. The function as given asks once more, "
    "and not more often: leave it so."
)
AT_ONCE = (
    "Two requests change one order at once. Both have read what it cost before either of them wrote, so one of the two "
    "differences is wrong, and money is lost or made. The function as given reads it with `for update`: the second "
    "request waits there until the first one has committed."
)
OPENED = (
    "More connections were opened than the pool has places. Either the function connects past the pool, or it closes "
    "what it borrowed, so that the pool must open another one for every request. Give it back open."
)


# --- mending ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A request to make."""

    what: str
    arguments: tuple[Any, ...]
    is_later: bool = False
    """Whether others have changed the data since the last one."""


@dataclass(frozen=True)
class Taken:
    """What one request gave."""

    answer: Answer
    before: dict[str, Any]
    data: dict[str, Any]
    cancelled: int
    """Statements that the server cancelled for their time."""

    def __str__(self) -> str:
        """The outcome, in words."""
        return f"raises `{self.answer.problem.name}`" if self.answer.problem else f"returns `{self.answer.value!r}`"


@dataclass(frozen=True)
class Bench:
    """What the measuring of one check needs."""

    trial: Trial
    box: Sandbox
    pg: Postgres
    conn: psycopg.Connection[dict[str, Any]]
    """An administrator's."""

    def demand(self, expected: str, measured: str, good: bool, look: str) -> None:
        """Expect something of one function among many: a row of the card only where it is not met."""
        if not good:
            self.trial.expect(expected, measured, good, look)


def mended_functions(
    trial: Trial, Shop: Function, given: Functions, requests: Requests, mended: Functions, pg: Postgres
) -> None:
    """Expect of each mended function that it loses nothing, and is otherwise as the one that was given."""
    same = [name for name in mended if given[name] is mended[name]]
    if same:
        trial.expect("functions that are not those of `GIVEN`", f"`{same[0]}` is the same", False, NOT_GIVEN)
    originals = {f"given {name}": given[name] for name in mended}
    with trial.sandbox(pg, Shop=Shop, **mended, **originals) as box, shops.manager(pg) as conn:
        bench = Bench(trial, box, pg, conn)
        count = sum(_works(bench, name, requests[name]) for name in mended)
        if "correct" in mended:
            _at_once(bench, "correct", [(17, 20), (17, 50)])
    trial.expect("every connection back after each request", f"all, after each of {count}", True, "-")
    trial.expect("answers, errors and data as those of the functions as given", "the same", True, "-")
    trial.expect(
        "connections that lie in the pool as they did when they were new", "they do, after each request", True, "-"
    )
    trial.expect(f"at most {SIZE} connections opened, by the pool", f"{SIZE} or fewer, for each function", True, "-")


def _works(bench: Bench, name: str, cases: Cases) -> int:
    """One mended function; how many requests it has answered."""
    bench.box.do(WITHIN, shops.close_shop)
    shops.furnish(bench.conn)
    mark = bench.pg.mark()
    opened_shop(bench.trial, bench.box, bench.pg, shops.MENDED)
    new = bench.box.do(WITHIN, shops.conditions, SIZE)
    steps = _steps(name, cases)
    taken = [_taken(bench, name, step, new) for step in steps]
    more = [(name, next(iter(cases.values())))] * MORE
    answers, out = bench.box.do(WITHIN, shops.requests, more, CREW, in_turn=True)
    back(bench.trial, f"after {MORE} requests of `{name}` from {CREW} threads", out)
    unchanged(bench.trial, bench.box, f"`{name}`", new)
    connections = opened(bench.pg, mark)
    _as_given(bench, name, steps, taken)
    failed = problems(answers)
    bench.demand(
        f"{MORE} more requests of `{name}`, {MORE} answers",
        f"{MORE - len(failed)} answers{first_of(failed)}",
        not failed,
        READ,
    )
    bench.demand(
        f"at most {SIZE} connections opened for `{name}`, by the pool", f"{connections}", connections <= SIZE, OPENED
    )
    return len(steps) + len(answers)


def _steps(name: str, cases: Cases) -> list[Step]:
    """What is asked of a function, in this order."""
    if name == "next_page":  # it remembers: two users in turn, and what comes after the last page
        calls = [(42, 3), (43, 3), (42, 3), (42, 1000), (42, 3), *[(44, 5)] * 4]
        return [Step(f"`{name}`, request {at} of {len(calls)}, {each},", each) for at, each in enumerate(calls, 1)]
    steps = [Step(f"`{name}`, case '{case}',", arguments) for case, arguments in cases.items()]
    again = f"{steps[0].what} the second time, when others have changed the data,"
    return [steps[0], Step(again, steps[0].arguments, is_later=True), *steps[1:]]


def _taken(bench: Bench, name: str, step: Step, new: list[str] | None = None) -> Taken:
    """Make one request. Of a mended function, for which ``new`` is given: nothing is out, and nothing left behind."""
    schema = shops.GIVEN if new is None else shops.MENDED
    if step.is_later:
        shops.meanwhile(bench.conn, schema)
    before, mark = shops.data_of(bench.conn, schema), bench.pg.mark() if name == IMPATIENT else None
    answer, out = bench.box.do(WITHIN, shops.request, f"given {name}" if new is None else name, step.arguments)
    if new is not None:
        back(bench.trial, f"after {step.what}", out)
        unchanged(bench.trial, bench.box, step.what, new)
    cancelled = 0 if mark is None else bench.pg.log(since=mark).count(shops.TIMED_OUT)
    return Taken(answer, before, shops.data_of(bench.conn, schema), cancelled)


def _as_given(bench: Bench, name: str, steps: Sequence[Step], taken: Sequence[Taken]) -> None:
    """The same requests of the function as given, on the same data, in a shop of its own."""
    opened_shop(bench.trial, bench.box, bench.pg, shops.GIVEN, quiet=True)
    for step, found in zip(steps, taken, strict=True):
        wanted = _taken(bench, name, step)
        problem = found.answer.problem
        bench.demand(f"{step.what} {wanted}", _outcome(found), str(wanted) == str(found), _meaning(problem))
        other = next((key for key, value in wanted.data.items() if found.data[key] != value), "")
        bench.demand(
            f"{step.what} leaves the data as the function as given does",
            f"other data, in {other}{_numbers(found.data[other], wanted.data[other])}" if other else "the same",
            not other,
            UNCOMMITTED if found.data == found.before else HALF if wanted.data == wanted.before else UNEQUAL,
        )
        bench.demand(  # a busy machine may cancel one of any request
            f"{step.what} makes {wanted.cancelled} attempts",
            f"{found.cancelled}, each of them cancelled",
            wanted.cancelled < 2 or wanted.cancelled == found.cancelled,
            CHANCES,
        )


def _at_once(bench: Bench, name: str, calls: Sequence[tuple[Any, ...]]) -> None:
    """Two requests that change one order at the same time: the money that they move is the money that is there."""
    opened_shop(bench.trial, bench.box, bench.pg, shops.MENDED)
    shops.furnish(bench.conn)
    whole = _worth(bench)
    with shops.held(bench.pg, calls[0][0]):
        pending = bench.box.begin(shops.requests, [(name, each) for each in calls], len(calls))
        _until_waiting(bench.trial, len(calls))
    answers, out = pending.result(WITHIN)
    what = " and ".join(f"`{name}(shop, {', '.join(map(str, each))})`" for each in calls)
    back(bench.trial, f"after {what} at once", out)
    failed, worth = problems(answers), _worth(bench)
    bench.demand(
        f"{what} at once, both answered", f"{len(answers) - len(failed)} answered{first_of(failed)}", not failed, READ
    )
    bench.demand(
        f"orders and accounts worth {whole} in all, also after {what} at once", f"{worth}", worth == whole, AT_ONCE
    )


def _worth(bench: Bench) -> Any:
    data = shops.data_of(bench.conn, shops.MENDED)
    return data["the worth of all orders"] + data["the money in all accounts"]


def _until_waiting(trial: Trial, number: int) -> None:
    """Wait until so many requests wait in the server; not long, for some wait outside of it, one for the other."""
    deadline = time.monotonic() + 1
    while (
        sum(row["wait_event_type"] == "Lock" for row in trial.sessions.now()) < number and time.monotonic() < deadline
    ):
        time.sleep(PERIOD)


def _outcome(found: Taken) -> str:
    return f"it raises {found.answer.problem}" if found.answer.problem else f"it {found}"


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


@contextmanager
def whole_shop(
    trial: Trial, Shop: Function, given: Functions, mended: Sequence[Function], pg: Postgres
) -> Iterator[Sandbox]:
    """A process with all functions: those that were given, and the seven mended ones in their places."""
    names = ("balance", "order", "correct", "report", "newest", "user_name", "next_page")
    with trial.sandbox(pg, Shop=Shop, **{**given, **dict(zip(names, mended, strict=True))}) as box:
        with shops.manager(pg) as conn:
            shops.furnish(conn)
        yield box


# --- what they share ----------------------------------------------------------------------------------------


def opened_shop(trial: Trial, box: Sandbox, pg: Postgres, schema: str, quiet: bool = False) -> None:
    """A new shop on that schema, in the place of the last one."""
    begun = box.do(WITHIN, shops.open_shop, shops.dsn_of(pg, schema), quiet)
    if begun.problem:
        trial.expect("`Shop(dsn)` gives a shop", str(begun.problem), False, SHOP)


def back(trial: Trial, when: str, out: Sequence[Borrowed]) -> None:
    """Expect that nothing is out; written down where something is."""
    if out:
        closed = len(when_gone(trial, SIZE - len(out))) < SIZE
        trial.expect(f"every connection back {when}", missing(out), False, f"{CLOSED if closed else HELD} {PATHS}")


def unchanged(trial: Trial, box: Sandbox, after: str, new: list[str]) -> None:
    """Expect that connections lie in the pool as ``new`` ones do; written down where they do not."""
    used = box.do(WITHIN, shops.conditions, SIZE)
    if used != new:
        trial.expect(
            f"connections that lie in the pool as they did when they were new, after {after}",
            f"{' / '.join(used)}; new ones: {' / '.join(new)}",
            False,
            POOLS_STATE,
        )


def when_gone(trial: Trial, number: int, within: float = CLOSING) -> list[dict[str, Any]]:
    """The server's sessions, as soon as they are ``number`` or fewer: it needs a moment to see that clients go."""
    deadline = time.monotonic() + within
    while len(rows := trial.sessions.now()) > number and time.monotonic() < deadline:
        time.sleep(PERIOD)
    return rows


def whole_pool(trial: Trial) -> int:
    """The server's sessions, when they are those of one shop: a pool may still be opening one, or closing some."""
    deadline = time.monotonic() + shops.BUSY
    while (number := len(trial.sessions.now())) != SIZE and time.monotonic() < deadline:
        time.sleep(PERIOD)
    return number


def missing(out: Sequence[Borrowed]) -> str:
    """What is out, and who borrowed the first of it."""
    if not out:
        return "none is missing"
    return f"{len(out)} {'is' if len(out) == 1 else 'are'} missing; borrowed {out[0]}"


def first_of(found: Sequence[Problem]) -> str:
    """The first error, as the end of a sentence; empty without one."""
    return f"; the first error was {found[0]}" if found else ""
