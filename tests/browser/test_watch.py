"""The live timeline as a learner has it: in a real JupyterLab, in a real browser, while a load runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from browser.jupyterlab_driver import Lab, end_kernels

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]
WITHIN = 60.0

START = """
import threading, time
from psycopg_pool import ConnectionPool
from connlab import Postgres, watch
pg = Postgres.start(max_connections=12)
bouncer = pg.pgbouncer(pool_mode="transaction", default_pool_size=2)
pool = ConnectionPool(bouncer.dsn, min_size=4, max_size=4, open=True, kwargs={"prepare_threshold": None})
pool.wait()
"""
WATCH = "live = watch(pg, bouncer, app=pool)"
LOAD = """
def work(seconds):
    with pool.connection() as conn:
        conn.execute("select pg_sleep(%s)", [seconds])
load = [threading.Thread(target=work, args=[3]) for _ in range(4)]
for thread in load: thread.start()
live.mark("load starts")
for thread in load: thread.join()
"""
THREADS = """
deadline = time.monotonic() + 10
while live.running and time.monotonic() < deadline: time.sleep(0.05)
print("threads:", sorted(t.name for t in threading.enumerate() if t.name.startswith(("connlab-live", "connlab-rec"))))
"""
CPU = """
began, used = time.monotonic(), time.process_time()
time.sleep(8)
print("cpu:", (time.process_time() - used) / (time.monotonic() - began))
"""
STOP = """
pool.close(); pg.stop()
print("all stopped")
"""


class Notebook:
    """The notebook in the browser."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def idle(self) -> None:
        """Wait until the kernel is."""
        self.page.get_by_text("| Idle").wait_for(timeout=60_000)

    def run(self, cell: int, *, wait: bool = True) -> Locator:
        """Run a cell, by its number from 0; returns its output."""
        place = self.page.locator(".jp-Notebook .jp-Cell").nth(cell)
        prompt = place.locator(".jp-InputArea-prompt")
        before = prompt.inner_text()
        prompt.click()
        self.page.keyboard.press("Control+Enter")
        until(lambda: prompt.inner_text() != before, f"cell {cell} begin")
        if wait:
            until(lambda: prompt.inner_text() != "[*]:", f"cell {cell} end")
            assert prompt.inner_text() != "[ ]:", f"cell {cell} did not run"
        return place.locator(".jp-Cell-outputArea")

    def shown(self, source: str, metric: str) -> int:
        """A number that stands in the figure."""
        text = self.page.locator(f"[data-source='{source}'][data-metric='{metric}']").first.text_content() or ""
        return int(text) if text.isdigit() else -1

    def text(self) -> str:
        """All that stands in the figure."""
        return self.page.locator("svg[aria-label*='PgBouncer:']").first.text_content() or ""


@pytest.fixture
def notebook(lab: Lab, page: Page, request: pytest.FixtureRequest) -> Iterator[Notebook]:
    name = f"{request.function.__name__}.ipynb"
    lab.write(name, START, WATCH, LOAD, THREADS, CPU, STOP)
    page.goto(lab.address(name))
    page.wait_for_selector(".jp-Notebook", timeout=60_000)
    notebook = Notebook(page)
    notebook.idle()
    notebook.run(0)
    yield notebook
    assert "all stopped" in notebook.run(5).inner_text()
    end_kernels(lab)


def until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN
    while not reached():
        assert time.monotonic() < deadline, f"never saw: {what}"
        time.sleep(0.05)


def picture(notebook: Notebook) -> str:
    return str(notebook.page.locator("svg[aria-label*='PgBouncer:']").first.inner_html())


def test_the_figure_follows_the_load_obeys_its_controls_and_ends_with_its_output(notebook: Notebook) -> None:
    output = notebook.run(1)
    until(lambda: notebook.shown("app", "idle") == 4, "four idle connections")
    assert notebook.shown("app", "in use") == 0

    notebook.run(2, wait=False)
    until(lambda: notebook.shown("app", "in use") == 4, "four borrowed connections")
    until(lambda: notebook.shown("PgBouncer", "clients waiting") == 2, "two clients that wait")
    until(lambda: notebook.shown("PgBouncer", "held by a client") == 2, "two clients that are served")
    until(lambda: notebook.shown("PostgreSQL", "active") == 2, "two active backends")
    until(lambda: "load starts" in notebook.text(), "the mark")
    until(lambda: notebook.shown("app", "idle") == 4, "the load's end")
    notebook.idle()

    assert "-30 s" in notebook.text() and "-10 s" not in notebook.text()
    output.get_by_role("button", name="10 s").click()
    until(lambda: "-10 s" in notebook.text(), "the axis of ten seconds")

    output.get_by_role("button", name="pause").click()
    time.sleep(1)
    before = picture(notebook)
    time.sleep(1)
    assert picture(notebook) == before
    output.get_by_role("button", name="pause").click()
    until(lambda: picture(notebook) != before, "a picture that moves again")

    share = float(notebook.run(4).inner_text().split("cpu:")[1])
    print(f"the kernel took {share:.1%} of a core for sampling and drawing")
    assert share < 0.5  # a runaway; benchmarks/recorder.py measures

    notebook.page.locator(".jp-Notebook .jp-Cell").nth(1).locator(".jp-InputArea-prompt").click()
    notebook.page.get_by_role("menuitem", name="Edit").click()
    notebook.page.get_by_role("menuitem", name="Clear Cell Output", exact=True).click()
    assert "threads: []" in notebook.run(3).inner_text()


def test_the_stop_button_ends_it_and_leaves_the_last_frame(notebook: Notebook) -> None:
    output = notebook.run(1)
    until(lambda: notebook.shown("app", "idle") == 4, "four idle connections")
    output.get_by_role("button", name="stop").click()
    until(lambda: "stopped" in output.inner_text(), "the word stopped")
    assert "threads: []" in notebook.run(3).inner_text()
    assert notebook.shown("app", "idle") == 4
