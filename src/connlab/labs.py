"""Labs are derived from their solutions: what the learner writes becomes a stub, what only the solution asserts goes.

The notation and the result are nbgrader's (https://nbgrader.readthedocs.io/en/stable/user_guide/
creating_and_grading_assignments.html, version 0.9), so that teachers can use the solutions as its sources:

- what stands from ``### BEGIN SOLUTION`` to ``### END SOLUTION`` becomes nbgrader's own stub; the cell is marked as a
  solution cell;
- what stands from ``### BEGIN HIDDEN TESTS`` to ``### END HIDDEN TESTS`` is left out; the cell is marked as a grade
  cell.

Stricter than nbgrader, which overlooks some of it: every solution cell has a region, and every region is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connlab import places
from connlab.errors import ConnlabError, StateError

SOLUTIONS, LABS = "solutions", "labs"
CODE_STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")
TEXT_STUB = ("YOUR ANSWER HERE",)
MARKS = {"schema_version", "grade", "grade_id", "locked", "points", "solution", "task"}
"""The fields of nbgrader's cell metadata, version 3; ``points`` belongs to cells that are graded."""

Notebook = dict[str, Any]
Cell = dict[str, Any]


class LabError(ConnlabError):
    """A solution notebook from which no lab can be derived: which notebook and cell, what is wrong, what to do."""


class LabsDiffer(ConnlabError):
    """Labs on disk are not what their solutions give, or would be overwritten: which, and what to do."""


@dataclass(frozen=True)
class _Region:
    """A kind of region: its first and last line, the field that its cell must have, and what stands in its place."""

    kind: str
    field: str
    stands_in: bool

    @property
    def begin(self) -> str:
        return f"### BEGIN {self.kind}"

    @property
    def end(self) -> str:
        return f"### END {self.kind}"


REGIONS = (_Region("SOLUTION", "solution", True), _Region("HIDDEN TESTS", "grade", False))


# --- a notebook ---------------------------------------------------------------------------------------------


def derive(solution: Notebook, name: str) -> Notebook:
    """The lab of a solution notebook (both in nbformat's JSON); ``name`` is for messages. Raises LabError.

    Example:
        >>> cell = {"cell_type": "code", "source": "def f():\\n    ### BEGIN SOLUTION\\n    ...\\n    ### END SOLUTION"}
        >>> marks = {"schema_version": 3, "grade_id": "f", "grade": False, "locked": False, "solution": True}
        >>> nb = {"cells": [cell | {"metadata": {"nbgrader": marks | {"task": False}}}], "metadata": {}}
        >>> print(derive(nb, "lab")["cells"][0]["source"])
        def f():
            # YOUR CODE HERE
            raise NotImplementedError()
    """
    taken: set[str] = set()
    cells = [_derived(cell, f"{name}, cell {cell.get('id', at)}", taken) for at, cell in enumerate(solution["cells"])]
    lab = {**solution, "cells": cells}
    lab["metadata"] = {**solution["metadata"], "connlab": {"derived": digest(lab)}}
    return lab


def digest(notebook: Notebook) -> str:
    """A digest of the cells' sources: a lab that still has the one it was derived with has nobody's work in it."""
    sources = json.dumps([_source(cell) for cell in notebook["cells"]])
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def is_as_derived(notebook: Notebook) -> bool:
    """Whether the notebook is a lab that nobody has written into."""
    derived = notebook["metadata"].get("connlab", {}).get("derived")
    return bool(derived) and derived == digest(notebook)


def as_text(notebook: Notebook) -> str:
    """The notebook as Jupyter writes it, the same on every system."""
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True, separators=(",", ": ")) + "\n"


def _derived(cell: Cell, where: str, taken: set[str]) -> Cell:
    marks = _marks(cell, where, taken)
    lines, found = _source(cell).split("\n"), set()
    for region in REGIONS:
        if (left := _without(region, lines, cell["cell_type"], where)) != lines:
            found.add(region.field)
            lines = left
    for region in REGIONS:
        if region.field in found and not marks.get(region.field):
            raise LabError(
                f"{where}: a region '{region.begin}' in a cell that nbgrader's metadata does not mark with "
                f'"{region.field}": true; mark it'
            )
    if marks.get("solution") and "solution" not in found:
        raise LabError(f"{where}: a solution cell without a region '{REGIONS[0].begin}' … '{REGIONS[0].end}'; add it")
    bare = {**cell, "source": "\n".join(lines).splitlines(keepends=True)}
    return bare if cell["cell_type"] != "code" else {**bare, "outputs": [], "execution_count": None}


