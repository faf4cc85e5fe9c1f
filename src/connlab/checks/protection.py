"""What a learner's code does to the server's settings: none of it outlasts the check."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from psycopg import sql

from connlab.postgres import Postgres

BASELINE = {"client_connection_check_interval": 0, "statement_timeout": 0}
"""PostgreSQL's defaults: nothing is checked, nothing times out."""
# setrole = 0: for every role; setdatabase = 0: in every database.
STORED = """
select case when setrole = 0 and setdatabase <> 0 then 'database ' || quote_ident(datname)
            else 'role ' || coalesce(quote_ident(rolname), 'all')
                 || coalesce(' in database ' || quote_ident(datname), '') end as owner,
       split_part(entry, '=', 1) as name, substr(entry, strpos(entry, '=') + 1) as value
from pg_db_role_setting
     left join pg_roles r on r.oid = setrole left join pg_database d on d.oid = setdatabase, unnest(setconfig) entry
"""
Key = tuple[str, str]


@contextlib.contextmanager
def unprotected(pg: Postgres) -> Iterator[None]:
    """A server that ends no query of itself, for the length of the block; all its settings are as before after it.

    Those of ``ALTER SYSTEM`` and of ``ALTER ROLE`` and ``ALTER DATABASE``, whoever has changed them meanwhile.

    Example:
        ``with unprotected(pg): box.do(5, call, "protect", pg.admin_dsn)``
    """
    before = stored(pg)
    with contextlib.ExitStack() as undo:
        with contextlib.redirect_stdout(io.StringIO()):  # a check's server says nothing in the learner's cell
            undo.enter_context(pg.settings(**BASELINE))
        undo.callback(_put_back, pg, before)
        for key in before:
            if key[1] in BASELINE:
                _alter(pg, key, None)
        yield


def stored(pg: Postgres) -> dict[Key, str]:
    """The settings of roles and databases: whose, such as "role app", and which, with their values."""
    return {(row["owner"], row["name"]): row["value"] for row in pg.rows(STORED)}


def not_yet_read(pg: Postgres) -> tuple[str, str] | None:
    """A limit of ``BASELINE`` that ``ALTER SYSTEM`` has written, and the server has not read: its name and value."""
    rows = pg.rows("""
        select f.name, f.setting from pg_file_settings f join pg_settings s using (name)
        where f.sourcefile like '%postgresql.auto.conf' and s.setting = '0' and f.setting <> '0'
    """)
    return next(((row["name"], row["setting"]) for row in rows if row["name"] in BASELINE), None)


def _put_back(pg: Postgres, before: dict[Key, str]) -> None:
    now = stored(pg)
    for key in now.keys() - before.keys():
        _alter(pg, key, None)
    for key, value in before.items():
        if now.get(key) != value:
            _alter(pg, key, value)


def _alter(pg: Postgres, key: Key, value: str | None) -> None:
    """``value`` None resets it."""
    owner, name = key
    what = sql.SQL("reset {}") if value is None else sql.SQL("set {} to {}")
    parts = [sql.Identifier(name)] if value is None else [sql.Identifier(name), sql.Literal(value)]
    pg.rows(f"alter {owner} {what.format(*parts).as_string()}")
