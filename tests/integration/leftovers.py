"""Processes that start servers and come to an end, and the search for what is left of them.

The process under test (a ``Child``) tells what it has, in lines of JSON (``tell``); a ``Trace`` collects that, and
``left`` looks for it from outside, with nothing of the library's own way to find its processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pwd
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil
import psycopg

import connlab
from connlab import account, places, programs

LINUX = sys.platform == "linux"
PATIENCE = 60.0
"""Seconds until a child that says nothing is given up, on a busy machine."""
DROPPED = "Exception ignored in"
GONE_WITHIN = 10.0
SEGMENTS = Path("/proc/sysvipc/shm")
PR_CAPBSET_DROP = 24
PRELUDE = """
import contextlib, multiprocessing, os, random, signal, sys, threading, time
import psutil, psycopg
from connlab import Postgres, StartError, janitor
from leftovers import busy, having, interrupt_at, listen, strangers, tell, until
"""


# --- in the child -------------------------------------------------------------------------------------------------


def tell(*nodes: connlab.Postgres | connlab.PgBouncer, **more: Any) -> None:
    """Print what this process has: its servers' processes, its helpers, the ports of ``nodes``."""
    roots = [str(root) for root in places.run_roots()]
    servers = _inside(roots, os.getpid())
    helpers = {child.pid: child.create_time() for child in psutil.Process().children() if child.pid not in servers}
    ports = [node.address.port for node in nodes]
    fact = {"owner": os.getpid(), "roots": roots, "servers": servers, "helpers": helpers, "ports": ports, **more}
    sys.stdout.write(f"\n{json.dumps(fact)}\n")  # in one piece, whenever the process is killed: print may make two
    sys.stdout.flush()


def strangers() -> list[str]:
    """Children of this process, dead ones too, that are no watchdogs."""
    return [name for child in psutil.Process().children() if "reaper.py" not in (name := _command(child))]


def _command(process: psutil.Process) -> str:
    try:
        return f"{process.status()}: {' '.join(process.cmdline())}"
    except psutil.Error as problem:
        return str(problem)


def having() -> tuple[int, int, int]:
    """How many processes, servers' directories and threads this process has."""
    homes = [home for root in places.run_roots() for home in root.glob(f"{os.getpid()}-*/*-*")]
    return len(strangers()), len(homes), threading.active_count()


class interrupt_at:
    """Raise KeyboardInterrupt at the given step of connlab's own code, counting those that hold a server in hand.

    A step is where Python looks for signals: at a function's first line, and after a call into C, as a constructor is.
    """

    HOLDERS = (
        *("node", "pgbouncer", "postgres", "relay", "lesson/started"),
        *("runtime/local", "runtime/process", "runtime/thread"),
    )

    def __init__(self, step: int, modules: Sequence[str] = HOLDERS) -> None:
        self._step, self.steps, self.where = step, 0, ""
        root = Path(connlab.__file__).parent
        self._files = {str(root / f"{name}.py") for name in modules}

    def __enter__(self) -> Self:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if code.co_filename not in self._files:
            return
        self.steps += event in ("call", "c_return") or (event == "return" and code.co_name == "__init__")
        if self.steps < self._step:
            return
        sys.setprofile(None)
        self.where = f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname} ({event})"
        raise KeyboardInterrupt


def listen() -> str:
    """Wait for a word of the parent's; empty when it is gone."""
    return sys.stdin.readline().strip()


def busy(pg: connlab.Postgres) -> None:
    """Have a backend compute for longer than any test lasts; returns once it does."""
    threading.Thread(target=_compute, args=[pg.dsn], daemon=True).start()
    query = "select count(*) from pg_stat_activity where state = 'active' and query like '%generate_series%' "
    until(lambda: pg.value(f"{query} and pid <> pg_backend_pid()") == 1, PATIENCE)


def _compute(dsn: str) -> None:
    with contextlib.suppress(psycopg.Error):
        psycopg.connect(dsn).execute("select count(*) from generate_series(1, 1000000000)")


# --- looking from outside -----------------------------------------------------------------------------------------


