"""The Docker engine: where it is, whether it answers, and its troubles in words.

testcontainers finds it: ``DOCKER_HOST``, its own settings, Docker's current context, or the usual socket. Only an
engine on this machine does, for containers publish their ports on 127.0.0.1 of the machine that they run on.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from connlab.errors import EngineError, ProgramMissing

if TYPE_CHECKING:
    from docker.api.client import APIClient
    from testcontainers.core.docker_client import DockerClient

USUAL = "unix:///var/run/docker.sock"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_START_IT = (
    "start the engine: Docker Desktop, `sudo systemctl start docker`, or by hand as root `dockerd`",
    "install one: `sudo apt-get install docker.io`, https://docs.docker.com/engine/install/, or Podman with its socket",
    "use the local backend, which needs no engine: CONNLAB_BACKEND=local",
)
_JOIN = (
    "let this user in: `sudo usermod -aG docker $USER`, then log in again (whoever is in that group has root's rights)",
    *_START_IT[2:],
)
_GO_THERE = (
    "run the course on that machine",
    "unset DOCKER_HOST, or `docker context use default`, to use this machine's engine",
    *_START_IT[2:],
)


class Engine:
    """A Docker engine that answers; ``connect()`` gives the one there is."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._clients: dict[int, DockerClient] = {}

    @property
    def docker(self) -> DockerClient:
        """testcontainers' client. A forked child has another, for it must not share its parent's connections."""
        process = os.getpid()
        if process not in self._clients:
            self._clients[process] = _client()
        return self._clients[process]

    @property
    def api(self) -> APIClient:
        """docker's own client, which knows containers by their names and keeps nothing."""
        return self.docker.client.api

    def __repr__(self) -> str:
        return f"<Docker engine at {self.address}>"

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Turn what goes wrong in the block into EngineError, which says that ``what`` could not be done and why."""
        import docker.errors
        import requests

        try:
            yield
        except docker.errors.APIError as problem:
            raise EngineError(f"{what}: the Docker engine says: {problem.explanation or problem}") from problem
        except (docker.errors.DockerException, requests.RequestException, OSError) as problem:
            raise EngineError(f"{what}: the Docker engine at {self.address} does not answer ({_root(problem)})") from (
                problem
            )


def connect() -> Engine:
    """The engine, after it has answered. Raises ProgramMissing with the ways out.

    Example:
        >>> connect().api.version()["Version"]
        '28.5.2'
    """
    return _connect(os.environ.get("DOCKER_HOST"))


@functools.lru_cache(maxsize=1)
def _connect(_host: str | None) -> Engine:
    """The argument only tells the kept one apart."""
    address = _address()
    _require_this_machine(address)
    import docker.errors
    import requests

    try:
        engine = Engine(address)
        engine.api.ping()
    except (docker.errors.DockerException, requests.RequestException, OSError) as problem:
        raise _missing(address, problem) from problem
    return engine


def _address() -> str:
    from testcontainers.core.docker_client import get_docker_host

    return get_docker_host() or USUAL


def _client() -> DockerClient:
    """testcontainers' client, and nothing that would start its reaper: the watchdog is ours, for both backends."""
    from testcontainers.core.docker_client import DockerClient

    before = os.environ.get("DOCKER_HOST")
    try:
        return DockerClient()
    finally:  # it writes there what it found, and every program that the learner starts would inherit it
        os.environ.pop("DOCKER_HOST", None)
        if before is not None:
            os.environ["DOCKER_HOST"] = before


def _require_this_machine(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme in ("unix", "http+unix") or (parts.scheme in ("tcp", "http") and parts.hostname in LOOPBACK):
        return
    raise ProgramMissing(
        f"The Docker engine at {address} cannot be used: it is on another machine. A container's port would be "
        "published on that machine's 127.0.0.1, which programs here cannot reach.",
        [f"DOCKER_HOST, testcontainers' settings and Docker's context: {address}"],
        _GO_THERE,
    )


def _missing(address: str, problem: BaseException) -> ProgramMissing:
    cause = _root(problem)
    if isinstance(cause, PermissionError):
        what = f"This user may not speak to the Docker engine at {address}."
        return ProgramMissing(what, [f"{address}: {cause.strerror}"], _JOIN)
    why = "no such socket" if isinstance(cause, FileNotFoundError) else str(cause)
    return ProgramMissing("No Docker engine answers.", [f"{address}: {why}"], _START_IT)


def _root(problem: BaseException) -> BaseException:
    """The error at the bottom: docker's own says less than the system call that failed."""
    found: Any = problem
    while found.__cause__ or found.__context__:
        found = found.__cause__ or found.__context__
    return found if isinstance(found, OSError) else problem
