"""Every numbered notebook has the shape of a lesson.

Title and guide section, what you will be able to do, minutes, what to know before; numbered experiments, each a
prediction, a run, a figure with a sentence on what to look at, an explanation, a verdict; a quiz of three to five
questions; a recap in five lines; where next. No text states a number that a run would have to measure.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lesson_form import Cell, Section, cells_of, numbered_notebooks, sections

NOT_YET_IN_THIS_SHAPE: set[str] = set()
"""Notebooks that are still to be brought into this shape. One that has it must be taken off the list."""

LONGEST_CELL = 25
RECAP_LINES = 5
QUESTIONS = range(3, 6)
FIGURES = ("connlab.figures", "connlab.watch", "matplotlib")
TABLE = "|---"

Rule = Callable[[list[Cell]], Iterator[str]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lesson" in metafunc.fixturenames:
        paths = numbered_notebooks(metafunc.config.rootpath)
        metafunc.parametrize("lesson", paths, ids=[path.stem for path in paths])


# --- the head -----------------------------------------------------------------------------------------------

HEAD = {
    r"\A# \d\d · \S": "begin with a heading such as '# 01 · What a connection costs'",
    r"[Ss]ection 20\.2": "name the section of the guide, such as 'Section 20.2.4'",
    r"\*\*After this notebook you can\*\*\s+- ": "list under '**After this notebook you can**' what one learns",
    r"\*\*Time:\*\* \d+ minutes": "say how long it takes: '**Time:** 40 minutes'",
    r"\*\*Before you start:\*\* \S": "say after '**Before you start:**' what one should know or have",
}


def head(cells: list[Cell]) -> Iterator[str]:
    first = cells[0] if cells else Cell(0, "none", "")
    for pattern, wish in HEAD.items():
        if first.kind != "markdown" or not re.search(pattern, first.text):
            yield f"the first cell: {wish}"


# --- the experiments ----------------------------------------------------------------------------------------


def numbering(cells: list[Cell]) -> Iterator[str]:
    numbers = [int(match[1]) for section in sections(cells) if (match := _experiment(section))]
    if not numbers:
        yield "there is no section '## Experiment 1: …'"
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"the experiments are numbered {numbers}"


def experiments(cells: list[Cell]) -> Iterator[str]:
    for section in sections(cells):
        if _experiment(section):
            yield from (f"'{section.title}': {complaint}" for complaint in _complaints(section, _imports(cells)))


def _experiment(section: Section) -> re.Match[str] | None:
    return re.match(r"Experiment (\d+): \S", section.title) if section.level == 2 else None


def _complaints(section: Section, figures: set[str]) -> Iterator[str]:
    steps = {name: _first(section, done) for name, done in STEPS.items()}
    for name, at in steps.items():
        if at is None:
            yield f"it has no {name}"
    reached = {name: at for name, at in steps.items() if at is not None}
    if list(reached.values()) != sorted(reached.values()):
        yield f"its order is {', '.join(sorted(reached, key=reached.__getitem__))}"
    if sum(len(cell.calls("predict")) for cell in section.code) > sum(
        len(cell.calls("reveal")) for cell in section.code
    ):
        yield "a prediction is never answered with reveal(…)"
    if not any(_draws(cell, figures) for cell in section.code):
        yield "it shows neither a figure nor a table of what was measured"
    early = [cell for cell in section.code if cell.calls("judge") and cell.number < (steps[EXPLAIN] or 0)]
    if early:
        yield f"cell {early[0].number} gives a verdict before the explanation"


PREDICT, RUN, SEE, EXPLAIN = "predict(…)", "cell that runs it", "'**See.**' sentence", "'**Explain**' text"
STEPS: dict[str, Callable[[Cell], bool]] = {
    PREDICT: lambda cell: bool(cell.calls("predict")),
    RUN: lambda cell: cell.kind == "code" and bool(cell.tree.body) and not cell.calls("predict"),
    SEE: lambda cell: cell.kind == "markdown" and bool(re.search(r"\*\*See\.\*\*\s+\w+", cell.text)),
    EXPLAIN: lambda cell: cell.kind == "markdown" and bool(re.search(r"(\*\*|<b>)Explain\.?(\*\*|</b>)", cell.text)),
}


def _first(section: Section, done: Callable[[Cell], bool]) -> float | None:
    """Where a step is done first; explaining may stand in the cell that says what to see, behind it."""
    at = next((cell.number for cell in section.cells if done(cell)), None)
    return at if at is None or done is not STEPS[EXPLAIN] else at + 0.5


def _imports(cells: list[Cell]) -> set[str]:
    """The names that draw: those imported from a module for figures, and connlab's live one."""
    found: set[str] = set()
    for node in (node for cell in cells for node in ast.walk(cell.tree)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            home = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in node.names:
                if f"{home}.{name.name}".lstrip(".").startswith(FIGURES):
                    found.add((name.asname or name.name).split(".")[0])
    return found


def _draws(cell: Cell, figures: set[str]) -> bool:
    return TABLE in cell.text or bool(set(re.findall(r"\w+", cell.text)) & figures)


# --- the end ------------------------------------------------------------------------------------------------


def end(cells: list[Cell]) -> Iterator[str]:
    top = [section for section in sections(cells) if section.level == 2]
    titles = [section.title for section in top]
    if titles[-3:] != ["Quiz", "Recap", "Where next"]:
        yield f"the last sections are {titles[-3:]}, not Quiz, Recap, Where next"
        return
    quiz, recap, where_next = top[-3:]
    yield from _quiz(quiz)
    lines = re.findall(r"^- \S", recap.prose, re.MULTILINE)
    if len(lines) != RECAP_LINES:
        yield f"the recap has {len(lines)} lines that begin with '- ', not {RECAP_LINES}"
    if not where_next.prose.strip():
        yield "'Where next' is empty"


def _quiz(section: Section) -> Iterator[str]:
    asking = [cell for cell in section.code if cell.calls("quiz")]
    count = sum(len(cell.calls("quiz")) for cell in asking)
    if count not in QUESTIONS:
        yield f"the quiz has {count} questions made with quiz(…), not 3 to 5"
    for cell in asking:
        if not cell.metadata.get("jupyter", {}).get("source_hidden"):
            yield (
                f"cell {cell.number} shows the quiz's answers as code: fold it (View → Collapse Selected Code, which "
                'sets "jupyter": {"source_hidden": true} in its metadata)'
            )


# --- prose --------------------------------------------------------------------------------------------------

UNIT = (
    r"(?:ms|µs|us|s|milliseconds?|microseconds?|seconds?|[kKMG]i?B|kilobytes?|megabytes?|gigabytes?|%|percent|times"
    r"|tps|queries(?: per |/)s\w*|requests(?: per |/)s\w*|round trips?)"
)
NUMBER = re.compile(rf"(?<![\w.§])\d[\d,.]*(?:\s?(?:to|-)\s?\d[\d,.]*)?\s?{UNIT}(?![\w-])")
MEASURING = re.compile(
    r"\b(took|takes?|needs?|needed|costs?|lasts?|lasted|measured?|median|p9\d|percentiles?|faster|slower|about|around"
    r"|roughly|nearly|almost|here (?:it|we|they)|we saw|you (?:saw|see)|was|were|uses?|used|grew|fell|rose|drops?)\b",
    re.IGNORECASE,
)
SAID = re.compile(
    r"\b(guide|documentation|default|says?|claims?|set to|setting|limit|timeout of)\b|\?\s*$", re.IGNORECASE
)


def measured_numbers(cells: list[Cell]) -> Iterator[str]:
    """A number with a unit in a sentence that speaks of measuring, and neither asks nor quotes anybody.

    What stands in backticks, in a code block or in a link's address does not count.
    """
    for cell in cells:
        if cell.kind != "markdown":
            continue
        for sentence in _sentences(cell.text):
            number = NUMBER.search(sentence)
            if number and MEASURING.search(sentence) and not SAID.search(sentence) and "**Time:**" not in sentence:
                yield (
                    f'cell {cell.number} states "{number[0].strip()}" ("{sentence.strip()[:80]}"): if it was measured, '
                    'take it from the run with display(Markdown(f"…")); if somebody says so, say who; '
                    "if it is a setting, write it in backticks"
                )


def _sentences(text: str) -> list[str]:
    for aside in (r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"<[^>]+>"):
        text = re.sub(aside, " ", text, flags=re.DOTALL)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*[-*|\d])", text)
    return [part for paragraph in paragraphs for part in re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split()))]


