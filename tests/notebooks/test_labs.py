"""Labs are what their solutions give, have the shape of a lab, and their checks tell right answers from wrong ones.

A plain run tries one wrong answer for each check; `-m full` tries all answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from lab_answers import RIGHT, WRONG, answers_of, checks_of, defined, names_of_checks, run_check
from lesson_form import Cell, Section, cells_of, sections, solutions
from test_notebooks_are_clean import as_git_has_it
from test_skeleton import HEAD, measured_numbers

from connlab import Postgres, labs
from connlab.checks.drivers import call
from connlab.checks.results import FAILED, PASSED
from connlab.checks.trial import Trial, check

ENOUGH_WRONG, ENOUGH_RIGHT = 4, 2
Rule = Callable[[list[Cell]], Iterator[str]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    paths = solutions(metafunc.config.rootpath)
    if "solution" in metafunc.fixturenames:
        metafunc.parametrize("solution", paths, ids=[path.stem for path in paths])
    for kind in ("wrong", "right"):
        if kind in metafunc.fixturenames:
            metafunc.parametrize(("path", kind), [each for path in paths for each in _given(path, kind)])


def _given(path: Path, kind: str) -> Iterator[Any]:
    """The answers to a lab as parameters: the first wrong one for each check always runs."""
    seen: set[str] = set()
    for answer in answers_of(path)[kind]:
        first = kind == "wrong" and answer["check"] not in seen
        seen.add(answer.get("check", ""))
        marks = [] if first else [pytest.mark.full]
        yield pytest.param(path, answer, id=f"{path.stem[:6]}-{answer['name']}", marks=marks)


# --- derived ------------------------------------------------------------------------------------------------


def test_every_lab_in_git_is_what_its_solution_gives(solution: Path, pytestconfig: pytest.Config) -> None:
    """In git, and not on disk: whoever has worked in a lab is not to be told off for that."""
    root = pytestconfig.rootpath
    derived = labs.derive(json.loads(as_git_has_it(solution, root)), solution.name)
    lab = as_git_has_it(root / labs.LABS / solution.name, root)
    assert lab == labs.as_text(derived), "run `connlab labs`, and stage what it changes"


def test_every_lab_has_a_solution(pytestconfig: pytest.Config) -> None:
    found = {path.name for path in (pytestconfig.rootpath / labs.LABS).glob("*.ipynb")}
    assert found == {path.name for path in solutions(pytestconfig.rootpath)}


# --- shape --------------------------------------------------------------------------------------------------

LAB_HEAD = {
    r"\A# Lab \d\d · \S": "begin with a heading such as '# Lab 02 · Replace connect-per-request'",
    **{pattern.replace("this notebook", "this lab"): wish for pattern, wish in list(HEAD.items())[1:]},
}
MINUTES = re.compile(r"\*\*Time:\*\* (\d+) minutes")
CHECK = re.compile(
    r"(?P<name>\w+) = check\.(?P<check>\w+)\([\w, ]*\)\n"
    r"### BEGIN HIDDEN TESTS\nassert (?P=name)\.passed, (?P=name)\n### END HIDDEN TESTS"
)
IN_A_TASK = {
    r"\*\*Time:\*\* \d+ minutes": "how long it takes: '**Time:** 5 minutes'",
    r"(?s)\*\*Expected\*\*|\*\*Expected:\*\*": "'**Expected:**'",
    r"(?s)\*\*Expected.*?```.*?✓ Passed.*?```": "a sample of the output, in a block after '**Expected**'",
    r"<details><summary>Hint": "a hint in <details><summary>Hint…",
}


def head(cells: list[Cell]) -> Iterator[str]:
    for pattern, wish in LAB_HEAD.items():
        if not cells or cells[0].kind != "markdown" or not re.search(pattern, cells[0].text):
            yield f"the first cell: {wish}"


def tasks(cells: list[Cell]) -> Iterator[str]:
    found = [section for section in sections(cells) if section.title.startswith("Task ")]
    if [section.title.split(":")[0] for section in found] != [
        f"Task {n}" for n in range(1, len(found) + 1)
    ] or not found:
        yield f"the tasks are {[section.title for section in found]}, not 'Task 1: …', 'Task 2: …'"
    for section in found:
        yield from (f"'{section.title}' lacks {wish}" for wish in _lacking(section))


def _lacking(section: Section) -> Iterator[str]:
    yield from (wish for pattern, wish in IN_A_TASK.items() if not re.search(pattern, section.prose))
    if not any(_marks(cell).get("grade") for cell in section.code):
        yield "a check"


def minutes(cells: list[Cell]) -> Iterator[str]:
    given = [int(found) for cell in cells for found in MINUTES.findall(cell.text)]
    if given and given[0] != sum(given[1:]):
        yield f"it takes {given[0]} minutes, and its parts {sum(given[1:])}"


def checks(cells: list[Cell]) -> Iterator[str]:
    """A check that the solution does not assert could not fail."""
    for cell in cells:
        if _marks(cell).get("grade") and not CHECK.fullmatch(cell.text):
            yield (
                f"cell {cell.number} is graded and has not the form 'name = check.what(…)', and between the marks of "
                "hidden tests 'assert name.passed, name'"
            )
        if "check." in cell.text and cell.kind == "code" and not _marks(cell).get("grade"):
            yield f"cell {cell.number} calls a check and is not graded"


def end(cells: list[Cell]) -> Iterator[str]:
    last = [section for section in sections(cells) if section.level == 2][-1:]
    if not last or last[0].title != "Where next" or not last[0].prose.strip():
        yield "the last section is not 'Where next', with text"


def _marks(cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = cell.metadata.get("nbgrader", {})
    return found


RULES: list[Rule] = [head, tasks, minutes, checks, end, measured_numbers]


def complaints(cells: list[Cell]) -> list[str]:
    return [complaint for rule in RULES for complaint in rule(cells)]


def test_the_solution_has_the_shape_of_a_lab(solution: Path) -> None:
    assert complaints(cells_of(solution)) == []


def test_the_lab_calls_each_of_its_checks_once(solution: Path) -> None:
    found = [CHECK.fullmatch(cell.text) for cell in cells_of(solution)]
    called = sorted(match["check"] for match in found if match)
    assert called == sorted(names_of_checks(checks_of(solution)))


# --- the checks against answers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pg() -> Iterator[Postgres]:
    with Postgres.start(max_connections=20, log_connections=True) as server:
        yield server


def test_the_wrong_answer_gets_the_message_meant_for_it(path: Path, wrong: dict[str, Any], pg: Postgres) -> None:
    result = run_check(getattr(checks_of(path), wrong["check"]), answers_of(path)["given"], wrong["code"], pg)
    assert result.status == FAILED, result
    lacking = [text for text in wrong["says"] if text not in str(result)]
    assert not lacking, f"the card does not say {lacking}:\n{result}"


def test_the_answer_in_another_style_passes_every_check(path: Path, right: dict[str, Any], pg: Postgres) -> None:
    module = checks_of(path)
    for name in names_of_checks(module):
        result = run_check(getattr(module, name), answers_of(path)["given"], right["code"], pg)
        assert result.status == PASSED, result


def test_there_are_enough_answers_and_every_check_fails_for_one(solution: Path) -> None:
    answers = answers_of(solution)
    assert len(answers["wrong"]) >= ENOUGH_WRONG and len(answers["right"]) >= ENOUGH_RIGHT
    assert {answer["check"] for answer in answers["wrong"]} == set(names_of_checks(checks_of(solution)))
    assert set(answers) == {"given", "wrong", "right"}
    assert all(set(answer) == WRONG and answer["says"] for answer in answers["wrong"])
    assert all(set(answer) == RIGHT for answer in answers["right"])


# --- what happens to the server -----------------------------------------------------------------------------


@check("The server is used")
def used(trial: Trial, act: Callable[[str, int], None], pg: Postgres) -> None:
    """Use the server."""
    postmaster = int(pg.value("select split_part(pg_read_file('postmaster.pid'), chr(10), 1)"))
    with trial.sandbox(pg, act=act) as box:
        answer = box.do(10, call, "act", pg.dsn, postmaster)
        trial.expect("no error", str(answer.problem), answer.problem is None, "Look.")


HARM = defined(
    """
