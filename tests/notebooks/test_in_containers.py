"""Every notebook and solution runs through on the docker backend too; CI runs some of them so each time."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from lesson_form import numbered_notebooks, solutions
from nbclient import NotebookClient

CELL_TIMEOUT = 300

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = metafunc.config.rootpath
    wanted = "docker" in metafunc.config.getoption("backends")
    paths = [*numbered_notebooks(root), *solutions(root)] if wanted else []
    metafunc.parametrize("lesson", paths, ids=[path.stem for path in paths])


def test_the_notebook_runs_in_containers(lesson: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(lesson, as_version=4)
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT, resources={"metadata": {"path": str(lesson.parent)}})
    client.execute(env={**os.environ, "CONNLAB_BACKEND": "docker", "CONNLAB_STATE": str(tmp_path)})
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source)
