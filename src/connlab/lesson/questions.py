"""Questions at the end of a notebook: choose one, choose several, a number, an order.

Each wrong choice has its explanation. Made of native inputs and styles alone, see ``cards``. The known library for
this, jupyterquiz 2.9.6.4, was tried in JupyterLab 4.6 and not taken: a script makes its questions and fetches another
from the internet, nothing is left of a question in an output that is not trusted, its text form is empty, and with one
of its radio buttons in focus D D deletes the cell.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from connlab.lesson import cards
from connlab.lesson.cards import HIDDEN, KEYS, inline
from connlab.lesson.errors import LessonError

Explained = Mapping[str, str]
"""Choices, each with the sentence that explains why it is right or wrong."""

ONE = ".connlab-quiz .choice:has(input:checked) > .why { display: block !important; }"
CHECKED = """
.connlab-quiz:has(details[open]) .right:has(input:checked) > .good,
.connlab-quiz:has(details[open]) .wrong:has(input:checked) > .bad,
.connlab-quiz:has(details[open]) .right:has(input:not(:checked)) > .lacks,
.connlab-quiz:has(details[open]) .choice:has(option.here:checked) > .good,
.connlab-quiz:has(details[open]) .choice:has(option.elsewhere:checked) > .bad,
.connlab-quiz:has(details[open]) .choice:has(input:in-range:valid) > .good,
.connlab-quiz:has(details[open]) .choice:has(input:out-of-range) > .bad { display: inline !important; }
.connlab-quiz input[type="number"] { width: 8rem; appearance: textfield; }
.connlab-quiz input::-webkit-inner-spin-button { display: none; }
"""
CHECK = "Check my answer"
UNTRUSTED = "Nothing can be chosen here, since this output is not trusted: run the cell, or open the answers below."


def quiz(
    question: str,
    *,
    right: Explained | None = None,
    wrong: Explained | None = None,
    several: bool = False,
    number: float | None = None,
    within: float = 0.0,
    unit: str = "",
    order: Sequence[str] | None = None,
    because: str = "",
) -> None:
    """Ask one question. What stands between backticks is shown as code.

    Choices: ``right`` and ``wrong`` map each choice to its explanation; with two right ones, or ``several``, any number
    may be ticked. A number: ``number`` with its ``unit``, good ``within`` that fraction of it; ``wrong`` maps typical
    mistakes ("25") to their explanations. An order: ``order`` has the steps as they should be. Number and order are
    explained by ``because``.

    Raises LessonError when the call makes no question.

    Example::

        quiz(
            "Five clients ask at once through one server connection. What happens?",
            right={"Four wait for their turn.": "A pool that is too small shows as waiting."},
            wrong={"Four get an error.": "An error comes only when somebody's patience ends."},
        )
    """
    if not isinstance(question, str) or not question.strip():
        raise LessonError(f"the question is {question!r}; write one")
    if (kinds := [bool(right), number is not None, bool(order)]).count(True) != 1:
        given = ", ".join(name for name, is_given in zip(("right", "number", "order"), kinds, strict=True) if is_given)
        raise LessonError(f"quiz takes one of right, number and order; this call gives {given or 'none'}: {question!r}")
    if right:
        _choices(question, right, wrong or {}, several or len(right) > 1)
    elif number is not None:
        _number(question, number, within, unit, because, wrong or {})
    else:
        _order(question, list(order or ()), because)


# --- choices ------------------------------------------------------------------------------------------------


def _choices(question: str, right: Explained, wrong: Explained, several: bool) -> None:
    _check_choices(question, right, wrong)
    explained = {**right, **wrong}
    texts = mixed(question, list(explained))
    name, kind = cards.token(), "checkbox" if several else "radio"
    rows = "\n".join(_choice(text, explained[text], text in right, name, kind) for text in texts)
    hint = "Tick every one that is right." if several else "Choose one."
    answers = [(text, text in right, explained[text]) for text in texts]
    body = _asked(question, hint, rows) + _answers(CHECK if several else "All answers explained", answers)
    lines = [question, hint, *(f"  [ ] {text}" for text in texts), "Answers:"]
    lines += [f"  {'right' if good else 'wrong'}: {text} - {why}" for text, good, why in answers]
    cards.show("quiz", body, "\n".join(lines), style=CHECKED if several else ONE)


def _check_choices(question: str, right: Explained, wrong: Explained) -> None:
    if not wrong:
        raise LessonError(f"there is no wrong choice: {question!r}")
    if both := sorted(set(right) & set(wrong)):
        raise LessonError(f"{both[0]!r} is among the right and the wrong choices: {question!r}")
    for text, why in {**right, **wrong}.items():
        if not why.strip():
            raise LessonError(f"the choice {text!r} has no explanation: {question!r}")


def _choice(text: str, why: str, good: bool, name: str, kind: str) -> str:
    word = "<span class='good'>Right.</span>" if good else "<span class='bad'>Not this one.</span>"
    after = (
        f"<div class='why' {HIDDEN} role='status'>{word} {inline(why)}</div>"
        if kind == "radio"
        else f"<span class='good' {HIDDEN}>well chosen</span> <span class='bad' {HIDDEN}>does not belong here</span>"
        f"<span class='lacks' {HIDDEN}>belongs here too</span>"
    )
    return (
        f"<div class='choice {'right' if good else 'wrong'}'><label><input type='{kind}' name='{name}' {KEYS}>"
        f"{inline(text)}</label> {after}</div>"
    )


def _asked(question: str, hint: str, rows: str) -> str:
    return (
        f"<fieldset><legend>{inline(question)}</legend><p class='hint'>{hint}</p>\n{rows}\n</fieldset>\n"
        f"<p class='unstyled'>{UNTRUSTED}</p>\n"
    )


def _answers(summary: str, answers: Sequence[tuple[str, bool, str]]) -> str:
    listed = "".join(
        f"<li><span class='{'good' if good else 'bad'}'>{'right' if good else 'wrong'}:</span> "
        f"<em>{inline(text)}</em> - {inline(why)}</li>"
        for text, good, why in answers
    )
    return f"<details><summary {KEYS}>{summary}</summary><ul>{listed}</ul></details>"


# --- a number -----------------------------------------------------------------------------------------------


def _number(question: str, number: float, within: float, unit: str, because: str, wrong: Explained) -> None:
    _check_because(question, because)
    if not math.isfinite(number) or not 0 <= within < 1:
        raise LessonError(f"number is {number}, within is {within}; within is a fraction below 1: {question!r}")
    near = abs(number) * within
    field = (
        f"<div class='choice'><label><input type='number' step='any' required min='{number - near:.12g}' "
        f"max='{number + near:.12g}' {KEYS}> {inline(unit)}</label> <span class='good' {HIDDEN}>right</span>"
        f"<span class='bad' {HIDDEN}>not yet</span></div>"
    )
    answer = f"{cards.number(number)} {unit}".strip()
    mistakes = "".join(f"<li>If you have {inline(value)}: {inline(why)}</li>" for value, why in wrong.items())
    body = (
        f"{_asked(question, 'Write a number, then check it.', field)}<details><summary {KEYS}>{CHECK}</summary>"
        f"<p><strong>{inline(answer)}</strong>{_tolerance(within)}. {inline(because)}</p><ul>{mistakes}</ul></details>"
    )
    lines = [
        question,
        f"Answer: {answer}. {because}",
        *(f"  If you have {value}: {why}" for value, why in wrong.items()),
    ]
    cards.show("quiz", body, "\n".join(lines), style=CHECKED)


def _tolerance(within: float) -> str:
    return f" (good within {within * 100:g} %)" if within else ""


def _check_because(question: str, because: str) -> None:
    if not because.strip():
        raise LessonError(f"because is empty; explain the answer: {question!r}")


# --- an order -----------------------------------------------------------------------------------------------


def _order(question: str, steps: list[str], because: str) -> None:
    _check_because(question, because)
    if len(steps) < 3 or len(set(steps)) != len(steps):
        raise LessonError(f"order takes three steps or more, each once, not {steps!r}: {question!r}")
    texts = mixed(question, steps)
    rows = "\n".join(_step(text, steps.index(text) + 1, len(steps)) for text in texts)
    listed = "".join(f"<li>{inline(step)}</li>" for step in steps)
    body = (
        f"{_asked(question, 'Give each its place, then check.', rows)}<details><summary {KEYS}>{CHECK}</summary>"
        f"<ol>{listed}</ol><p>{inline(because)}</p></details>"
    )
    lines = [question, *(f"  - {text}" for text in texts), "Answer:"]
    lines += [f"  {place}. {step}" for place, step in enumerate(steps, start=1)]
    cards.show("quiz", body, "\n".join([*lines, because]), style=CHECKED)


def _step(text: str, place: int, steps: int) -> str:
    options = "".join(
        f"<option class='{'here' if number == place else 'elsewhere'}'>{number}</option>"
        for number in range(1, steps + 1)
    )
    return (
        f"<div class='choice'><label><select {KEYS}><option>?</option>{options}</select> {inline(text)}</label> "
        f"<span class='good' {HIDDEN}>right</span><span class='bad' {HIDDEN}>another place</span></div>"
    )


def mixed(question: str, texts: Sequence[str]) -> list[str]:
    """The texts in an order that tells nothing, the same at every run; never the order given."""
    found = sorted(texts, key=lambda text: hashlib.sha256(f"{question}{text}".encode()).digest())
    return found if found != list(texts) else [*found[1:], found[0]]
