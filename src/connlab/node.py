"""What PostgreSQL, PgBouncer and a relay have in common: a DSN, queries, a log, and verbs."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import psycopg
from psycopg.rows import dict_row, tuple_row

from connlab.configuration import Change, Value
from connlab.errors import ConnlabError, NodeStopped, StartError
from connlab.runtime import Address, Program
from connlab.version import Version

if TYPE_CHECKING:
    from connlab.relay import Relay

READY_WITHIN = 30.0
"""Seconds until a start is given up. A program that exits is reported at once."""
STOP_WITHIN = 10.0
LOG_TAIL = 15
# Answers that stay the same however often one asks: a start that gets one is given up at once.
FINAL = re.compile(
    r"authentication failed|no such (?:user|database)|does not exist|no pg_hba.conf entry|login rejected"
    r"|server login failed: (?!.*(?:database system is|too many|slots))"
)
BURST = "too many clients"
"""What PostgreSQL tells a superuser too, for the moment in which others have a slot and are about to be refused."""
BURST_WITHIN = 5.0


@dataclass
class Login:
    """A role's name, its password, and its SCRAM secret as pg_authid holds it."""

    name: str
    password: str = field(repr=False)
    secret: str = field(default="", repr=False)


class Node:
    """A server that a lesson uses. ``stop`` ends it and everything that stands in front of it."""

    label = "server"

    def __init__(self, program: Program) -> None:
        self._program = program
        self._maker = os.getpid()
        self._fronts: list[Node] = []
        self._stopped_log: str | None = None
        self._frozen = False
        self._stopping = threading.Lock()

    # --- what it is -----------------------------------------------------------------------------------------

    @property
    def dsn(self) -> str:
        """A postgresql:// URL of an ordinary role (no superuser), through this node."""
        raise NotImplementedError

    @property
    def admin_dsn(self) -> str:
        """A postgresql:// URL with every right: a superuser, or PgBouncer's console."""
        raise NotImplementedError

    @property
    def version(self) -> Version:
        """The server's version: compares with tuples, prints as "18.6"."""
        return self._program.version

    @property
    def address(self) -> Address:
        """Host and port at which programs on this machine reach the node."""
        return self._program.address

    @property
    def inner_address(self) -> Address:
        """Host and port for the configuration of another node: with containers it is not ``address``."""
        return self._program.inner_address

    @property
    def running(self) -> bool:
        """Whether its main process is there (a frozen one is)."""
        return self._stopped_log is None and self._program.alive()

    def __repr__(self) -> str:
        state = "frozen" if self._frozen else "running" if self.running else "stopped"
        return f"<{self.label} {self.version} at {self.address}, {state}>"

    # --- asking ---------------------------------------------------------------------------------------------

    def rows(self, query: str) -> list[dict[str, Any]]:
        """The result of ``query`` as dicts, over an administrator's connection of its own, closed after it.

        Raises NodeStopped, and psycopg's errors for a wrong query.

        Example:
            ``pg.rows("select state, count(*) from pg_stat_activity group by state")``
        """
        with self._connection() as connection:
            cursor = connection.execute(query)
            return cursor.fetchall() if cursor.description else []

    def value(self, query: str) -> Any:
        """The first column of the first row of ``query``; None when there is no row."""
        with self._connection() as connection:
            cursor = connection.cursor(row_factory=tuple_row).execute(query)  # two columns may have one name
            found = cursor.fetchone() if cursor.description else None
            return found[0] if found else None

    def mark(self) -> int:
        """A mark in the log, for ``log(since=…)``."""
        self._program.settle()
        return self._program.log_size()

    def log(self, since: int = 0) -> str:
        """What the server has logged since it was started, or since a ``mark``; works after ``stop`` too."""
        if self._stopped_log is None:
            self._program.settle()
            return self._program.log(since)
        return self._stopped_log.encode()[since:].decode(errors="replace")

    def proc(self, name: str, pids: Iterable[int] | None = None) -> dict[int, str]:
        """The text of the file /proc/<pid>/``name`` for each of its processes, or for ``pids``, wherever they run.

        As the kernel gives it, but for newlines and zero bytes at its end.

        A process that has ended is left out. The pids are those that ``pg_backend_pid()`` tells. Raises ConnlabError
        where there is no /proc, as on macOS.

        Example:
            ``pg.proc("smaps_rollup")`` tells each process's memory, ``pg.proc("cmdline")`` what each one does
        """
        if not re.fullmatch("[a-z_]+", name):
            raise ConnlabError(f"{name!r} is no file of a process in /proc; write a name such as 'smaps_rollup'")
        self._must_run()
        found = self._program.proc(name, pids)
        return {pid: text.rstrip("\0\n") for pid, text in found.items()}

    # --- verbs ----------------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Have it read its configuration again."""
        raise NotImplementedError

    def restart(self) -> None:
        """Stop it in order, or take up a killed one, and start it again at the same address."""
        self._must_exist()
        self.thaw()
        self._shut_down()
        self._start()

    def stop(self) -> None:
        """Stop it and all that stands in front of it, and remove everything but its log. Twice is no error."""
        with self._stopping, contextlib.ExitStack() as behind:
            behind.callback(self._stop_this)
            for front in self._fronts:
                behind.callback(front.stop)  # the newest first, and this one whatever they raise

    def _stop_this(self) -> None:
        if self._stopped_log is not None:
            return
        try:
            self.thaw()
            self._shut_down()
        finally:
            self._program.settle()
            self._stopped_log = self._program.log()
            self._program.remove()

    def kill(self) -> None:
        """SIGKILL to every process of it, as if its machine had lost power. ``restart`` takes it up again."""
        self._must_exist()
        self._program.kill()
        self._frozen = False

    def freeze(self) -> None:
        """Stop all its processes without ending any: connections stay open and nobody answers."""
        self._must_exist()
        self._program.freeze()
        self._frozen = True

    def thaw(self) -> None:
        """Let a frozen node go on."""
        if self._frozen:
            self._program.thaw()
            self._frozen = False

    @contextlib.contextmanager
    def settings(self, **settings: Value) -> Iterator[Change]:
        """Change settings for the length of a ``with`` block: reloads or restarts as they demand, and says which.

        Raises SettingError for what the server does not take; the old values are back after the block.

        Example:
            ``with pg.settings(log_connections="on"): ...``
        """
        self._must_run()
        change = self._change(settings)
        print(change)
        try:
            yield change
        finally:
            if self._stopped_log is None:
                self._restore(change)

    def relay(self, **settings: Value) -> Relay:
        """Put a TCP relay in front: ``delay_ms`` for each direction, ``to_server`` and ``to_client`` False for mute.

        ``jitter_ms``, ``seed`` and ``kb_per_s``: see ``Relay``. Its settings change while connections are open:
        ``with relay.settings(delay_ms=10): …``. Raises SettingError.
        """
        from connlab.relay import Relay  # a relay is a node itself

        self._must_run()
        return Relay.in_front_of(self, settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() == self._maker:  # a forked child leaves the block too, and the server is its parent's
            self.stop()

    # --- for the kinds of node ------------------------------------------------------------------------------

    def _arguments(self) -> list[str]:
        raise NotImplementedError

    def _configuration(self) -> str:
        raise NotImplementedError

    def _shut_down_signals(self) -> list[int]:
        raise NotImplementedError

    def _change(self, settings: dict[str, Value]) -> Change:
        raise NotImplementedError

    def _restore(self, change: Change) -> None:
        raise NotImplementedError

    def _prepare_access(self) -> None:
        """What is to be done before an ordinary role can get in; raises psycopg.OperationalError until it can."""

    def _start(self) -> None:
        """Start and return once a query has gone through the learner's path."""
        mark = self._program.log_size()
        self._program.start(self._arguments())
        deadline, problem = time.monotonic() + READY_WITHIN, ""
        while time.monotonic() < deadline:
            try:
                self._try_path()
                return
            except psycopg.Error as error:
                problem = str(error).strip()
                final = not isinstance(error, psycopg.OperationalError)
            if not self._program.alive():
                raise self._start_error(mark, f"it ended with {self._program.ended()}")
            if final or FINAL.search(problem):
                raise self._start_error(mark, f"it runs and lets no query through: {problem}")
            if hopeless := self._hopeless(mark):
                raise self._start_error(mark, f"it runs and lets no query through: {hopeless}")
            time.sleep(0.005)
        raise self._start_error(mark, f"no query got through within {READY_WITHIN:g} s; the last try said: {problem}")

    def _try_path(self) -> None:
        self._prepare_access()
        with psycopg.connect(self.dsn, connect_timeout=3, autocommit=True) as connection:
            connection.execute("select 1")

    def _start_error(self, mark: int, outcome: str) -> StartError:
        self._program.settle()
        log = self._program.log(mark)
        reason = outcome if self._program.alive() else self._reason(log) or outcome
        return StartError(
            f"{self.label} {self.version} did not start: {reason}",
            command=self._program.command(),
            configuration=self._configuration(),
            log="\n".join(log.splitlines()[-LOG_TAIL:]),
            hint=self._hint(reason),
        )

    def _reason(self, log: str) -> str:
        """The line of the log that tells why, or an empty text."""
        raise NotImplementedError

    def _hopeless(self, mark: int) -> str:
        """What its log says since ``mark``, if it is that no query will get through; else empty."""
        return ""

    def _hint(self, reason: str) -> str:
        """What to do about ``reason``; empty when we know nothing better than the server's own words."""
        return ""

    def _shut_down(self) -> None:
        """Ask kindly, then less kindly, then not at all."""
        for number in self._shut_down_signals():
            self._program.signal(number)
            deadline = time.monotonic() + STOP_WITHIN
            while self._program.alive():
                if time.monotonic() > deadline:
                    break
                time.sleep(0.002)
            else:
                return
        self._program.kill()

    def _must_exist(self) -> None:
        if self._stopped_log is not None:
            raise NodeStopped(f"this {self.label} was stopped; start another one")

    def _must_run(self) -> None:
        self._must_exist()
        if self._frozen:
            raise NodeStopped(f"this {self.label} is frozen and answers nobody; thaw() it first")
        if not self._program.alive():
            raise NodeStopped(f"this {self.label} has ended ({self._program.ended()}); restart() takes it up again")

    def _connection(self) -> psycopg.Connection[dict[str, Any]]:
        self._must_run()
        deadline = time.monotonic() + BURST_WITHIN
        while True:
            try:
                return self._connect()
            except psycopg.OperationalError as problem:
                if BURST not in str(problem) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _connect(self) -> psycopg.Connection[dict[str, Any]]:
        return psycopg.connect(
            self.admin_dsn,
            autocommit=True,
            prepare_threshold=None,
            connect_timeout=10,
            application_name="connlab",
            row_factory=dict_row,
        )


def url(address: Address, user: str, password: str, database: str) -> str:
    """A DSN as a URL, with every part quoted."""
    user, password, database = (quote(part, safe="") for part in (user, password, database))
    return f"postgresql://{user}:{password}@{address.host}:{address.port}/{database}"


def new_password() -> str:
    """A password nobody can guess, with no character that a URL or a configuration file would need quoted."""
    return secrets.token_hex(16)
