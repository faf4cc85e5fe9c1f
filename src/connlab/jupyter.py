"""Runs JupyterLab on the course, in this very process.

In this process and not as a child: whatever ends `connlab start`, SIGKILL too, ends JupyterLab with it, on
every system, and its kernels see their parent go and end themselves. What JupyterLab writes (settings,
checkpoints, logs) goes to the state directory, and its runtime files go where servers run, for the
watchdog to remove; the learner's own Jupyter configuration is neither read nor written.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import http.client
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import psutil

from connlab import janitor, places
from connlab.browser import open_browser
from connlab.errors import ConnlabError, StateError
from connlab.progress import Progress

if TYPE_CHECKING:
    from jupyter_server.serverapp import ServerApp

HOST = "127.0.0.1"
DEFAULT_PORT = 8888
NOTEBOOK = "notebooks/00_start_here.ipynb"
ANSWERS_WITHIN = 60.0
"""Seconds until a JupyterLab that does not answer is given up."""
LOG_TAIL = 15


class JupyterFailed(ConnlabError):
    """JupyterLab did not start; the message carries the last lines of its log."""


class NotebookMissing(ConnlabError):
    """There are no notebooks where connlab runs."""


class PortTaken(ConnlabError):
    """The port that was asked for cannot be had."""

    exit_code = 4

    def __init__(self, port: int, why: str) -> None:
        super().__init__(
            f"port {port} of {HOST} cannot be had: {why}\n"
            f"Leave --port out to get one that is free, or stop what listens there (`ss -ltnp` shows it)."
        )


@dataclass(frozen=True)
class Folders:
    """Where one JupyterLab keeps its things."""

    root: Path
    """The course: what JupyterLab shows."""
    state: Path
    """Settings, checkpoints and logs. For this user alone, since a file in it carries the token."""
    runtime: Path
    """Connection files, gone with this process."""


def course_dir() -> Path:
    """The folder with the notebooks: the current one, else the one that connlab runs from.

    Raises NotebookMissing.
    """
    candidates = list(dict.fromkeys([Path.cwd(), places.project_dir()]))
    for folder in candidates:
        if (folder / NOTEBOOK).is_file():
            return folder
    looked = " and ".join(str(folder) for folder in candidates)
    raise NotebookMissing(
        f"there is no {NOTEBOOK} in {looked}\n"
        "The package connlab alone holds no notebooks: get the course's folder (git clone, or its archive) "
        "and run `connlab start` in it. `connlab demo` works without."
    )


def check_port(port: int) -> None:
    """Raise PortTaken when nothing can listen on ``port``, before anything slow is begun."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)  # as Jupyter does
        try:
            trial.bind((HOST, port))
        except OSError as problem:
            why = "another program listens there" if problem.errno == errno.EADDRINUSE else str(problem.strerror)
            raise PortTaken(port, why) from None


def run(root: Path, *, port: int | None, browser: bool) -> None:
    """Run JupyterLab until Ctrl-C or SIGTERM.

    ``port`` None: 8888, or the next free one. Raises PortTaken, JupyterFailed.
    """
    folders = _folders(root)
    _point_jupyter_at(folders)
    with _noise_to(folders.state / f"jupyter-{os.getpid()}.log") as (screen, log):
        _Session(folders, screen, log, port, browser).run()


