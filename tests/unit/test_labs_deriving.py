"""Deriving labs: what becomes of a solution's cells, what is refused, and whose work is not overwritten."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from connlab import cli, labs
from connlab.labs import LabError, LabsDiffer

SOLVED = """\
import time

def act(x):
    '''Say it.'''
    ### BEGIN SOLUTION
    for each in x:
        say(each)
    ### END SOLUTION
    time.sleep(0)
    ### BEGIN SOLUTION
    return x
    ### END SOLUTION"""
STUBBED = """\
import time

def act(x):
    '''Say it.'''
    # YOUR CODE HERE
    raise NotImplementedError()
    time.sleep(0)
    # YOUR CODE HERE
    raise NotImplementedError()"""
CHECKED = "ok = check(act)\n### BEGIN HIDDEN TESTS\nassert ok.passed, ok\n### END HIDDEN TESTS"


def cell(source: str, kind: str = "code", **marks: Any) -> dict[str, Any]:
    plain = {"schema_version": 3, "grade": False, "grade_id": "a", "locked": False, "solution": False, "task": False}
    metadata = {"nbgrader": plain | marks} if marks else {}
    outputs = {"outputs": [{"output_type": "stream"}], "execution_count": 7} if kind == "code" else {}
    lines = source.splitlines(keepends=True)
    return {"cell_type": kind, "id": "c", "metadata": metadata, "source": lines, **outputs}


