"""Rules that turn measurements into a verdict, and what they say in words."""

from __future__ import annotations

import ast
import difflib
import linecache
import math
import numbers
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from types import CodeType, FunctionType
from typing import Any

from connlab.lesson.errors import LessonError, VerdictError
from connlab.lesson.verdicts import CONFIRMED, DEPENDS, REFUTED

Measurement = float | int | str
Rule = Callable[[Any], bool]
"""Gets the measurements as attributes of one object: ``lambda m: m.connect_ms < 10``."""


class NotMeasured(LessonError, AttributeError):
    """A rule reads a name that was not measured."""


class Measurements:
    """The measurements as attributes, which is how rules read them."""

    def __init__(self, values: Mapping[str, Measurement]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Measurement:
        near = difflib.get_close_matches(name, self.__dict__, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise NotMeasured(f"{name!r} was not measured, only {', '.join(self.__dict__)}{meant}")


def checked(values: object, what: str) -> dict[str, Measurement]:
    """Measurements as plain Python numbers and texts; raises LessonError for what is neither."""
    if not isinstance(values, Mapping) or not values:
        raise LessonError(f"{what} must be a dict with at least one measurement, not {values!r}")
    for name in values:
        if not isinstance(name, str) or not name.isidentifier():
            raise LessonError(f"{what}: {name!r} is no name that a rule could read as m.name")
    return {name: _plain(f"{what}: {name}", value) for name, value in values.items()}


def _plain(name: str, value: object) -> Measurement:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool) and math.isfinite(value):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise LessonError(
        f"{name} is {value!r}: a measurement is a finite number or a text. Instead of true or false, give what was "
        "seen: how many of how many, or the error's name"
    )


def verdict(values: Mapping[str, Measurement], confirmed: Rule, refuted: Rule) -> str:
    """The verdict that the rules give; raises VerdictError when both are true, LessonError for a rule that fails."""
    says = {name: _ask(name, rule, values) for name, rule in ((CONFIRMED, confirmed), (REFUTED, refuted))}
    if all(says.values()):
        shown = ", ".join(f"{name} = {value!r}" for name, value in values.items())
        raise VerdictError(f"the rules contradict each other: both are true for {shown}")
    return next((name for name, true in says.items() if true), DEPENDS)


def _ask(name: str, rule: Rule, values: Mapping[str, Measurement]) -> bool:
    if not callable(rule):
        raise LessonError(f"the rule {name!r} is {rule!r}; write a function, such as lambda m: m.connect_ms < 10")
    try:
        answer = rule(Measurements(values))
    except NotMeasured as problem:
        raise LessonError(f"the rule {name!r} cannot be applied: {problem}") from problem
    except Exception as problem:
        raise LessonError(f"the rule {name!r} failed with {type(problem).__name__}: {problem}") from problem
    if not isinstance(answer, bool):
        raise LessonError(f"the rule {name!r} gave {answer!r}, which is neither True nor False; write a comparison")
    return answer


# --- in words -----------------------------------------------------------------------------------------------


def meaning(rule: Rule) -> str:
    """The rule as it stands in the notebook: a lambda's expression without the "m.", or a function's own name."""
    if not isinstance(rule, FunctionType):
        return "a rule of its own"
    if rule.__name__ != "<lambda>":
        return (rule.__doc__ or rule.__name__).strip().splitlines()[0]
    body = _body(rule.__code__)
    argument = rule.__code__.co_varnames[0]
    return re.sub(rf"\b{re.escape(argument)}\.", "", body) if body else "the rule in the cell above"


def _body(code: CodeType) -> str:
    """The source of a lambda's expression; several may stand on one line, so columns decide."""
    source = "".join(linecache.getlines(code.co_filename))
    try:
        lambdas = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Lambda)]
    except SyntaxError:  # a cell with magics
        return ""
    fitting = [node for node in lambdas if _holds(node.body, code)]
    return " ".join(ast.unparse(min(fitting, key=_length).body).split()) if fitting else ""


def _holds(body: ast.expr, code: CodeType) -> bool:
    begin, end = (body.lineno, body.col_offset), (body.end_lineno, body.end_col_offset)
    spans = [span for span in code.co_positions() if span[2] is not None and span[2:] != (0, 0)]
    return bool(spans) and all((a, c) >= begin and (b, d) <= end for a, b, c, d in spans)


def _length(node: ast.Lambda) -> int:
    return len(ast.unparse(node))