def long_cells(cells: list[Cell]) -> Iterator[str]:
    yield from (f"cell {cell.number} has {cell.lines} lines" for cell in cells if cell.lines > LONGEST_CELL)


RULES: list[Rule] = [head, numbering, experiments, end, measured_numbers, long_cells]


def complaints(cells: list[Cell]) -> list[str]:
    return [complaint for rule in RULES for complaint in rule(cells)]


def test_the_notebook_has_the_shape_of_a_lesson(lesson: Path) -> None:
    found = complaints(cells_of(lesson))
    if lesson.stem in NOT_YET_IN_THIS_SHAPE:
        assert found, f"{lesson.stem} has the shape by now: take it off the list NOT_YET_IN_THIS_SHAPE"
    else:
        assert not found, "\n".join(found)


def test_what_is_listed_as_not_yet_in_this_shape_exists(pytestconfig: pytest.Config) -> None:
    assert {path.stem for path in numbered_notebooks(pytestconfig.rootpath)} >= NOT_YET_IN_THIS_SHAPE


# What follows shows that each rule can fail.

HEAD_TEXT = """\
# 01 · What a connection costs

*Section 20.2 of the guide.*

**After this notebook you can**

- say what one costs.

**Time:** 30 minutes. **Before you start:** nothing."""
HIDDEN = {"jupyter": {"source_hidden": True}}
LESSON: list[tuple[str, str, dict[str, object]]] = [
    ("markdown", HEAD_TEXT, {}),
    ("code", "from connlab import claim, predict, quiz\nfrom connlab.figures import timeline", {}),
    ("markdown", "## Experiment 1: a birth\n\nText.", {}),
    ("code", 'guess = predict("How many?", choices=[1, 2])', {}),
    ("code", 'pids = ask()\ntimeline(pids)\nguess.reveal(len(pids), "so")', {}),
    ("markdown", "**See.** Look at the lane.\n\n<details><summary><b>Explain</b></summary>\n\nWhy.\n\n</details>", {}),
    ("code", 'claim("G01").judge({"x": 1})', {}),
    ("markdown", "### Once more", {}),
    ("markdown", "## Quiz", {}),
    ("code", 'quiz("A?")\nquiz("B?")', HIDDEN),
    ("code", 'quiz("C?")', HIDDEN),
    ("markdown", "## Recap\n\n- a\n- b\n- c\n- d\n- e\n\n## Where next\n\nTo 02.", {}),
]


