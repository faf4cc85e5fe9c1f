"""A real PgBouncer in front of a PostgreSQL."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from typing import Self

import psycopg

from connlab import configuration
from connlab.configuration import Change, Value, ini_values, ini_with
from connlab.errors import SettingError, StartError
from connlab.node import Login, Node, url
from connlab.runtime import Address, Program, Runtime
from connlab.template import DATABASE
from connlab.version import Version

CONSOLE = "console"
"""The one who may speak to the console; known to PgBouncer alone."""
REFUSED = {
    "listen_addr": "connlab's servers listen on this machine alone",
    "unix_socket_dir": "PgBouncer lets its own user in through the socket without a password",
    "logfile": "the log goes where bouncer.log() reads it",
    "pidfile": "no other program needs it",
    "user": "the server runs as an ordinary user already",
}
# A SCRAM secret cannot be passed on to the server after a reconnect: pgbouncer.org/changelog.html, 1.25.3.
SECRET_BREAKS = (Version((1, 25, 1)), Version((1, 25, 2)))
# "fill_defaults fail" says less than the line after it; S-0x… and C-0x… are connections' troubles.
TROUBLE = re.compile(r"\] (?:ERROR|FATAL) (?!fill_defaults fail|[SC]-0x|S: )(.+)")
NO_SERVER = re.compile(r"S-0x\w+: \S+@(\S+) closing because: connect failed")
DOCUMENTATION = "https://www.pgbouncer.org/config.html"


class PgBouncer(Node):
    """A PgBouncer; ``pg.pgbouncer(…)`` starts one.

    Example:
        ``bouncer = pg.pgbouncer(pool_mode="transaction", default_pool_size=5)``, then
        ``bouncer.rows("SHOW POOLS")``
    """

    label = "PgBouncer"

    def __init__(self, program: Program, role: Login, console: Login, ini: str) -> None:
        super().__init__(program)
        self._role, self._console, self._ini = role, console, ini

    @classmethod
    def in_front_of(
        cls,
        server: Address,
        runtime: Runtime,
        role: Login,
        console: Login,
        ini: str | None,
        settings: Mapping[str, Value],
        choice: str | None = None,
    ) -> Self:
        """Start one in front of ``server``, which ``pg.pgbouncer`` calls. ``role`` and ``console`` may log in."""
        wanted = dict(settings)
        port = wanted.pop("listen_port", None)
        if port is not None and (isinstance(port, bool) or not isinstance(port, int)):
            raise SettingError(f"listen_port takes a whole number, not {port!r}")
        configuration.check_names(wanted, REFUSED)
        program = runtime.prepare("pgbouncer", port=port, choice=choice)
        bouncer = cls(program, role, console, complete_ini(ini or "", wanted, server, program.listen))
        program.write("userlist.txt", bouncer._userlist())
        program.write("pgbouncer.ini", bouncer.ini)
        bouncer._start()
        return bouncer

    @property
    def dsn(self) -> str:
        """A URL of the ordinary role ``app`` in the database ``shop``, through this PgBouncer."""
        return url(self.address, self._role.name, self._role.password, DATABASE)

    @property
    def admin_dsn(self) -> str:
        """A URL of the console: connect with ``autocommit=True``; it takes SHOW, PAUSE… and no SQL."""
        return url(self.address, self._console.name, self._console.password, "pgbouncer")

    @property
    def ini(self) -> str:
        """The text of pgbouncer.ini that runs."""
        return self._ini

    def reload(self) -> None:
        """Have PgBouncer read its configuration again (RELOAD in the console)."""
        self.rows("RELOAD")

    # --- for Node -------------------------------------------------------------------------------------------

    def _arguments(self) -> list[str]:
        return ["pgbouncer.ini"]

    def _configuration(self) -> str:
        return self._ini

    def _shut_down_signals(self) -> list[int]:
        return [signal.SIGQUIT]  # at once in every version; SIGTERM waits for clients since 1.23

    def _userlist(self) -> str:
        secret = self._role.password if self.version in SECRET_BREAKS else self._role.secret
        pairs = {self._role.name: secret, self._console.name: self._console.secret}
        return "".join(f'"{name}" "{password}"\n' for name, password in pairs.items())

    def _change(self, settings: dict[str, Value]) -> Change:
        configuration.check_names(settings, {**REFUSED, "listen_port": "a node keeps its address"})
        _check_privacy(settings)
        shown = {row["key"]: row for row in self.rows("SHOW CONFIG")}
        for name in settings:
            if name not in shown:
                near = configuration.did_you_mean(name, shown)
                raise SettingError(f"PgBouncer {self.version} has no setting {name}; {near or DOCUMENTATION}")
        how = "reload" if all(_reloadable(shown[name]) for name in settings) else "restart"
        old = {name: shown[name]["value"] or "" for name in settings}
        change = Change(self.label, how, {}, old, self._ini)
        try:
            self._apply(how, ini_with(self._ini, "pgbouncer", settings))
        except (SettingError, StartError) as problem:
            self._restore(change)
            reason = problem.reason if isinstance(problem, StartError) else problem
            raise SettingError(f"PgBouncer {self.version} refuses: {reason}") from problem
        after = {row["key"]: row["value"] or "" for row in self.rows("SHOW CONFIG")}
        return Change(self.label, how, {name: after[name] for name in settings}, old, change.file)

    def _restore(self, change: Change) -> None:
        self._apply(change.how, change.file)

    def _apply(self, how: str, ini: str) -> None:
        mark = self.mark()
        self._write_ini(ini)
        if how == "restart" or self._frozen or not self._program.alive():
            self.restart()
            return
        try:
            self.reload()
        except psycopg.Error as problem:  # newer versions say so in the console, older ones in the log alone
            raise SettingError(self._reason(self.log(mark)) or str(problem)) from problem
        if reason := self._reason(self.log(mark)):
            raise SettingError(reason)

    def _write_ini(self, text: str) -> None:
        self._program.write("pgbouncer.ini", text)
        self._ini = text

    def _reason(self, log: str) -> str:
        match = TROUBLE.search(log)
        return match.group(1).strip() if match else ""

    def _hopeless(self, mark: int) -> str:
        """It keeps clients waiting for a server that is not there, and tries again only after a while."""
        match = NO_SERVER.search(self._program.log(mark))
        return f"no server answers it at {match.group(1)}" if match else ""

    def _hint(self, reason: str) -> str:
        if match := re.search(r"unknown parameter: pgbouncer/(\S+)", reason):
            return self._hint_for_name(match.group(1))
        if "invalid value" in reason:
            return f"{DOCUMENTATION} says what the setting takes; a comment cannot stand behind a value"
        if re.search("authentication failed|no such user|wrong password type", reason):
            return (
                f"leave auth_file out: connlab's own knows {self._role.name}; and auth_type, unless it is scram-sha-256"
            )
        if "no server answers" in reason:
            return "see the section [databases]: host and port of pg.inner_address, or leave the section out"
        return "leave listen_port out to get one that is free" if "Address already in use" in reason else ""

    def _hint_for_name(self, name: str) -> str:
        if name in configuration.PGBOUNCER_NAMES:
            return (
                f"PgBouncer {self.version} does not have it: https://www.pgbouncer.org/changelog.html says which does"
            )
        near = configuration.did_you_mean(name, configuration.PGBOUNCER_NAMES)
        return near or f"check the setting's name: {DOCUMENTATION}"


def _reloadable(row: Mapping[str, str | None]) -> bool:
    """Whether a reload sets it and, without its line, gives it its default again: "not set" is none it could give."""
    return row["changeable"] == "yes" and row["value"] is not None


def complete_ini(text: str, settings: Mapping[str, Value], server: Address, listen: Address) -> str:
    """``text`` with ``settings`` and what it lacks to run beside this server.

    Where it listens and logs is connlab's to say, and one more administrator; all else that the text says holds.
    """
    text = _with_databases(text, f"host={server.host} port={server.port}")
    if settings:
        text = ini_with(text, "pgbouncer", settings)
    given = ini_values(text, "pgbouncer")
    _check_privacy(given)
    administrators = [given["admin_users"], CONSOLE] if given.get("admin_users") else [CONSOLE]
    added: dict[str, Value] = {"listen_addr": listen.host, "listen_port": listen.port, "unix_socket_dir": ""}
    added |= {name: "" for name in ("logfile", "pidfile", "user") if name in given}
    wanted = {"auth_type": "scram-sha-256", "auth_file": "userlist.txt"}
    added |= {name: value for name, value in wanted.items() if name not in given}
    return ini_with(text, "pgbouncer", {**added, "admin_users": ", ".join(administrators)}, "added by connlab")


def _with_databases(text: str, server: str) -> str:
    given = ini_values(text, "databases")
    if not given:
        return ini_with(text, "databases", {DATABASE: server, "*": server})
    if DATABASE in given or "*" in given:
        return text
    return ini_with(text, "databases", {DATABASE: server}, "added by connlab")


def _check_privacy(settings: Mapping[str, Value]) -> None:
    method = settings.get("auth_type")
    if method in ("trust", "any"):
        raise SettingError(f"auth_type = {method} asks for no password; every server of connlab's does")