@dataclass
class Trace:
    """All that is known of one process that starts servers."""

    owner: int = 0
    roots: set[str] = field(default_factory=set)
    servers: dict[int, float] = field(default_factory=dict)
    """Pid and start time of each process of its servers."""
    helpers: dict[int, float] = field(default_factory=dict)
    """The same of its other children: the watchdog."""
    ports: set[int] = field(default_factory=set)
    besides: set[int] = field(default_factory=set)
    """Pids that have nothing to do with it, though their working directory says so."""
    shared: set[Path] = field(default_factory=lambda: set(_shared_files()))
    """The shared memory files that others had before."""

    def learn(self, told: Mapping[str, Any]) -> None:
        self.owner = told["owner"]
        self.roots |= set(told["roots"])
        self.ports |= set(told["ports"])
        self.servers |= {int(pid): started for pid, started in told["servers"].items()}
        self.look()  # root in a container may not see its servers, and takes them for helpers
        helpers = {int(pid): started for pid, started in told["helpers"].items()}
        self.helpers |= {pid: started for pid, started in helpers.items() if pid not in self.servers}

    def look(self) -> None:
        """Note the servers that run at this moment and nobody has told of."""
        self.servers |= _inside(self.roots, self.owner)

    def directories(self) -> list[Path]:
        found: list[Path] = []
        for root in self.roots:
            with contextlib.suppress(FileNotFoundError):  # the last one to go takes the root with it, at any moment
                found += Path(root).glob(f"{self.owner}-*")
        return found


def left(trace: Trace, *, owner_lives: bool = False) -> list[str]:
    """What is left of it, one line for each thing. Of a living owner only servers are looked for."""
    assert trace.owner and trace.roots, "the child has told nothing, so nothing could be found"
    trace.look()
    mine = {**trace.servers, **({} if owner_lives else trace.helpers)}
    directories = trace.directories()
    if owner_lives:
        directories = [inner for found in directories for inner in found.iterdir() if inner.is_dir()]
    return [
        *(f"process {pid}" for pid in mine if _runs(pid, mine[pid]) and pid not in trace.besides),
        *(f"directory {found}" for found in directories),
        *(f"port {port}" for port in trace.ports if _taken(port)),
        *(f"shared memory segment {found}" for found in _segments_of(trace.servers)),
        *(f"shared memory file {found}" for found in _shared_files() if found not in trace.shared and _unused(found)),
    ]


def assert_nothing_left(trace: Trace, *, owner_lives: bool = False, seconds: float = GONE_WITHIN) -> None:
    until(lambda: not left(trace, owner_lives=owner_lives), seconds)
    assert left(trace, owner_lives=owner_lives) == []


def assert_no_process_left(trace: Trace) -> None:
    until(lambda: not any(line.startswith("process") for line in left(trace)), GONE_WITHIN)
    assert [line for line in left(trace) if line.startswith("process")] == []


def until(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.03)
    return True


def _inside(roots: list[str] | set[str], owner: int) -> dict[int, float]:
    """The processes that work in a directory of ``owner``'s, removed already or not."""
    starts = tuple(f"{root}/{owner}-" for root in roots)
    found = {}
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if _works_in(pid).startswith(starts):
                found[pid] = psutil.Process(pid).create_time()
    return found


