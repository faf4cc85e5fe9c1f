"""Gets ready what lessons need, before the first of them runs."""

from __future__ import annotations

from connlab import backends, engine, images, programs, template
from connlab.errors import ProgramMissing
from connlab.progress import Progress


def prepare(progress: Progress) -> None:
    """Get the backend ready that lessons will run on: fetch what can be fetched, make what servers start from.

    Says what takes over a second. Raises ProgramMissing, StartError, EngineError.
    """
    wanted = backends.named()
    if wanted == "local":
        local(progress)
    elif wanted == "docker":
        docker(progress)
    else:
        _either(progress)


def everything(progress: Progress) -> None:
    """Get every backend ready that can be, whichever lessons will run on; what cannot be is said."""
    for ready in (local, docker):
        try:
            ready(progress)
        except ProgramMissing as problem:
            progress.say(problem.what)


def local(progress: Progress) -> None:
    """Find PostgreSQL and PgBouncer, fetch what can be fetched, and make the data directory's template."""
    with progress.step("Looking for PostgreSQL"):
        postgres = programs.find_postgres()
    with progress.step("Looking for PgBouncer"):
        pgbouncer = programs.find_pgbouncer(say=progress.say)
    with progress.step("Initialising a data directory (once, later servers start from a copy)"):
        template.initialised(postgres)
    for name, version, source in (
        ("PostgreSQL", postgres.version, postgres.source),
        ("PgBouncer", pgbouncer.version, pgbouncer.source),
    ):
        progress.say(f"{name} {version} ({source})")


def docker(progress: Progress) -> None:
    """Find the engine; download and build the images that it lacks."""
    found = engine.connect()
    if images.lacking(found):
        with progress.step("Making the images of the docker backend (once)"):
            images.make(found, progress.say)
    versions = images.versions(found)
    progress.say(f"PostgreSQL {versions['postgres']} and PgBouncer {versions['pgbouncer']} (docker)")


def _either(progress: Progress) -> None:
    """Local where it can be had, else docker."""
    try:
        return local(progress)
    except ProgramMissing as no_local:
        progress.say(f"{no_local.what} Trying Docker instead.")
        try:
            return docker(progress)
        except ProgramMissing as no_docker:
            looked, ways = no_local.looked + no_docker.looked, no_local.ways_out + no_docker.ways_out
            raise ProgramMissing(f"{no_local.what} {no_docker.what}", looked, tuple(dict.fromkeys(ways))) from None
