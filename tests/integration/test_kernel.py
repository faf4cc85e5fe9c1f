"""Servers and a real Jupyter kernel: interrupt, restart, shutdown and kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.manager import KernelManager
from leftovers import PATIENCE, PRELUDE, Trace, assert_nothing_left, python_path

STARTED = "pg = Postgres.start(); bouncer = pg.pgbouncer(); tell(pg, bouncer)"


class Notebook:
    """A kernel, and the cells that are run in it."""

    def __init__(self) -> None:
        self.trace = Trace()
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env={**os.environ, "PYTHONPATH": python_path()})
        self._connect()

    def run(self, code: str) -> dict[str, Any]:
        """Run a cell to its end: what it told last, or the error's name as ``error``."""
        return self.result(self.begin(code))

    def begin(self, code: str) -> str:
        """Start a cell."""
        message: str = self.client.execute(code)
        return message

    def until_printed(self, text: str) -> None:
        while text not in self._next_output().get("text", ""):
            pass

    def result(self, message: str) -> dict[str, Any]:
        reply: dict[str, Any] = {}
        while reply.get("parent_header", {}).get("msg_id") != message:
            reply = self.client.get_shell_msg(timeout=PATIENCE)
        told = self._told(message)
        return told if reply["content"]["status"] == "ok" else {**told, "error": reply["content"]["ename"]}

    def restart(self, *, now: bool) -> None:
        self.client.stop_channels()
        self.manager.restart_kernel(now=now)
        self._connect()

    def end(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def _connect(self) -> None:
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=PATIENCE)
        assert "error" not in self.run(PRELUDE)

    def _next_output(self) -> dict[str, Any]:
        content: dict[str, Any] = self.client.get_iopub_msg(timeout=PATIENCE)["content"]
        return content

    def _told(self, message: str) -> dict[str, Any]:
        """Read the output up to the cell's end; the last line of JSON in it."""
        text, idle = "", False
        while not idle:
            output = self.client.get_iopub_msg(timeout=PATIENCE)
            if output["parent_header"].get("msg_id") == message:
                text += output["content"].get("text", "")
                idle = output["content"].get("execution_state") == "idle"
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        for line in lines:
            self.trace.learn(line)
        return lines[-1] if lines else {}


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    started = Notebook()
    try:
        yield started
    finally:
        started.end()
    if started.trace.owner:
        assert_nothing_left(started.trace)


def test_an_interrupted_query_ends_and_the_next_cell_finds_the_servers_alive(notebook: Notebook) -> None:
    notebook.run(STARTED)
    before = dict(notebook.trace.servers)
    cell = notebook.begin("""
with psycopg.connect(bouncer.dsn) as connection:
    connection.execute("select 1")
    print("it runs", flush=True)
    connection.execute("select pg_sleep(600)")
""")
    notebook.until_printed("it runs")
    notebook.manager.interrupt_kernel()
    assert notebook.result(cell)["error"] in ("KeyboardInterrupt", "QueryCanceled")
    told = notebook.run("tell(pg, bouncer, answer=pg.value('select 42'), pools=len(bouncer.rows('SHOW POOLS')))")
    assert told["answer"] == 42 and told["pools"] >= 1
    main = min(before)
    assert str(main) in told["servers"], "another server than before"
    asleep = "select count(*) from pg_stat_activity where query like '%pg_sleep(600)%' and state = 'active'"
    told = notebook.run(f'tell(ended=until(lambda: pg.value("{asleep} and pid <> pg_backend_pid()") == 0, 10))')
    assert told["ended"], "the query went on without anybody waiting for it"


def test_interrupts_during_the_start_leave_nothing_half_started(notebook: Notebook) -> None:
    for _ in range(6):
        cell = notebook.begin("print('it runs', flush=True)\npg = Postgres.start(); pg.pgbouncer(); time.sleep(600)")
        notebook.until_printed("it runs")
        time.sleep(random.uniform(0, 0.3))  # not a wait: the moment of the interrupt
        notebook.manager.interrupt_kernel()
        assert notebook.result(cell)["error"] == "KeyboardInterrupt"
        assert "error" not in notebook.run("globals().get('pg') and pg.stop()\nglobals().pop('pg', None)\ntell()")
        assert_nothing_left(notebook.trace, owner_lives=True)
    assert notebook.run("pg = Postgres.start(); tell(pg, answer=pg.value('select 42'))")["answer"] == 42


@pytest.mark.parametrize("now", [True, False])
def test_a_restart_of_the_kernel_leaves_nothing_and_new_servers_start(notebook: Notebook, now: bool) -> None:
    notebook.run(STARTED)
    old, notebook.trace = notebook.trace, Trace()
    assert len(old.servers) > 2
    notebook.restart(now=now)
    assert_nothing_left(old)
    assert notebook.run(f"{STARTED}; tell(answer=pg.value('select 42'))")["answer"] == 42
    assert notebook.trace.owner != old.owner


def test_a_shutdown_of_the_kernel_leaves_nothing(notebook: Notebook) -> None:
    notebook.run(STARTED)
    notebook.client.stop_channels()
    notebook.manager.shutdown_kernel(now=False)
    assert_nothing_left(notebook.trace)


def test_kill_9_of_the_kernel_during_a_query_leaves_nothing(notebook: Notebook) -> None:
    notebook.run(f"{STARTED}; busy(pg); tell()")
    assert len(notebook.trace.servers) > 3
    os.kill(notebook.trace.owner, signal.SIGKILL)
    assert_nothing_left(notebook.trace)
