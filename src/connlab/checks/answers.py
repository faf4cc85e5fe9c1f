"""What a call of the learner's function gave: plain data, which can go from one process to another."""

from __future__ import annotations

import datetime
import inspect
import linecache
import sysconfig
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

LONGEST = 300
"""Characters of a message or a value that are kept."""
PLAIN = (bool, int, float, str, bytes, Decimal, datetime.datetime, datetime.date, datetime.timedelta)


@dataclass(frozen=True)
class Place:
    """A line of the learner's code."""

    function: str
    line: int
    file: str
    in_pool: bool = False
    """Whether it waits there for what others give back: in psycopg_pool, or at a queue."""

    def __str__(self) -> str:
        source = linecache.getline(self.file, self.line).strip()
        return f"`{self.function}`, line {self.line}" + (f": `{source}`" if source else "")


@dataclass(frozen=True)
class Problem:
    """An exception that left the learner's function."""

    name: str
    """The class's name, such as "PoolTimeout"."""
    kinds: tuple[str, ...]
    """The names of the class and of its bases."""
    message: str
    place: Place | None
    is_stub: bool
    """Whether it is the stub of an exercise, not an error."""
    is_begun: bool = False
    """Whether code stands above the stub."""

    def __str__(self) -> str:
        text = f"`{self.name}: {self.message}`" if self.message else f"`{self.name}`"
        return f"{text} in {self.place}" if self.place else text


@dataclass(frozen=True)
class Answer:
    """What one call gave, and when; times in seconds on a clock of the learner's process."""

    arguments: tuple[Any, ...]
    began: float
    seconds: float
    value: Any
    """What it returned, as plain data; None when it raised an exception."""
    problem: Problem | None


def problems(answers: Iterable[Answer]) -> list[Problem]:
    """The exceptions among the answers, in order."""
    return [answer.problem for answer in answers if answer.problem]


def problem_of(error: BaseException) -> Problem:
    """``error`` as plain data."""
    kinds = tuple(kind.__name__ for kind in type(error).__mro__ if kind is not object)
    place, innermost = _places(error)
    is_stub = type(error) is NotImplementedError and not error.args and innermost
    message = " ".join(str(error).split())[:LONGEST]
    return Problem(type(error).__name__, kinds, message, place, is_stub, is_stub and not is_bare_stub(_last(error)))


def _last(error: BaseException) -> CodeType:
    """The code that raised it."""
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1].f_code


def is_bare_stub(code: CodeType) -> bool:
    """Whether a function's body is ``raise NotImplementedError()`` and nothing else."""
    collecting = (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS)
    given = code.co_argcount + code.co_kwonlyargcount + sum(bool(code.co_flags & each) for each in collecting)
    return code.co_names == ("NotImplementedError",) and code.co_nlocals == given


def _places(error: BaseException) -> tuple[Place | None, bool]:
    """The learner's innermost line, and whether the exception was raised there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_learners(frame.filename)]
    if not own:
        return None, False
    return Place(own[-1].name, own[-1].lineno or 0, own[-1].filename), own[-1] is frames[-1]


def is_learners(filename: str) -> bool:
    """Whether code with that file name is the learner's: of no library, and not frozen into the interpreter.

    What Cython has compiled, such as psycopg's C part, names its sources without a folder.
    """
    return not filename.startswith(("<frozen", *_libraries())) and not filename.endswith((".pyx", ".pxd"))


@cache
def _libraries() -> tuple[str, ...]:
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return (*paths, str(Path(__file__).resolve().parents[1]))


def plain(value: Any) -> Any:
    """``value`` where it is plain data, else its text: objects of the learner's cannot leave their process."""
    if value is None or type(value) in PLAIN:
        return value
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    return repr(value)[:LONGEST]
