"""The live timeline where nobody watches: one static frame, or an end after a while; bad input is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat.v4
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from connlab import ConnlabError, Postgres, live, watch

CELL = """
from connlab import watch
shown = watch(pg, window=10)
"""
START = "import threading, time\nfrom connlab import Postgres, live\npg = Postgres.start()\n"
THREADS = """
print("threads:", sorted(t.name for t in threading.enumerate() if t.name.startswith(("connlab-live", "connlab-rec"))))
pg.stop()
"""


def run(*cells: str, environment: dict[str, str]) -> list[nbformat.NotebookNode]:
    """Run cells in a kernel with this environment, without a front end; returns the last two cells' outputs."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    manager = KernelManager(kernel_name="python3")
    NotebookClient(notebook, km=manager, timeout=60).execute(env=environment)
    return [output for cell in notebook.cells for output in cell.outputs]


def without_pytest() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@pytest.mark.parametrize("variable", ["PYTEST_CURRENT_TEST", "CONNLAB_STATIC"])
def test_under_nbval_it_is_one_frame_and_no_thread(variable: str) -> None:
    outputs = run(START, CELL, THREADS, environment={**without_pytest(), variable: "1"})
    frame, text = outputs
    assert "<svg" in frame.data["text/html"] and "PostgreSQL" in frame.data["text/html"]
    assert "threads: []" in text.text


def test_without_a_front_end_that_shows_it_it_ends_after_a_while() -> None:
    wait = "live.UNSEEN = 1.0\n" + CELL + "running = shown.running\ntime.sleep(3)\nprint('was running:', running)"
    *_, running, threads = run(START, wait, THREADS, environment=without_pytest())
    assert "was running: True" in running.text and "threads: []" in threads.text


def test_it_ends_after_its_minutes() -> None:
    end = "live.UNSEEN = 60\n" + CELL.replace("window=10", "minutes=1 / 60") + "time.sleep(3)"
    *_, threads = run(START, end, THREADS, environment=without_pytest())
    assert "threads: []" in threads.text


def test_outside_jupyter_it_is_static(tmp_path: Path) -> None:
    code = START + CELL + "print(shown)" + THREADS
    ran = subprocess.run(
        [sys.executable, "-c", code], env=without_pytest(), capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "<live timeline, stopped>" in ran.stdout and "threads: []" in ran.stdout


def test_a_static_one_can_be_asked_and_stopped(server: Postgres) -> None:
    assert live.is_static()
    began = time.monotonic()
    shown = watch(server)
    shown.stop()
    assert not shown.running and len(shown.rec.frame()) and time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 7}, "window takes 10, 30, 60"),
        ({"minutes": 0}, "minutes takes"),
        ({"minutes": "1"}, "minutes takes"),
    ],
)
def test_bad_options_are_refused(server: Postgres, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConnlabError, match=words):
        watch(server, **options)  # type: ignore[arg-type]
