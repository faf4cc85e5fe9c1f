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

from connlab.errors import ConnlabError, NodeStopped, ProgramMissing, SettingError, StartError, StateError
from connlab.pgbouncer import PgBouncer
from connlab.postgres import Postgres
from connlab.relay import Relay
from connlab.version import Version

__all__ = [
    "ConnlabError",
    "NodeStopped",
    "PgBouncer",
    "Postgres",
    "ProgramMissing",
    "Relay",
    "SettingError",
    "StartError",
    "StateError",
    "Version",
]
