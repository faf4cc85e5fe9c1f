"""The nightly job of lab 07: what is expected of its workers, and of the advisory lock that they take for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from connlab.checks import lab_07_looks as looks
from connlab.checks.answers import Answer
from connlab.checks.drivers import Learner, call
from connlab.checks.errors import Hangs
from connlab.checks.lab_07_case import WITHIN, Case
from connlab.checks.sessions import held_up
from connlab.postgres import Postgres

WORKERS = 3
AT_ONCE_WITHIN = 2.5
"""Seconds that a worker has to say that another one is at the job."""
BEGINS_WITHIN = 5.0
"""Seconds that a worker has to begin the job."""
WAITING = "from pg_locks where not granted and locktype = 'transactionid'"
ADVISORY = "select count(*) from pg_locks where locktype = 'advisory'"


def set_off(learner: Learner, name: str, arguments: Sequence[tuple[Any, ...]], on: str, seconds: float) -> list[Answer]:
    """A driver: a call for each of ``arguments``, in threads; the answers that are there after ``seconds`` at most."""
    threads = ThreadPoolExecutor(len(arguments))
    begun = [threads.submit(learner.call, name, *given, on=on) for given in arguments]
    learner.kept["set off"] = [*learner.kept.get("set off", []), *begun]
    done, _ = wait(begun, timeout=seconds)
    return [each.result() for each in done]


def finish(learner: Learner) -> list[Answer]:
    """A driver: the answers of all that was set off, when they are there."""
    return [each.result() for each in learner.kept["set off"]]


def expect_closed(it: Case, day: str, when: str) -> None:
    """Expect that a worker does the job, once, and that the lock is free then."""
    given = it.box.do(WITHIN, call, "close_day", day, on="app")
    it.says(given, True, f"True for a day, {when}", looks.LOCK_LEFT)
    _expect_once(it, day)
    expect_free(it, "afterwards")


def _expect_once(it: Case, day: str) -> None:
    times = it.pg.value(f"select count(*) from closing where day = '{day}'")
    if times != 1:
        it.trial.expect("the day is in `closing` once", f"{times} times", False, looks.NOT_AT_IT)


def expect_free(it: Case, when: str) -> None:
    """Expect that nobody holds an advisory lock."""
    held = it.pg.value(ADVISORY)
    it.trial.expect(f"the lock is free {when}", "it is" if not held else f"{held} held", held == 0, looks.LOCK_LEFT)


def expect_false_at_once(it: Case, day: str) -> None:
    """Expect that a worker does not wait for a program that is at the job."""
    expected = "False at once, while another program is at the job"
    try:
        given = it.box.do(AT_ONCE_WITHIN, call, "close_day", day, on="app")
    except Hangs as hang:
        it.trial.expect(expected, f"{hang}", False, looks.WAITED)
        raise
    it.says(given, False, expected, looks.ANOTHER_PROGRAM)


def expect_one_worker(it: Case, day: str) -> None:
    """The first worker waits inside the job, on its server connection, while the others ask."""
    others = WORKERS - 1
    with held_up(it.pg, "closing", day):
        it.box.do(WITHIN, set_off, "close_day", [(day,)], "app", 0)
        if _at_the_job(it.pg):
            locks = it.pg.value(f"{ADVISORY} and objid = {looks.NIGHTLY}")
            expected = f"advisory lock {looks.NIGHTLY} is held while the job runs"
            it.trial.expect(expected, "it is" if locks else "it is not", locks > 0, looks.LOCK_GONE)
        given = it.box.do(WITHIN, set_off, "close_day", [(day,)] * others, "app", AT_ONCE_WITHIN)
        at_it = _at_the_job(it.pg)
        it.trial.expect(f"one of {WORKERS} workers at the job at a time", f"{at_it}", at_it == 1, looks.BOTH_AT_IT)
        it.answered(given, "of workers while one is at it")
        said = [each.value for each in given]
        it.trial.expect(
            f"the other {others} say False at once",
            f"{len(said)} said {' and '.join(map(repr, said)) or 'nothing'}",
            said == [False] * others,
            looks.WAITED,
        )
    done = sum(each.value is True for each in it.box.do(WITHIN, finish))
    it.trial.expect("one worker says True", f"{done} did", done == 1, looks.NOT_AT_IT)
    _expect_once(it, day)
    expect_free(it, "after the job")


def _at_the_job(pg: Postgres) -> int:
    """How many sessions wait in the middle of the job; waits for the first."""
    query = f"select count(*) {WAITING}"
    deadline = time.monotonic() + BEGINS_WITHIN
    while not (found := pg.value(query)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(found)


def expect_dead_worker_leaves_nothing(it: Case, day: str) -> None:
    """The server connection of a worker dies in the middle of the job."""
    with held_up(it.pg, "closing", day):
        pending = it.box.begin(call, "close_day", day, on="app")
        _at_the_job(it.pg)
        it.pg.rows(f"select pg_terminate_backend(pid, 5000) from (select pid {WAITING}) as worker")
    given = pending.result(WITHIN)
    it.trial.expect(
        "a worker whose server connection dies gets an error (a `psycopg.OperationalError`)",
        f"{given.problem or repr(given.value)}",
        given.problem is not None and "OperationalError" in given.problem.kinds,
        looks.UNCHANGED,
    )
    expect_free(it, "after its death")