def _without(region: _Region, lines: list[str], kind: str, where: str) -> list[str]:
    """The lines with every region of that kind replaced or left out."""
    kept: list[str] = []
    inside = False
    for number, line in enumerate(lines, start=1):
        edge = _edge(region, line, f"{where}, line {number}")
        if edge == "begin":
            _refuse(inside, f"{where}, line {number}: '{line.strip()}' inside such a region; end the first one before")
            inside = True
            kept += _stand_in(region, kind, line)
        elif edge == "end":
            _refuse(
                not inside, f"{where}, line {number}: '{line.strip()}' ends nothing; add '{region.begin}' or drop it"
            )
            inside = False
        elif not inside:
            kept.append(line)
    _refuse(inside, f"{where}: '{region.begin}' is never ended; add '{region.end}'")
    return kept


def _edge(region: _Region, line: str, where: str) -> str:
    """ "begin", "end" or nothing. nbgrader takes any line that has the words in it: such a line must be the mark."""
    for edge, mark in (("begin", region.begin), ("end", region.end)):
        if mark.removeprefix("### ") in line:
            _refuse(line.strip() != mark, f"{where}: nbgrader takes '{line.strip()}' for a mark; write '{mark}' alone")
            return edge
    return ""


def _stand_in(region: _Region, kind: str, line: str) -> list[str]:
    if not region.stands_in:
        return []
    indentation = line[: len(line) - len(line.lstrip())]
    return [indentation + each for each in (CODE_STUB if kind == "code" else TEXT_STUB)]


def _marks(cell: Cell, where: str, taken: set[str]) -> dict[str, Any]:
    """nbgrader's metadata of the cell, complete and with an id that no other cell has."""
    marks: dict[str, Any] = cell["metadata"].get("nbgrader", {})
    if not marks:
        return marks
    wanted = MARKS if marks.get("grade") else MARKS - {"points"}
    if wrong := sorted(set(marks) ^ wanted):
        raise LabError(f"{where}: nbgrader's metadata has or lacks {', '.join(wrong)}; it takes {sorted(wanted)}")
    _refuse(marks["schema_version"] != 3, f"{where}: nbgrader's schema_version is {marks['schema_version']}; write 3")
    _refuse(marks["grade_id"] in taken, f"{where}: the grade_id {marks['grade_id']} is another cell's; choose one")
    _refuse(not marks["grade_id"], f"{where}: the grade_id is empty; choose one")
    taken.add(marks["grade_id"])
    return marks


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise LabError(message)


def _source(cell: Cell) -> str:
    return "".join(cell["source"])


# --- the folders --------------------------------------------------------------------------------------------


def expected(root: Path) -> Iterator[tuple[Path, str]]:
    """Each lab's file and the text that it should have. Raises LabError."""
    for solution in sorted((root / SOLUTIONS).glob("*.ipynb")):
        name = solution.relative_to(root).as_posix()
        yield root / LABS / solution.name, as_text(derive(_read(solution, name), name))


def write(root: Path, *, force: bool = False) -> list[str]:
    """Derive every lab again; returns a line for each file that has changed.

    Raises LabError, and LabsDiffer before anything is written where a lab has somebody's work in it and not ``force``.
    """
    wanted = dict(expected(root))
    worked_on = [path for path in _labs(root) if not is_as_derived(_read(path, path.name))]
    if worked_on and not force:
        raise LabsDiffer(
            f"somebody has worked in {', '.join(_names(root, worked_on))}: copy what is worth keeping, "
            "then `connlab labs --force`"
        )
    changed = [(path, text) for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    for path, text in changed:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    without = [path for path in _labs(root) if path not in wanted]
    for path in without:
        path.unlink()
    return [f"derived {name}" for name in _names(root, [path for path, _ in changed])] + [
        f"removed {name}, which has no solution" for name in _names(root, without)
    ]


def check(root: Path) -> int:
    """Compare every lab with its solution; returns how many there are. Raises LabError, LabsDiffer."""
    wanted = dict(expected(root))
    differ = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    if differ := [*differ, *(path for path in _labs(root) if path not in wanted)]:
        raise LabsDiffer(
            f"not what the solutions give: {', '.join(_names(root, differ))}; change the solution, then `connlab labs`"
        )
    return len(wanted)


def root() -> Path:
    """The folder with the solutions: the current one, else the one that connlab runs from. Raises StateError."""
    for folder in (Path.cwd(), places.project_dir()):
        if (folder / SOLUTIONS).is_dir():
            return folder
    raise StateError(f"there is no folder {SOLUTIONS} in {Path.cwd()}; run this in the course's folder")


def _labs(root: Path) -> list[Path]:
    return sorted((root / LABS).glob("*.ipynb"))


def _names(root: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def _read(path: Path, name: str) -> Notebook:
    try:
        notebook: Notebook = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise LabError(f"{name} cannot be read: {problem}") from problem
    return notebook