import os, signal
import psycopg

def kill_the_server(dsn, postmaster):
    os.kill(postmaster, signal.SIGKILL)

def leave_a_query(dsn, postmaster):
    import threading, time
    conn = psycopg.connect(dsn)
    conn.execute("lock table orders in access exclusive mode")
    threading.Thread(target=conn.execute, args=["select pg_sleep(600)"]).start()
    time.sleep(0.2)

def take_every_slot(dsn, postmaster):
    global held
    held = []
    try:
        while True:
            held.append(psycopg.connect(dsn))
    except psycopg.OperationalError:
        pass
"""
)


def test_code_that_kills_the_server_is_told_so_and_the_next_check_works(pg: Postgres) -> None:
    result = used(HARM["kill_the_server"], pg)
    assert result.status == FAILED
    assert "measured: it was down" in str(result) and "started again" in str(result)
    assert used(HARM["take_every_slot"], pg).passed


def test_code_that_takes_every_slot_leaves_them_to_the_next_check(pg: Postgres) -> None:
    assert used(HARM["take_every_slot"], pg).passed
    assert used(HARM["take_every_slot"], pg).passed


def test_code_that_leaves_a_query_and_a_lock_leaves_them_to_nobody(pg: Postgres) -> None:
    assert used(HARM["leave_a_query"], pg).passed
    with psycopg.connect(pg.dsn, options="-c lock_timeout=5s") as conn:
        conn.execute("lock table orders in access exclusive mode")
    assert (
        pg.value("select count(*) from pg_stat_activity where query like '%pg_sleep(600)%' and pid <> pg_backend_pid()")
        == 0
    )


def test_a_server_that_the_notebook_has_killed_or_frozen_is_taken_up(pg: Postgres) -> None:
    for harm in (pg.kill, pg.freeze):
        harm()
        assert run_on(pg).passed


def run_on(pg: Postgres) -> Any:
    @check("The server is there")
    def there(trial: Trial, pg: Postgres) -> None:
        """Leave it there."""
        with trial.sandbox(pg):
            trial.expect("1", str(pg.value("select 1")), pg.value("select 1") == 1, "Look.")

    return there(pg)


def test_a_server_that_was_stopped_is_a_message_and_no_traceback() -> None:
    with Postgres.start() as server:
        pass
    result = run_on(server)
    assert result.status == FAILED
    assert "Run the cell that starts it again" in str(result)


# What follows shows that each rule can fail.

HEAD_TEXT = """\
# Lab 02 · Replace connect-per-request

