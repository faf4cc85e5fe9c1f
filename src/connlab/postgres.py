"""A real PostgreSQL server."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable
from typing import Any, Self

import psycopg
from psycopg import sql

from connlab import backends, configuration, janitor
from connlab.configuration import Change, Value
from connlab.errors import ConnlabError, SettingError, StartError
from connlab.lesson import started
from connlab.node import Login, Node, new_password, url
from connlab.pgbouncer import CONSOLE, PgBouncer
from connlab.runtime import Program, Runtime
from connlab.template import DATABASE, ROLE, SUPERUSER

REFUSED = {
    "listen_addresses": "connlab's servers listen on this machine alone",
    "unix_socket_directories": "the socket is in the server's own directory; pg.socket_directory tells which",
    "data_directory": "each server has a directory of its own; with on_disk=True it is on disk",
    "hba_file": "the rules are in the data directory's pg_hba.conf",
    "ident_file": "the map is in the data directory's pg_ident.conf",
    "config_file": "pass its text as conf=…",
    "external_pid_file": "the server's directory goes with it",
    "logging_collector": "the log goes where pg.log() reads it",
    "log_destination": "the log goes where pg.log() reads it",
    "dynamic_shared_memory_type": "its files go with the data directory, whatever kills the server",
}
# For the statements that set passwords: they stay out of the log, and work, whatever the settings for all others.
CALM = (
    "-c log_statement=none -c log_min_duration_statement=-1 -c log_duration=off -c statement_timeout=0"
    " -c default_transaction_read_only=off -c synchronous_commit=local"
)
# Settings that take several values, which ALTER SYSTEM would take for one.
LISTS = (
    "shared_preload_libraries",
    "session_preload_libraries",
    "local_preload_libraries",
    "search_path",
    "temp_tablespaces",
)
TROUBLE = re.compile(
    r"(?:FATAL|PANIC|ERROR):\s+(?!\s|the database system is|configuration file .* contains errors)(.+)"
    r"|LOG:\s+(.*(?:configuration parameter|invalid value|syntax error|could not bind|outside the valid range).*)"
    r"|^postgres: (.+)",
    re.MULTILINE,
)
DOCUMENTATION = "https://www.postgresql.org/docs/current/runtime-config.html"


class Postgres(Node):
    """A PostgreSQL server that is removed with the process that started it.

    Example:
        >>> with Postgres.start(max_connections=20) as pg:
        ...     pg.value("show max_connections")
        '20'
    """

    label = "PostgreSQL"

    def __init__(self, program: Program, runtime: Runtime, conf: str) -> None:
        super().__init__(program)
        self._runtime, self._conf = runtime, conf
        self._logins = {name: Login(name, new_password()) for name in (ROLE, CONSOLE, SUPERUSER)}
        self._opened = False

    @classmethod
    @janitor.all_or_nothing
    def start(cls, *, backend: str = "auto", conf: str | None = None, on_disk: bool = False, **settings: Value) -> Self:
        """Start a server and return once a query has gone through.

        Keywords are postgresql.conf settings; ``conf`` is the text of such a file, for lessons about it (the keywords
        come after it and win). ``backend``: "local", "docker", or "auto": what ``CONNLAB_BACKEND`` says, else local
        where it is usable, else docker.
        ``port`` asks for one port instead of any free one; ``on_disk`` keeps the data out of memory.

        The database ``shop`` has tables users, accounts and orders, owned by the ordinary role ``app``.

        Raises SettingError, ProgramMissing, StartError.
        """
        port = settings.pop("port", None)
        if port is not None and (isinstance(port, bool) or not isinstance(port, int)):
            raise SettingError(f"port takes a whole number, not {port!r}")
        configuration.check_names(settings, REFUSED)
        text = (f"{conf.rstrip()}\n" if conf else "") + configuration.postgres_lines(settings)
        runtime = backends.choose(backend)
        program = runtime.prepare("postgres", port=port, on_disk=on_disk)
        pg = cls(program, runtime, text)
        program.write("data/postgresql.conf", text)
        pg._start()
        started.remember(pg, runtime.name)
        return pg

    @property
    def dsn(self) -> str:
        """A URL of the ordinary role ``app`` in the database ``shop``."""
        return self.dsn_of(ROLE)

    @property
    def admin_dsn(self) -> str:
        """A URL of the superuser, for whom slots stay reserved when every ordinary one is taken."""
        return self.dsn_of(SUPERUSER)

    def dsn_of(self, role: str, *, database: str = DATABASE) -> str:
        """A URL for ``role``: "app" or "postgres"."""
        return url(self.address, role, self._logins[role].password, database)

    @property
    def socket_directory(self) -> str:
        """The directory of the server's Unix socket: ``psycopg.connect(pg.dsn, host=pg.socket_directory)``.

        Raises ConnlabError when it is inside a container.
        """
        if not self._program.socket_directory:
            raise ConnlabError("the server's socket is inside its container; connect with pg.dsn, over TCP")
        return self._program.socket_directory

    @property
    def conf(self) -> str:
        """The text of postgresql.conf that this server was started with."""
        return self._conf

    @janitor.all_or_nothing
    def pgbouncer(
        self, *, ini: str | None = None, program: str | os.PathLike[str] | None = None, **settings: Value
    ) -> PgBouncer:
        """Put a PgBouncer in front of this server; any number of them.

        Keywords are settings of pgbouncer.ini's section [pgbouncer]; ``ini`` is the text of such a file. Where to
        listen is always added, and what it does not say about whom to let in and which server stands behind;
        ``.ini`` shows the result. ``program`` chooses a version, as ``pgbouncer_programs`` lists them.

        Raises SettingError, ProgramMissing, StartError.
        """
        self._must_run()
        choice = os.fspath(program) if program is not None else None
        bouncer = PgBouncer.in_front_of(
            self.inner_address, self._runtime, self._logins[ROLE], self._logins[CONSOLE], ini, settings, choice
        )
        self._fronts.append(bouncer)
        started.remember(bouncer, self._runtime.name)
        return bouncer

    def pgbouncer_programs(self) -> list[str]:
        """The PgBouncers that are here, each version once, for ``pg.pgbouncer(program=…)``; the usual one is first.

        With the local backend these are paths: of ``CONNLAB_PGBOUNCER``, of the system's and of the unpacked package.
        With docker it is the name of the one image. Raises ProgramMissing.
        """
        return self._runtime.choices()

    def reload(self) -> None:
        """Have the server read its configuration again (SIGHUP); returns when new connections see it."""
        self._must_run()
        before = self.value("select pg_conf_load_time()")
        self._program.signal(signal.SIGHUP)
        deadline = time.monotonic() + 5
        while self.value("select pg_conf_load_time()") == before and time.monotonic() < deadline:
            time.sleep(0.005)

    # --- for Node -------------------------------------------------------------------------------------------

    def _arguments(self) -> list[str]:
        """On the command line stands what no configuration file may change."""
        host, port = self._program.listen
        data = f"{self._program.directory}/data"
        fixed = {
            "listen_addresses": host,
            "port": port,
            "unix_socket_directories": self._program.directory,
            "data_directory": data,
            "hba_file": f"{data}/pg_hba.conf",
            "ident_file": f"{data}/pg_ident.conf",
            "external_pid_file": "",
            "dynamic_shared_memory_type": "mmap",
            "logging_collector": "off",
            "log_destination": "stderr",
        }
        settings = [argument for name, value in fixed.items() for argument in ("-c", f"{name}={value}")]
        return ["-D", data, *settings]

    def _configuration(self) -> str:
        return self._conf

    def _shut_down_signals(self) -> list[int]:
        return [signal.SIGINT, signal.SIGQUIT]  # fast, then immediate shutdown

    def _prepare_access(self) -> None:
        """At the first start: passwords that nobody has seen, in place of the one in the cache."""
        if self._opened:
            return
        first = url(self.address, SUPERUSER, self._program.secret, "postgres")
        with psycopg.connect(first, autocommit=True, connect_timeout=5, options=CALM) as connection:
            for login in self._logins.values():
                secret = connection.pgconn.encrypt_password(
                    login.password.encode(), login.name.encode(), b"scram-sha-256"
                )
                login.secret = secret.decode()
            with connection.transaction():  # one wait for the disk
                for name in (ROLE, SUPERUSER):
                    change = sql.SQL("alter role {} password {}")
                    connection.execute(change.format(sql.Identifier(name), self._logins[name].secret))
        self._opened = True

    def _change(self, settings: dict[str, Value]) -> Change:
        """Through ALTER SYSTEM, which checks values; the file that it writes is kept, to be put back."""
        configuration.check_names(settings, {**REFUSED, "port": "a node keeps its address"})
        file = self.value("select pg_read_file('postgresql.auto.conf')")
        with self._connection() as connection:
            how = self._how(connection, settings)
            old = self._shown(settings)
            try:
                for name, value in settings.items():
                    connection.execute(_alter_system(name, value))
            except psycopg.Error as problem:
                self._program.write("data/postgresql.auto.conf", file)
                raise SettingError(f"PostgreSQL {self.version} refuses: {problem}") from problem
        try:
            self._apply(how)
        except StartError as problem:
            self._restore(Change(self.label, how, {}, old, file))
            wanted = ", ".join(configuration.postgres_lines(settings).splitlines())
            raise SettingError(f"with {wanted} {problem.reason}. It runs with the old settings again") from problem
        return Change(self.label, how, self._shown(settings), old, file)

    def _restore(self, change: Change) -> None:
        self._program.write("data/postgresql.auto.conf", change.file)
        self._apply(change.how)

    def _apply(self, how: str) -> None:
        if how == "restart" or self._frozen or not self._program.alive():
            self.restart()
        else:
            self.reload()

    def _how(self, connection: psycopg.Connection[dict[str, Any]], settings: Iterable[str]) -> str:
        rows = connection.execute("select name, context from pg_settings").fetchall()
        contexts = {row["name"].lower(): row["context"] for row in rows}
        for name in settings:
            if "." not in name and name.lower() not in contexts:
                near = configuration.did_you_mean(name, contexts)
                raise SettingError(f"PostgreSQL {self.version} has no setting {name}; {near or DOCUMENTATION}")
        return "restart" if any(contexts.get(name.lower()) == "postmaster" for name in settings) else "reload"

    def _shown(self, settings: Iterable[str]) -> dict[str, str]:
        with self._connection() as connection:
            query = "select coalesce(current_setting(%s, true), '') as shown"
            return {name: connection.execute(query, [name]).fetchall()[0]["shown"] for name in settings}

    def _reason(self, log: str) -> str:
        match = TROUBLE.search(log) or re.search(r"LOG:\s+(.+)", log)
        return next(filter(None, match.groups())).strip() if match else ""

    def _hint(self, reason: str) -> str:
        if match := re.search(r'unrecognized configuration parameter "([^"]+)"', reason):
            near = configuration.did_you_mean(match.group(1), configuration.POSTGRES_NAMES)
            return near or f"check the setting's name: {DOCUMENTATION}"
        if "Address already in use" in reason:
            return "leave the port out to get one that is free"
        return f"{DOCUMENTATION} says what each setting takes" if "invalid value" in reason else ""


def _alter_system(name: str, value: Value) -> sql.Composed:
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    values = [part.strip() for part in text.split(",")] if name.lower() in LISTS else [text]
    return sql.SQL("alter system set {} = {}").format(
        sql.Identifier(name), sql.SQL(", ").join(map(sql.Literal, values))
    )
