"""Gets ready what lessons need, before the first of them runs."""

from __future__ import annotations

from connlab import backends, programs, template
from connlab.progress import Progress


def prepare(progress: Progress) -> None:
    """Find PostgreSQL and PgBouncer, fetch what can be fetched, and make the data directory's template.

    Says what takes over a second. Raises ProgramMissing, StartError and, for a backend that is not there, ConnlabError.
    """
    backends.choose()
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
