"""Settings as the servers write them: values, lines, and what a change of them did."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from connlab.errors import SettingError

Value = str | int | float | bool
"""A setting's value as Python has it; booleans become on/off (PgBouncer: 1/0)."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Change:
    """What ``with node.settings(…)`` did.

    ``how`` is "reload" or "restart"; ``new`` and ``old`` map each setting to its value as the server shows it.
    """

    label: str
    how: str
    new: Mapping[str, str]
    old: Mapping[str, str]
    file: str = field(default="", repr=False)
    """The configuration file as it was, to be put back."""

    def __str__(self) -> str:
        values = ", ".join(f"{name} {self.old[name]} -> {value}" for name, value in self.new.items())
        return f"{self.label}, {self.how}: {values}"


def check_names(settings: Iterable[str], refused: Mapping[str, str]) -> None:
    """Raise SettingError for a name that cannot be one, or that is ``refused`` (name to reason)."""
    for name in settings:
        if not NAME.fullmatch(name):
            raise SettingError(f"{name!r} is not the name of a setting")
        if name.lower() in refused:  # PostgreSQL takes names in capitals too
            raise SettingError(f"{name} cannot be set here: {refused[name.lower()]}")


def postgres_value(value: Value) -> str:
    """A value as postgresql.conf takes it: bare where that is possible, else quoted.

    Example:
        >>> postgres_value(True), postgres_value(20), postgres_value("it's")
        ('on', '20', "'it''s'")
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return str(value)
    return "'" + _text(value).replace("\\", "\\\\").replace("'", "''") + "'"


def postgres_lines(settings: Mapping[str, Value]) -> str:
    """Settings as lines of postgresql.conf."""
    return "".join(f"{name} = {postgres_value(value)}\n" for name, value in settings.items())


def pgbouncer_value(value: Value) -> str:
    """A value as pgbouncer.ini takes it: everything after the equals sign, no comment behind it."""
    if isinstance(value, bool):
        return str(int(value))
    return str(value) if isinstance(value, int | float) else _text(value)


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise SettingError(f"a setting's value is text, a number, True or False, not {value!r}")
    if "\n" in value or "\r" in value:
        raise SettingError(f"a setting's value has no line breaks: {value!r}")
    return value


def ini_with(text: str, section: str, settings: Mapping[str, Value], note: str = "") -> str:
    """``text`` with settings at the end of ``section`` (made when missing), under a comment ``note``.

    PgBouncer takes the last of two lines for one setting, so these win: they go into the last section of that name,
    or into one at the very end when another file is included behind it.

    Example:
        >>> print(ini_with("[pgbouncer]\\npool_mode = session\\n", "pgbouncer", {"listen_port": 6432}))
        [pgbouncer]
        pool_mode = session
        listen_port = 6432
        <BLANKLINE>
    """
    added = [f"; {note}"] if note else []
    added += [f"{name} = {pgbouncer_value(value)}" for name, value in settings.items()]
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    start = max((n for n, line in enumerate(lines) if _section(line) == section), default=None)
    if start is None or any(line.lstrip().startswith("%include") for line in lines[start:]):
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        start = len(lines) - 1
    end = next((n for n in range(start + 1, len(lines)) if _section(lines[n])), len(lines))
    while end - 1 > start and not lines[end - 1].strip():
        end -= 1
    return "\n".join(lines[:end] + added + lines[end:]) + "\n"


def ini_values(text: str, section: str) -> dict[str, str]:
    """What ``section`` of ``text`` sets, the last line of each name.

    Example:
        >>> ini_values("[pgbouncer]\\npool_mode = session\\n; pool_mode = statement\\n", "pgbouncer")
        {'pool_mode': 'session'}
    """
    found, current = {}, ""
    for line in text.splitlines():
        current = _section(line) or current
        if current == section and "=" in line and not line.lstrip().startswith((";", "#", "[")):
            name, _, value = line.partition("=")
            found[name.strip()] = value.strip()
    return found


POSTGRES_NAMES = frozenset(
    """
    application_name archive_mode authentication_timeout autovacuum client_connection_check_interval cluster_name
    deadlock_timeout default_transaction_isolation default_transaction_read_only effective_cache_size fsync
    full_page_writes hot_standby huge_pages idle_in_transaction_session_timeout idle_session_timeout jit lock_timeout
    log_connections log_disconnections log_duration log_line_prefix log_lock_waits log_min_duration_statement
    log_min_messages log_statement log_temp_files maintenance_work_mem max_connections max_locks_per_transaction
    max_parallel_workers max_prepared_transactions max_standby_streaming_delay max_wal_senders max_wal_size
    max_worker_processes password_encryption random_page_cost reserved_connections search_path session_preload_libraries
    shared_buffers shared_preload_libraries ssl statement_timeout superuser_reserved_connections synchronous_commit
    tcp_keepalives_count tcp_keepalives_idle tcp_keepalives_interval tcp_user_timeout temp_buffers timezone
    track_activities track_activity_query_size track_io_timing transaction_timeout wal_level work_mem
    """.split()  # noqa: SIM905
)
"""Settings that people name, for "did you mean" where no server runs that could be asked."""
PGBOUNCER_NAMES = frozenset(
    """
    admin_users application_name_add_host auth_file auth_query auth_type auth_user autodb_idle_timeout
    cancel_wait_timeout client_idle_timeout client_login_timeout client_tls_sslmode default_pool_size disable_pqexec
    dns_max_ttl idle_transaction_timeout ignore_startup_parameters listen_backlog log_connections log_disconnections
    log_pooler_errors log_stats max_client_conn max_db_client_connections max_db_connections max_packet_size
    max_prepared_statements max_user_client_connections max_user_connections min_pool_size pkt_buf pool_mode
    query_timeout query_wait_notify query_wait_timeout reserve_pool_size reserve_pool_timeout server_check_delay
    server_check_query server_connect_timeout server_fast_close server_idle_timeout server_lifetime server_login_retry
    server_reset_query server_reset_query_always server_round_robin server_tls_sslmode so_reuseport stats_period
    stats_users suspend_timeout tcp_keepalive tcp_keepcnt tcp_keepidle tcp_keepintvl tcp_user_timeout
    track_extra_parameters transaction_timeout verbose
    """.split()  # noqa: SIM905
)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A sentence that names the settings closest to ``name``, or an empty text."""
    near = difflib.get_close_matches(name.lower(), known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _section(line: str) -> str:
    match = re.match(r"\s*\[([^]]*)\]", line)
    return match.group(1).strip() if match else ""
