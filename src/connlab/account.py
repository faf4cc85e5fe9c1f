"""Which user servers run as: PostgreSQL and PgBouncer refuse root."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from connlab.errors import ConnlabError

CANDIDATES = ("postgres", "nobody")


def server_account() -> pwd.struct_passwd | None:
    """The user that servers run as when we are root; None when we are an ordinary user (they run as us)."""
    if os.geteuid() != 0:
        return None
    for name in CANDIDATES:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ConnlabError(
        "PostgreSQL refuses to run as root and there is no user "
        f"{' or '.join(CANDIDATES)} to drop to; add one (useradd --system postgres) or run as an ordinary user"
    )


def can_read(account: pwd.struct_passwd | None, path: Path) -> bool:
    """Whether ``account`` (None: ourselves) can reach and read ``path``, a file or a directory."""
    if account is None:
        return os.access(path, os.R_OK)
    resolved = path.resolve()
    return _allowed(account, resolved, 4) and all(_allowed(account, parent, 1) for parent in resolved.parents)


def _allowed(account: pwd.struct_passwd, path: Path, bit: int) -> bool:
    found = path.stat()
    if found.st_uid == account.pw_uid:
        return bool(found.st_mode & bit << 6)
    if found.st_gid == account.pw_gid:
        return bool(found.st_mode & bit << 3)
    return bool(found.st_mode & bit)
