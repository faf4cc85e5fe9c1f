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
from collections.abc import Iterable
from pathlib import Path

import platformdirs

from connlab.account import can_read, server_account
from connlab.errors import StateError

MEMORY = Path("/dev/shm")
ENOUGH_MEMORY = 1 << 30
"""Bytes that must be free in memory before data directories go there."""
SHORT = (Path("/tmp"), Path("/var/tmp"))
"""Where servers run when TMPDIR or the cache have paths that are too long; the second is on disk by convention."""
SOCKET_PATH = 103
"""Bytes that the path of a Unix socket may have: 107 on Linux, 103 on macOS."""
LONGEST = "/4194304-0123abcd/postgres-9999/.s.PGSQL.65535"


def cache_dir() -> Path:
    """The cache: a user's own, or the machine's when root runs (servers drop root and must read it)."""
    if os.geteuid() != 0:
        return _make(_cache_path(), "XDG_CACHE_HOME")
    path = _make(_cache_path())
    if path.stat().st_mode & 0o555 != 0o555:  # root's umask may be strict
        path.chmod(0o755)
    return path


def _cache_path() -> Path:
    return platformdirs.site_cache_path("connlab") if os.geteuid() == 0 else platformdirs.user_cache_path("connlab")


def state_dir() -> Path:
    """The state directory; made when missing."""
    chosen = os.environ.get("CONNLAB_STATE")
    return _make(Path(chosen).expanduser().absolute() if chosen else project_dir() / ".connlab", "CONNLAB_STATE")


def project_dir() -> Path:
    """The course's folder when connlab runs from it, else the current directory."""
    source = Path(__file__).resolve().parents[2]
    return source if (source / "pyproject.toml").is_file() else Path.cwd()


def run_roots() -> list[Path]:
    """Every directory under which servers of this user may run, memory first; none is made."""
    return _roots([MEMORY, Path(tempfile.gettempdir()), *SHORT, _cache_path()])


def run_root(*, on_disk: bool = False) -> Path:
    """The directory for a new server: in memory where at least 1 GB is free there, else on disk."""
    temporary = Path(tempfile.gettempdir())
    bases = [temporary, *SHORT]
    if on_disk:  # the temporary directory is in memory on many systems
        bases = [cache_dir(), *reversed(SHORT), temporary]
    elif MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= ENOUGH_MEMORY:
        bases = [MEMORY, *bases]
    for root in _roots(bases):
        if root.is_dir() or os.access(root.parent, os.W_OK | os.X_OK):
            return private_dir(root)
    tried = ", ".join(map(str, bases))
    raise StateError(
        f"no directory for servers: {tried} are not there, not writable, or too long for a Unix socket "
        f"({SOCKET_PATH} bytes in all); set TMPDIR to a short path that is writable"
    )


def _roots(bases: Iterable[Path]) -> list[Path]:
    """A directory of this user in each base that is there and does for servers, in order, each once."""
    account = server_account()
    found = [base.resolve() / f"connlab-{os.geteuid()}" for base in bases if os.path.isdir(base)]
    return [root for root in dict.fromkeys(found) if _takes_sockets(root) and can_read(account, root.parent)]


def _takes_sockets(root: Path) -> bool:
    """Whether the longest path of a server's socket under ``root`` is one that the kernel and libpq take."""
    return len(os.fsencode(f"{root}{LONGEST}")) <= SOCKET_PATH and "," not in str(root)


def private_dir(path: Path) -> Path:
    """Make ``path``, or make sure that it is a directory of ours: /dev/shm and /tmp belong to everybody.

    Root's is passable (0711), for the servers that run under it have dropped root.
    """
    mode = 0o711 if os.geteuid() == 0 else 0o700
    _mkdir(path, mode, _way_out("TMPDIR"))
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StateError(
            f"{path} is not a directory of this user's (uid {os.geteuid()}) but belongs to uid {found.st_uid}: connlab "
            "runs no servers where somebody else can change things; have that user or root remove it"
        )
    if stat.S_IMODE(found.st_mode) != mode:
        path.chmod(mode)
    return path


def _make(path: Path, variable: str = "") -> Path:
    """Make a directory, or make sure that it is writable; ``variable`` is the one that moves it."""
    _mkdir(path, 0o755, _way_out(variable))
    if not os.access(path, os.W_OK | os.X_OK):
        raise StateError(f"the directory {path} is not writable; {_way_out(variable)}")
    return path


def _mkdir(path: Path, mode: int, way_out: str) -> None:
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as problem:
        raise StateError(f"cannot make the directory {path}: {problem.strerror}; {way_out}") from problem


def _way_out(variable: str) -> str:
    return f"make it writable, or set {variable} to a place that is" if variable else "make it writable"
