"""The drivers for callers that give up: coroutines behind ordinary calls, and attempts as a script says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from connlab.checks.abandoned import in_a_loop, queued, retrying, scripted
from connlab.checks.drivers import Learner, call


async def slow(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


def test_a_coroutine_is_called_and_cancelled_when_the_patience_is_over() -> None:
    learner = Learner({"slow": slow})
    in_a_loop(learner, "slow", 0.05, "briefly")
    in_a_loop(learner, "slow", None, "slow")
    assert call(learner, "slow", 0.1).value == 0.1
    cancelled = call(learner, "briefly", 60)
    assert cancelled.problem is not None and cancelled.problem.name == "TimeoutError"
    assert cancelled.seconds < 30


def test_what_is_no_coroutine_is_told_so() -> None:
    learner = Learner({"ask": lambda: 1})
    in_a_loop(learner, "ask", 1, "ask")
    problem = call(learner, "ask").problem
    assert problem is not None and "it is no coroutine: write `async def" in problem.message


async def forgets() -> Any:
    return slow(0)


def test_a_coroutine_that_nobody_awaits_is_told_so() -> None:
    learner = Learner({"forgets": forgets})
    in_a_loop(learner, "forgets", 1, "forgets")
    problem = call(learner, "forgets").problem
    assert problem is not None and "`await` is missing after `return` in `forgets`" in problem.message


async def stub() -> None:
    raise NotImplementedError()


def test_the_stub_of_a_coroutine_is_one() -> None:
    learner = Learner({"stub": stub})
    in_a_loop(learner, "stub", 1, "stub")
    problem = call(learner, "stub").problem
    assert problem is not None and problem.is_stub and not problem.is_begun


def test_the_first_come_by_one_name_and_the_others_by_another() -> None:
    learner = Learner({"first": lambda app, at: ("first", at), "other": lambda app, at: ("other", at)})
    learner.kept["app"] = None
    answers = queued(learner, [(1,), (2,), (3,)], ("first", 2), "other", 0.01)
    assert [answer.value for answer in answers] == [("first", 1), ("first", 2), ("other", 3)]


def again(app: Any, attempt: Callable[[], Any]) -> Any:
    try:
        return attempt()
    except TimeoutError:
        return attempt()


@pytest.mark.parametrize(
    ("script", "value", "error", "attempts"),
    [
        (["row"], "row", None, 1),
        (["TimeoutError", "row"], "row", None, 2),
        (["TimeoutError"], None, "TimeoutError", 2),
        (["UndefinedTable", "row"], None, "UndefinedTable", 1),
    ],
)
def test_attempts_go_as_the_script_says(script: list[str], value: Any, error: str | None, attempts: int) -> None:
    learner = Learner({"ask_again": again})
    learner.kept["app"] = None
    answer, times = scripted(learner, script)
    assert (answer.value, answer.problem and answer.problem.name, len(times)) == (value, error, attempts)
    assert all(abs(moment - time.perf_counter()) < 60 for moment in times)


def test_attempts_are_counted_for_each_request() -> None:
    def ask(app: Any, user: int) -> int:
        if user == 2:
            raise TimeoutError
        return user

    learner = Learner({"ask_again": again, "ask": ask})
    learner.kept["app"] = None
    answers, attempts = retrying(learner, [(1,), (2,)], 2)
    assert [(answer.arguments, answer.value) for answer in answers] == [((1,), 1), ((2,), None)]
    assert sorted(attempts) == [1, 2, 2]
