"""The listener of lab 07: what is expected of ``listen`` and ``events``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from connlab.checks import lab_07_looks as looks
from connlab.checks.answers import Answer, Problem
from connlab.checks.drivers import call, is_none
from connlab.checks.errors import Hangs
from connlab.checks.lab_07_case import WITHIN, Case

ARRIVES_WITHIN = 2.0
"""Seconds that a notification has to arrive."""
SILENT = 0.5
"""Seconds that ``events`` is given when nothing comes."""
SILENT_WITHIN = 2.0
SHORTLY = 0.7
"""Seconds that ``events`` is given for what has come already."""


def begin_to_listen(it: Case) -> None:
    """Have the application listen."""
    it.returns("listen(app)", it.box.do(WITHIN, call, "listen", on="app", keep="listener"))


def _events(it: Case, many: int, seconds: float) -> Answer:
    return it.box.do(WITHIN, call, "events", many, seconds, on="listener")


def expect_heard(it: Case, sent: Sequence[str], when: str, at_once: bool = True) -> None:
    """Expect that what is sent arrives in time; ``at_once``: it has been sent when `events` is called."""
    past, expected = it.mode.past(), f"{len(sent)} notifications, sent {when}, arrive within {ARRIVES_WITHIN:g} s"
    if at_once:
        it.mode.notify("invoice", sent)
    pending = it.box.begin(call, "events", len(sent), ARRIVES_WITHIN, on="listener")
    if not at_once:
        time.sleep(0.2)
        it.mode.notify("invoice", sent)
    given = pending.result(WITHIN)
    heard = _payloads(given)
    it.trial.expect(
        expected,
        f"{given.problem}" if given.problem else f"{sum(each in heard for each in sent)} arrived",
        heard == [*sent],
        _meaning(it, given.problem) if given.problem else _why_deaf(it, past),
    )
    if given.seconds >= ARRIVES_WITHIN:
        measured = f"all arrived, and `events` took {given.seconds:.1f} s"
        it.trial.expect(f"{expected}, and `events` returns then", measured, False, looks.WHOLE_TIME)


def expect_silence(it: Case) -> None:
    """Nothing is sent, and `events` must not wait for it longer than it is told."""
    expected = f"`events(listener, 1, {SILENT:g})` returns [] within {SILENT_WITHIN:g} s when nothing is sent"
    try:
        given = it.box.do(SILENT_WITHIN, call, "events", 1, SILENT, on="listener")
    except Hangs as hang:
        it.trial.expect(expected, f"{hang}", False, looks.LATE)
        raise
    it.trial.expect(expected, f"{given.problem or repr(given.value)}", given.value == [], looks.LATE)


def expect_none_dropped(it: Case, sent: Sequence[str]) -> None:
    """More have come than one call asks for."""
    it.mode.notify("invoice", sent)
    many = len(sent) // 2
    heard = [payload for _ in range(2) for payload in _payloads(_events(it, many, SHORTLY))]
    expected = f"{len(sent)} notifications, sent before two calls for {many} each, arrive"
    it.trial.expect(expected, f"{len(heard)} arrived", heard == [*sent], looks.DROPPED)


def _payloads(given: Answer) -> list[Any]:
    return given.value if isinstance(given.value, list) else []


def _meaning(it: Case, problem: Problem) -> str:
    nothing = "NoneType" in problem.message and it.box.do(WITHIN, is_none, "listener")
    return looks.NO_LISTENER if nothing else it.meaning(problem)


def _own_sessions(it: Case) -> Iterator[dict[str, Any]]:
    """The learner's sessions that came past PgBouncer."""
    servers = it.mode.pids()
    return (row for row in it.trial.sessions.now() if row["pid"] not in servers)


def _why_deaf(it: Case, past: int) -> str:
    if it.mode.past() > past:
        return looks.DEAF_LATE
    states = [row["state"] or "" for row in _own_sessions(it)]
    if any(state.startswith("idle in transaction") for state in states):
        return looks.DEAF_TRANSACTION
    return looks.DEAF_ELSE if states else looks.DEAF


def expect_listens_again(it: Case) -> None:
    """The listener's session dies: its caller must learn of it, or it must listen again by itself."""
    for row in _own_sessions(it):
        it.pg.rows(f"select pg_terminate_backend({row['pid']}, 5000)")
    given = _events(it, 1, 0.3)
    if given.problem:
        it.trial.expect(
            "`events` raises a `psycopg.OperationalError` when its session has ended, or listens again",
            f"{given.problem}",
            "OperationalError" in given.problem.kinds,
            looks.UNCHANGED,
        )
        begin_to_listen(it)
    sent = ["invoice again"]
    it.mode.notify("invoice", sent)
    given = _events(it, 1, ARRIVES_WITHIN)
    it.trial.expect(
        "after the end of its session, and `listen` again where `events` raised an error, 1 notification arrives",
        f"{given.problem or repr(given.value)}",
        given.value == sent,
        looks.DEAF_FOREVER,
    )
