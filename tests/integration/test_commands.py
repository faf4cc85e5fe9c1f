"""The commands as a learner runs them: real JupyterLab, real servers, and nothing left afterwards."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from psycopg_pool import ConnectionPool

from connlab import Postgres, cli, demo, jupyter, places, reaper

CONNLAB = [sys.executable, "-m", "connlab.cli"]
PATIENCE = 60.0
"""Seconds until something that does not come is given up, on a busy machine."""
GONE_WITHIN = 15.0
NO_ENGINE = "unix:///nowhere/docker.sock"
NOTEBOOK = {
    "cells": [{"id": "a", "cell_type": "markdown", "metadata": {}, "source": "Start here."}],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


def connlab(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CONNLAB, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=PATIENCE
    )


def until(done: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return found


# --- doctor -------------------------------------------------------------------------------------------------


def test_doctor_json_is_what_other_tools_read():
    done = connlab("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert set(found) == {"backends", "postgres", "pgbouncer", "chosen"}
    assert set(found["backends"]) == {"local", "docker"}
    for backend in found["backends"].values():
        assert set(backend) == {"usable", "why"}
        assert isinstance(backend["usable"], bool)
        assert backend["why"]
    assert found["backends"]["local"]["usable"]
    assert found["chosen"] == "local"
    with Postgres.start() as pg, pg.pgbouncer() as bouncer:
        assert (found["postgres"], found["pgbouncer"]) == (str(pg.version), str(bouncer.version))


@pytest.mark.parametrize(
    ("variable", "program"), [("CONNLAB_POSTGRES", "postgres"), ("CONNLAB_PGBOUNCER", "pgbouncer")]
)
def test_doctor_ends_with_3_and_the_ways_out_when_nothing_is_usable(variable, program):
    done = connlab("doctor", "--json", **{variable: "/nowhere", "DOCKER_HOST": NO_ENGINE})
    found = json.loads(done.stdout)
    assert done.returncode == cli.NO_BACKEND
    assert not found["backends"]["local"]["usable"]
    assert found[program] is None
    assert found["chosen"] is None
    for text in (found["backends"]["local"]["why"], done.stderr):
        assert f"unset {variable}" in text
    for text in (found["backends"]["docker"]["why"], done.stderr):
        assert "start the engine" in text


def test_doctor_shows_a_cross_and_the_way_out():
    done = connlab("doctor", CONNLAB_POSTGRES="/nowhere")
    assert re.search(r"^✗ PostgreSQL .*/nowhere", done.stdout, re.MULTILINE)
    assert re.search(r"^✓ PgBouncer \d", done.stdout, re.MULTILINE)
    assert "way out: unset CONNLAB_POSTGRES" in done.stdout


def test_doctor_says_when_the_variable_names_a_backend_that_is_not_there():
    chosen = {"CONNLAB_BACKEND": "docker", "DOCKER_HOST": NO_ENGINE}
    found = json.loads(connlab("doctor", "--json", **chosen).stdout)
    assert found["chosen"] is None
    assert "unset CONNLAB_BACKEND" in connlab("doctor", **chosen).stdout


# --- demo ---------------------------------------------------------------------------------------------------


def test_demo_shows_three_real_errors_and_the_cure_in_under_a_minute():
    began = time.monotonic()
    done = connlab("demo")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60
    assert done.stderr == ""
    for error in (
        r"psycopg_pool\S*\.PoolTimeout\n\s+couldn't get a connection after",
        r"psycopg.errors.QueryCanceled \(SQLSTATE 57014\)\n\s+canceling statement due to statement timeout",
        r"psycopg.OperationalError\n\s+.*remaining connection slots are reserved",
    ):
        assert re.search(error, done.stdout)
    assert f"17 of {demo.CLIENTS} clients got in" in done.stdout
    assert f"{demo.CLIENTS} of {demo.CLIENTS} clients were answered" in done.stdout
    assert re.search(rf"SHOW POOLS\s+{demo.CLIENTS} clients", done.stdout)


@pytest.fixture(scope="module")
def pg() -> Iterator[Postgres]:
    with Postgres.start(max_connections=demo.MAX_CONNECTIONS) as server:
        yield server


def give_back(dsn: str) -> None:
    with ConnectionPool(dsn, min_size=3, max_size=3) as pool:
        borrowed = [pool.getconn() for _ in range(3)]
        for conn in borrowed:
            conn.execute("select 1")
            pool.putconn(conn)
        pool.putconn(pool.getconn(timeout=0.5))


def close_all(dsn: str) -> None:
    """A leak of another kind: PoolTimeout comes, and PostgreSQL has no sessions."""
    with ConnectionPool(dsn, min_size=3, max_size=3) as pool:
        for _ in range(3):
            pool.getconn().close()
        pool.getconn(timeout=0.5)


def be_quick(dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute("set statement_timeout = '500ms'")
        conn.execute("select pg_sleep(0.01)")


def be_cancelled_by_somebody(dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        threading.Timer(0.1, conn.cancel_safe).start()
        conn.execute("select pg_sleep(60)")


def be_few(dsn: str, clients: int, connected: list[psycopg.Connection]) -> None:
    while len(connected) < 5:
        connected.append(psycopg.connect(dsn, autocommit=True))


def fail_otherwise(dsn: str, clients: int, connected: list[psycopg.Connection]) -> None:
    psycopg.connect(dsn, password="wrong")


def ask_one_after_another(connected: list[psycopg.Connection]) -> list[int]:
    return [conn.execute("select pg_backend_pid() from pg_sleep(0.01)").fetchall()[0][0] for conn in connected]


def ask_half(connected: list[psycopg.Connection]) -> list[int]:
    return REAL_ASK(connected[::2])


REAL_ASK = demo.ask_all_at_once


@pytest.mark.parametrize(
    ("part", "name", "sabotage"),
    [
        (demo.show_leak, "leak", give_back),
        (demo.show_leak, "leak", close_all),
        (demo.show_timeout, "timeout", be_quick),
        (demo.show_timeout, "timeout", be_cancelled_by_somebody),
        (demo.show_saturation, "connect", be_few),
        (demo.show_saturation, "connect", fail_otherwise),
        (lambda pg: demo.show_cure(pg, 17), "connect", be_few),
        (lambda pg: demo.show_cure(pg, 17), "ask_all_at_once", ask_one_after_another),
        (lambda pg: demo.show_cure(pg, 17), "ask_all_at_once", ask_half),
    ],
)
def test_demo_fails_when_what_it_shows_does_not_happen(pg, part, name, sabotage, monkeypatch, capsys):
    monkeypatch.setattr(demo, name, sabotage)
    with pytest.raises(demo.DemoFailed):
        part(pg)
    assert inspect.getsource(sabotage).strip().splitlines()[-1].strip() in capsys.readouterr().out  # shows what it runs


# --- clean --------------------------------------------------------------------------------------------------

DIES_WITH_ITS_WATCHDOG = """
import os, signal
import psutil
from connlab import Postgres
pg = Postgres.start()
watchdog = next(child for child in psutil.Process().children() if any("reaper" in word for word in child.cmdline()))
print(pg.socket_directory, flush=True)
watchdog.kill()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_clean_removes_what_a_dead_process_left_and_says_so():
    died = subprocess.run([sys.executable, "-c", DIES_WITH_ITS_WATCHDOG], capture_output=True, text=True)
    owner = Path(died.stdout.strip()).parent
    assert owner.is_dir(), died.stderr
    done = connlab("clean")
    assert done.returncode == 0
    assert f"removed {owner}" in done.stdout
    assert not owner.exists()


