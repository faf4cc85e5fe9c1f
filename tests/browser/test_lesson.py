"""Predictions, questions and verdicts in a real JupyterLab: by keyboard, after a reload, and not trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from browser.jupyterlab_driver import Lab, end_kernels, opened, run_all, save

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

NOTEBOOK = "lesson.ipynb"
PREDICT = """\
from connlab import claim, predict, quiz
guess = predict("How many different backends answer?", choices=[1, 2, 5])"""
REVEAL = 'guess.reveal(1, "One server connection served them all.")'
ONE = """\
quiz("What happens to the fifth client?",
     right={"It waits.": "Until a server connection is free."},
     wrong={"It gets an error.": "Only when patience ends.", "It crashes.": "Nothing crashes."})"""
SEVERAL = """\
quiz("What holds a server connection?", right={"a query": "While it runs.", "a transaction": "Until COMMIT."},
     wrong={"an idle client": "It has none in transaction mode."})"""
NUMBER = """\
quiz("How many are busy?", number=20, within=0.1, unit="connections", because="That is the limit.",
     wrong={"100": "Those are the clients."})"""
ORDER = 'quiz("In which order?", order=["knock", "prove", "ask"], because="So it is.")'
JUDGE = """\
claim("G01").judge({"connect_ms": 5.2}, confirmed=lambda m: 10 <= m.connect_ms <= 100,
                   refuted=lambda m: m.connect_ms < 0.1, otherwise="depends on the password's proof",
                   counterexample={"connect_ms": 40})"""
CELLS = (PREDICT, REVEAL, ONE, SEVERAL, NUMBER, ORDER, JUDGE)


@pytest.fixture(scope="module")
def run(lab: Lab, browser: Browser) -> Lab:
    """A notebook with one card of each kind, run once and saved, whose kernel has ended."""
    lab.write(NOTEBOOK, *CELLS)
    with browser.new_context() as context:
        page = opened(context.new_page(), lab, NOTEBOOK)
        run_all(page)
        save(page)
    end_kernels(lab)
    return lab


@pytest.fixture(scope="module")
def reloaded(run: Lab, browser: Browser) -> Iterator[Page]:
    """That notebook opened anew: what is on the page comes from the file, and no kernel from before is there."""
    asked: list[str] = []
    with browser.new_context(viewport={"width": 1300, "height": 1000}) as context:
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        opened(page, run, NOTEBOOK)
        page.locator(".connlab-claim").wait_for()
        yield page
    hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}


@pytest.fixture
def fresh(reloaded: Page) -> Page:
    """That page with nothing chosen and nothing opened."""
    reloaded.evaluate(UNTOUCHED)
    return reloaded


UNTOUCHED = """() => {
    for (const input of document.querySelectorAll('.connlab-card input')) { input.checked = false; input.value = '' }
    for (const select of document.querySelectorAll('.connlab-card select')) { select.selectedIndex = 0 }
    for (const details of document.querySelectorAll('.connlab-card details')) { details.open = false }
}"""


def quiz(page: Page, number: int) -> Locator:
    return page.locator(".connlab-quiz").nth(number)


def choice(card: Locator, text: str) -> Locator:
    return card.locator(".choice", has_text=text)


def press(place: Locator, *keys: str) -> None:
    """Keys as a learner without a mouse types them."""
    place.focus()
    for key in keys:
        place.page.keyboard.press(key)


def test_choosing_one_by_keyboard_explains_that_choice_alone(fresh: Page) -> None:
    card = quiz(fresh, 0)
    assert card.locator(".why:visible").count() == 0
    first = card.locator("input").first
    press(first, "Space")
    assert card.locator(".why:visible").all_inner_texts() == [first.locator("xpath=../..").locator(".why").inner_text()]
    press(first, "ArrowDown", "ArrowDown")
    assert card.locator(".choice:has(input:checked) .why:visible").count() == 1
    assert card.locator(".why:visible").count() == 1
    choice(card, "It waits.").locator("input").focus()
    fresh.keyboard.press("Space")
    assert card.locator(".why:visible").inner_text() == "Right. Until a server connection is free."


def test_keys_that_jupyterlab_knows_do_nothing_to_the_notebook(fresh: Page) -> None:
    cells = fresh.locator(".jp-Cell").count()
    for place in fresh.locator(":is(.connlab-card) :is(input, select, summary)").all():
        press(place, "d", "d", "x", "b", "m", "Escape")
    assert fresh.locator(".jp-Cell").count() == cells == len(CELLS)
    assert fresh.locator(".jp-MarkdownCell").count() == 0


def test_ticks_are_judged_when_the_learner_checks(fresh: Page) -> None:
    card = quiz(fresh, 1)
    for text in ("a query", "an idle client"):
        press(choice(card, text).locator("input"), "Space")
    assert card.locator(".good:visible, .bad:visible, .lacks:visible").count() == 0
    press(card.locator("summary"), "Enter")
    said = {text: choice(card, text).locator("span:visible").inner_text() for text in ("a query", "an idle", "a trans")}
    assert said == {"a query": "well chosen", "an idle": "does not belong here", "a trans": "belongs here too"}
    assert "Until COMMIT." in card.locator("details").inner_text()


@pytest.mark.parametrize(("typed", "answer"), [("21", "right"), ("100", "not yet"), ("", "")])
def test_a_number_is_judged_when_the_learner_checks(fresh: Page, typed: str, answer: str) -> None:
    card = quiz(fresh, 2)
    card.locator("input").focus()
    fresh.keyboard.type(typed)
    assert card.locator(".good:visible, .bad:visible").count() == 0
    press(card.locator("summary"), "Space")
    assert "".join(card.locator(".good:visible, .bad:visible").all_inner_texts()) == answer
    assert "If you have 100: Those are the clients." in card.locator("details").inner_text()


def test_an_order_is_judged_step_by_step(fresh: Page) -> None:
    card = quiz(fresh, 3)
    for step, place in (("knock", "1"), ("prove", "3"), ("ask", "2")):
        press(choice(card, step).locator("select"), place)
    press(card.locator("summary"), "Enter")
    said = {step: choice(card, step).locator("span:visible").inner_text() for step in ("knock", "prove", "ask")}
    assert said == {"knock": "right", "prove": "another place", "ask": "another place"}


@pytest.mark.parametrize(("at", "said"), [(0, "You said 1. That is what happened."), (2, "You said 5. Something else")])
def test_the_answer_of_the_run_knows_what_was_predicted(fresh: Page, at: int, said: str) -> None:
    asked, answered = fresh.locator(".connlab-predict").all()
    assert "You said" not in answered.inner_text()
    press(asked.locator("input").nth(at), "Space")
    assert said in answered.inner_text()
    assert "Answer of this run: 1." in answered.inner_text()


def test_a_verdict_shows_its_numbers_and_its_rules(fresh: Page) -> None:
    card = fresh.locator(".connlab-claim")
    for text in ("Claim G01", "section 20.2", "depends on the password's proof", "connect_ms", "5.2", "psycopg"):
        assert text in card.inner_text()
    press(card.locator("summary"), "Enter")
    for text in ("confirmed if 10 <= connect_ms <= 100", "With connect_ms = 40 the verdict would be: confirmed"):
        assert text in card.inner_text()


def test_what_is_not_trusted_is_readable_and_gives_no_answer_away(run: Lab, page: Page) -> None:
    changed = json.loads((run.folder / NOTEBOOK).read_text())
    changed["cells"][0]["source"] = "# a notebook with another signature"
    Path(run.folder / "strange.ipynb").write_text(json.dumps(changed))
    opened(page, run, "strange.ipynb")
    page.locator("text=Claim G01").wait_for()
    assert page.locator(".jp-OutputArea style, .jp-OutputArea input:enabled").count() == 0
    shown = outputs(page)
    for text in ("How many different backends answer?", "5.2", "not trusted"):
        assert text in shown
    for hidden in ("Right.", "well chosen", "belongs here too", "Until a server connection is free.", "You said"):
        assert hidden not in shown
    page.locator("summary", has_text="All answers explained").click()
    assert "Until a server connection is free." in outputs(page)


def outputs(page: Page) -> str:
    return "\n".join(page.locator(".jp-OutputArea").all_inner_texts())
