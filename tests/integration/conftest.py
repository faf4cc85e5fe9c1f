"""What integration tests share: the backend they run on, and servers on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from connlab import PgBouncer, Postgres, programs, template

BACKENDS = ["local"]
Start = Callable[..., Postgres]


@pytest.fixture(scope="session", autouse=True)
def everything_is_here() -> None:
    """What `connlab start` sees to before anything else: PgBouncer, and an initialised directory in the cache."""
    programs.find_pgbouncer()
    template.initialised(programs.find_postgres())


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each way to run servers; a test that uses it runs once on each."""
    name: str = request.param
    return name


@pytest.fixture
def local_only(backend: str) -> None:
    """For tests that look at processes, files and sockets of this machine."""
    if backend != "local":
        pytest.skip("looks at processes and files of this machine")


@pytest.fixture
def start(backend: str) -> Iterator[Start]:
    """``Postgres.start`` on the backend under test; what it has started is stopped after the test."""
    with contextlib.ExitStack() as running:

        def start(**settings: Any) -> Postgres:
            return running.enter_context(Postgres.start(backend=backend, **settings))

        yield start


@pytest.fixture(scope="module")
def server(backend: str) -> Iterator[Postgres]:
    """A server for the tests of one module that leave it as they found it."""
    with Postgres.start(backend=backend) as pg:
        yield pg


@pytest.fixture(scope="module")
def bouncer(server: Postgres) -> PgBouncer:
    """A PgBouncer in front of ``server``, under the same condition."""
    return server.pgbouncer()


@pytest.fixture(params=["PostgreSQL", "PgBouncer"])
def node(request: pytest.FixtureRequest, start: Start) -> Postgres | PgBouncer:
    """A node of each kind that a test may do anything with."""
    pg = start()
    return pg if request.param == "PostgreSQL" else pg.pgbouncer()