def lesson_with(changes: dict[int, str], **metadata: object) -> list[Cell]:
    """A lesson in shape, with the text of some cells replaced."""
    return [
        Cell(number, kind, changes.get(number, text), metadata if number in changes else meta)
        for number, (kind, text, meta) in enumerate(LESSON)
    ]


def test_a_lesson_in_shape_has_no_complaint() -> None:
    assert complaints(lesson_with({})) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({0: HEAD_TEXT.replace("# 01 · ", "# ")}, "begin with a heading"),
        ({0: HEAD_TEXT.replace("Section 20.2", "Part")}, "name the section of the guide"),
        ({0: HEAD_TEXT.replace("\n- say", "\nSay")}, "what one learns"),
        ({0: HEAD_TEXT.replace("30 minutes", "a while")}, "say how long it takes"),
        ({0: HEAD_TEXT.replace("**Before you start:** nothing.", "")}, "Before you start"),
        ({2: "## A birth"}, "there is no section '## Experiment 1: …'"),
        ({2: "## Experiment 2: a birth"}, "the experiments are numbered [2]"),
        ({3: "guess = 1"}, "it has no predict(…)"),
        ({4: 'predict("Again?")', 6: "# nothing"}, "it has no cell that runs it"),
        ({5: "**Explain**"}, "it has no '**See.**' sentence"),
        ({5: "**See.** Look here."}, "it has no '**Explain**' text"),
        ({3: "timeline(ask())", 4: 'predict("How many?").reveal(1, "so")'}, "its order is cell that runs it"),
        ({4: "timeline(ask())"}, "a prediction is never answered"),
        ({4: 'guess.reveal(1, "so")'}, "neither a figure nor a table"),
        ({4: 'timeline(1)\nguess.reveal(1, "so")\nclaim("G01").judge({})'}, "cell 4 gives a verdict before"),
        ({8: "## Questions"}, "the last sections are"),
        ({9: "pass"}, "the quiz has 1 questions"),
        ({9: 'quiz("A?");' * 5}, "the quiz has 6 questions"),
        ({9: 'quiz("A?")\nquiz("B?")'}, "cell 9 shows the quiz's answers as code"),
        ({11: "## Recap\n\n- a\n- b\n\n## Where next\n\nTo 02."}, "the recap has 2 lines"),
        ({11: "## Recap\n\n- a\n- b\n- c\n- d\n- e\n\n## Where next"}, "'Where next' is empty"),
        ({7: "x\n" * 26}, "cell 7 has 26 lines"),
        ({7: "Connecting took 5.2 ms."}, 'cell 7 states "5.2 ms"'),
    ],
)
def test_what_is_out_of_shape_is_named(changes: dict[int, str], complaint: str) -> None:
    found = complaints(lesson_with(changes))
    assert any(complaint in each for each in found), found