def test_clean_spares_the_living(pg):
    connlab("clean")
    assert pg.value("select 1") == 1
    assert Path(pg.socket_directory).is_dir()


# --- start --------------------------------------------------------------------------------------------------


class Lab:
    """A `connlab start` in a terminal of its own, on a course of its own; killed at the end if it lives."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self.project, self.state, self.home = folder / "course", folder / "state", folder / "home"
        self.home.mkdir()
        self._output = folder / "output"
        variables = {"CONNLAB_STATE": str(self.state), "HOME": str(self.home), "XDG_CACHE_HOME": str(_cache())}
        ours, its = os.openpty()  # JupyterLab behaves otherwise without a terminal
        with self._output.open("w") as output, os.fdopen(its) as terminal:
            self._terminal = os.fdopen(ours)
            self.process = subprocess.Popen(
                [*CONNLAB, "start", *options],
                cwd=self.project,
                env={**os.environ, **variables, **environment},
                stdin=terminal,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def said(self) -> str:
        return self._output.read_text()

    def address(self) -> str:
        """The address that it prints; it must have ended its preparations then."""
        pattern = re.compile(r"http://127\.0\.0\.1:\d+/lab/tree/\S+\?token=\S+")
        return str(until(lambda: self._alive() and pattern.search(self.said()), "an address").group())

    def ask(self, path: str, *, method: str = "GET", body: Any = None, token: bool = True) -> tuple[int, Any]:
        base, _, secret = re.sub(r"/lab/.*\?", "?", self.address()).partition("?token=")
        headers = {"Authorization": f"token {secret}"} if token else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{base}{path}", data=data, headers=headers, method=method)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read().decode()

    def start_postgres_in_a_kernel(self) -> None:
        """As a notebook does: a kernel, and in it a server."""
        status, kernel = self.ask("/api/kernels", method="POST", body={"name": "python3"})
        assert status == 201, kernel
        words = [word for child in self.children() for word in command_line(child).split()]
        file = Path(next(word for word in words if kernel["id"] in word))
        _execute(file, "from connlab import Postgres; pg = Postgres.start()")

    def children(self) -> list[psutil.Process]:
        """Itself and all that it has started, kernels, servers and watchdogs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            itself = psutil.Process(self.process.pid)
            return [itself, *itself.children(recursive=True)]
        return []

    def _alive(self) -> bool:
        assert self.process.poll() is None, self.said()
        return True

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._terminal.close()


