"""Connections under pressure: real PostgreSQL servers and PgBouncers for a course on connections.

Example:
    >>> import psycopg
    >>> from connlab import Postgres
    >>> with Postgres.start(max_connections=20) as pg:
    ...     bouncer = pg.pgbouncer(pool_mode="transaction", default_pool_size=5)
    ...     with psycopg.connect(bouncer.dsn) as conn:
    ...         conn.execute("select 1").fetchone()
    (1,)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from connlab import faults as faults
    from connlab import figures as figures
    from connlab.errors import ConnlabError as ConnlabError
    from connlab.errors import EngineError as EngineError
    from connlab.errors import NodeStopped as NodeStopped
    from connlab.errors import ProgramMissing as ProgramMissing
    from connlab.errors import SettingError as SettingError
    from connlab.errors import StartError as StartError
    from connlab.errors import StateError as StateError
    from connlab.lesson.claims import claim as claim
    from connlab.lesson.predictions import predict as predict
    from connlab.lesson.questions import quiz as quiz
    from connlab.live import watch as watch
    from connlab.pgbouncer import PgBouncer as PgBouncer
    from connlab.postgres import Postgres as Postgres
    from connlab.recorder import Recorder as Recorder
    from connlab.relay import Relay as Relay
    from connlab.version import Version as Version
    from connlab.workload import Load as Load
    from connlab.workload import closed_loop as closed_loop
    from connlab.workload import closed_loop_async as closed_loop_async
    from connlab.workload import open_loop as open_loop
    from connlab.workload import open_loop_async as open_loop_async
    from connlab.workload import pgbench as pgbench
    from connlab.workload import schedule as schedule

# Looked up when first used: `connlab --help` and the watchdog need no database driver.
_HOMES = {
    "Postgres": "postgres",
    "PgBouncer": "pgbouncer",
    "Relay": "relay",
    "Recorder": "recorder",
    "Version": "version",
    "claim": "lesson.claims",
    "predict": "lesson.predictions",
    "quiz": "lesson.questions",
    "watch": "live",  # a module of the function's own name would stand in its place once imported
    **dict.fromkeys(
        ("Load", "closed_loop", "closed_loop_async", "open_loop", "open_loop_async", "pgbench", "schedule"),
        "workload",
    ),
    **dict.fromkeys(
        ("ConnlabError", "EngineError", "NodeStopped", "ProgramMissing", "SettingError", "StartError", "StateError"),
        "errors",
    ),
}
_MODULES = ("faults", "figures")
__all__ = (*_HOMES, *_MODULES)


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"connlab.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'connlab' has no attribute {name!r}")
    return getattr(importlib.import_module(f"connlab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