def _works_in(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/cwd") if LINUX else psutil.Process(pid).cwd()  # psutil is ten times slower


def _runs(pid: int, started: float) -> bool:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    return False


def _taken(port: int) -> bool:
    """Whether somebody listens there, or holds it without listening. A closed connection's TIME_WAIT is nobody."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as problem:
            assert problem.errno == errno.EADDRINUSE
            return not _lingers(port)
    return False


def _lingers(port: int) -> bool:
    """Whether all that is known of the port are connections that have ended."""
    states = {row.status for row in psutil.net_connections("tcp") if row.laddr and row.laddr.port == port}
    return states == {psutil.CONN_TIME_WAIT}


def _segments_of(pids: Mapping[int, float]) -> list[str]:
    if not SEGMENTS.exists():
        return []
    lines = [line.split() for line in SEGMENTS.read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]
    made = [(row["shmid"], int(row["cpid"]), int(row["ctime"])) for row in rows]
    return [shmid for shmid, pid, changed in made if pid in pids and changed > pids[pid] - 2]  # else an earlier pid's


def _shared_files() -> list[Path]:
    return list(places.MEMORY.glob("PostgreSQL.*"))


def _unused(file: Path) -> bool:
    """Whether no process has it: then it is left over, and no other server's that runs just now."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(file) in maps.read_text():
                return False
    return file.exists()


# --- who runs a child, and the child ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """Who runs a child: with which Python, as which user and groups, with which environment and rights."""

    python: str = sys.executable
    user: pwd.struct_passwd | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None
    groups: Sequence[int] = ()

    def popen(self, arguments: list[str], **more: Any) -> subprocess.Popen[str]:
        user = self.user
        return subprocess.Popen(
            [self.python, *arguments],
            user=user.pw_uid if user else None,
            group=user.pw_gid if user else None,
            extra_groups=self.groups if user else None,
            env={**os.environ, "PYTHONPATH": python_path(), **self.environment},
            preexec_fn=self.prepare,
            cwd="/",
            text=True,
            **more,
        )


class Child:
    """A Python process that runs ``parts`` one after another, killed at the end of the ``with`` block if it lives."""

    def __init__(self, person: Person, *parts: str) -> None:
        self.trace = Trace()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the child
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        script = "\n".join(textwrap.dedent(part).strip() for part in (PRELUDE, *parts))
        self.process = person.popen(["-c", script], **pipes)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def told(self, seconds: float = PATIENCE) -> dict[str, Any]:
        """What it tells next."""
        with contextlib.suppress(queue.Empty):
            if line := self._lines.get(timeout=seconds):
                told: dict[str, Any] = json.loads(line)
                self.trace.learn(told)
                return told
        raise AssertionError(f"the child told nothing; its errors:\n{self.errors()}")

    def say(self, word: str = "go on") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def interrupt(self) -> dict[str, Any]:
        """Send SIGINT; what it tells then.

        Python drops an interrupt that falls into a destructor or a weak reference's callback, and says so: there
        the one who pressed stop presses again.
        """
        self.send(signal.SIGINT)
        deadline, dropped = time.monotonic() + PATIENCE, self.errors().count(DROPPED)
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(AssertionError):
                return self.told(seconds=2)
            if self.errors().count(DROPPED) > dropped:
                dropped += 1
                self.send(signal.SIGINT)
        return self.told(seconds=0.1)

    def ended(self) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        return self.process.wait(PATIENCE)

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def kill(self) -> None:
        """kill -9."""
        self.send(signal.SIGKILL)
        self.ended()
        with contextlib.suppress(AssertionError):
            while True:  # what it told before
                self.told(seconds=0.2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        for file in (self.process.stdin, self.process.stdout, self._errors):
            with contextlib.suppress(OSError):
                file.close()  # type: ignore[union-attr]

    def _read(self) -> None:
        """Its lines, the ones of JSON; an empty one at the end."""
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self.process.stdout:
                if line.startswith("{") and line.endswith("}\n"):
                    self._lines.put(line)
        self._lines.put("")


@contextlib.contextmanager
def ordinary_person() -> Iterator[Person | None]:
    """An ordinary user with a home and an empty cache of its own; None when root finds nobody who can run Python.

    An ordinary user is that itself. Root takes another user than the one that its own servers run as.
    """
    home = Path(tempfile.mkdtemp(prefix="connlab-test-"))
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    try:
        _seed_pgbouncer(home / "cache" / "connlab")
        if os.geteuid() != 0:
            yield Person(environment=environment)
        else:
            yield _somebody(home, environment)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _somebody(home: Path, environment: Mapping[str, str]) -> Person | None:
    servers = account.server_account()
    users = [user for user in pwd.getpwall() if user.pw_name in account.CANDIDATES]
    for user in sorted(users, key=lambda user: user == servers):
        for path in [home, *home.glob("**/*")]:
            os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
        for python in _pythons():
            person = Person(python, user, environment)
            with contextlib.suppress(OSError):
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                if person.popen(["-c", PRELUDE], **quiet).wait(PATIENCE) == 0:
                    return person
    return None


def _pythons() -> list[str]:
    """Interpreters of our version; not every user may reach the one that runs this."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = [*os.get_exec_path(), "/usr/bin", "/usr/local/bin"]
    found = [shutil.which(name, path=folder) for folder in folders]
    return list(dict.fromkeys([sys.executable, *filter(None, found)]))


def python_path() -> str:
    """Where connlab, its dependencies and this file are, for any Python of our version."""
    packages = {str(Path(module.__file__ or "").parents[1]): None for module in (connlab, psycopg, psutil)}
    return os.pathsep.join([str(Path(__file__).parent), *packages])


def _seed_pgbouncer(cache: Path) -> None:
    """A PgBouncer that was unpacked into our cache need not be fetched again."""
    path = programs.find_pgbouncer().path
    ours = places.cache_dir()
    cache.mkdir(parents=True)
    if path.is_relative_to(ours):
        top = path.relative_to(ours).parts[:2]
        shutil.copytree(ours.joinpath(*top), cache.joinpath(*top), symlinks=True)


KEPT_IN_CONTAINERS = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}
"""Docker's default capabilities (linux/capability.h): neither CAP_SYS_PTRACE nor CAP_SYS_ADMIN."""


def contained_root() -> Person:
    """Root as containers have it: it may neither look at other users' processes nor remove their shared memory."""
    return Person(prepare=_drop_capabilities)


def _drop_capabilities() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in set(range(last + 1)) - KEPT_IN_CONTAINERS:
        if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, number, 0, 0, 0):
            raise OSError("a capability could not be dropped")
