"""Which servers this process has started: what a verdict was measured on."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

from connlab.version import Version

DRIVERS = ("psycopg", "psycopg_pool")
"""Python packages whose behaviour verdicts depend on."""
NAMES = {"postgres": "PostgreSQL", "pgbouncer": "PgBouncer"}


class Server(Protocol):
    """What is asked of a node."""

    @property
    def version(self) -> Version:
        """The program's version."""


@dataclass(frozen=True)
class Started:
    """One kind of server that was started."""

    kind: str
    """"postgres", "pgbouncer"…"""
    version: str
    backend: str | None


_seen: dict[Started, None] = {}
_nodes: weakref.WeakKeyDictionary[Server, Started] = weakref.WeakKeyDictionary()


def remember(server: Server, backend: str) -> None:
    """Note that this process has started ``server`` with ``backend`` ("local", "docker")."""
    _nodes[server] = Started(_kind(server), str(server.version), backend)
    _seen[_nodes[server]] = None


@dataclass(frozen=True)
class Environment:
    """What an experiment ran on."""

    backend: str | None
    """"local" or "docker"; None when no server took part."""
    versions: dict[str, str]

    def __str__(self) -> str:
        named = ", ".join(f"{NAMES.get(kind, kind)} {version}" for kind, version in self.versions.items())
        return f"{named} ({self.backend} backend)" if self.backend else named


def environment(on: Server | Sequence[Server] | None = None) -> Environment:
    """The versions and the backend of the servers ``on``; None: of all that this process has started.

    Example:
        >>> environment(on=pg).versions
        {'postgres': '18.6', 'psycopg': '3.3.9', 'psycopg_pool': '3.3.3'}
    """
    found = list(_seen) if on is None else [_started(server) for server in _as_list(on)]
    backends = sorted({server.backend for server in found if server.backend})
    versions = {kind: _joined(found, kind) for kind in dict.fromkeys(server.kind for server in found)}
    return Environment("+".join(backends) or None, {**versions, **_drivers()})


def _as_list(on: Server | Sequence[Server]) -> Iterable[Server]:
    return on if isinstance(on, Sequence) else [on]


def _started(server: Server) -> Started:
    return _nodes.get(server) or Started(_kind(server), str(server.version), None)


def _kind(server: Server) -> str:
    return type(server).__name__.lower()


def _joined(found: Iterable[Started], kind: str) -> str:
    return ", ".join(sorted({server.version for server in found if server.kind == kind}))


def _drivers() -> dict[str, str]:
    return {name: metadata.version(name) for name in DRIVERS}
