"""Each claim of the ledger is judged once, in its own notebook, as soon as that notebook exists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from lesson_form import cells_of, judged, numbered_notebooks

from connlab.lesson.ledger import ledger


def complaints(notebooks: Mapping[str, Sequence[str]]) -> list[str]:
    """What is wrong about the claims that each of these notebooks judges."""
    return [*_missing(notebooks), *_misplaced(notebooks)]


def _missing(notebooks: Mapping[str, Sequence[str]]) -> list[str]:
    due = [entry for entry in ledger().values() if entry.notebook in notebooks]
    counts = {entry.id: list(notebooks[entry.notebook]).count(entry.id) for entry in due}
    return [
        f'{entry.notebook} has claim("{entry.id}").judge(…) {counts[entry.id]} times, not once'
        for entry in due
        if counts[entry.id] != 1
    ]


def _misplaced(notebooks: Mapping[str, Sequence[str]]) -> list[str]:
    found = [(name, id) for name, ids in notebooks.items() for id in dict.fromkeys(ids)]
    unknown = [f"{name} judges {id!r}, which the ledger does not have" for name, id in found if id not in ledger()]
    return unknown + [
        f"{name} judges {id}, which {ledger()[id].notebook} settles"
        for name, id in found
        if id in ledger() and ledger()[id].notebook != name
    ]


def test_every_claim_is_settled_once_in_its_own_notebook(pytestconfig: pytest.Config) -> None:
    paths = numbered_notebooks(pytestconfig.rootpath)
    found = complaints({path.stem: judged(cells_of(path)) for path in paths})
    assert not found, "\n".join(found)


# What follows shows that it can fail.

SETTLED = {"00_start_here": ["G21", "G22"], "02_three_approaches": ["G07", "G06", "G08"]}


def test_notebooks_that_settle_their_claims_have_no_complaint() -> None:
    assert complaints(SETTLED) == []


@pytest.mark.parametrize(
    ("name", "ids", "complaint"),
    [
        ("00_start_here", ["G21"], '00_start_here has claim("G22").judge(…) 0 times, not once'),
        ("00_start_here", ["G21", "G22", "G22"], '00_start_here has claim("G22").judge(…) 2 times, not once'),
        ("00_start_here", ["G21", "G22", "G06"], "00_start_here judges G06, which 02_three_approaches settles"),
        ("00_start_here", ["G21", "G22", "L01"], "00_start_here judges L01, which 13_leaks settles"),
        ("00_start_here", ["G21", "G22", "G99"], "00_start_here judges 'G99', which the ledger does not have"),
    ],
)
def test_what_is_settled_elsewhere_twice_or_not_is_named(name: str, ids: list[str], complaint: str) -> None:
    assert complaints({**SETTLED, name: ids}) == [complaint]


def test_only_calls_count_not_words_or_comments(tmp_path: Path) -> None:
    cell = '%matplotlib inline\n# claim("G22").judge\nprint("claim(\'G22\').judge()")\nclaim("G21").judge(\n  {"x": 1})'
    notebook = {"cells": [{"cell_type": "code", "source": cell, "metadata": {}}]}
    (tmp_path / "x.ipynb").write_text(json.dumps(notebook))
    assert judged(cells_of(tmp_path / "x.ipynb")) == ["G21"]