def _cache() -> Path:
    """HOME is another in these tests; the cache stays, or each would fetch everything again."""
    return places.cache_dir().parent


def _execute(connection_file: Path, code: str) -> None:
    from jupyter_client.blocking.client import BlockingKernelClient

    until(connection_file.exists, "the kernel's connection file")
    client = BlockingKernelClient(connection_file=str(connection_file))
    client.load_connection_file()
    client.start_channels(hb=False)  # a busy machine misses beats
    try:
        reply = client.execute(code, reply=True, timeout=PATIENCE)
        assert reply["content"]["status"] == "ok", reply
    finally:
        client.stop_channels()


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A folder with a course: the real first notebook when there is one."""
    notebook = tmp_path / "course" / jupyter.NOTEBOOK
    notebook.parent.mkdir(parents=True)
    real = places.project_dir() / jupyter.NOTEBOOK
    if real.is_file():
        shutil.copy(real, notebook)
    else:
        notebook.write_text(json.dumps(NOTEBOOK))
    return tmp_path


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_all_gone(processes: list[psutil.Process], owners: set[int]) -> None:
    def left() -> list[str]:
        running = [str(one) for one in processes if runs(one)]
        return running + [str(path) for root in places.run_roots() for pid in owners for path in root.glob(f"{pid}-*")]

    deadline = time.monotonic() + GONE_WITHIN
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() == []


def assert_nothing_left_by(lab: Lab, end: Callable[[], None]) -> None:
    """``end`` the command while a notebook's server runs; then look for processes and directories."""
    lab.start_postgres_in_a_kernel()
    processes = lab.children()
    names = " ".join(map(command_line, processes))
    assert all(word in names for word in ("ipykernel", "postgres", "reaper"))
    assert_the_key_is_secret(lab)
    end()
    lab.process.wait(GONE_WITHIN)
    assert_all_gone(processes, {process.pid for process in processes})


@contextlib.contextmanager
def somebody_on(port: int) -> Iterator[int]:
    """A listener on ``port`` (0: any); if another program is there already, so much the better."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        with contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            listener.listen()
        yield port or listener.getsockname()[1]


def test_start_serves_the_course_to_who_has_the_key_until_ctrl_c(course):
    with somebody_on(jupyter.DEFAULT_PORT), Lab(course, "--no-browser") as lab:
        address = lab.address()
        assert f"Port {jupyter.DEFAULT_PORT} is taken" in lab.said()
        page = address.partition("127.0.0.1:")[2].partition("/")[2]
        assert lab.ask(f"/{page}", token=False)[0] == 200
        assert lab.ask("/api/contents", token=False)[0] == 403
        status, served = lab.ask(f"/api/contents/{jupyter.NOTEBOOK}")
        assert status == 200
        assert len(served["content"]["cells"]) == len(json.loads((lab.project / jupyter.NOTEBOOK).read_text())["cells"])
        assert "No browser was opened (--no-browser)" in until(lambda: "No browser" in lab.said() and lab.said(), "it")
        assert_only_state_is_written(lab, served)
        assert_the_page_asks_for_no_news(lab)
        assert_the_cache_is_in_use_by(lab)
        assert_nothing_left_by(lab, lambda: os.killpg(lab.process.pid, signal.SIGINT))
        assert lab.process.returncode == 0
        assert "JupyterLab has stopped" in lab.said()
        assert "Traceback" not in lab.said()


def assert_the_key_is_secret(lab: Lab) -> None:
    """Arguments are everybody's to read, and the environment every child's."""
    token = lab.address().partition("token=")[2]
    for process in lab.children():
        assert token not in command_line(process)
        with contextlib.suppress(psutil.Error):
            assert token not in str(process.environ())
    assert (lab.state / "jupyter").stat().st_mode & 0o077 == 0


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # it may have ended
        return " ".join(process.cmdline())
    return ""


def assert_the_cache_is_in_use_by(lab: Lab) -> None:
    """`clean --cache` spares the cache while an owner lives. To run it here would risk everybody's cache."""
    owners = [path for root in places.run_roots() for path in root.glob(f"{lab.process.pid}-*")]
    assert owners
    assert all(reaper.lock_file(owner / reaper.LOCK, wait=False) is None for owner in owners)


