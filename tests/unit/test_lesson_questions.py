"""Predictions and quiz questions: what is asked, what is answered, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from connlab import predict, quiz
from connlab.lesson import cards, questions
from connlab.lesson.errors import LessonError

RIGHT = {"It waits.": "Until one is free."}
WRONG = {"It fails.": "Only with a timeout.", "It crashes.": "Nothing does."}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


@pytest.fixture
def markup(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The HTML of what is shown."""
    shown: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda card: shown.append(card._repr_html_()))
    return shown


# --- predict ------------------------------------------------------------------------------------------------


def test_without_a_notebook_question_and_answer_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    guess = predict("How many?", choices=[1, 2, 5], unit="backends")
    assert said(capsys).splitlines() == [
        "Predict: How many?",
        "  ( ) 1 backends",
        "  ( ) 2 backends",
        "  ( ) 5 backends",
    ]
    guess.reveal(2, "Two were enough.")
    assert said(capsys) == "How many?\nAnswer of this run: 2 backends. Measured: 2 backends. Two were enough.\n"


@pytest.mark.parametrize(
    ("asked", "measured", "answer"),
    [
        ({"choices": [1, 2, 5]}, 4, "none of the choices"),
        ({"choices": [1, 2, 5]}, 5.0, "5"),
        ({"choices": ["yes", "no"]}, "no", "no"),
        ({"choices": {"twice": lambda x: x < 3, "more": lambda x: x >= 3}}, 12.5, "more"),
        ({"between": (0.1, 100), "unit": "ms"}, 5.2, "3 to 10 ms"),
        ({"between": (0.1, 100), "unit": "ms"}, 10, "10 to 30 ms"),
        ({"between": (0.1, 100), "unit": "ms"}, 0.05, "less than 0.1 ms"),
        ({"between": (0.1, 100), "unit": "ms"}, 100, "100 ms or more"),
        ({"between": (2, 50)}, 2, "2 to 3"),
        ({"between": (2, 50)}, 45, "30 to 50"),
        ({"between": (1, 10_000_000)}, 50_000, "10,000 to 100,000"),
    ],
)
def test_the_answer_is_the_choice_that_fits_the_measurement(
    asked: dict[str, Any], measured: Any, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    predict("How much?", **asked).reveal(measured, "So it is.")
    assert f"Answer of this run: {answer}." in said(capsys)


@pytest.mark.parametrize("low", [0.001, 0.7, 1, 42])
@pytest.mark.parametrize("factor", [1.5, 10, 5_000])
def test_every_size_has_one_range(low: float, factor: float, capsys: pytest.CaptureFixture[str]) -> None:
    high = low * factor
    for part in range(-2, 23):
        predict("How much?", between=(low, high)).reveal(low * factor ** (part / 20), "So.")
    assert "none of" not in said(capsys)


def test_a_prediction_that_ends_a_cell_is_shown_once() -> None:
    assert predict("How many?", choices=[1, 2])._ipython_display_() is None


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: predict("", choices=[1, 2]), "the question is ''"),
        (lambda: predict("How many?"), "takes choices or between"),
        (lambda: predict("How many?", choices=[1, 2], between=(1, 2)), "takes choices or between"),
        (lambda: predict("How many?", choices=[1]), "two choices or more"),
        (lambda: predict("How many?", choices="ab"), "two choices or more"),
        (lambda: predict("How many?", choices=[1, 1]), "stands there twice"),
        (lambda: predict("How many?", between=(0, 5)), "two numbers above 0"),
        (lambda: predict("How many?", between=(5, 5)), "two numbers above 0"),
        (
            lambda: predict("Who?", choices=["a", "b"]).reveal("c", "So."),
            "'c' is not among the choices of 'Who\\?': a, b",
        ),
        (lambda: predict("Who?", choices=[1, 2]).reveal(float("nan"), "So."), "finite number"),
        (lambda: predict("Who?", choices=[1, 2]).reveal(1, ""), "has no sentence"),
        (
            lambda: predict("Who?", choices={"a": lambda x: x > 1, "b": lambda x: x > 2}).reveal(3, "So."),
            "3 fits a and b",
        ),
        (lambda: predict("Who?", choices={"a": lambda x: x, "b": lambda x: x > 2}).reveal(3, "So."), "gave 3 for 3"),
        (lambda: predict("Who?", choices={"a": lambda x: x.y, "b": bool}).reveal(3, "So."), "cannot be compared"),
    ],
)
def test_what_is_no_prediction_is_refused(call: Callable[[], object], complaint: str) -> None:
    with pytest.raises(LessonError, match=complaint):
        call()


