"""Load: clients that wait for each answer, requests that come at their own moments, and pgbench.

Example:
    >>> from psycopg_pool import ConnectionPool
    >>> from connlab import Postgres, closed_loop
    >>> with Postgres.start() as pg, ConnectionPool(pg.dsn, max_size=4) as pool:
    ...     load = closed_loop(lambda conn: conn.execute("select 1"), borrow=pool.connection, clients=8, requests=100)
    >>> load.succeeded
    100
"""

from connlab.workload.arrivals import schedule as schedule
from connlab.workload.heavy import PgbenchLoad as PgbenchLoad
from connlab.workload.heavy import pgbench as pgbench
from connlab.workload.load import Load as Load
from connlab.workload.loops import closed_loop as closed_loop
from connlab.workload.loops import closed_loop_async as closed_loop_async
from connlab.workload.loops import open_loop as open_loop
from connlab.workload.loops import open_loop_async as open_loop_async

__all__ = (
    "Load",
    "PgbenchLoad",
    "closed_loop",
    "closed_loop_async",
    "open_loop",
    "open_loop_async",
    "pgbench",
    "schedule",
)
