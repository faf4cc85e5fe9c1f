"""The checks of lab 14: a ladder of timeouts in the application, PgBouncer and PostgreSQL, each rung set off for real.

The learner writes ``server_settings(version)``, SQL that an administrator runs; ``pooler_settings()``, a dict of
settings of PgBouncer; ``start(dsn)`` and ``handle(app, work)``, the service; ``report(app, query)`` and
``migrate(dsn, statement)``, which need other limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from connlab.checks.answers import Answer
from connlab.checks.drivers import load
from connlab.checks.lab_14_service import (
    begin_service,
    expect_nothing_left,
    expect_refused,
    expect_statuses,
    expect_transactions,
    expect_well,
    handled_at_last,
    slowest,
)
from connlab.checks.ladder import (
    WITHIN,
    Reads,
    given_to_pooler,
    in_force,
    long_reader,
    one_column_more,
    pooler,
    queued,
    reading,
)
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
    REPORT,
    Work,
    exceptional,
    face_silence,
    shown,
    status,
    work_of,
)
from connlab.checks.requirement import (
    BACKUP,
    CALLER,
    CONNECTIONS,
    CONVOY,
    CROWD,
    GIVE_UP,
    IN_THE_WAY,
    LEAKS,
    LOCK,
    MARGIN,
    MOST_STOOD,
    POOL,
    QUEUE,
    READ,
    SLACK,
    STATEMENT,
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
from connlab.checks.trial import Trial, check
from connlab.postgres import Postgres

Function = Callable[..., Any]

# --- the checks ---------------------------------------------------------------------------------------------


@check("PostgreSQL's rungs: statement, lock, pause, transaction")
def server_rungs(trial: Trial, server_settings: Function, pg: Postgres) -> None:
    """Write `server_settings`: SQL that limits the role `app`, whoever connects with it, and nobody else."""
    with trial.sandbox(pg, server_settings=server_settings) as box, in_force(trial, box, pg):
        with pooler(pg, trial, size=12) as bouncer, ThreadPoolExecutor(16) as threads, row_locked(pg, 1):
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
        ended_by(trial, "a statement without end", best([each.result() for each in slow], "57014"), "57014", STATEMENT)
        ended_by(
            trial, "a statement that waits for a lock", best([each.result() for each in lock], "55P03"), "55P03", LOCK
        )
        expect_forgotten(trial, [each.result() for each in forgotten])
        expect_long(trial, pg, best([each.result() for each in long], "25P04"))
        expect_abandoned(trial, abandoned.result())
        for what, end in good.result().items():
            trial.expect(f"{what} goes through", f"{end}" if end.name else "it did", not end.name, TIGHT)
        trial.expect(
            f"a backup by the role postgres, a statement of {BACKUP:g} s, goes through",
            f"{backup.result()}" if backup.result().name else "it did",
            not backup.result().name,
            "The limits are the service's, and its role is `app`. What stands in the configuration or at the database "
            "holds for everybody who connects.",
        )


@check("The application's rungs: the pool, and the right answer")
def answers(trial: Trial, start: Function, handle: Function, pg: Postgres) -> None:
    """Write `start` and `handle`: no request waits long for a connection, and each gets the answer that fits."""
    with trial.sandbox(pg, start=start, handle=handle) as box, pooler(pg, trial, size=10) as bouncer:
        begin_service(trial, box, bouncer)
        expect_well(trial, bouncer, handled_at_last(box, [Work("reads", row=7)] * CONNECTIONS), "ordinary requests")
        expect_transactions(trial, box, pg)
        expect_statuses(trial, box, pg)
        expect_refused(trial, box)
        expect_well(trial, bouncer, handled_at_last(box, [Work("reads", row=7)] * CONNECTIONS), "requests afterwards")
        expect_nothing_left(trial, left_behind(bouncer.dsn, CONNECTIONS), CONNECTIONS)


@check("PgBouncer's rungs: its queue, and silence")
def pooler_rungs(trial: Trial, pooler_settings: Function, start: Function, handle: Function, pg: Postgres) -> None:
    """Write `pooler_settings`, and have `start` and `handle` stand a pooler that says nothing."""
    with trial.sandbox(pg, pooler_settings=pooler_settings, start=start, handle=handle) as box, Silent() as silent:
        settings = given_to_pooler(trial, box)
        facing = box.begin(face_silence, silent.dsn)
        with pooler(pg, trial, settings) as bouncer:
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
        pooler(pg, trial, size=1) as narrow,
        pooler(pg, trial) as other,
    ):
        begin_service(trial, box, narrow)
        begin_service(trial, box, other, keep="other")
        with one_column_more(pg) as there:
            with reading(pg, IN_THE_WAY) as reads, long_reader(pg, IN_THE_WAY):
                good, left, following, endless, done = box.do(WITHIN, exceptional, pg.dsn, narrow.dsn)
            is_there = there()
    _expect_report(trial, good, left, following, endless)
    _expect_migration(trial, reads, done, is_there)


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
    with trial.sandbox(pg, **codes) as box, in_force(trial, box, pg):
        settings = given_to_pooler(trial, box)
        with pooler(pg, trial, settings) as bouncer, pooler(pg, trial, settings, size=1) as full:
            begin_service(trial, box, bouncer)
            expect_well(trial, bouncer, handled_at_last(box, ordinary), "16 ordinary requests at once")
            pending = box.begin(load, "handle", [(work,) for work in _stuck(pg)], CROWD, on="app")
            queue = queued(pg, full, GIVE_UP)
            waits = _expect_rungs(trial, pg, pending.result(WITHIN), queue)
            trial.expect(
                f"a request that meets them one after the other has its answer within {CALLER:g} s",
                f"{' + '.join(f'{seconds:.2f}' for seconds in waits)} = {sum(waits):.2f} s",
                sum(waits) <= CALLER,
                "Each is within its own limit, and their sum is not: a caller may wait for a connection, then in "
                "PgBouncer's queue, then for the transaction. Which of them can do with less?",
            )
            left = until(lambda: not _busy(trial), 2 * SLACK)
            trial.expect(
                "nothing of them runs on the server afterwards, and no transaction is open",
                "nothing does" if left else f"sessions that are {', '.join(_busy(trial))}",
                left,
                "Whatever gives the caller his answer must also end the work: what in PostgreSQL would?",
            )
            expect_well(trial, bouncer, handled_at_last(box, ordinary), "16 ordinary requests afterwards")


# --- the exceptions -----------------------------------------------------------------------------------------


def _expect_report(trial: Trial, good: Answer, left: list[str], following: End, endless: Answer) -> None:
    trial.expect(
        f"a report of {REPORT:g} s, with its result",
        shown(good),
        isinstance(good.value, tuple) and good.value == (1000, 1000),
        "The limit of the role holds for the report too. Inside one transaction `set local` gives it another: "
        "https://www.postgresql.org/docs/current/sql-set.html. Return the row as `fetchone()` gives it.",
    )
    expect_nothing_left(trial, left, 1)
    what = "a statement of another client, on the same server connection after it,"
    ended_by(trial, what, following, "57014", STATEMENT, LEAKS)
    trial.expect(
        f"a report that hangs ends, after at most {TRANSACTION:g} s ({MARGIN})",
        shown(endless),
        endless.problem is not None and endless.seconds <= TRANSACTION + SLACK,
        "Longer is not without end: 0 switches a limit off. Give the report what it needs, and some room.",
    )


def _expect_migration(trial: Trial, reads: Reads, done: Answer, is_there: bool) -> None:
    trial.expect(
        f"{len(reads.ends)} requests that read the table while `migrate` runs, and none fails",
        f"{len(reads.failed)} failed, the first with {reads.failed[0]}" if reads.failed else "none did",
        not reads.failed,
        CONVOY,
    )
    trial.expect(
        f"the column is there, though a transaction of {IN_THE_WAY:g} s was in the way",
        "it is" if is_there else f"it is not; `migrate` ended with {done.problem or repr(done.value)}",
        is_there,
        "Who gives up quickly must come again: who tries the statement once more, and for how long?",
    )
    trial.expect("`migrate` returns", str(done.problem) if done.problem else "it did", done.problem is None, READ)
    trial.expect(
        f"requests stand still for less than {MOST_STOOD:.0%} of that time",
        f"{reads.stood:.0%}",
        reads.stood < MOST_STOOD,
        "Each attempt holds up all who come after it, for as long as it waits. How long does one attempt wait, and how "
        "long do requests have to themselves before the next?",
    )


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
        shown(odd) if odd else f"each did, the last after {slowest(found):.2f} s",
        odd is None,
        "Somebody went through, or the error was of another kind: which rung should have ended it? Tasks 1 to 3 look "
        "at each alone.",
    )
    in_pool = _fewest([answer for answer in found if not work_of(answer).called])
    waits = [
        _expect_rung(trial, "in the pool", in_pool, POOL),
        _expect_rung(trial, "in PgBouncer's queue", queue.seconds if queue.sqlstate == "08P01" else None, QUEUE),
    ]
    if pg.version >= (17,):
        in_server = _fewest([answer for answer in found if "25P04" in work_of(answer).error])
        return [*waits, _expect_rung(trial, "in a transaction that is stuck (SQLSTATE 25P04)", in_server, TRANSACTION)]
    trial.expect("(not counted) who is stuck in PostgreSQL is ended", lacks(pg), True, "-")
    return waits


def _expect_rung(trial: Trial, place: str, seconds: float | None, within: float) -> float:
    trial.expect(
        f"who waits {place} is ended, after at most {within:g} s",
        "none was" if seconds is None else f"after {seconds:.2f} s",
        seconds is not None and seconds <= within + SLACK,
        "Tasks 1 to 3 look at each rung alone: is each check there passed?",
    )
    assert seconds is not None
    return seconds


def _fewest(found: Sequence[Answer]) -> float | None:
    return min((answer.seconds for answer in found), default=None)


def _busy(trial: Trial) -> list[str]:
    return [str(row["state"]) for row in trial.sessions.now() if row["state"] != "idle"]