# --- quiz ---------------------------------------------------------------------------------------------------


def test_as_text_a_question_has_its_choices_and_each_has_its_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    quiz("What happens?", right=RIGHT, wrong=WRONG)
    text = said(capsys)
    assert sorted(re.findall(r"\[ \] (.+)", text)) == ["It crashes.", "It fails.", "It waits."]
    for line in ("right: It waits. - Until one is free.", "wrong: It fails. - Only with a timeout."):
        assert line in text


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"right": RIGHT, "wrong": WRONG}, "radio"),
        ({"right": RIGHT, "wrong": WRONG, "several": True}, "checkbox"),
        ({"right": {**RIGHT, "b": "c"}, "wrong": WRONG}, "checkbox"),
        ({"number": 20, "because": "So."}, "number"),
    ],
)
def test_each_kind_has_its_own_input(asked: dict[str, Any], kind: str, markup: list[str]) -> None:
    quiz("What happens?", **asked)
    assert set(re.findall(r"type='(\w+)'", markup[0])) == {kind}


@pytest.mark.parametrize(
    "asked",
    [{"right": RIGHT, "wrong": WRONG}, {"number": 20, "because": "So."}, {"order": ["a", "b", "c"], "because": "So."}],
)
def test_everything_that_takes_the_keyboard_keeps_jupyterlabs_shortcuts_away(
    asked: dict[str, Any], markup: list[str]
) -> None:
    quiz("What happens?", **asked)
    places = re.findall(r"<(?:input|select|summary)[^>]*>", markup[0])
    assert len(places) >= 2
    assert all(cards.KEYS in place for place in places)


@pytest.mark.parametrize(
    "asked",
    [{"right": RIGHT, "wrong": WRONG}, {"number": 20, "because": "So."}, {"order": ["a", "b", "c"], "because": "So."}],
)
def test_no_card_has_a_script_or_asks_another_server(asked: dict[str, Any], markup: list[str]) -> None:
    quiz("What happens?", **asked)
    assert not re.search(r"<script|javascript:|\son\w+=|https?://|@import|url\(", markup[0])


def test_text_is_text_and_backticks_are_code(markup: list[str]) -> None:
    quiz("Is `a < b` <b>bold</b>?", right={"`x`": "<i>"}, wrong={"y & z": "no"})
    for text in ("<code>a &lt; b</code> &lt;b&gt;bold", "<code>x</code>", "&lt;i&gt;", "y &amp; z"):
        assert text in markup[0]


def test_the_right_order_is_never_the_one_shown() -> None:
    for number in range(50):
        steps = ["a", "b", "c"]
        shown = questions.mixed(str(number), steps)
        assert shown != steps
        assert sorted(shown) == steps
        assert shown == questions.mixed(str(number), steps)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({}, "this call gives none"),
        ({"right": RIGHT, "wrong": WRONG, "number": 5}, "this call gives right, number"),
        ({"right": RIGHT}, "there is no wrong choice"),
        ({"right": RIGHT, "wrong": {"It waits.": "no"}}, "'It waits.' is among the right and the wrong"),
        ({"right": RIGHT, "wrong": {"It fails.": " "}}, "'It fails.' has no explanation"),
        ({"number": 5}, "because is empty"),
        ({"number": float("nan"), "because": "So."}, "number is nan"),
        ({"number": 5, "within": 1.5, "because": "So."}, "within is 1.5"),
        ({"order": ["a", "b"], "because": "So."}, "three steps or more"),
        ({"order": ["a", "b", "a"], "because": "So."}, "three steps or more"),
        ({"order": ["a", "b", "c"]}, "because is empty"),
    ],
)
def test_what_is_no_question_is_refused(asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LessonError, match=complaint):
        quiz("What happens?", **asked)


def test_a_question_without_words_is_refused() -> None:
    with pytest.raises(LessonError, match="the question is ' '"):
        quiz(" ", right=RIGHT, wrong=WRONG)
