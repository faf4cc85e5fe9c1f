"""How a check is written: a function that expects things of what it measures.

::

    @check("Every request is answered")
    def answered(trial, start, handle, pg):
        '''Write `start` and `handle`.'''                        # shown while the exercise has its stub
        with trial.sandbox(pg, start=start, handle=handle) as box:
            box.do(5, call, "start", pg.dsn, keep="app")
            answers = box.do(10, load, "handle", [(user,) for user in range(1, 41)], clients=8, on="app")
            failed = problems(answers)
            trial.expect("40 answers", f"{40 - len(failed)}", not failed, look=f"The first error was {failed[:1]}.")

In a notebook it is called without ``trial``. It shows a card and never raises for what the learner did: a notebook
whose exercises are not solved runs through. It returns the result, and the solution asserts that it has passed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec

import psycopg

from connlab.checks.errors import CheckError, ServerDown, Trouble, Unfinished
from connlab.checks.results import FAILED, OPEN, PASSED, Result, Row
from connlab.checks.sandbox import Sandbox
from connlab.checks.sessions import Sessions
from connlab.errors import ConnlabError, NodeStopped
from connlab.postgres import Postgres

P = ParamSpec("P")


class Unmet(Exception):
    """An expectation was not met; it has been written down, and the check has found what there was to find."""


class Trial:
    """One run of a check: collects what was expected and measured."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[Row] = []
        self.look, self.output = "", ""
        self.sessions: Sessions
        """What the server sees of the learner's code; there from ``sandbox`` on."""

    def expect(self, expected: str, measured: str, good: bool, look: str) -> None:
        """Expect something: in words, what was measured, whether it is good; ``look`` says what to do if not.

        The first expectation that is not met ends the check. Backticks make code.
        """
        if not all(text.strip() for text in (expected, measured, look)) or not isinstance(good, bool):
            raise CheckError(
                f"the check {self.title!r} expects {(expected, measured, good, look)}; it takes three texts and, "
                "third, True or False"
            )
        self.rows.append(Row(expected, measured, good))
        if not good:
            self.look = look
            raise Unmet

    @contextmanager
    def sandbox(self, pg: Postgres, **code: Callable[..., Any]) -> Iterator[Sandbox]:
        """A process with the learner's functions, and a server that runs: started again if somebody killed it."""
        _take_up(pg)
        sessions = self.sessions = Sessions(pg)
        try:
            with Sandbox(**code) as box:
                try:
                    yield box
                finally:
                    self.output = box.output
        except (psycopg.Error, NodeStopped, Trouble, Unmet):
            _leave(pg, sessions)
            raise
        _leave(pg, sessions)

    def result(self, status: str) -> Result:
        """What was found, under that status."""
        if status != OPEN and not self.rows:
            raise CheckError(f"the check {self.title!r} has expected nothing, so it shows nothing")
        return Result(self.title, status, tuple(self.rows), self.look, self.output)


def check(title: str) -> Callable[[Callable[Concatenate[Trial, P], None]], Callable[P, Result]]:
    """Make a check of a function; its docstring says what is asked, and is shown while the exercise has its stub."""

    def decorate(body: Callable[Concatenate[Trial, P], None]) -> Callable[P, Result]:
        asked = " ".join((inspect.getdoc(body) or "").split())
        if not asked or not title.strip():
            raise CheckError(f"the check {title!r} does not say what is asked: write it as its docstring")

        @functools.wraps(body)
        def run(*args: P.args, **kwargs: P.kwargs) -> Result:
            trial = Trial(title)
            result = _result(trial, lambda: body(trial, *args, **kwargs), asked)
            result.show()
            return result

        return run

    return decorate


def _result(trial: Trial, body: Callable[[], None], asked: str) -> Result:
    try:
        body()
    except Unmet:
        return trial.result(FAILED)
    except Unfinished as problem:
        return Result(trial.title, OPEN, look=f"{asked} Still to be written: {_names(problem.names)}.{_begun(problem)}")
    except Trouble as problem:
        trial.rows.append(Row(problem.expected, problem.measured, False))
        trial.look = problem.look
        return trial.result(FAILED)
    return trial.result(PASSED)


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _begun(problem: Unfinished) -> str:
    if not problem.begun:
        return ""
    return (
        f" In {_names(problem.begun)} the stub's last line still stands below your code: take "
        "`raise NotImplementedError()` out."
    )


# --- the server ---------------------------------------------------------------------------------------------


def _take_up(pg: Postgres) -> None:
    """Start a server again that was killed or frozen."""
    if not _answers(pg):
        with _or_down():
            pg.restart()


def _answers(pg: Postgres) -> bool:
    try:
        return bool(pg.value("select 1") == 1)
    except (psycopg.Error, NodeStopped):
        return False


def _leave(pg: Postgres, sessions: Sessions) -> None:
    """Leave the server to the next check as it was; raises ServerDown when it was down, and runs again."""
    if _answers(pg):
        sessions.end()
        return
    with _or_down():
        pg.restart()
    raise ServerDown(again=True) from None


@contextmanager
def _or_down() -> Iterator[None]:
    try:
        yield
    except ConnlabError as problem:
        raise ServerDown(again=False) from problem
