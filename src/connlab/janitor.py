"""Nothing survives: owner directories, the watchdog, the sweep of what dead processes left.

Each process that starts servers is an *owner*. Its directories (one for each place that servers run in) are
locked while it lives; one watchdog waits for its end and removes them, and the containers that carry their names.
What even a watchdog could not remove, since the machine died, the engine had stopped or somebody killed it too, the
next start sweeps.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from connlab import places, reaper

HOST_LABEL = "connlab.host"
_MUTEX = threading.RLock()
Wanted = ParamSpec("Wanted")
Made = TypeVar("Made")


class Owner:
    """This process as the owner of servers; ``owner()`` gives the one there is."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.id = f"{self.pid}-{secrets.token_hex(4)}"
        self._locks: dict[Path, int] = {}
        self._numbers = itertools.count(1)
        self._stops: dict[Callable[[], None], tuple[int, int]] = {}
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._engines: dict[str, Path] = {}

    def server_directory(self, kind: str, *, on_disk: bool = False) -> Path:
        """A new name for a server's directory; the directory itself is the caller's to make."""
        with _MUTEX:
            self._begin()
            return self._directory(places.run_root(on_disk=on_disk)) / f"{kind}-{next(self._numbers)}"

    def container(self, kind: str, engine: str) -> tuple[str, dict[str, str]]:
        """A name for a container or network on the engine at that address, and the labels by which it is found.

        They must be on it from the moment it is made.
        """
        with _MUTEX:
            self._begin()
            if engine not in self._engines:
                self._note_engine(self._directory(places.run_root()), engine)
            labels = {reaper.OWNER_LABEL: str(self._engines[engine]), HOST_LABEL: host_label()}
            return f"connlab-{kind}-{self.id}-{next(self._numbers)}", labels

    def at_exit(self, stop: Callable[[], None]) -> None:
        """Have ``stop`` called when the process ends in order, and by ``undo``."""
        self._stops[stop] = next(self._numbers), threading.get_ident()

    def forget(self, stop: Callable[[], None]) -> None:
        """Take ``at_exit`` back. Twice is no error."""
        self._stops.pop(stop, None)

    def mark(self) -> int:
        """A moment, for ``undo``."""
        return next(self._numbers)

    def undo(self, mark: int) -> None:
        """Stop what this thread has made since ``mark``, newest first, each whatever the others raise."""
        with contextlib.ExitStack() as stops:
            for stop, (number, thread) in list(self._stops.items()):
                if number > mark and thread == threading.get_ident():
                    stops.callback(stop)

    def end(self) -> None:
        """Stop all that is still running, newest first, and remove the directories."""
        if os.getpid() != self.pid:
            return  # a forked child: the servers are its parent's
        for stop in reversed(list(self._stops)):
            with contextlib.suppress(Exception):
                stop()
        for root in self._locks:
            reaper.reap(root / self.id)

    def _begin(self) -> None:
        """Before the first server: the watchdog, and an end to what others have left."""
        if self._watchdog is None:
            self._watch()
            sweep()

    def _note_engine(self, directory: Path, engine: str) -> None:
        """Before the first container: whoever reaps this owner must know where to look."""
        with (directory / reaper.ENGINES).open("a") as file:
            file.write(f"{engine}\n")
        self._engines[engine] = directory
        sweep_engine(engine)

    def _directory(self, root: Path) -> Path:
        directory = root / self.id
        if root not in self._locks:
            with reaper.root_lock(places.private_dir(root)):
                places.private_dir(root)  # again: it may have been removed and made anew meanwhile
                lock = reaper.lock_file(places.private_dir(directory) / reaper.LOCK, wait=True)
                assert lock is not None
                self._locks[root] = lock
        return directory

    def _watch(self) -> None:
        """Start the watchdog, and a thread that starts another one should this one be killed."""
        self._watchdog = self._start_watchdog()
        threading.Thread(target=self._keep_watchdog, name="connlab-watchdog", daemon=True).start()

    def _keep_watchdog(self) -> None:
        for _ in range(20):
            assert self._watchdog is not None
            began = time.monotonic()
            self._watchdog.wait()
            if os.getpid() != self.pid or sys.is_finalizing():
                return
            time.sleep(0.5 if time.monotonic() - began < 1 else 0)
            self._watchdog = self._start_watchdog()

    def _start_watchdog(self) -> subprocess.Popen[bytes]:
        owners = [str(root / self.id) for root in places.run_roots()]
        return subprocess.Popen(
            [sys.executable, "-I", reaper.__file__, str(self.pid), *owners],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )


_owner: Owner | None = None


def owner() -> Owner:
    """The owner that this process is; a forked child becomes one of its own."""
    global _owner
    with _MUTEX:
        if _owner is None or _owner.pid != os.getpid():
            _owner = Owner()
            atexit.register(_owner.end)
        return _owner


def all_or_nothing(start: Callable[Wanted, Made]) -> Callable[Wanted, Made]:
    """Have ``start`` remove what it has made when it raises, and when an interrupt keeps it from returning it.

    A ``try`` inside it is not enough: an interrupt comes between two steps, also between the last and the ``return``.
    """

    @functools.wraps(start)
    def whole(*args: Wanted.args, **kwargs: Wanted.kwargs) -> Made:
        mine = owner()
        mark = mine.mark()
        try:
            return start(*args, **kwargs)
        except BaseException:
            mine.undo(mark)
            raise

    return whole


def sweep() -> list[Path]:
    """Remove what dead owners of this user have left; returns their directories."""
    with _MUTEX:
        return [directory for root in places.run_roots() if root.is_dir() for directory in _sweep_root(root)]


def sweep_engine(engine: str) -> list[str]:
    """Remove containers and networks of this user whose owner's directory is gone, as after the machine went down.

    Returns the directories. Empty when the engine at that address does not answer.
    """
    with contextlib.suppress(OSError, ValueError):
        found = reaper.labelled(engine, f"{HOST_LABEL}={host_label()}").values()
        gone = sorted({owner for labels in found if not os.path.exists(owner := labels[reaper.OWNER_LABEL])})
        return [owner for owner in gone if reaper.remove_labelled(engine, f"{reaper.OWNER_LABEL}={owner}")]
    return []


def host_label() -> str:
    """Whose containers these are: an engine may serve several machines, as containers that share its socket are."""
    return f"{socket.gethostname()}/{os.geteuid()}"


def dead() -> list[Path]:
    """The directories of owners that are gone, of this user."""
    with _MUTEX:
        return [directory for root in places.run_roots() if root.is_dir() for directory in _dead_in(root)]


def _sweep_root(root: Path) -> list[Path]:
    return [directory for directory in _dead_in(root) if reaper.reap(directory)]


def _dead_in(root: Path) -> list[Path]:
    places.private_dir(root)
    mine = _owner.id if _owner is not None and _owner.pid == os.getpid() else ""
    with reaper.root_lock(root):  # no owner is between making and locking its directory now
        return [path for path in root.iterdir() if path.is_dir() and path.name != mine and _is_dead(path)]


def _is_dead(directory: Path) -> bool:
    lock = reaper.lock_file(directory / reaper.LOCK, wait=False)
    if lock is None:
        return False
    os.close(lock)
    return True


def _forget_mutex() -> None:
    """In a forked child: another thread of the parent may have held it at that moment."""
    global _MUTEX
    _MUTEX = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_mutex)
