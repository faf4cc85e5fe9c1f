"""Removes what a dead process has left: its servers, their shared memory, their directories.

Run as a program this file is the watchdog: it waits for the end of the process that started servers
(its *owner*) and then reaps. It uses the standard library alone and imports nothing of connlab, so that
it starts in a few milliseconds and works while the environment around it is being changed.

An *owner directory* holds a file ``lock``, locked for as long as the owner lives (a POSIX lock: the kernel
frees it with the process, and forked children do not inherit it), and a directory for each server. A process
belongs to a server when its working directory lies inside and its program is one that was started there (the
file ``programs`` lists them; somebody's shell that looks around is none). PostgreSQL's backends make
sessions of their own, so that neither process groups nor parents find them once their postmaster is gone.

An owner of containers has a file ``engines`` besides, with the address of each engine they run on; they and their
networks carry the owner's directory as a label.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LOCK = "lock"
PROGRAMS = "programs"
ENGINES = "engines"
OWNER_LABEL = "connlab.owner"
GRACE = 2.0
"""Seconds that programs get to end by themselves (PostgreSQL then removes its shared memory)."""
DEADLINE = 20.0
IN_FLIGHT = 2.0
"""Seconds in which an engine may still make what it was asked for by somebody who is gone or was interrupted."""
STUCK = 3.0
"""Seconds after which an engine that removes nothing any more is left alone until the next time."""
IPC_RMID = 0
CAP_SYS_PTRACE = 19
LINUX = sys.platform == "linux"


def processes_in(directory: Path) -> list[int]:
    """The pids of the programs that were started in ``directory``, and of their children."""
    inside, programs = f"{directory}/", set(_lines(directory / PROGRAMS))
    with _eyes_of_its_owner(directory):
        return [pid for pid, cwd, program in _processes() if f"{cwd}/".startswith(inside) and program in programs]


def proc(directory: Path, name: str, pids: Iterable[int] | None = None) -> dict[int, str]:
    """The text of /proc/<pid>/``name`` for each program in ``directory``, or for ``pids``; see ``processes_in``."""
    found: dict[int, str] = {}
    wanted = processes_in(directory) if pids is None else pids
    with _eyes_of_its_owner(directory):
        for pid in wanted:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    return found


def note_programs(directory: Path, programs: Iterable[str]) -> None:
    """Write down that ``programs`` are about to be started in ``directory``, or to be started by each other."""
    with (directory / PROGRAMS).open("a") as file:
        file.writelines(f"{os.path.realpath(program)}\n" for program in programs)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def _eyes_of_its_owner(directory: Path) -> Iterator[None]:
    """Let this thread, and no other, look at processes as the user whom ``directory`` belongs to.

    Root as it is in a container lacks CAP_SYS_PTRACE, without which it does not see where another user's processes
    work (proc(5), proc_pid_cwd); they see it of each other, and the kernel asks for setfsuid(2)'s user.
    """
    if not LINUX or os.geteuid() != 0 or _may_see_all() or not directory.exists():
        yield
        return
    owner, libc = directory.stat(), ctypes.CDLL(None)
    try:
        libc.setfsgid(owner.st_gid)
        libc.setfsuid(owner.st_uid)
        yield
    finally:
        libc.setfsuid(os.geteuid())
        libc.setfsgid(os.getegid())


def _may_see_all() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    return any(line.startswith("CapEff:") and int(line.split()[1], 16) >> CAP_SYS_PTRACE & 1 for line in lines)


def kill_processes(directory: Path, *, grace: float = GRACE) -> list[int]:
    """End every process in ``directory``: SIGQUIT (and SIGCONT, for frozen ones), then SIGKILL.

    Returns the pids that were seen. Looks again until none is left, for a dying server may still fork.
    """
    seen: set[int] = set()
    started = time.monotonic()
    quiet = 0
    while quiet < 2 and time.monotonic() - started < DEADLINE:
        found = set(processes_in(directory))
        hard = time.monotonic() - started >= grace
        for pid in found if hard else found - seen:
            send(pid, signal.SIGKILL if hard else signal.SIGQUIT)
            send(pid, signal.SIGCONT)
        seen |= found
        quiet = 0 if found else quiet + 1
        time.sleep(0.01)
    return sorted(seen)


def send(pid: int, number: int) -> None:
    """Send a signal; a process that is gone already is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def remove_tree(directory: Path) -> None:
    """Remove one server's directory, its processes and its System V shared memory."""
    pids = kill_processes(directory)
    with contextlib.suppress(FileNotFoundError):  # another thread has removed it meanwhile
        remove_shared_memory(directory, pids)
    _remove_directory(directory)