*Section 20.2 of the guide.*

**After this lab you can**

- do it.

**Time:** 10 minutes. **Before you start:** nothing.
"""
TASK = "## Task 1: borrow\n\n**Time:** 10 minutes"
AFTER = "**Expected:**\n\n```\n✓ Passed: x\n```\n\n<details><summary>Hint: how?</summary>\n\nSo.\n\n</details>"
CHECKED = "ok = check.works(start, pg)\n### BEGIN HIDDEN TESTS\nassert ok.passed, ok\n### END HIDDEN TESTS"


def lab_with(changes: dict[int, str]) -> list[Cell]:
    texts = [HEAD_TEXT, TASK, CHECKED, AFTER, "## Where next\n\nHome."]
    kinds = ["markdown", "markdown", "code", "markdown", "markdown"]
    graded: dict[str, Any] = {"nbgrader": {"grade": True}}
    return [
        Cell(at, kind, changes.get(at, text), graded if kind == "code" else {})
        for at, (kind, text) in enumerate(zip(kinds, texts, strict=True))
    ]


def test_a_well_formed_lab_has_no_complaint() -> None:
    assert complaints(lab_with({})) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({0: HEAD_TEXT.replace("# Lab 02", "# 02")}, "begin with a heading such as '# Lab 02"),
        ({0: HEAD_TEXT.replace("this lab", "this")}, "the first cell: list under"),
        ({0: HEAD_TEXT.replace("20.2", "x")}, "the first cell: name the section"),
        ({0: HEAD_TEXT.replace("10 minutes", "15 minutes")}, "it takes 15 minutes, and its parts 10"),
        ({1: TASK.replace("Task 1", "Task 2")}, "the tasks are ['Task 2: borrow']"),
        ({1: "## Task 1: borrow"}, "lacks how long it takes"),
        ({2: CHECKED.replace("assert ok.passed, ok", "ok.passed")}, "cell 2 is graded and has not the form"),
        ({2: CHECKED.replace("assert ok.", "assert other.")}, "cell 2 is graded and has not the form"),
        ({2: CHECKED.replace("ok = ", "")}, "cell 2 is graded and has not the form"),
        ({3: AFTER.replace("✓ Passed: x", "")}, "lacks a sample of the output"),
        ({3: AFTER.replace("Hint: how?", "Answer")}, "lacks a hint"),
        ({4: "## Where next"}, "the last section is not 'Where next', with text"),
        ({3: AFTER + "\n\nIt took 5.2 ms."}, 'cell 3 states "5.2 ms"'),
    ],
)
def test_what_is_out_of_shape_is_named(changes: dict[int, str], complaint: str) -> None:
    found = complaints(lab_with(changes))
    assert any(complaint in each for each in found), found


def test_a_check_that_is_not_graded_and_a_task_without_one_are_named() -> None:
    cells = lab_with({})
    cells[2].metadata = {}
    assert complaints(cells) == ["'Task 1: borrow' lacks a check", "cell 2 calls a check and is not graded"]