def assert_only_state_is_written(lab: Lab, notebook: dict[str, Any]) -> None:
    body = {"type": "notebook", "format": "json", "content": notebook["content"]}
    assert lab.ask(f"/api/contents/{jupyter.NOTEBOOK}", method="PUT", body=body)[0] == 200
    assert lab.ask(f"/api/contents/{jupyter.NOTEBOOK}/checkpoints", method="POST")[0] == 201
    assert [path.name for path in lab.project.rglob("*") if path.is_file()] == [Path(jupyter.NOTEBOOK).name]
    assert not list(lab.project.rglob(".ipynb_checkpoints"))
    assert list((lab.state / "jupyter" / "checkpoints").rglob("*-checkpoint.ipynb"))
    assert list(lab.home.iterdir()) == []


def assert_the_page_asks_for_no_news(lab: Lab) -> None:
    page = lab.ask("/lab")[1]
    settings = json.loads(re.search(r'<script id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.DOTALL).group(1))
    assert "@jupyterlab/apputils-extension:announcements" in settings["disabledExtensions"]


def test_start_opens_a_browser_without_showing_the_key_and_ends_with_sigterm(course):
    script = course / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" > {course}/seen.part; cp "${{1#file://}}" {course}/page\n')
    with script.open("a") as file:
        file.write(f"mv {course}/seen.part {course}/seen\n")
    script.chmod(0o755)
    with Lab(course, BROWSER=str(script), DISPLAY=":99") as lab:
        token = lab.address().partition("token=")[2]
        until((course / "seen").exists, "the browser")
        assert token not in (course / "seen").read_text()
        assert token in (course / "page").read_text()
        assert "No browser was opened" not in lab.said()
        assert_nothing_left_by(lab, lab.process.terminate)
        assert lab.process.returncode == 0
        assert not list((lab.state / "jupyter").glob("open-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="kernels elsewhere notice their parent's end later")
def test_nothing_survives_when_start_is_killed(course):
    with Lab(course, "--no-browser") as lab:
        lab.address()
        assert_nothing_left_by(lab, lab.process.kill)
        assert lab.process.returncode == -signal.SIGKILL


def test_a_port_that_was_asked_for_and_is_taken_is_an_error_of_its_own(course):
    with somebody_on(0) as port, Lab(course, "--port", str(port)) as lab:
        assert lab.process.wait(PATIENCE) == cli.PORT_TAKEN
        assert f"port {port} of 127.0.0.1" in lab.said()
        assert "Traceback" not in lab.said()


def test_start_without_notebooks_says_so(tmp_path):
    shutil.copytree(Path(cli.__file__).parent, tmp_path / "connlab")
    done = subprocess.run(
        [*CONNLAB, "start", "--no-browser"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == cli.FAILED
    assert f"there is no {jupyter.NOTEBOOK}" in done.stderr
    assert "Traceback" not in done.stderr


def test_start_without_postgres_ends_with_the_ways_out(course):
    with Lab(course, "--no-browser", CONNLAB_POSTGRES="/nowhere") as lab:
        assert lab.process.wait(PATIENCE) == cli.NO_BACKEND
        assert "Ways out" in lab.said()
        assert "Traceback" not in lab.said()


def test_a_jupyterlab_that_does_not_start_shows_the_end_of_its_log(course):
    broken = course / "broken" / "jupyterlab"
    broken.mkdir(parents=True)
    (broken / "__init__.py").touch()
    (broken / "labapp.py").write_text("print('words in the log')\nraise ImportError('half of it is missing')\n")
    with Lab(course, "--no-browser", PYTHONPATH=str(broken.parent)) as lab:
        assert lab.process.wait(PATIENCE) == cli.FAILED
        assert "JupyterLab did not start: ImportError: half of it is missing" in lab.said()
        assert "    words in the log" in lab.said()
        assert "Traceback" not in lab.said()