def _remove_directory(directory: Path) -> None:
    """Again until it is gone: a copy that was interrupted may still write a file or two."""
    deadline = time.monotonic() + GRACE
    shutil.rmtree(directory, ignore_errors=True)
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
        shutil.rmtree(directory, ignore_errors=True)


def remove_shared_memory(directory: Path, creators: Iterable[int]) -> None:
    """Remove the segments that the PostgreSQL in ``directory`` left when it was killed.

    PostgreSQL keeps one small System V segment as a lock on its data directory, and writes its id into
    ``postmaster.pid`` (https://www.postgresql.org/docs/current/storage-file-layout.html). Killed between the two,
    it leaves a segment that only its creator's pid tells. A segment in use is never touched.
    """
    pids = set(creators)
    known: set[int] = set()
    for file in directory.glob("**/postmaster.pid"):
        lines = file.read_text(errors="replace").split("\n")
        pids.update(abs(int(word)) for word in lines[:1] if word.strip("- ").isdigit())  # negative: initdb's
        known.update(int(line.split()[1]) for line in lines[6:7] if len(line.split()) == 2)
    owner = directory.stat()
    for segment in _unused_segments(owner.st_uid, pids, known):
        if ctypes.CDLL(None).shmctl(segment, IPC_RMID, None) and os.geteuid() == 0:
            _remove_segment_as(owner, segment)