def notebook(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"cells": list(cells), "metadata": {"kernelspec": {"name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}


def source_of(lab: dict[str, Any], at: int = 0) -> str:
    return "".join(lab["cells"][at]["source"])


# --- one cell -----------------------------------------------------------------------------------------------


def test_a_solution_becomes_nbgraders_stub_as_deep_as_it_was() -> None:
    lab = labs.derive(notebook(cell(SOLVED, solution=True)), "lab")
    assert source_of(lab) == STUBBED


def test_hidden_tests_are_left_out() -> None:
    lab = labs.derive(notebook(cell(CHECKED, grade=True, points=1)), "lab")
    assert source_of(lab) == "ok = check(act)"


def test_a_written_answer_becomes_a_line_of_text() -> None:
    answer = cell("Why?\n\n### BEGIN SOLUTION\nSo.\n### END SOLUTION", "markdown", grade=True, solution=True, points=1)
    assert source_of(labs.derive(notebook(answer), "lab")) == "Why?\n\nYOUR ANSWER HERE"


def test_other_cells_and_nbgraders_metadata_stay_and_results_go() -> None:
    solution = notebook(cell("# Text", "markdown"), cell("x = 1\n"), cell(SOLVED, solution=True))
    before = copy.deepcopy(solution)
    lab = labs.derive(solution, "lab")
    assert solution == before
    assert [source_of(lab, at) for at in (0, 1)] == ["# Text", "x = 1\n"]
    assert [each["metadata"] for each in lab["cells"]] == [each["metadata"] for each in solution["cells"]]
    assert all(each["outputs"] == [] and each["execution_count"] is None for each in lab["cells"][1:])


BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
TEST, TESTED = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"


@pytest.mark.parametrize(
    ("source", "marks", "said"),
    [
        (f"{BEGIN}\n{BEGIN}\n{END}\n{END}", {"solution": True}, f"line 2: '{BEGIN}' inside such a region"),
        (f"{BEGIN}\nx = 1", {"solution": True}, f"'{BEGIN}' is never ended; add '{END}'"),
        (f"x = 1\n{END}", {"solution": True}, f"line 2: '{END}' ends nothing"),
        (f"{BEGIN}\n{END}\n{END}", {"solution": True}, f"line 3: '{END}' ends nothing"),
        (f"{BEGIN}\n{END}", {}, 'does not mark with "solution": true'),
        (f"{BEGIN}\n{END}", {"grade": True, "points": 1}, 'does not mark with "solution": true'),
        (f"{TEST}\n{TESTED}", {"locked": True}, 'does not mark with "grade": true'),
        (f"{TEST}\nx = 1", {"grade": True, "points": 1}, f"'{TEST}' is never ended"),
        (f"{TEST}\n{BEGIN}\n{TESTED}\n{END}", {"solution": True}, f"'{TEST}' is never ended"),
        ("x = 1", {"solution": True}, "a solution cell without a region"),
        ("# BEGIN SOLUTION\n# END SOLUTION", {"solution": True}, f"write '{BEGIN}' alone"),
        (f"{BEGIN} # here\n{END}", {"solution": True}, f"write '{BEGIN}' alone"),
        ("x = 1", {"schema_version": 1}, "schema_version is 1; write 3"),
        ("x = 1", {"grade_id": ""}, "the grade_id is empty"),
        ("x = 1", {"grade": True}, "has or lacks points"),
        ("x = 1", {"point": 1}, "has or lacks point;"),
    ],
)
def test_what_is_wrong_is_refused_with_notebook_and_cell(source: str, marks: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError) as found:
        labs.derive(notebook(cell("first"), cell(source, **marks) | {"id": "wrong-one"}), "solutions/lab_99.ipynb")
    assert str(found.value).startswith("solutions/lab_99.ipynb, cell wrong-one")
    assert said in str(found.value)


def test_two_cells_with_one_grade_id_are_refused() -> None:
    with pytest.raises(LabError, match="the grade_id a is another cell's"):
        labs.derive(notebook(cell("x", locked=True), cell("y", locked=True)), "lab")


def test_prose_that_nbgrader_would_take_for_a_mark_is_refused() -> None:
    with pytest.raises(LabError, match="nbgrader takes"):
        labs.derive(notebook(cell("Write after BEGIN SOLUTION.", "markdown")), "lab")


# --- the folders --------------------------------------------------------------------------------------------


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course with one solution, as the current directory."""
    (tmp_path / "solutions").mkdir()
    monkeypatch.chdir(tmp_path)
    solve(tmp_path, SOLVED)
    return tmp_path


def solve(course: Path, source: str, name: str = "lab_99") -> None:
    solution = notebook(cell(source, solution=True))
    (course / f"solutions/{name}.ipynb").write_text(json.dumps(solution), encoding="utf-8")


def lab(course: Path, name: str = "lab_99") -> Path:
    return course / f"labs/{name}.ipynb"


def test_labs_are_derived_and_derived_again_without_a_difference(course: Path, capsys: Any) -> None:
    assert cli.main(["labs"]) == cli.FINE
    first = lab(course).read_bytes()
    assert cli.main(["labs"]) == cli.FINE
    assert capsys.readouterr().out == "derived labs/lab_99.ipynb\nevery lab was up to date\n"
    assert lab(course).read_bytes() == first and first.endswith(b"}\n")
    assert cli.main(["labs", "--check"]) == cli.FINE


def test_a_changed_solution_changes_its_lab_and_a_lab_without_solution_goes(course: Path) -> None:
    solve(course, SOLVED, "lab_98")
    labs.write(course)
    solve(course, SOLVED.replace("import time", "import math"))
    (course / "solutions/lab_98.ipynb").unlink()
    assert labs.write(course) == ["derived labs/lab_99.ipynb", "removed labs/lab_98.ipynb, which has no solution"]
    assert "import math" in lab(course).read_text()
    assert not lab(course, "lab_98").exists()


@pytest.mark.parametrize("change", ["missing", "edited", "too many", "solution"])
def test_check_fails_on_any_difference_and_changes_nothing(course: Path, change: str, capsys: Any) -> None:
    labs.write(course)
    if change == "missing":
        lab(course).unlink()
    if change == "edited":
        lab(course).write_text(lab(course).read_text().replace("YOUR CODE", "MY CODE"))
    if change == "too many":
        lab(course, "lab_97").write_text(lab(course).read_text())
    if change == "solution":
        solve(course, SOLVED.replace("time", "math"))
    before = {path: path.read_bytes() for path in lab(course).parent.iterdir()}
    assert cli.main(["labs", "--check"]) == cli.FAILED
    said = capsys.readouterr().err
    assert ("labs/lab_97.ipynb" if change == "too many" else "labs/lab_99.ipynb") in said and "connlab labs" in said
    assert {path: path.read_bytes() for path in lab(course).parent.iterdir()} == before


def test_a_lab_that_somebody_has_worked_in_is_not_overwritten(course: Path, capsys: Any) -> None:
    labs.write(course)
    worked = lab(course).read_text().replace("raise NotImplementedError()", "return 42")
    lab(course).write_text(worked)
    solve(course, SOLVED.replace("time", "math"))
    assert cli.main(["labs"]) == cli.FAILED
    assert "somebody has worked in labs/lab_99.ipynb" in capsys.readouterr().err
    assert lab(course).read_text() == worked
    assert cli.main(["labs", "--force"]) == cli.FINE
    assert "return 42" not in lab(course).read_text()


def test_a_run_of_a_lab_is_no_work_in_it(course: Path) -> None:
    labs.write(course)
    ran = json.loads(lab(course).read_text())
    ran["cells"][0] |= {"execution_count": 3, "outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}]}
    lab(course).write_text(json.dumps(ran))
    assert labs.write(course) == ["derived labs/lab_99.ipynb"]


def test_nothing_is_written_when_one_solution_is_wrong(course: Path, capsys: Any) -> None:
    solve(course, "x = 1", "lab_98")
    with pytest.raises(LabError, match=r"solutions/lab_98.ipynb, cell c: a solution cell without a region"):
        labs.write(course)
    assert not lab(course).exists()


def test_a_file_that_is_no_notebook_is_named(course: Path) -> None:
    (course / "solutions/lab_98.ipynb").write_text("{")
    with pytest.raises(LabError, match=r"solutions/lab_98.ipynb cannot be read"):
        labs.check(course)


def test_where_there_are_no_solutions_it_says_so(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(labs.places, "project_dir", lambda: tmp_path)
    assert cli.main(["labs"]) == cli.FAILED
    assert f"no folder solutions in {os.getcwd()}" in capsys.readouterr().err


def test_differences_are_connlabs_errors() -> None:
    assert issubclass(LabsDiffer, labs.ConnlabError) and issubclass(LabError, labs.ConnlabError)
