"""What the syllabus demands of a notebook or lab has its section there: nothing is skipped unseen."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from lesson_form import Cell, Section, cells_of, numbered_notebooks, sections, solutions

Demand = Mapping[str, Any]
FIELDS = {"demand", "section", "runs", "links"}


def demands() -> dict[str, list[Demand]]:
    return tomllib.loads(Path(__file__).with_name("syllabus.toml").read_text(encoding="utf-8"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lesson" in metafunc.fixturenames:
        root = metafunc.config.rootpath
        paths = [*numbered_notebooks(root), *solutions(root)]
        metafunc.parametrize("lesson", paths, ids=[path.stem for path in paths])


def complaints(cells: list[Cell], wanted: Sequence[Demand]) -> list[str]:
    """What the syllabus demands and the notebook lacks."""
    if not wanted:
        return ["syllabus.toml demands nothing of this notebook"]
    found = sections(cells)
    return [complaint for demand in wanted for complaint in _complaints(demand, found)]


def _complaints(demand: Demand, found: Sequence[Section]) -> Iterator[str]:
    named = [section for section in found if section.title == demand["section"]]
    if len(named) != 1:
        yield f"{len(named)} sections '{demand['section']}', not one, for {demand['demand']}"
        return
    if demand.get("runs", True) and not any(cell.tree.body for cell in named[0].code):
        yield f"the section '{demand['section']}' runs nothing, for {demand['demand']}"
    for link in demand.get("links", ()):
        if f"]({link}" not in named[0].prose:
            yield f"the section '{demand['section']}' has no link to {link}"


def test_the_notebook_has_what_the_syllabus_demands(lesson: Path) -> None:
    found = complaints(cells_of(lesson), demands().get(lesson.stem, []))
    assert not found, "\n".join(found)


def test_the_data_has_no_field_that_nobody_reads() -> None:
    wanted = [demand for each in demands().values() for demand in each]
    assert all({"demand", "section"} <= set(demand) <= FIELDS for demand in wanted)


# What follows shows that it can fail.

LESSON = [
    Cell(0, "markdown", "# 13 · Leaks\n\n## Experiment 1: a leak\n\nSee [timeouts](14_timeouts.ipynb)."),
    Cell(1, "code", "leak()"),
    Cell(2, "markdown", "## Experiment 2: words"),
    Cell(3, "code", "# nothing"),
    Cell(4, "markdown", "## Twice\n\n## Twice"),
]


@pytest.mark.parametrize(
    ("demand", "complaint"),
    [
        ({"section": "Experiment 1: a leak"}, []),
        ({"section": "Experiment 1: a leak", "links": ["14_timeouts.ipynb"]}, []),
        ({"section": "Experiment 2: words", "runs": False}, []),
        ({"section": "Experiment 3: more"}, ["0 sections 'Experiment 3: more', not one, for x"]),
        ({"section": "Twice", "runs": False}, ["2 sections 'Twice', not one, for x"]),
        ({"section": "Experiment 2: words"}, ["the section 'Experiment 2: words' runs nothing, for x"]),
        (
            {"section": "Experiment 1: a leak", "links": ["15_silence.ipynb"]},
            ["the section 'Experiment 1: a leak' has no link to 15_silence.ipynb"],
        ),
    ],
)
def test_what_is_lacking_is_named(demand: Demand, complaint: list[str]) -> None:
    assert complaints(LESSON, [{"demand": "x", **demand}]) == complaint


def test_a_notebook_of_which_nothing_is_demanded_is_named() -> None:
    assert complaints(LESSON, []) == ["syllabus.toml demands nothing of this notebook"]
