"""Where connlab keeps things.

``cache_dir``
    survives: initialised data directories, unpacked programs. Safe to delete at any time.
``state_dir``
    survives: verdicts of the last runs. ``.connlab/`` in the project, or ``CONNLAB_STATE``.
``run_roots``
    does not survive: data directories, configuration and logs of running servers.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

import platformdirs

from connlab.errors import StateError

MEMORY = Path("/dev/shm")
ENOUGH_MEMORY = 1 << 30
"""Bytes that must be free in memory before data directories go there."""


def cache_dir() -> Path:
    """The cache: a user's own, or the machine's when root runs (servers drop root and must read it)."""
    root = os.geteuid() == 0
    base = platformdirs.site_cache_path("connlab") if root else platformdirs.user_cache_path("connlab")
    return _make(base, 0o755)


def state_dir() -> Path:
    """The state directory; made when missing."""
    chosen = os.environ.get("CONNLAB_STATE")
    return _make(Path(chosen).expanduser().absolute() if chosen else project_dir() / ".connlab", 0o755)


def project_dir() -> Path:
    """The course's folder when connlab runs from it, else the current directory."""
    source = Path(__file__).resolve().parents[2]
    return source if (source / "pyproject.toml").is_file() else Path.cwd()


def run_roots() -> list[Path]:
    """Every directory under which servers of this user may run, memory first; none is made."""
    bases = [MEMORY, Path(tempfile.gettempdir()), cache_dir()]
    return [base.resolve() / f"connlab-{os.geteuid()}" for base in bases if base.is_dir()]


def run_root(*, on_disk: bool = False) -> Path:
    """The directory for a new server: in memory where at least 1 GB is free there, else on disk."""
    roots = run_roots()
    if on_disk:
        return private_dir(roots[-1])
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < ENOUGH_MEMORY:
        roots = [root for root in roots if root.parent != MEMORY]
    return private_dir(roots[0])


def private_dir(path: Path) -> Path:
    """Make ``path``, or make sure that it is a directory of ours: /dev/shm and /tmp belong to everybody.

    Root's is passable (0711), for the servers that run under it have dropped root.
    """
    mode = 0o711 if os.geteuid() == 0 else 0o700
    _make(path, mode)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StateError(f"{path} is not a directory of this user's (uid {os.geteuid()}); remove it or set TMPDIR")
    if stat.S_IMODE(found.st_mode) != mode:
        path.chmod(mode)
    return path


def _make(path: Path, mode: int) -> Path:
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as problem:
        raise StateError(
            f"cannot make the directory {path}: {problem.strerror}; "
            "make it writable, or set CONNLAB_STATE, XDG_CACHE_HOME or TMPDIR to a place that is"
        ) from problem
    if not os.access(path, os.W_OK | os.X_OK):
        raise StateError(
            f"the directory {path} is not writable; make it so, or set CONNLAB_STATE, XDG_CACHE_HOME or TMPDIR"
        )
    return path
