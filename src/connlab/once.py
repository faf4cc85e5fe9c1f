"""Make a folder in the cache once, however many processes and threads want it at the same time.

A folder with its final name is complete: it is built beside itself and renamed. The lock is one that the
kernel frees, so a killed process holds up nobody; what it left half done is removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from connlab.errors import StateError

Found = TypeVar("Found")

_THREADS = threading.Lock()  # file locks exclude processes, not the threads of one


def made_once(folder: Path, build: Callable[[Path], object], usable: Callable[[Path], Found | None]) -> Found:
    """What ``usable(folder)`` finds; when that is None, after ``build`` has made the folder.

    ``build`` gets an empty folder to fill, readable for all; what it raises passes through and leaves
    nothing. Raises StateError when the cache cannot be written. Example::

        made_once(cache_dir() / "x", lambda new: (new / "y").write_text("1"), lambda made: made / "y")
    """
    found = usable(folder)
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _THREADS, _lock(folder.with_name(f"{folder.name}.lock")):
            found = usable(folder)  # another process may have made it while we waited
            if found is None:
                _replace(folder, build)
                found = usable(folder)
    except OSError as problem:
        raise StateError(f"cannot make {folder}: {problem}; make room or make it writable{_elsewhere()}") from problem
    if found is None:
        raise StateError(f"{folder} was made and cannot be used all the same; remove it and try again")
    return found


def _elsewhere() -> str:
    """The other way out, which root does not have: its cache is the machine's."""
    return "" if os.geteuid() == 0 else ", or set XDG_CACHE_HOME to a place that is"


def _replace(folder: Path, build: Callable[[Path], object]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: we hold the lock
    try:
        partial.mkdir(parents=True)
        partial.chmod(0o755)  # whatever the umask: servers may run as another user
        build(partial)
        if folder.exists():
            shutil.rmtree(folder)  # there, and not usable
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