def _remove_segment_as(owner: os.stat_result, segment: int) -> None:
    """Root in a container (without CAP_SYS_ADMIN) may not remove another user's segment; that user may."""
    import subprocess  # only here: it would slow the watchdog's start

    with contextlib.suppress(OSError):
        subprocess.run(
            ["ipcrm", "-m", str(segment)],
            user=owner.st_uid,
            group=owner.st_gid,
            extra_groups=[],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _unused_segments(uid: int, creators: set[int], known: set[int]) -> list[int]:
    table = Path("/proc/sysvipc/shm")
    if not table.exists():
        return sorted(known)
    rows = [line.split() for line in table.read_text().splitlines()]
    names, found = rows[0], [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]
    assert {"shmid", "cpid", "nattch", "uid"} <= set(names)
    return [
        int(row["shmid"])
        for row in found
        if row["nattch"] == "0"
        and int(row["uid"]) == uid
        and (int(row["cpid"]) in creators or int(row["shmid"]) in known)
    ]


def reap(owner: Path, *, settle: float = 0) -> bool:
    """Remove a dead owner's directory and all that runs in it; ``settle`` as for ``remove_labelled``.

    False when its owner lives, or when an engine that may have containers of it does not answer.
    """
    lock = lock_file(owner / LOCK, wait=False)
    if lock is None:
        return False
    try:
        for server in sorted(path for path in owner.iterdir() if path.is_dir()):
            remove_tree(server)
        label = f"{OWNER_LABEL}={owner}"
        if not all([remove_labelled(engine, label, settle=settle) for engine in _lines(owner / ENGINES)]):
            return False
        shutil.rmtree(owner, ignore_errors=True)
    except FileNotFoundError:
        pass  # somebody else has reaped it meanwhile
    finally:
        os.close(lock)
    with root_lock(owner.parent):
        pass
    return True


def remove_labelled(engine: str, label: str, *, settle: float = 0) -> bool:
    """Remove the containers and networks with ``label``; False when the engine does not answer or something stays.

    Looks for ``settle`` seconds at least: the engine may still be making what a process had asked for that was killed
    just now. Gives up what cannot be removed, as a network that somebody else's container uses.
    """
    began = changed = time.monotonic()
    before = -1
    try:
        while (found := labelled(engine, label)) or time.monotonic() - began < settle:
            if len(found) != before:
                before, changed = len(found), time.monotonic()
            if found and time.monotonic() - changed > STUCK:
                return False
            _delete(engine, found)
            time.sleep(0.1)
    except (OSError, ValueError):
        return False
    return True


def labelled(engine: str, label: str) -> dict[str, dict[str, str]]:
    """The labels of each container, then of each network, that has ``label``, by its path in the engine's API.

    https://docs.docker.com/reference/api/engine/ Raises OSError when the engine does not answer.
    """
    import json
    from urllib.parse import quote

    wanted = quote(json.dumps({"label": [label]}))
    containers = json.loads(_ask(engine, "GET", f"/containers/json?all=true&filters={wanted}"))
    networks = json.loads(_ask(engine, "GET", f"/networks?filters={wanted}"))
    found: list[tuple[str, Any]] = [(f"/containers/{item['Id']}?force=true&v=true", item) for item in containers]
    found += [(f"/networks/{item['Id']}", item) for item in networks]
    return {path: dict(item["Labels"] or {}) for path, item in found}


def _delete(engine: str, paths: Iterable[str]) -> None:
    """Several at once, for each takes a moment; what refuses, as a network that is still in use, is asked again."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda path: _ask(engine, "DELETE", path), paths))


def _ask(engine: str, method: str, path: str) -> bytes:
    import http.client
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(engine)
    connection = http.client.HTTPConnection(parts.hostname or "docker", parts.port or 2375, timeout=DEADLINE)
    try:
        if parts.path.strip("/"):  # a Unix socket: http.client takes one that is connected
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(DEADLINE)
            connection.sock.connect(parts.path)
        connection.request(method, path)
        answer = connection.getresponse()
        if method == "GET" and answer.status != 200:
            raise OSError(f"the engine at {engine} says {answer.status} {answer.reason}")
        return answer.read()
    except http.client.HTTPException as problem:
        raise OSError(f"the engine at {engine} broke off: {problem!r}") from problem
    finally:
        connection.close()


@contextlib.contextmanager
def root_lock(root: Path) -> Iterator[None]:
    """Hold the lock under which owner directories are made and judged; remove ``root`` after it when empty.

    A ``root`` that is not there, or goes while we wait for it, is made (again).
    """
    path = root / ".lock"
    descriptor = None
    while descriptor is None or not _is_still(descriptor, path):
        if descriptor is not None:
            os.close(descriptor)
        root.mkdir(mode=0o700, exist_ok=True)
        descriptor = lock_file(path, wait=True)
    try:
        yield
    finally:
        if os.listdir(root) == [path.name]:
            path.unlink()
            root.rmdir()
        os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def lock_file(path: Path, *, wait: bool) -> int | None:
    """Lock ``path`` and return its descriptor; None when its directory is gone or another process holds it.

    Beware: closing *any* descriptor of that file frees this process's lock.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    except BaseException:  # interrupted; a lock that nobody knows of would stay until our end
        os.close(descriptor)
        raise
    return descriptor


def wait_for_end(pid: int) -> None:
    """Return when ``pid``, our parent, has ended, reaped by its own parent or not."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.pidfd_open(pid)
        if os.getppid() == pid:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
        return
    while os.getppid() == pid:
        time.sleep(0.2)


def watch(owner_pid: int, owners: list[Path]) -> None:
    """Wait for the owner's end, then reap its directories (one for each place that servers run in)."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    wait_for_end(owner_pid)
    for owner in owners:
        if owner.is_dir():
            _reap_soon(owner)
        elif owner.parent.is_dir():
            with root_lock(owner.parent):  # which removes it, had the owner just made it
                pass


def _reap_soon(owner: Path) -> None:
    """The kernel frees the lock a moment after it has reported the end."""
    deadline = time.monotonic() + 5
    while owner.is_dir() and not reap(owner, settle=IN_FLIGHT) and time.monotonic() < deadline:
        time.sleep(0.01)


def _processes() -> Iterator[tuple[int, str, str]]:
    """Pid, working directory and program of each process that we may look at."""
    if not os.path.exists("/proc/self/cwd"):
        yield from _processes_without_proc()
        return
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry), _link(f"/proc/{entry}/cwd"), _link(f"/proc/{entry}/exe")


def _link(path: str) -> str:
    return os.readlink(path).removesuffix(" (deleted)")


def _processes_without_proc() -> Iterator[tuple[int, str, str]]:
    import psutil  # only here: it would double the watchdog's start

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            yield process.pid, process.cwd(), process.exe()


if __name__ == "__main__":
    watch(int(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
