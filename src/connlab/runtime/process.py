"""One program as a plain process of this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from connlab import janitor, reaper
from connlab.account import server_account
from connlab.errors import ConnlabError, StartError
from connlab.runtime import Address, ports
from connlab.runtime.spawn import spawn
from connlab.version import Version

LOG = "log"
STOP_WITHIN = 10.0
"""Seconds that the kernel gets to end a killed process."""
MAKE_ROOM = "a server needs about 60 MB; free some, run `connlab clean`, or set TMPDIR to another place"


class LocalProgram:
    """One program as a local process: see ``connlab.runtime.Program``.

    Whoever makes one stands under ``janitor.all_or_nothing``, which removes it when the making fails.
    """

    def __init__(
        self,
        kind: str,
        path: Path,
        version: Version,
        environment: Mapping[str, str],
        *,
        port: int | None = None,
        on_disk: bool = False,
        secret: str = "",
        listens: bool = True,
    ) -> None:
        self.kind, self.version, self.secret, self.account = kind, version, secret, server_account()
        self._path, self._environment = path, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []
        self._starter, self._command = os.getpid(), [str(path)]
        self._reaping = threading.Lock()
        self._port = ports.hold(port) if listens else None
        owner = janitor.owner()
        self._home = owner.server_directory(kind, on_disk=on_disk)
        owner.at_exit(self.remove)
        self._make_home()

    @property
    def directory(self) -> str:
        """See ``Program``."""
        return str(self._home)

    socket_directory = directory

    @property
    def listen(self) -> Address:
        """See ``Program``."""
        return Address(ports.HOST, self._port.number if self._port else 0)

    address = inner_address = listen

    def write(self, name: str, text: str) -> None:
        """See ``Program``. Replaced in one step: a reload never reads half a file."""
        path = self._home / name
        beside = path.with_name(f".{path.name}.new")
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(text)
            self._hand_over(beside)
            beside.replace(path)
        except OSError as problem:
            raise no_room(problem, self._home) from problem

    def start(self, arguments: Sequence[str]) -> None:
        """See ``Program``."""
        self._command = [str(self._path), *arguments]
        self._process = self._spawn(self._command)
        self._starter = os.getpid()

    def run(self, name: str, arguments: Sequence[str], *, seconds: float = 120) -> None:
        """Run the program ``name`` that lies beside this one to its end; raises StartError with its output."""
        mark, command = self.log_size(), [str(self._path.with_name(name)), *arguments]
        try:
            ended = f"exit code {self._spawn(command).wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"not done after {seconds:g} s"
        if ended != "exit code 0":
            log = self.log(mark)
            hint = MAKE_ROOM if os.strerror(errno.ENOSPC) in log else ""
            raise StartError(f"{name} failed ({ended})", command=shlex.join(command), log=log, hint=hint)

    def command(self) -> str:
        """See ``Program``."""
        return shlex.join(self._command)

    def alive(self) -> bool:
        """See ``Program``. In a forked child the process is no child of ours: we can only look."""
        if self._process is None:
            return False
        if self._starter == os.getpid():
            with self._reaping:
                return self._process.poll() is None
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._process.pid).status() != psutil.STATUS_ZOMBIE
        return False

    def ended(self) -> str:
        """See ``Program``."""
        if self._process is None or self.alive():
            return ""
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"

    def signal(self, number: int) -> None:
        """See ``Program``."""
        if self._process is not None and self.alive():
            reaper.send(self._process.pid, number)

    def kill(self) -> None:
        """See ``Program``."""
        self.signal(signal.SIGKILL)
        reaper.kill_processes(self._home, grace=0)
        self.alive()  # collects the exit code

    def freeze(self) -> None:
        """See ``Program``. The main process first: then it cannot fork any more, once that one is through."""
        self.signal(signal.SIGSTOP)
        stopped: set[int] = set()
        while more := set(reaper.processes_in(self._home)) - stopped:
            for pid in more:
                reaper.send(pid, signal.SIGSTOP)
            stopped |= more

    def thaw(self) -> None:
        """See ``Program``."""
        for pid in reaper.processes_in(self._home):
            reaper.send(pid, signal.SIGCONT)

    def log(self, since: int = 0) -> str:
        """See ``Program``."""
        with contextlib.suppress(FileNotFoundError), (self._home / LOG).open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")
        return ""

    def log_size(self) -> int:
        """See ``Program``."""
        path = self._home / LOG
        return path.stat().st_size if path.exists() else 0

    def settle(self) -> None:
        """See ``Program``. It is there at once."""

    def proc(self, name: str, pids: Iterable[int] | None = None) -> dict[int, str]:
        """See ``Program``."""
        if not reaper.LINUX:
            raise ConnlabError("this system has no /proc, from which a process's memory and CPU could be read")
        return reaper.proc(self._home, name, pids)

    def remove(self) -> None:
        """See ``Program``."""
        if self._home.exists():
            reaper.remove_tree(self._home)
        self._end_children()
        if self._port:
            self._port.release()
        janitor.owner().forget(self.remove)

    def _end_children(self) -> None:
        """Collect what has ended; end what lives on, as what a wrapper script runs, which we do not know by name."""
        if self._starter != os.getpid():
            return
        for process in self._started:
            with self._reaping:
                if process.poll() is None:
                    process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_WITHIN)

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        reaper.note_programs(self._home, {command[0], str(self._path)})
        try:
            return spawn(
                command,
                cwd=self._home,
                log=self._home / LOG,
                account=self.account,
                environment=self._environment,
                started=self._started,
            )
        except OSError as problem:
            raise StartError(f"{command[0]} cannot be run: {problem}", command=shlex.join(command)) from problem

    def _make_home(self) -> None:
        try:
            self._home.mkdir(mode=0o700)
            self._hand_over(self._home)
        except OSError as problem:
            raise no_room(problem, self._home) from problem

    def _hand_over(self, path: Path) -> None:
        if self.account:
            os.chown(path, self.account.pw_uid, self.account.pw_gid)


def wait_until(done: Callable[[], bool], seconds: float, *, pause: float = 0.005) -> bool:
    """Ask ``done`` until it says yes or ``seconds`` are over; returns its last word."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def no_room(problem: OSError, directory: Path | str) -> StartError:
    """The error for a file that cannot be written, with the room that is left there."""
    place = Path(directory).parent
    free = shutil.disk_usage(place).free >> 20 if place.exists() else 0
    return StartError(
        f"cannot write to {directory}: {problem.strerror or problem} ({free} MB free there)",
        hint=MAKE_ROOM,
    )
