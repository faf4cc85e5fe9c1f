"""What runs beside the learner's code, in its process: calls of its functions, one at a time or from many threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from connlab.checks.answers import Answer, Problem, plain, problem_of


class Learner:
    """The learner's functions by name, and what they have returned so far."""

    def __init__(self, code: dict[str, Any]) -> None:
        self.code, self.kept = code, dict[str, Any]()
        self.stubs, self.exits = dict[str, bool](), dict[str, None]()
        self.crew: list[ThreadPoolExecutor] = []
        self._mutex = threading.Lock()

    def call(self, name: str, *arguments: Any, on: str = "", keep: str = "") -> Answer:
        """Call the function ``name``. ``on`` puts what was kept by that name before the arguments; ``keep`` keeps."""
        given = (self.kept[on], *arguments) if on else arguments
        value, problem, began = None, None, time.perf_counter()
        try:
            value = self.code[name](*given)
        except BaseException as error:  # sys.exit() too: it must not end the check
            problem = problem_of(error)
            self._note(name, problem)
        seconds = time.perf_counter() - began
        if keep:
            self.kept[keep] = value
        return Answer(arguments, began, seconds, None if keep else plain(value), problem)

    def _note(self, name: str, problem: Problem) -> None:
        with self._mutex:
            if problem.is_stub:
                self.stubs[problem.place.function if problem.place else name] = problem.is_begun
            if problem.name == "SystemExit":
                self.exits[name] = None


def call(learner: Learner, name: str, *arguments: Any, on: str = "", keep: str = "") -> Answer:
    """One call; see ``Learner.call``."""
    return learner.call(name, *arguments, on=on, keep=keep)


def load(learner: Learner, name: str, arguments: Sequence[tuple[Any, ...]], clients: int, on: str = "") -> list[Answer]:
    """A call for each of ``arguments``, from ``clients`` threads: each takes the next when it is done with one."""
    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(lambda given: learner.call(name, *given, on=on), arguments))


def crew(
    learner: Learner, name: str, arguments: Sequence[tuple[Any, ...]], clients: int, on: str, in_turn: bool = False
) -> list[Answer]:
    """As ``load``, from threads that stay for the next call of it: they keep what the learner's code keeps in them.

    Each takes the same share of ``arguments``. ``in_turn`` makes one call at a time, each from the next thread.
    """
    learner.crew = learner.crew or [ThreadPoolExecutor(1) for _ in range(clients)]
    calls = zip(itertools.cycle(learner.crew), arguments, strict=False)
    begun = (thread.submit(learner.call, name, *given, on=on) for thread, given in calls)
    return [each.result() for each in (begun if in_turn else list(begun))]


def is_none(learner: Learner, kept: str) -> bool:
    """Whether what was kept by that name is None."""
    return learner.kept.get(kept) is None
