"""What integration tests share: the backend they run on, and servers on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from connlab import PgBouncer, Postgres, programs, template
from connlab.engine import connect
from connlab.images import find

Start = Callable[..., Postgres]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that names the fixture ``backend`` runs on each one that was asked for, or on the one that it is for."""
    if "backend" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("backends")
        only = [name for name in ("local", "docker") if f"{name}_only" in metafunc.fixturenames]
        if only:
            left_out = pytest.param(only[0], marks=pytest.mark.not_asked_for)
            wanted = only if only[0] in wanted else [left_out]
        metafunc.parametrize("backend", wanted, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of a backend that was not asked for; they are no skipped tests."""
    left_out = [item for item in items if item.get_closest_marker("not_asked_for")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def everything_is_here(request: pytest.FixtureRequest) -> None:
    """What `connlab start` sees to before anything else: programs, an initialised directory, images."""
    wanted = request.config.getoption("backends")
    if "local" in wanted:
        programs.find_pgbouncer()
        template.initialised(programs.find_postgres())
    if "docker" in wanted:
        find(connect(), "postgres")
        find(connect(), "pgbouncer")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Each way to run servers; a test that uses it runs once on each."""
    name: str = request.param
    return name


@pytest.fixture
def local_only(backend: str) -> None:
    """For tests that look at processes, files and sockets of this machine."""


@pytest.fixture
def docker_only(backend: str) -> None:
    """For tests that look at containers and the engine."""


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
