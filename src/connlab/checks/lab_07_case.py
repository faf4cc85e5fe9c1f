"""One run of a check of lab 07: the learner's application behind PgBouncer, and what is expected of each function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from connlab.checks import lab_07_looks as looks
from connlab.checks.answers import Answer, Problem, problems
from connlab.checks.drivers import call, is_none, load
from connlab.checks.errors import Hangs
from connlab.checks.sandbox import Sandbox
from connlab.checks.transaction_mode import TAKEN, TransactionMode, application
from connlab.checks.trial import Trial
from connlab.postgres import Postgres

TABLES = ("invoice", "rate", "closing")
WITHIN = 10.0
"""Seconds that a round of calls may take."""
REFUSES_OPTIONS = "unsupported startup parameter"
"""PgBouncer's words for settings that come with a connection."""


@dataclass(frozen=True)
class Case:
    """The parts of a check that each expectation needs."""

    trial: Trial
    pg: Postgres
    box: Sandbox
    mode: TransactionMode

    def load(self, name: str, arguments: Sequence[tuple[Any, ...]], clients: int = 1, on: str = "app") -> list[Answer]:
        """A call for each of ``arguments``, from that many threads."""
        try:
            return self.box.do(WITHIN, load, name, arguments, clients, on=on)
        except Hangs as hang:
            if hang.in_pool and REFUSES_OPTIONS in self.box.output:
                refused = f"`{REFUSES_OPTIONS}`, says the log of your pool, which waits for a connection"
                self.trial.expect("a pool that connects", refused, False, looks.STARTUP)
            raise

    def start(self) -> None:
        """Start the application."""
        begun = self.box.do(WITHIN, call, "start", self.mode.dsn, self.pg.dsn, keep="app")
        self.returns("start(dsn, direct_dsn)", begun)

    def returns(self, what: str, answer: Answer) -> None:
        """What was called has raised no error."""
        if answer.problem:
            self.trial.expect(f"`{what}` returns", f"{answer.problem}", False, self.meaning(answer.problem))

    def answered(self, answers: Sequence[Answer], when: str, what: str = "call") -> None:
        """Each call returned something."""
        failed = problems(answers)
        self.trial.expect(
            f"{_many(len(answers), what)} {when}, {_many(len(answers), 'answer')}",
            f"{_many(len(answers) - len(failed), 'answer')}{first(failed)}",
            not failed,
            self.meaning(failed[0]) if failed else "-",
        )

    def same(
        self,
        answers: Sequence[Answer],
        wanted: Callable[..., Any],
        expected: str = "the same answers as on a direct connection",
        look: str = looks.FORM,
    ) -> None:
        """The answers are those of a direct connection, as ``wanted`` says for a call's arguments."""
        other = next((each for each in answers if each.value != wanted(*each.arguments)), None)
        self.trial.expect(
            expected,
            f"{other.value!r} instead of {wanted(*other.arguments)!r}" if other else "the same",
            other is None,
            look,
        )

    def says(self, answer: Answer, wanted: bool, expected: str, look: str) -> None:
        """A call returned True or False."""
        self.trial.expect(
            expected,
            f"{answer.problem or repr(answer.value)}",
            not answer.problem and answer.value is wanted,
            self.meaning(answer.problem) if answer.problem else look,
        )

    def raised(self, answers: Sequence[Answer], kind: str, words: str = "") -> None:
        """Each of the calls failed, with the server's error, which has these ``words``."""
        wrong = next((each for each in answers if not _is(each.problem, kind, words)), None)
        problem = wrong.problem if wrong else None
        returned = f"{wrong.value!r} was returned" if wrong else "it did"
        self.trial.expect(
            f"a query that the server refuses raises its error (a `psycopg.{kind}`)",
            f"{problem}" if problem else returned,
            wrong is None,
            self.meaning(problem, looks.UNCHANGED) if problem else looks.UNCHANGED,
        )

    def none_past(self) -> None:
        """No connection was opened straight to PostgreSQL."""
        past = self.mode.past()
        self.trial.expect("no connection past PgBouncer", f"{past}", past == 0, looks.PAST)

    def meaning(self, problem: Problem, other: str = looks.READ) -> str:
        """What to look at for an error that a good call got."""
        if problem.name in ("InvalidSqlStatementName", "DuplicatePreparedStatement"):
            return looks.STATEMENT
        if problem.name == "SyntaxError" and '"$1"' in problem.message:
            return looks.NO_PARAMETERS
        if problem.name == "SyntaxError" and "neil" in problem.message:
            return looks.QUOTED
        if looks.BAD in problem.message:
            return looks.EARLIER
        if looks.ONE_DAY in problem.message:
            return looks.NOT_AT_IT
        if problem.name in ("UndefinedTable", "DuplicateTable"):
            return looks.TEMPORARY
        if "query_wait_timeout" in problem.message or "PoolTimeout" in problem.kinds:
            return TAKEN
        if REFUSES_OPTIONS in problem.message:
            return looks.STARTUP
        if "NoneType" in problem.message and self.box.do(WITHIN, is_none, "app"):
            return looks.NOTHING
        return other


def _is(problem: Problem | None, kind: str, words: str) -> bool:
    return problem is not None and kind in problem.kinds and words in problem.message


@contextmanager
def case(
    trial: Trial, pg: Postgres, schema: str, also: str = "", undo: str = "", /, **code: Callable[..., Any]
) -> Iterator[Case]:
    """The learner's application, started behind PgBouncer in transaction mode."""
    with application(trial, pg, schema, TABLES, also, undo, **code) as (box, mode):
        found = Case(trial, pg, box, mode)
        found.start()
        yield found


def first(failed: Sequence[Problem]) -> str:
    """The first error, as the end of a sentence; empty without one."""
    return f"; the first error was {failed[0]}" if failed else ""


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
