"""Which PgBouncers the local backend could run: generations that differ, for lessons that compare them.

``programs.find_pgbouncer`` takes one; here are all of those that are there, and any other by its path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from connlab import programs
from connlab.errors import ProgramMissing
from connlab.programs import PgBouncerProgram


def at_hand() -> list[PgBouncerProgram]:
    """Each version that is here, once: the one that ``find_pgbouncer`` takes comes first. Nothing is fetched.

    Raises ProgramMissing when ``CONNLAB_PGBOUNCER`` names one that cannot be used. Example:

        >>> [str(program.version) for program in at_hand()]
        ['1.24.1', '1.18.0']
    """
    found: dict[str, PgBouncerProgram] = {}
    for program in _candidates():
        found.setdefault(str(program.version), program)
    return list(found.values())


def at(path: str) -> PgBouncerProgram:
    """The PgBouncer at ``path``, with the libraries it needs when it is one of those at hand. Raises ProgramMissing."""
    wanted = Path(path).expanduser().absolute()
    for program in _candidates():
        if program.path == wanted:
            return program
    try:
        return programs._pgbouncer_at(wanted, "program=", programs._libraries())
    except programs._Unusable as problem:
        raise ProgramMissing(
            f"program={path!r} is no PgBouncer that can be run.",
            [str(problem)],
            [
                f"name the program of a PgBouncer, {programs.OLDEST_PGBOUNCER} or later",
                "pg.pgbouncer_programs() lists those that are here; leave program out to get the first of them",
            ],
        ) from None


def _candidates() -> list[PgBouncerProgram]:
    chosen = os.environ.get("CONNLAB_PGBOUNCER")
    looks: list[Callable[[], PgBouncerProgram]] = [
        lambda path=path: programs._pgbouncer_at(path, "system")  # type: ignore[misc]
        for path in programs._system_pgbouncers()
    ]
    looks.append(lambda: programs._pgbouncer_unpacked_in(programs._package_folder()))
    first = [programs.find_pgbouncer(fetch=False)] if chosen else []
    return first + [program for look in looks if (program := programs._or_none(look))]
