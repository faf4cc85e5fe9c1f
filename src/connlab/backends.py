"""Which runtime servers run in."""

from __future__ import annotations

import os

from connlab import programs
from connlab.errors import ConnlabError
from connlab.runtime import Runtime
from connlab.runtime.local import LocalRuntime

VARIABLE = "CONNLAB_BACKEND"
NAMES = ("auto", "local", "docker")
LOCAL_PROGRAMS = ("CONNLAB_POSTGRES", "CONNLAB_PGBOUNCER")


def choose(backend: str = "auto") -> Runtime:
    """The runtime for ``backend``; for "auto" the variable CONNLAB_BACKEND decides.

    Where that does not either: local where it is usable, else docker where that is, else local, whose errors then say
    what is missing. Raises ConnlabError for any other name.
    """
    wanted = named(backend)
    if wanted == "docker" or (wanted == "auto" and not local_usable() and docker_usable()):
        from connlab.runtime.docker import DockerRuntime

        return DockerRuntime()
    return LocalRuntime()


def named(backend: str = "auto") -> str:
    """The name that was given: by the argument, else by the variable, else "auto".

    Whoever names local programs means local ones: nothing else may take the place of a wrong path.
    """
    found = os.environ.get(VARIABLE, "auto") if backend == "auto" else backend
    if found not in NAMES:
        raise ConnlabError(
            f"there is no backend {found!r}: write 'auto', 'local' or 'docker' (argument backend or {VARIABLE})"
        )
    return "local" if found == "auto" and any(os.environ.get(name) for name in LOCAL_PROGRAMS) else found


def local_usable() -> bool:
    """Whether a local server and a PgBouncer could start now with nothing fetched."""
    try:
        programs.find_postgres()
        programs.find_pgbouncer(fetch=False)
    except ConnlabError:
        return False
    return True


def docker_usable() -> bool:
    """Whether an engine answers and has the images."""
    from connlab import engine, images

    try:
        return not images.lacking(engine.connect())
    except ConnlabError:
        return False
