"""The checks of lab 14: a ladder of timeouts in the application, PgBouncer and PostgreSQL, each rung set off for real.

The learner writes ``server_settings(version)``, SQL that an administrator runs; ``pooler_settings()``, a dict of
settings of PgBouncer; ``start(dsn)`` and ``handle(app, work)``, the service; ``report(app, query)`` and
``migrate(dsn, statement)``, which need other limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import psycopg

from connlab.checks.answers import Answer
from connlab.checks.drivers import call, load
from connlab.checks.exempt import expect_migration, expect_nothing_left, expect_report
from connlab.checks.ladder import (
    WITHIN,
    LongReader,
    given_to_pooler,
    in_force,
    one_column_more,
    pooler,
    queued,
    reading,
)
from connlab.checks.limits import expect_patience, expect_sum, expect_unlimited, expect_within, setting_of
from connlab.checks.probes import (
    End,
    Silent,
    abandons,
    best,
    forgets,
    left_behind,
    many_short,
    row_locked,
    sleeps,
    until,
    waits_for,
)
from connlab.checks.requests import (
    HANGS,
    Work,
    crowd,
    exceptional,
    face_silence,
    patience,
    shown,
    status,
    watch_pools,
    work_of,
)
from connlab.checks.requirement import (
    BACKUP,
    BUSY,
    CONNECTIONS,
    CROWD,
    FORM,
    GIVE_UP,
    HELD,
    IN_THE_WAY,
    LOCK,
    MAPPING,
    MARGIN,
    NEVER_ASKS,
    OPTIONS,
    PATIENT,
    POOL,
    QUEUE,
    READ,
    SETTLES,
    SLACK,
    SOON,
    STATEMENT,
    STATUSES,
    THIRD,
    TIGHT,
    TRANSACTION,
)
from connlab.checks.rungs import (
    ended_by,
    expect_abandoned,
    expect_faced,
    expect_forgotten,
    expect_long,
    expect_queue,
    expect_silence,
    lacks,
    ordinary,
)
from connlab.checks.sandbox import Sandbox
from connlab.checks.trial import Trial, check
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres

Function = Callable[..., Any]

# --- the checks ---------------------------------------------------------------------------------------------


@check("PostgreSQL's rungs: statement, lock, pause, transaction")
def server_rungs(trial: Trial, server_settings: Function, pg: Postgres) -> None:
    """Write `server_settings`: SQL that limits the role `app`, whoever connects with it, and nobody else."""
    with trial.sandbox(pg, server_settings=server_settings) as box, in_force(trial, box, pg) as limits:
        has = f"A new session of `app` has {limits}."
        with pooler(pg, trial, box, size=12) as bouncer, ThreadPoolExecutor(16) as threads, row_locked(pg, 1):
            begin, dsn = threads.submit, bouncer.dsn
            slow = [begin(sleeps, dsn, GIVE_UP) for _ in range(2)]
            lock = [begin(waits_for, dsn, 1) for _ in range(2)]
            forgotten = [begin(forgets, pg, dsn, row, GIVE_UP) for row in (2, 3)]
            long = [begin(many_short, dsn, GIVE_UP) for _ in range(2)]
            abandoned = begin(abandons, pg, dsn, GIVE_UP)
            good = begin(ordinary, pg, dsn)
            backup = begin(sleeps, pg.admin_dsn, BACKUP)
            begun: list[Future[Any]] = [*slow, *lock, *forgotten, *long, abandoned, good, backup]
            wait(begun, GIVE_UP + SLACK)  # then the lock is given back, for those whom nothing ends
        end = best([each.result() for each in slow], "57014")
        ended_by(trial, "a statement without end", end, "57014", STATEMENT, has)
        end = best([each.result() for each in lock], "55P03")
        ended_by(trial, "a statement that waits for a lock", end, "55P03", LOCK, has)
        expect_forgotten(trial, [each.result() for each in forgotten], has)
        expect_long(trial, pg, best([each.result() for each in long], "25P04"), has)
        expect_abandoned(trial, abandoned.result(), has)
        expect_within(trial, limits)
        for what, end in good.result().items():
            trial.expect(f"{what} goes through", f"{end}" if end.name else "it did", not end.name, f"{has} {TIGHT}")
        trial.expect(
            f"a backup by the role postgres, a statement of {BACKUP:g} s, goes through",
            f"{backup.result()}" if backup.result().name else "it did",
            not backup.result().name,
            "The limits are the service's, and its role is `app`. What stands in the configuration or at the database "
            "holds for everybody who connects.",
        )
        expect_unlimited(trial, pg.admin_dsn)


@check("The application's rungs: the pool, and the right answer")
def answers(trial: Trial, start: Function, handle: Function, pg: Postgres) -> None:
    """Write `start` and `handle`: no request waits long for a connection, and each gets the answer that fits."""
    with (
        trial.sandbox(pg, start=start, handle=handle) as box,
        pooler(pg, trial, box, {"query_wait_timeout": SOON / 2}, size=1) as full,
        pooler(pg, trial, box, size=10) as bouncer,
    ):
        box.do(WITHIN, watch_pools)
        _start(trial, box, bouncer)
        _all_well(trial, bouncer, _handled_at_last(box, [Work("reads", row=7)] * CONNECTIONS), "ordinary requests")
        _expect_transactions(trial, box, pg)
        _expect_statuses(trial, box, pg)
        _expect_queued(trial, box, full)
        _expect_refused(trial, box)
        _all_well(trial, bouncer, _handled_at_last(box, [Work("reads", row=7)] * CONNECTIONS), "requests afterwards")
        expect_nothing_left(trial, left_behind(bouncer.dsn, CONNECTIONS), CONNECTIONS)


@check("PgBouncer's rungs: its queue, and silence")
def pooler_rungs(trial: Trial, pooler_settings: Function, start: Function, handle: Function, pg: Postgres) -> None:
    """Write `pooler_settings`, and have `start` and `handle` stand a pooler that says nothing."""
    with trial.sandbox(pg, pooler_settings=pooler_settings, start=start, handle=handle) as box, Silent() as silent:
        settings = given_to_pooler(trial, box)
        facing = box.begin(face_silence, silent.dsn)
        with pooler(pg, trial, box, settings) as bouncer:
            expect_queue(trial, bouncer)
            expect_silence(trial, pg, bouncer)
        expect_faced(trial, facing, silent)


@check("Two exceptions: the report and the migration")
def exceptions(
    trial: Trial, server_settings: Function, start: Function, report: Function, migrate: Function, pg: Postgres
) -> None:
    """Write `report` and `migrate`: other limits for one transaction, and nobody else suffers from it."""
    codes = {"server_settings": server_settings, "start": start, "report": report, "migrate": migrate}
    with (
        trial.sandbox(pg, **codes) as box,
        in_force(trial, box, pg),
        pooler(pg, trial, box, size=1) as narrow,
        pooler(pg, trial, box) as other,
    ):
        _start(trial, box, narrow)
        _start(trial, box, other, keep="other")
        with one_column_more(pg) as there:
            reader = LongReader(pg, IN_THE_WAY, NEVER_ASKS)
            with reading(pg, reader) as reads, reader:
                good, left, following, endless, done = box.do(WITHIN, exceptional, pg.dsn, narrow.dsn)
            is_there = there()
    expect_report(trial, good, left, following, endless)
    expect_migration(trial, reads, done, is_there)


@check("The whole ladder")
def whole_ladder(
    trial: Trial,
    server_settings: Function,
    pooler_settings: Function,
    start: Function,
    handle: Function,
    pg: Postgres,
) -> None:
    """Have all rungs of tasks 1 to 3 fit together: the sum of what one request can meet is what its caller waits."""
    codes = {
        "server_settings": server_settings,
        "pooler_settings": pooler_settings,
        "start": start,
        "handle": handle,
    }
    ordinary = [Work("sleeps", 0.03)] * 16
    with trial.sandbox(pg, **codes) as box, in_force(trial, box, pg) as limits:
        box.do(WITHIN, watch_pools)
        settings = given_to_pooler(trial, box)
        with pooler(pg, trial, box, settings) as bouncer, pooler(pg, trial, box, settings, size=1) as full:
            _start(trial, box, bouncer)
            _all_well(trial, bouncer, _handled_at_last(box, ordinary), "16 ordinary requests at once")
            pending = box.begin(load, "handle", [(work,) for work in _stuck(pg)], CROWD, on="app")
            queue = queued(pg, full, GIVE_UP)
            waits = _expect_rungs(trial, pg, pending.result(WITHIN), queue)
            expect_sum(trial, limits, setting_of(bouncer, "query_wait_timeout"), box.do(WITHIN, patience), waits)
            left = until(lambda: not _busy(trial), 2 * SLACK)
            trial.expect(
                "nothing of them runs on the server afterwards, and no transaction is open",
                "nothing does" if left else f"sessions that are {', '.join(_busy(trial))}",
                left,
                "Whatever gives the caller his answer must also end the work: what in PostgreSQL would?",
            )
            _all_well(trial, bouncer, _handled_at_last(box, ordinary), "16 ordinary requests afterwards")


# --- the application's rungs --------------------------------------------------------------------------------


def _start(trial: Trial, box: Sandbox, bouncer: PgBouncer, keep: str = "app") -> None:
    """Start the service; its pool has a moment to open its connections."""
    begun = box.do(WITHIN, call, "start", bouncer.dsn, keep=keep)
    if begun.problem:
        trial.expect("`start(dsn)` returns", str(begun.problem), False, _refused(bouncer) or READ)
    until(lambda: len(bouncer.rows("SHOW CLIENTS")) > CONNECTIONS, SETTLES)


def _handled(box: Sandbox, works: Sequence[Work]) -> list[Answer]:
    return box.do(WITHIN, load, "handle", [(work,) for work in works], len(works), on="app")


def _handled_at_last(box: Sandbox, works: Sequence[Work]) -> list[Answer]:
    """As ``_handled``, again until all are well: a pool replaces connections in the background."""
    found: list[Answer] = []

    def well() -> bool:
        found[:] = _handled(box, works)
        return all(status(answer) == 200 for answer in found)

    until(well, SETTLES)
    return found


def _refused(bouncer: PgBouncer) -> str:
    return OPTIONS if "unsupported startup parameter" in bouncer.log() else ""


def _all_well(trial: Trial, bouncer: PgBouncer, found: list[Answer], what: str) -> None:
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


def _expect_transactions(trial: Trial, box: Sandbox, pg: Postgres) -> None:
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


def _expect_statuses(trial: Trial, box: Sandbox, pg: Postgres) -> None:
    wanted = {name: each for name, each in STATUSES.items() if name != "long" or pg.version >= (17,)}
    with row_locked(pg, 5):
        found = _handled(box, [Work(name, SOON, row=5) for name in wanted])
    for answer in found:
        what, code = wanted[work_of(answer).kind]
        trial.expect(f"{what}: {code}", f"{shown(answer)}", status(answer) == code, MAPPING)


def _expect_queued(trial: Trial, box: Sandbox, full: PgBouncer) -> None:
    with psycopg.connect(full.dsn) as holder:
        holder.execute("select 1")
        _start(trial, box, full, keep="full")
        (found,) = box.do(WITHIN, load, "handle", [(Work("reads", row=7),)], 1, on="full")
        holder.rollback()
    what = "a request that waits too long in PgBouncer's queue, `query_wait_timeout` (08P01): 503"
    trial.expect(what, shown(found), status(found) == 503, MAPPING)


def _expect_refused(trial: Trial, box: Sandbox) -> None:
    _handled_at_last(box, [Work("holds", PATIENT / 2)] * CONNECTIONS)  # the pool has replaced what was lost
    first, later, served = box.do(WITHIN, crowd, CONNECTIONS, PATIENT, HELD)
    lacking = [answer for answer in first if status(answer) != 200]
    trial.expect(
        f"{CONNECTIONS} requests work at the same time",
        f"{len(first) - len(lacking)} did" + (f"; one got {shown(lacking[0])}" if lacking else ""),
        not lacking,
        f"The service has {CONNECTIONS} connections (`min_size`, `max_size`), or some have not come back: does "
        "`handle` give its connection back on every way out, after each of the errors above too?",
    )
    trial.expect(
        f"{CONNECTIONS} more come, one connection comes back after {PATIENT:g} s: one of them gets it",
        f"{served} got a connection" + ("" if served else f"; the first got {shown(later[0])}"),
        served == 1,
        "All were turned away before. A queue that nobody may stand in is no queue: how long does the pool let a "
        "request wait?",
    )
    refused = sorted((answer for answer in later if status(answer) != 200), key=lambda answer: answer.seconds)
    what = shown(refused[0]) if refused else f"none was turned away, the last was served after {_slowest(later):.2f} s"
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
    expect_patience(trial, box.do(WITHIN, patience))


def _slowest(found: Sequence[Answer]) -> float:
    return max(answer.seconds for answer in found)


# --- the whole ladder ---------------------------------------------------------------------------------------


def _stuck(pg: Postgres) -> list[Work]:
    seconds = HANGS if pg.version >= (17,) else TRANSACTION  # no limit ends it before 17: it ends by itself
    return [Work("stuck", seconds) for _ in range(CROWD)]


def _expect_rungs(trial: Trial, pg: Postgres, found: list[Answer], queue: End) -> list[float]:
    """Of requests that are all stuck, some wait in the pool, some in PgBouncer's queue, some run in PostgreSQL."""
    ends = (503, 504) if pg.version >= (17,) else (200, 503, 504)
    odd = next((answer for answer in found if status(answer) not in ends), None)
    trial.expect(
        f"{CROWD} requests at once that are all stuck: each gets {' or '.join(map(str, ends))}",
        shown(odd) if odd else f"each did, the last after {_slowest(found):.2f} s",
        odd is None,
        "Somebody went through, or the error was of another kind: which rung should have ended it? Tasks 1 to 3 look "
        "at each alone.",
    )
    in_pool = _fewest([answer for answer in found if not work_of(answer).called])
    in_queue = queue.seconds if queue.sqlstate == "08P01" else None
    waits = [
        _expect_rung(trial, "in the pool", in_pool, POOL),
        _expect_rung(trial, "in PgBouncer's queue", in_queue, QUEUE, third=True),
    ]
    if pg.version >= (17,):
        in_server = _fewest([answer for answer in found if "25P04" in work_of(answer).error])
        return [*waits, _expect_rung(trial, "in a transaction that is stuck (SQLSTATE 25P04)", in_server, TRANSACTION)]
    trial.expect("(not counted) who is stuck in PostgreSQL is ended", lacks(pg), True, "-")
    return waits


def _expect_rung(trial: Trial, place: str, seconds: float | None, within: float, third: bool = False) -> float:
    trial.expect(
        f"who waits {place} is ended, after at most {within:g} s ({'and its third of a second; ' * third}{MARGIN})",
        "none was" if seconds is None else f"after {seconds:.2f} s",
        seconds is not None and seconds <= within + THIRD * third + SLACK,
        "Tasks 1 to 3 look at each rung alone: is each check there passed?",
    )
    assert seconds is not None
    return seconds


def _fewest(found: Sequence[Answer]) -> float | None:
    return min((answer.seconds for answer in found), default=None)


def _busy(trial: Trial) -> list[str]:
    return [str(row["state"]) for row in trial.sessions.now() if row["state"] != "idle"]
