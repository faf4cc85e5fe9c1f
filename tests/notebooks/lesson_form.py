"""Numbered notebooks taken apart: cells, sections, and the calls that make them lessons."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

NUMBERED = re.compile(r"\d\d_[a-z0-9_]+")
HEADING = re.compile(r"(#{1,4})\s+(.+)")


@dataclass
class Cell:
    """One cell, with its place in the notebook."""

    number: int
    kind: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def tree(self) -> ast.Module:
        """Its Python; magics and shell commands become calls of get_ipython()."""
        return ast.parse(TransformerManager().transform_cell(self.text) if self.kind == "code" else "")

    def calls(self, name: str) -> list[ast.Call]:
        """Calls of the function ``name``, or of a method of that name."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.Call) and _called(node) == name]


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


@dataclass
class Section:
    """A heading and the cells under it, as far as the next heading of its level or above."""

    title: str
    level: int
    cells: list[Cell] = field(default_factory=list)

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def prose(self) -> str:
        return "\n".join(cell.text for cell in self.cells if cell.kind == "markdown")


def numbered_notebooks(root: Path) -> list[Path]:
    """The notebooks of the course, in order."""
    return sorted(path for path in (root / "notebooks").glob("*.ipynb") if NUMBERED.fullmatch(path.stem))


def solutions(root: Path) -> list[Path]:
    """The solutions of the labs, in order."""
    return sorted((root / "solutions").glob("lab_*.ipynb"))


def cells_of(path: Path) -> list[Cell]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [
        Cell(number, cell["cell_type"], "".join(cell["source"]), cell["metadata"])
        for number, cell in enumerate(notebook["cells"])
    ]


def sections(cells: list[Cell]) -> list[Section]:
    """Every section in order; a section's cells are also those of the section around it.

    A Markdown cell may hold several headings: each section gets the part of the cell that is its own.
    """
    found: list[Section] = []
    opened: list[Section] = []
    for cell in cells:
        for title, level, part in _parts(cell):
            if title:
                opened = [section for section in opened if section.level < level]
                opened.append(Section(title, level))
                found.append(opened[-1])
            for section in opened:
                section.cells.append(part)
    return found


def _parts(cell: Cell) -> Iterator[tuple[str, int, Cell]]:
    """The cell cut at its headings: title (empty without one), level, and the part as a cell."""
    if cell.kind != "markdown":
        yield "", 0, cell
        return
    part: list[str] = []
    title, level, fenced = "", 0, False
    for line in cell.text.splitlines():
        fenced ^= line.startswith("```")
        match = None if fenced else HEADING.fullmatch(line.strip())
        if match:
            if part or title:
                yield title, level, Cell(cell.number, cell.kind, "\n".join(part), cell.metadata)
            title, level, part = match[2].strip(), len(match[1]), []
        else:
            part.append(line)
    yield title, level, Cell(cell.number, cell.kind, "\n".join(part), cell.metadata)


def judged(cells: list[Cell]) -> list[str]:
    """The ids in ``claim("ID").judge(…)``, in order, each as often as it stands there."""
    return [
        call.func.value.args[0].value
        for cell in cells
        for call in cell.calls("judge")
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Call)
        and _called(call.func.value) == "claim"
        and call.func.value.args
        and isinstance(call.func.value.args[0], ast.Constant)
    ]