@pytest.mark.parametrize(
    "text",
    [
        "Connecting took 5.2 ms on a network that costs nothing.",
        "A backend uses about 10 MB.",
        "| path | took 12 s |",
        "With PgBouncer it was 34 times faster.",
        "The median\nis around 3 to 5 ms.",
        "It fell by 40 %.",
        "SCRAM needs 4.3 round trips.",
    ],
)
def test_measured_numbers_are_found(text: str) -> None:
    assert list(measured_numbers([Cell(0, "markdown", text)]))


@pytest.mark.parametrize(
    "text",
    [
        "**Time:** about 20 minutes, **Before you start:** nothing.",
        "The guide says that it takes 10 to 100 ms.",
        "Does a connection take about 10 ms?",
        "It was set with `statement_timeout = 60 s` and used.",
        "It took as long as you see above, in version 18.6 of the server.",
        "Here a 30 s timeout becomes 0.5 s.",
        "Five clients took part; 100 connections were open.",
        "```\ntook 5 ms\n```",
        "The default was 30 s.",
        "PostgreSQL 18 used [this](https://example.org/5ms-took-7 ms).",
        "See section 20.2.4, which was written for version 16.",
    ],
)
def test_other_numbers_are_left_alone(text: str) -> None:
    assert list(measured_numbers([Cell(0, "markdown", text)])) == []


@pytest.mark.parametrize(
    ("drawing", "draws"),
    [
        ("from connlab.figures import (\n    lanes as draw,\n)", True),
        ("from connlab import figures as draw", True),
        ("from connlab import watch as draw", True),
        ("import matplotlib.pyplot as draw", True),
        ("from connlab import Postgres as draw", False),
    ],
)
def test_what_draws_is_what_comes_from_a_module_for_figures(drawing: str, draws: bool) -> None:
    cells = lesson_with({1: drawing, 4: 'draw(1)\nguess.reveal(1, "so")'})
    assert (complaints(cells) == []) == draws


def test_only_numbered_notebooks_are_lessons(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    for name in ("00_start_here", "scratch"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"cells": []}))
    assert [path.stem for path in numbered_notebooks(tmp_path)] == ["00_start_here"]
