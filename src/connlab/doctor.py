"""Looks at what the course needs, without downloading anything."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from connlab import backends, engine, images, jupyter, places, programs, reaper
from connlab.errors import ConnlabError, ProgramMissing
from connlab.version import Version

PREPARES = Version((1, 21))
"""The first PgBouncer with prepared statements in transaction mode: pgbouncer.org/changelog.html."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    good: bool
    what: str
    where: str
    notes: Sequence[str] = ()
    """What else is to be said about it: the ways out when it is not good."""
    ways_out: Sequence[str] = ()
    version: str | None = None
    needed: bool = True
    """Whether something is wrong when it is not good."""


@dataclass(frozen=True)
class Backend:
    """Whether servers could start now with nothing downloaded, and why or why not."""

    usable: bool
    why: str


@dataclass(frozen=True)
class Findings:
    """All that was looked at."""

    checks: tuple[Check, ...]
    backends: dict[str, Backend]
    postgres: str | None
    """The version that lessons get, as the next."""
    pgbouncer: str | None
    chosen: str | None
    """The backend that lessons get; None when the one they would get is not usable."""

    @property
    def usable(self) -> bool:
        """Whether there is a usable backend."""
        return any(backend.usable for backend in self.backends.values())


def look() -> Findings:
    """Look at everything. Starts no server, and runs programs only for their versions.

    Example:
        >>> look().backends["local"].usable
        True
    """
    docker, in_docker = _docker()
    postgres, pgbouncer, room = _postgres(), _pgbouncer(in_docker.get("pgbouncer")), _room()
    found = {"local": _local([postgres, pgbouncer, room]), "docker": _backend(docker)}
    checks = (_python(), _jupyterlab(), _notebooks(), postgres, pgbouncer, room, _state(), docker, _choice(found))
    if _chosen(found) == "docker":
        return Findings(checks, found, in_docker["postgres"], in_docker["pgbouncer"], "docker")
    return Findings(checks, found, postgres.version, pgbouncer.version, _chosen(found))


def as_json(found: Findings) -> str:
    """The findings as other programs read them."""
    usable = {name: {"usable": backend.usable, "why": backend.why} for name, backend in found.backends.items()}
    versions = {"postgres": found.postgres, "pgbouncer": found.pgbouncer}
    return json.dumps({"backends": usable, **versions, "chosen": found.chosen}, indent=2, ensure_ascii=False)


def as_text(found: Findings) -> str:
    """The findings for a person, a line for each thing and below it what to do."""
    return "\n".join(line for check in found.checks for line in _lines(check))


def ways_out(found: Findings) -> str:
    """What to do when no backend is usable."""
    ways = [f"  - {way}" for check in found.checks if not check.good for way in check.ways_out]
    return "\n".join(["No backend is usable. Ways out:", *dict.fromkeys(ways)])


def _lines(check: Check) -> list[str]:
    mark = "✓" if check.good else "✗" if check.needed else "-"
    label = f"{check.what} {check.version}" if check.version else check.what
    below = [*check.notes, *(f"way out: {way}" for way in check.ways_out)]
    return [f"{mark} {label:<20} {check.where}", *(f"    {line}" for line in below)]


# --- the things ---------------------------------------------------------------------------------------------


def _postgres() -> Check:
    try:
        found = programs.find_postgres()
    except ConnlabError as problem:
        return _missing("PostgreSQL", problem)
    return Check(True, "PostgreSQL", f"{found.bin} ({found.source})", version=str(found.version))


def _pgbouncer(in_docker: str | None) -> Check:
    try:
        found = programs.find_pgbouncer(fetch=False)
    except ConnlabError as problem:
        return _missing("PgBouncer", problem)
    notes = [] if found.version >= PREPARES else [_no_prepared_statements(found.version, in_docker)]
    return Check(True, "PgBouncer", f"{found.path} ({found.source})", notes, version=str(found.version))


