"""Notebooks are kept in git without results, and in the form that every front end and nbval need."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from notebook_guard import course_notebooks, tracked_notebooks

LONGEST_CELL = 25

Notebook = dict[str, Any]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "notebook_path" in metafunc.fixturenames:
        root = metafunc.config.rootpath
        metafunc.parametrize("notebook_path", [root / path for path in course_notebooks(root)], ids=str)


def code_cells(notebook: Notebook) -> Iterator[tuple[str, Notebook]]:
    """Code cells with the names that nbval gives them."""
    code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    return ((f"Cell {number}", cell) for number, cell in enumerate(code))


def source(cell: Notebook) -> str:
    """A cell's text, which the format keeps as a string or as a list of lines."""
    return "".join(cell["source"])


def left_over_results(notebook: Notebook) -> list[str]:
    outputs = [f"{name} has outputs" for name, cell in code_cells(notebook) if cell.get("outputs")]
    counts = [
        f"{name} has an execution count"
        for name, cell in code_cells(notebook)
        if cell.get("execution_count") is not None
    ]
    return outputs + counts


def wrong_kernel(notebook: Notebook) -> list[str]:
    name = notebook["metadata"].get("kernelspec", {}).get("name")
    return [] if name == "python3" else [f"the kernelspec is {name!r}, not 'python3'"]


def bad_ids(notebook: Notebook) -> list[str]:
    """Without ids (format 4.5) each front end invents its own, and git shows a change in every cell."""
    ids = [cell.get("id") for cell in notebook["cells"]]
    missing = [f"cell {at} of all has no id" for at, name in enumerate(ids, start=1) if not name]
    twice = [f"the id {name} occurs twice" for name in {name for name in ids if name and ids.count(name) > 1}]
    return missing + twice


def old_format(notebook: Notebook) -> list[str]:
    version = (notebook["nbformat"], notebook["nbformat_minor"])
    return [] if version >= (4, 5) else [f"the notebook's format is {version}, which has no cell ids"]


def long_cells(notebook: Notebook) -> list[str]:
    lengths = ((name, len(source(cell).splitlines())) for name, cell in code_cells(notebook))
    return [f"{name} has {length} lines" for name, length in lengths if length > LONGEST_CELL]


def as_git_has_it(path: Path, root: Path) -> str:
    """The staged text; the file where git does not track it.

    Whoever works through the course has results in the files on disk, and is not to be told off for that.
    """
    relative = path.relative_to(root)
    if relative not in tracked_notebooks(root):
        return path.read_text(encoding="utf-8")
    return subprocess.run(
        ["git", "show", f":./{relative.as_posix()}"], cwd=root, capture_output=True, check=True, text=True
    ).stdout


def test_git_has_no_results(notebook_path: Path, pytestconfig: pytest.Config) -> None:
    notebook = json.loads(as_git_has_it(notebook_path, pytestconfig.rootpath))
    assert not left_over_results(notebook)


@pytest.mark.parametrize("rule", [wrong_kernel, bad_ids, old_format, long_cells])
def test_form(notebook_path: Path, rule: Callable[[Notebook], list[str]]) -> None:
    assert not rule(json.loads(notebook_path.read_text(encoding="utf-8")))


# What follows shows that each rule can fail.


def notebook_of(**cell: Any) -> Notebook:
    """A clean notebook of a heading and one code cell, with that cell's fields replaced."""
    code = {"cell_type": "code", "id": "b", "metadata": {}, "source": "1 + 1", "outputs": []}
    heading = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title\n", "text"]}
    kernelspec = {"name": "python3", "display_name": "Python 3"}
    return {
        "cells": [heading, code | {"execution_count": None} | cell],
        "metadata": {"kernelspec": kernelspec},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.mark.parametrize("rule", [left_over_results, wrong_kernel, bad_ids, old_format, long_cells])
def test_a_clean_notebook_has_no_complaint(rule: Callable[[Notebook], list[str]]) -> None:
    assert rule(notebook_of()) == []


@pytest.mark.parametrize(
    ("rule", "dirty", "complaint"),
    [
        (left_over_results, notebook_of(outputs=[{"output_type": "stream"}]), "Cell 0 has outputs"),
        (left_over_results, notebook_of(execution_count=0), "Cell 0 has an execution count"),
        (wrong_kernel, notebook_of() | {"metadata": {}}, "the kernelspec is None, not 'python3'"),
        (bad_ids, notebook_of(id=""), "cell 2 of all has no id"),
        (bad_ids, notebook_of(id="a"), "the id a occurs twice"),
        (old_format, notebook_of() | {"nbformat_minor": 4}, "the notebook's format is (4, 4), which has no cell ids"),
        (long_cells, notebook_of(source=["x\n"] * 26), "Cell 0 has 26 lines"),
        (long_cells, notebook_of(source="\n".join("x" * 26)), "Cell 0 has 26 lines"),
    ],
)
def test_a_dirty_notebook_is_named_cell_by_cell(
    rule: Callable[[Notebook], list[str]], dirty: Notebook, complaint: str
) -> None:
    assert rule(dirty) == [complaint]


def test_what_is_staged_counts_and_not_what_a_learner_ran(tmp_path: Path) -> None:
    notebook = tmp_path / "00.ipynb"
    notebook.write_text("as committed")
    for command in (["git", "init", "-q"], ["git", "add", "00.ipynb"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    notebook.write_text("as run")
    assert as_git_has_it(notebook, tmp_path) == "as committed"


def test_a_notebook_that_git_does_not_know_yet_is_read_from_disk(tmp_path: Path) -> None:
    notebook = tmp_path / "00.ipynb"
    notebook.write_text("just written")
    assert as_git_has_it(notebook, tmp_path) == "just written"
