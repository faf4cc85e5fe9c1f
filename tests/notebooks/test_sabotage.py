"""A lesson that cannot fail proves nothing: with one line replaced, each notebook must fail.

And it must fail as a lesson: with its own assertion, or because the rules of a claim no longer tell anything.
Each takes as long as its notebook, so a plain run tries the first of each; `-m full` tries all.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from lesson_form import numbered_notebooks, solutions
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_TIMEOUT = 60
LESSON_ERRORS = ("AssertionError", "VerdictError")
FIELDS = {"line", "becomes", "fails_with", "why"}
Sabotage = Mapping[str, str]


def sabotages() -> dict[str, list[Sabotage]]:
    return tomllib.loads(Path(__file__).with_name("sabotage.toml").read_text(encoding="utf-8"))


def lessons(root: Path) -> list[str]:
    """Every notebook and lab that must have a sabotage, as sabotage.toml names them."""
    paths = [*numbered_notebooks(root), *solutions(root)]
    return [path.relative_to(root).with_suffix("").as_posix() for path in paths]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "sabotage" in metafunc.fixturenames:
        each = [
            pytest.param(name, sabotage, id=f"{name}-{sabotage['line'][:40]}", marks=[pytest.mark.full] * (number > 0))
            for name, several in sabotages().items()
            for number, sabotage in enumerate(several)
        ]
        metafunc.parametrize(("lesson", "sabotage"), each)


def sabotaged(notebook: nbformat.NotebookNode, sabotage: Sabotage) -> nbformat.NotebookNode:
    """A copy with the line replaced; AssertionError when the line is not there exactly once."""
    copy = nbformat.from_dict(notebook)
    found = [
        (cell, number)
        for cell in copy.cells
        if cell.cell_type == "code"
        for number, line in enumerate(cell.source.splitlines())
        if line.strip() == sabotage["line"]
    ]
    assert len(found) == 1, f"the line {sabotage['line']!r} stands there {len(found)} times, not once"
    (cell, number), lines = found[0], found[0][0].source.splitlines()
    indentation = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
    lines[number] = indentation + sabotage["becomes"]
    cell.source = "\n".join(lines)
    return copy


def failure(notebook: nbformat.NotebookNode, folder: Path, state: Path) -> tuple[str, str] | None:
    """The class and the message of the error that ends the notebook; None when it runs through."""
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT, resources={"metadata": {"path": str(folder)}})
    # The verdicts of a sabotaged run are not those of the course.
    environment = {**os.environ, "CONNLAB_STATE": str(state), "CONNLAB_FAST": "1"}
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        return error.ename, error.evalue
    return None


def test_the_sabotaged_notebook_fails_with_the_lessons_own_error(
    lesson: str, sabotage: Sabotage, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    path = pytestconfig.rootpath / f"{lesson}.ipynb"
    broken = sabotaged(nbformat.read(path, as_version=4), sabotage)
    found = complaint(failure(broken, path.parent, tmp_path), sabotage)
    assert not found, found


def complaint(failed: tuple[str, str] | None, sabotage: Sabotage) -> str:
    """What is wrong about how a sabotaged notebook ended; empty when it failed as it should."""
    wanted = sabotage.get("fails_with", "AssertionError")
    if failed is None:
        return f"with {sabotage['becomes']!r} in the place of {sabotage['line']!r} it still passes"
    name, message = failed
    if name not in LESSON_ERRORS or not f"{name}: {message}".startswith(wanted):
        return f"it fails with {name}: {message[:200]}, not with the lesson's {wanted}"
    return ""


def test_every_notebook_and_lab_has_a_sabotage(pytestconfig: pytest.Config) -> None:
    assert unsabotaged(lessons(pytestconfig.rootpath), sabotages()) == []


def unsabotaged(names: Sequence[str], given: Mapping[str, Sequence[Sabotage]]) -> list[str]:
    return [name for name in names if not given.get(name)]


def test_the_data_names_notebooks_that_exist_and_no_other_field(pytestconfig: pytest.Config) -> None:
    assert set(sabotages()) <= set(lessons(pytestconfig.rootpath))
    each = [sabotage for several in sabotages().values() for sabotage in several]
    assert all({"line", "becomes", "why"} <= set(sabotage) <= FIELDS for sabotage in each)


# What follows shows that it can fail.


def notebook_of(*sources: str) -> Any:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


LEAK: Sabotage = {"line": "leak(3)", "becomes": "leak(0)", "why": "nothing leaks"}


@pytest.mark.parametrize(
    ("source", "times"), [("leak(30)", 0), ("leak(3)\nleak(3)", 2), ("# leak(3)", 0), ("print('leak(3)')", 0)]
)
def test_a_line_that_is_not_there_exactly_once_is_refused(source: str, times: int) -> None:
    with pytest.raises(AssertionError, match=f"stands there {times} times"):
        sabotaged(notebook_of("x = 1", source), LEAK)


def test_a_line_keeps_its_indentation_and_the_original_its_line() -> None:
    original = notebook_of("if True:\n    leak(3)\nprint()")
    assert sabotaged(original, LEAK).cells[0].source == "if True:\n    leak(0)\nprint()"
    assert "leak(3)" in original.cells[0].source


def test_a_lesson_that_notices_fails_and_one_that_does_not_passes(tmp_path: Path) -> None:
    apart = f"import os\nif os.environ['CONNLAB_STATE'] != {str(tmp_path)!r}:\n    raise RuntimeError"
    blind = notebook_of(apart, "def leak(n):\n    return n", "leak(3)", "print('leaked')")
    assert failure(sabotaged(blind, LEAK), tmp_path, tmp_path) is None
    seeing = notebook_of("def leak(n):\n    global leaked\n    leaked = n", "leak(3)", "assert leaked, 'none'")
    assert failure(sabotaged(seeing, LEAK), tmp_path, tmp_path) == ("AssertionError", "none")


@pytest.mark.parametrize(
    ("failed", "fails_with", "said"),
    [
        (("AssertionError", "none"), "AssertionError", ""),
        (("VerdictError", "claim L01: the verdict"), "VerdictError: claim L01", ""),
        (None, "AssertionError", "it still passes"),
        (("NameError", "leaked"), "AssertionError", "it fails with NameError"),
        (("NameError", "leaked"), "NameError", "it fails with NameError"),
        (("AssertionError", "none"), "VerdictError", "it fails with AssertionError"),
    ],
)
def test_an_ending_that_is_not_the_lessons_own_is_named(
    failed: tuple[str, str] | None, fails_with: str, said: str
) -> None:
    found = complaint(failed, {**LEAK, "fails_with": fails_with})
    assert said in found
    assert bool(found) == bool(said)


def test_a_notebook_without_sabotage_is_named() -> None:
    given = {"notebooks/00": [LEAK], "notebooks/01": []}
    assert unsabotaged(["notebooks/00", "notebooks/01", "solutions/lab_02"], given) == [
        "notebooks/01",
        "solutions/lab_02",
    ]