class _Session:
    """One JupyterLab, from its start to its end."""

    def __init__(self, folders: Folders, screen: TextIO, log: Path, port: int | None, browser: bool) -> None:
        self._folders, self._log, self._port, self._browser = folders, log, port, browser
        self._progress = Progress(screen)
        self._token = secrets.token_urlsafe(24)
        self._stopping = False
        self._problem = ""

    def run(self) -> None:
        try:
            server = self._server()
            self._stop_on_signals(server)
            threading.Thread(target=self._announce, args=[server], daemon=True).start()
            server.start()
        except SystemExit:
            self._problem = "it gave up"
        except Exception as problem:
            self._problem = f"{type(problem).__name__}: {problem}"
        if self._problem:
            raise self._failure()
        self._progress.say("JupyterLab has stopped, and its kernels with it.")

    def _server(self) -> ServerApp:
        with self._progress.step("Starting JupyterLab"):
            from jupyterlab.labapp import LabApp  # type: ignore[import-untyped]

            # In memory: the token is in no process's arguments or environment.
            server: ServerApp = LabApp.initialize_server(argv=self._settings())
        server.browser_open_file = str(self._folders.state / f"open-{os.getpid()}.html")
        return server

    def _stop_on_signals(self, server: ServerApp) -> None:
        """Jupyter itself asks a question at Ctrl-C, or without a terminal drops everything where it is."""

        def stop(_number: int, _frame: object) -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # an impatient second one would leave things behind
            self._stopping = True
            self._progress.say("\nStopping JupyterLab and its kernels.")
            server.stop(from_signal=True)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

    def _settings(self) -> list[str]:
        given = {
            "ServerApp.ip": HOST,
            "ServerApp.port": self._port or DEFAULT_PORT,
            "ServerApp.port_retries": 0 if self._port else 50,
            "ServerApp.root_dir": self._folders.root,
            "ServerApp.open_browser": False,
            "ServerApp.allow_root": os.geteuid() == 0,
            "IdentityProvider.token": self._token,
            "LabApp.default_url": f"/lab/tree/{NOTEBOOK}",
            "LabApp.extension_manager": "readonly",  # the other one asks a package index
            "KernelSpecManager.allowed_kernelspecs": "python3",
            "LanguageServerManager.autodetect": False,  # looks by running npm, which writes to the home directory
            "ContentsManager.checkpoints_class": "connlab.checkpoints.Checkpoints",
            "Checkpoints.root_dir": self._folders.state / "checkpoints",
        }
        return [f"--{name}={value}" for name, value in given.items()]

    def _announce(self, server: ServerApp) -> None:
        """Wait until the notebook can be had, as the learner's browser will ask for it; then say where."""
        if not self._waited_for(server.port):
            if self._stopping:
                return
            self._problem = f"it did not answer within {ANSWERS_WITHIN:.0f} s"
            server.stop()
            return
        address = f"http://{HOST}:{server.port}/lab/tree/{NOTEBOOK}?token={self._token}"
        if server.port != (self._port or DEFAULT_PORT):
            self._progress.say(f"Port {DEFAULT_PORT} is taken: JupyterLab listens on {server.port}.")
        self._progress.say(_welcome(address, server.port, self._log))
        why_not = open_browser(address, Path(server.browser_open_file)) if self._browser else "--no-browser"
        if why_not:
            self._progress.say(f"No browser was opened ({why_not}): open the address yourself.")

    def _waited_for(self, port: int) -> bool:
        deadline = time.monotonic() + ANSWERS_WITHIN
        while time.monotonic() < deadline and not self._stopping:
            if _status(port, self._token) == http.HTTPStatus.OK:
                return True
            time.sleep(0.05)
        return False

    def _failure(self) -> ConnlabError:
        sys.stdout.flush()  # what Jupyter has printed is in the log only then
        lines = self._log.read_text(errors="replace").splitlines()
        tail = "\n".join(f"    {line}" for line in lines[-LOG_TAIL:])
        return JupyterFailed(f"JupyterLab did not start: {self._problem}\nLast lines of its log {self._log}:\n{tail}")


def _status(port: int, token: str) -> int:
    """The status of a request for the notebook; 0 when nobody answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)  # goes through no proxy
    try:
        path = f"/api/contents/{NOTEBOOK}?content=0"
        connection.request("GET", path, headers={"Authorization": f"token {token}"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def _welcome(address: str, port: int, log: Path) -> str:
    return f"""
JupyterLab runs. Its address, with the key to it (keep it to yourself):

    {address}

To stop it and all servers of the notebooks: Ctrl-C here.
Does it run on a remote machine? On your own computer, run
    ssh -N -L {port}:{HOST}:{port} {getpass.getuser()}@{socket.gethostname()}
and open the address there. JupyterLab's log: {log}
"""


def _folders(root: Path) -> Folders:
    state = places.state_dir() / "jupyter"
    try:
        state.mkdir(exist_ok=True)
        state.chmod(0o700)
    except OSError as problem:
        raise StateError(f"{state}: {problem.strerror}; set CONNLAB_STATE to a folder of yours") from None
    _tidy(state)
    runtime = janitor.owner().server_directory("jupyter")
    runtime.mkdir(mode=0o700)
    return Folders(root, state, runtime)


def _tidy(state: Path) -> None:
    """Remove the logs and pages of earlier runs; a log outlives its own run, for somebody to read."""
    for path in [*state.glob("jupyter-*.log"), *state.glob("open-*.html")]:
        if not psutil.pid_exists(int(path.stem.split("-")[1])):
            path.unlink(missing_ok=True)


def _point_jupyter_at(folders: Folders) -> None:
    """Through the environment, which kernels share: nothing goes to the home directory."""
    os.environ.update(
        JUPYTER_CONFIG_DIR=str(folders.state / "config"),
        JUPYTER_DATA_DIR=str(folders.state / "data"),
        JUPYTER_RUNTIME_DIR=str(folders.runtime),
        JUPYTERLAB_SETTINGS_DIR=str(folders.state / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(folders.state / "workspaces"),
        JUPYTER_PREFER_ENV_PATH="1",  # the kernel python3 is this environment's
        IPYTHONDIR=str(folders.state / "ipython"),
        JP_LSP_VIRTUAL_DIR=str(folders.runtime / "virtual_documents"),
    )
    config = folders.state / "config" / "labconfig" / "page_config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    # The plugin asks whether it may fetch news, and looks for updates.
    config.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))


@contextlib.contextmanager
def _noise_to(log: Path) -> Iterator[tuple[TextIO, Path]]:
    """Send what this process and its children print to ``log``; yields the screen as it was."""
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("wb") as file, os.fdopen(os.dup(1), "w", errors="replace") as screen:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield screen, log
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)