def _no_prepared_statements(version: Version, in_docker: str | None) -> str:
    newer = f"CONNLAB_BACKEND=docker has PgBouncer {in_docker}" if in_docker else "the docker backend has a newer one"
    return (
        f"{version} has no prepared statements in transaction mode, which need {PREPARES}; the lessons work and say "
        f"what differs. Recommended: {newer}; CONNLAB_PGBOUNCER=/path/to/pgbouncer chooses another."
    )


def _room() -> Check:
    try:
        cache, place = places.cache_dir(), places.run_root()
    except ConnlabError as problem:
        return _missing("room for servers", problem)
    free = shutil.disk_usage(place).free >> 20
    with reaper.root_lock(place):  # removes it when nobody runs servers there
        pass
    return Check(True, "room for servers", f"{place} ({free} MB free); cache: {cache}")


def _state() -> Check:
    try:
        return Check(True, "results", str(places.state_dir()))
    except ConnlabError as problem:
        return _missing("results", problem)


def _python() -> Check:
    return Check(True, "Python", sys.executable, version=platform.python_version())


def _jupyterlab() -> Check:
    try:
        return Check(True, "JupyterLab", "in the same environment", version=metadata.version("jupyterlab"))
    except metadata.PackageNotFoundError:
        return Check(False, "JupyterLab", "not in this environment", ways_out=["run `uv sync` in the course's folder"])


def _notebooks() -> Check:
    try:
        return Check(True, "notebooks", str(jupyter.course_dir() / Path(jupyter.NOTEBOOK).parent))
    except ConnlabError as problem:
        return _missing("notebooks", problem)


def _docker() -> tuple[Check, dict[str, str]]:
    """The engine and its images; the versions of what is in them."""
    try:
        found = engine.connect()
        versions = {kind: str(version) for kind, version in images.versions(found).items()}
    except ConnlabError as problem:
        return replace(_missing("docker", problem), needed=False), {}
    where = f"{found.address}; PostgreSQL {versions['postgres']}, PgBouncer {versions['pgbouncer']}"
    return Check(True, "docker", where, version=str(found.api.version()["Version"])), versions


def _missing(what: str, problem: ConnlabError) -> Check:
    if isinstance(problem, ProgramMissing):
        looked = [f"looked at: {line}" for line in problem.looked]
        return Check(False, what, problem.what, looked, problem.ways_out)
    first, *rest = str(problem).splitlines()
    return Check(False, what, first, rest)


# --- the backends -------------------------------------------------------------------------------------------


def _local(needed: Sequence[Check]) -> Backend:
    lacking = [check for check in needed if not check.good]
    if not lacking:
        return Backend(True, "; ".join(f"{check.what} {check.version or 'in'} {check.where}" for check in needed))
    whys = [" ".join([check.where, *_one_of(check.ways_out)]) for check in lacking]
    return Backend(False, " ".join(whys))


def _backend(check: Check) -> Backend:
    return Backend(check.good, " ".join([check.where, *_one_of(check.ways_out)]))


def _one_of(ways: Sequence[str]) -> list[str]:
    return [f"Ways out, one is enough: {'; '.join(ways)}."] if ways else []


def _chosen(found: dict[str, Backend]) -> str | None:
    """What `Postgres.start()` would take."""
    try:
        wanted = backends.named()
    except ConnlabError:
        return None
    names = [name for name in found if wanted in ("auto", name)]
    return next((name for name in names if found[name].usable), None)


def _choice(found: dict[str, Backend]) -> Check:
    chosen, said = _chosen(found), os.environ.get(backends.VARIABLE, "auto")
    how = f"{backends.VARIABLE} says {said!r}"
    if chosen:
        return Check(True, "chosen backend", f"{chosen} ({how})" if said != "auto" else chosen)
    if said != "auto":
        return Check(False, "chosen backend", f"none: {how}", ways_out=[f"unset {backends.VARIABLE}"])
    named = [name for name in backends.LOCAL_PROGRAMS if os.environ.get(name)]
    if named and found["docker"].usable:
        why = f"none: {' and '.join(named)} means the local backend, which is not usable"
        return Check(False, "chosen backend", why, ways_out=[f"unset {' '.join(named)}"])
    return Check(False, "chosen backend", "none is usable")
