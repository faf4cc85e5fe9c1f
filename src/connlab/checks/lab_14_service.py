"""The service of lab 14: how its checks start it and ask it, and what is expected of its own rungs."""

from __future__ import annotations

from collections.abc import Sequence

from connlab.checks.answers import Answer
from connlab.checks.drivers import call, load
from connlab.checks.ladder import WITHIN
from connlab.checks.probes import row_locked, until
from connlab.checks.requests import Work, crowd, shown, status, work_of
from connlab.checks.requirement import (
    BUSY,
    CONNECTIONS,
    FORM,
    HELD,
    LEAKS,
    MAPPING,
    MARGIN,
    OPTIONS,
    PATIENT,
    POOL,
    READ,
    SETTLES,
    SLACK,
    SOON,
    STATUSES,
)
from connlab.checks.sandbox import Sandbox
from connlab.checks.trial import Trial
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres


def begin_service(trial: Trial, box: Sandbox, bouncer: PgBouncer, keep: str = "app") -> None:
    """Start the service; its pool has a moment to open its connections."""
    begun = box.do(WITHIN, call, "start", bouncer.dsn, keep=keep)
    if begun.problem:
        trial.expect("`start(dsn)` returns", str(begun.problem), False, _refused(bouncer) or READ)
    until(lambda: len(bouncer.rows("SHOW CLIENTS")) > CONNECTIONS, SETTLES)


def _handled(box: Sandbox, works: Sequence[Work]) -> list[Answer]:
    return box.do(WITHIN, load, "handle", [(work,) for work in works], len(works), on="app")


def handled_at_last(box: Sandbox, works: Sequence[Work]) -> list[Answer]:
    """The answers of ``handle``, asked again until all are well: a pool replaces connections in the background."""
    found: list[Answer] = []

    def well() -> bool:
        found[:] = _handled(box, works)
        return all(status(answer) == 200 for answer in found)

    until(well, SETTLES)
    return found


def _refused(bouncer: PgBouncer) -> str:
    return OPTIONS if "unsupported startup parameter" in bouncer.log() else ""


def expect_well(trial: Trial, bouncer: PgBouncer, found: list[Answer], what: str) -> None:
    """Expect that ordinary requests get 200, and what `work` has returned."""
    other = next((answer for answer in found if status(answer) != 200), None)
    trial.expect(
        f"{what}: (200, what `work` has returned)",
        shown(other) if other else "all of them",
        other is None,
        _refused(bouncer) or (READ if other and other.problem else FORM if other and status(other) is None else BUSY),
    )
    wanted = {"reads": 10, "sleeps": None}
    odd = next((answer for answer in found if answer.value[1] != wanted[work_of(answer).kind]), None)
    if odd is not None:
        trial.expect("in the answer, what `work` has returned", shown(odd), False, FORM)


def expect_transactions(trial: Trial, box: Sandbox, pg: Postgres) -> None:
    """Expect that each request is one transaction."""
    query = "select array_agg(balance order by id) from accounts where id in (9, 10)"
    before = pg.value(query)
    written, halved = _handled(box, [Work("writes", row=9), Work("halves", row=10)])
    kept, undone = (now - then for now, then in zip(pg.value(query), before, strict=True))
    trial.expect(
        "a request that adds 1 to an account is answered with 200, and the 1 is there",
        f"{shown(written)}; {kept} was added",
        status(written) == 200 and kept == 1,
        "Each request is one transaction: committed when `work` returns.",
    )
    trial.expect(
        "one that adds 1 and then has a mistake in its SQL raises `UndefinedColumn`, and nothing is added",
        f"{shown(halved)}; {undone} was added",
        halved.problem is not None and "UndefinedColumn" in halved.problem.kinds and undone == 0,
        "Each request is one transaction: rolled back when `work` raises. And a mistake of the program's is no trouble "
        "of the database's: let it through.",
    )


def expect_statuses(trial: Trial, box: Sandbox, pg: Postgres) -> None:
    """Expect the answer that fits each error."""
    wanted = {name: each for name, each in STATUSES.items() if name != "long" or pg.version >= (17,)}
    with row_locked(pg, 5):
        found = _handled(box, [Work(name, SOON, row=5) for name in wanted])
    for answer in found:
        what, code = wanted[work_of(answer).kind]
        trial.expect(f"{what}: {code}", f"{shown(answer)}", status(answer) == code, MAPPING)


def expect_refused(trial: Trial, box: Sandbox) -> None:
    """Expect that a request waits for a connection, though not for long."""
    handled_at_last(box, [Work("holds", PATIENT / 2)] * CONNECTIONS)  # the pool has replaced what was lost
    first, later = box.do(WITHIN, crowd, CONNECTIONS, PATIENT, HELD)
    lacking = [answer for answer in first if status(answer) != 200]
    trial.expect(
        f"{CONNECTIONS} requests work at the same time",
        f"{len(first) - len(lacking)} did" + (f"; one got {shown(lacking[0])}" if lacking else ""),
        not lacking,
        f"The service has {CONNECTIONS} connections (`min_size`, `max_size`).",
    )
    served = sum(status(answer) == 200 for answer in later)
    trial.expect(
        f"of {CONNECTIONS} that come now, one gets the connection that comes back after {PATIENT:g} s",
        f"{served} {'was' if served == 1 else 'were'} served"
        + ("" if served else f"; the first got {shown(later[0])}"),
        served >= 1,
        "All were turned away before. A queue that nobody may stand in is no queue: how long does the pool let a "
        "request wait?",
    )
    refused = sorted((answer for answer in later if status(answer) != 200), key=lambda answer: answer.seconds)
    what = shown(refused[0]) if refused else f"none was turned away, the last was served after {slowest(later):.2f} s"
    trial.expect(
        f"the others get 503, after at most {POOL:g} s ({MARGIN})",
        what,
        len(refused) >= CONNECTIONS // 2
        and all(status(answer) == 503 for answer in refused)
        and refused[0].seconds <= POOL + SLACK,
        f"A request that finds all {CONNECTIONS} connections lent waits in the pool. Which limit does the pool have "
        "for that, how long is it without one, and which exception ends it? "
        "https://www.psycopg.org/psycopg3/docs/api/pool.html",
    )


def slowest(found: Sequence[Answer]) -> float:
    """The seconds of the slowest answer."""
    return max(answer.seconds for answer in found)


def expect_nothing_left(trial: Trial, found: list[str], number: int) -> None:
    """What ``set`` has left on the server connections, seen by other clients who get each of them."""
    trial.expect(
        "another client of PgBouncer's finds no limit that somebody has set",
        f"`{found[0]}`, and {len(found)} such on {number} server connection{'s' if number > 1 else ''}"
        if found
        else "none",
        not found,
        LEAKS,
    )
