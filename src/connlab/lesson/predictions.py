"""Predictions: a question that the learner answers before an experiment, and what the run measured after it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from connlab.lesson import cards, rules
from connlab.lesson.cards import HIDDEN, KEYS, inline
from connlab.lesson.errors import LessonError

Range = Callable[[Any], bool]
Choices = Sequence[str | int | float] | Mapping[str, Range]
MOST_RANGES = 8


class Prediction:
    """A question that was asked; ``reveal`` answers it from the run."""

    def __init__(self, question: str, choices: Mapping[str, Range], unit: str) -> None:
        self._question, self._choices, self._unit = question, dict(choices), unit
        self._token = cards.token()
        self._ask()

    def reveal(self, measured: float | int | str, sentence: str) -> None:
        """Answer from what the run has ``measured``; ``sentence`` says what to make of it.

        The card names what the learner has chosen, where the front end still knows. When no choice fits what was
        measured, it says so. Raises LessonError for a text that is not among the choices, and for a number that more
        than one choice claims.

        Example: ``guess.reveal(len(set(pids)), "PgBouncer lent one server connection to each in turn.")``
        """
        value = rules.checked({"measured": measured}, f"the answer to {self._question!r}")["measured"]
        if not isinstance(sentence, str) or not sentence.strip():
            raise LessonError(f"the answer to {self._question!r} has no sentence; say what to make of it")
        self._answer(self._fitting(value), f"{cards.number(value)} {self._unit}".strip(), sentence)

    def __repr__(self) -> str:
        return f"<Prediction: {self._question}>"

    def _ipython_display_(self) -> None:
        """Nothing: the question was shown when it was asked, also where it ends a cell."""

    def _fitting(self, value: float | int | str) -> int | None:
        """The position of the choice that fits; None when none does."""
        fitting = [at for at, (label, fits) in enumerate(self._choices.items()) if _applies(label, fits, value)]
        if len(fitting) > 1:
            labels = " and ".join(list(self._choices)[at] for at in fitting)
            raise LessonError(f"{value!r} fits {labels}; the choices of {self._question!r} overlap")
        if not fitting and isinstance(value, str):
            raise LessonError(f"{value!r} is not among the choices of {self._question!r}: {', '.join(self._choices)}")
        return fitting[0] if fitting else None

    def _ask(self) -> None:
        rows = "\n".join(
            f"<div class='choice'><label><input type='radio' name='{self._token}' class='{self._token}-{at}' {KEYS}>"
            f"{inline(label)}</label></div>"
            for at, label in enumerate(self._choices)
        )
        body = (
            f"<p class='kind'>Predict, before you run on</p>\n"
            f"<fieldset><legend>{inline(self._question)}</legend>\n{rows}\n</fieldset>"
        )
        lines = [f"Predict: {self._question}", *(f"  ( ) {label}" for label in self._choices)]
        cards.show("predict", body, "\n".join(lines))

    def _answer(self, fitting: int | None, shown: str, sentence: str) -> None:
        labels = list(self._choices)
        answer = labels[fitting] if fitting is not None else "none of the choices"
        chosen = "".join(
            f"<span class='{self._token}-you-{at}' {HIDDEN}>You said <em>{inline(label)}</em>. "
            f"<span class='{'good' if at == fitting else 'bad'}'>"
            f"{'That is what happened.' if at == fitting else 'Something else happened.'}</span></span>"
            for at, label in enumerate(labels)
        )
        measured = "" if shown == answer else f" Measured: <strong>{inline(shown)}</strong>."
        body = (
            f"<p class='kind'>{inline(self._question)}</p>\n"
            f"<p>Answer of this run: <strong>{inline(answer)}</strong>.{measured} {chosen}</p>\n"
            f"<p>{inline(sentence)}</p>"
        )
        text = f"{self._question}\nAnswer of this run: {answer}. Measured: {shown}. {sentence}"
        cards.show("predict", body, text, style=self._style())

    def _style(self) -> str:
        """Shows what was chosen in the other card, wherever that is on the page."""
        selectors = (
            f"body:has(.{self._token}-{at}:checked) .{self._token}-you-{at}" for at in range(len(self._choices))
        )
        return f"{', '.join(selectors)} {{ display: inline !important; }}"


def predict(
    question: str,
    *,
    choices: Choices | None = None,
    between: tuple[float, float] | None = None,
    unit: str = "",
) -> Prediction:
    """Ask for a prediction, and show its choices.

    ``choices``: numbers or texts, or a dict from texts to what is true of the measurement then. ``between``: two
    numbers above 0, for a guess of the size: the ranges from one to the other become the choices. What stands between
    backticks is shown as code.

    Raises LessonError when the call makes no question.

    Examples::

        guess = predict("How many different backends answer?", choices=[1, 2, 5])
        guess = predict("Who wins?", choices={"the pool": lambda x: x > 1.2, "nobody": lambda x: x <= 1.2})
        guess = predict("How long does connecting take?", between=(0.1, 100), unit="ms")
        ...
        guess.reveal(measured_ms, "Most of it is the password's proof.")
    """
    if not isinstance(question, str) or not question.strip():
        raise LessonError(f"the question is {question!r}; write one")
    if (choices is None) == (between is None):
        raise LessonError(f"predict takes choices or between, and one of the two: {question!r}")
    found = _ranges(question, between, unit) if between is not None else _labelled(question, choices or (), unit)
    return Prediction(question, found, unit)


def _labelled(question: str, choices: Choices, unit: str) -> dict[str, Range]:
    if len(choices) < 2 or isinstance(choices, str):
        raise LessonError(f"a prediction needs two choices or more, not {choices!r}: {question!r}")
    if isinstance(choices, Mapping):
        return dict(choices)
    found = {_label(choice, unit): _equal(choice) for choice in choices}
    if len(found) < len(choices):
        raise LessonError(f"a choice stands there twice in {choices!r}: {question!r}")
    return found


def _label(choice: str | float, unit: str) -> str:
    return choice if isinstance(choice, str) else f"{cards.number(choice)} {unit}".strip()


def _equal(choice: str | float) -> Range:
    return lambda value: bool(value == choice)


def _applies(label: str, fits: Range, value: float | int | str) -> bool:
    try:
        answer = fits(value)
    except Exception as problem:
        raise LessonError(f"the choice {label!r} cannot be compared with {value!r}: {problem}") from problem
    if not isinstance(answer, bool):
        raise LessonError(f"the choice {label!r} gave {answer!r} for {value!r}, which is neither True nor False")
    return answer


def _ranges(question: str, between: tuple[float, float], unit: str) -> dict[str, Range]:
    low, high = between
    if not (0 < low < high and math.isfinite(high)):
        raise LessonError(f"between takes two numbers above 0, the smaller first, not {between!r}: {question!r}")
    edges = _edges(low, high)
    found: dict[str, Range] = {f"less than {cards.number(low)} {unit}".strip(): lambda value: value < low}
    for start, end in itertools.pairwise(edges):
        found[f"{cards.number(start)} to {cards.number(end)} {unit}".strip()] = _in(start, end)
    found[f"{cards.number(high)} {unit} or more".replace("  ", " ")] = lambda value: value >= high
    return found


def _in(start: float, end: float) -> Range:
    return lambda value: start <= value < end


def _edges(low: float, high: float) -> list[float]:
    """From ``low`` to ``high`` in steps of about three, or of ten where that would be too many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 3), (1,)):
        inner = [float(Decimal(step).scaleb(exponent)) for exponent in exponents for step in steps]
        edges = [low, *(edge for edge in inner if low < edge < high), high]
        if len(edges) <= MOST_RANGES:
            break
    return edges
