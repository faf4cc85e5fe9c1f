"""Private: nobody gets in from elsewhere or without the password, and no password is to be found."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from conftest import Start
from leftovers import LINUX, until

from connlab import ConnlabError, PgBouncer, Postgres, StartError, places
from connlab.account import server_account

Node = Postgres | PgBouncer
PATIENCE = 60.0
NO_ENTRY = "authentication failed|no password supplied|not allowed"
SASL = 10
"""The server's demand for SASL: https://www.postgresql.org/docs/current/protocol-message-formats.html"""


@pytest.fixture(params=["PostgreSQL", "PgBouncer"])
def either(request: pytest.FixtureRequest, server: Postgres, bouncer: PgBouncer) -> Node:
    return server if request.param == "PostgreSQL" else bouncer


def enters(node: Node, **login: Any) -> bool:
    """Whether a login gets in; raises when something else than the login is in the way."""
    login = {"host": node.address.host, "port": node.address.port, "passfile": "/dev/null", **login}
    try:
        with psycopg.connect(**login, autocommit=True, connect_timeout=20):
            return True
    except psycopg.OperationalError as problem:
        if not re.search(NO_ENTRY, str(problem)):
            raise
        return False


def passwords(*nodes: Node) -> list[str]:
    """Every password that opens one of these nodes."""
    dsns = {dsn for node in nodes for dsn in (node.dsn, node.admin_dsn)}
    return sorted({str(psycopg.conninfo.conninfo_to_dict(dsn)["password"]) for dsn in dsns})


# --- who can reach it ---------------------------------------------------------------------------------------------


def test_no_other_address_of_this_machine_answers(either: Node) -> None:
    assert either.address.host == "127.0.0.1" and answers("127.0.0.1", either.address.port)
    others = [address for address in own_addresses() if address != "127.0.0.1"]
    assert [address for address in others if answers(address, either.address.port)] == []


def own_addresses() -> list[str]:
    families = (socket.AF_INET, socket.AF_INET6)
    found = [entry for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in families]
    return [*{entry.address for entry in found}, "127.0.0.2", "::1"]


def answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False


def test_its_processes_listen_on_that_address_alone(either: Node, local_only: None) -> None:
    main = main_process(either)
    pids = {main.pid, *(child.pid for child in main.children(recursive=True))}
    listening = [row for row in psutil.net_connections("inet") if row.status == psutil.CONN_LISTEN]
    found = {tuple(row.laddr) for row in listening if row.pid in pids}
    assert found == {tuple(either.address)}


def main_process(node: Node) -> psutil.Process:
    if isinstance(node, Postgres):
        return psutil.Process(int(node.value("select pg_read_file('postmaster.pid')").split()[0]))
    rows = [row for row in psutil.net_connections("tcp") if row.status == psutil.CONN_LISTEN]
    (pid,) = {row.pid for row in rows if row.laddr.port == node.address.port and row.pid}
    return psutil.Process(pid)


def home_of(node: Node) -> Path:
    """The directory in which the node's main process runs (PostgreSQL goes into its data directory)."""
    cwd = Path(main_process(node).cwd())
    return cwd.parent if isinstance(node, Postgres) else cwd


def test_pgbouncer_has_no_unix_socket(bouncer: PgBouncer, local_only: None) -> None:
    assert [path for path in home_of(bouncer).rglob("*") if path.is_socket()] == []
    if LINUX:
        assert f".s.PGSQL.{bouncer.address.port}" not in Path("/proc/net/unix").read_text()


def test_others_cannot_reach_the_socket(server: Postgres, local_only: None) -> None:
    account, other = server_account(), pwd.getpwnam("nobody")
    if account is None or account == other:
        pytest.skip("needs root, and two users to drop to")
    path = f"{server.socket_directory}/.s.PGSQL.{server.address.port}"
    reached = [subprocess.run(["test", "-S", path], user=user.pw_uid).returncode for user in (account, other)]
    assert reached == [0, 1]


def test_files_are_the_servers_users_alone(either: Node, local_only: None) -> None:
    """What the server has itself; the log and the note of its programs are ours, in the same closed directory."""
    home, account = home_of(either), server_account()
    user = account.pw_uid if account else os.geteuid()
    found: dict[Path, os.stat_result] = {}
    for path in [home, *home.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):  # a server at work removes files
            found |= {path: path.lstat()} if path.name not in ("log", "programs") else {}
    assert len(found) > (900 if isinstance(either, Postgres) else 2)
    assert [path for path, seen in found.items() if not path.is_socket() and seen.st_mode & 0o077] == []
    assert {seen.st_uid for seen in found.values()} == {user}


def test_nobody_can_list_or_change_the_directories_above(either: Node, local_only: None) -> None:
    owner = home_of(either).parent
    for directory in (owner, owner.parent):
        found = directory.stat()
        assert found.st_uid == os.geteuid()
        assert stat.S_IMODE(found.st_mode) == (0o711 if os.geteuid() == 0 else 0o700)


def test_the_initialised_directories_in_the_cache_are_closed(server: Postgres, local_only: None) -> None:
    secret = list((places.cache_dir() / "templates").glob("*/*"))
    assert "password" in {path.name for path in secret}
    assert [path for path in secret if path.stat().st_mode & 0o077] == []


# --- no entry without the password --------------------------------------------------------------------------------

WRONG: list[dict[str, str]] = [{"password": ""}, {"password": "wrong"}]


@pytest.mark.parametrize("wrong", WRONG, ids=["no password", "a wrong password"])
@pytest.mark.parametrize("way", ["tcp", "socket"])
@pytest.mark.parametrize("user", ["app", "postgres"])
@pytest.mark.parametrize("replication", [None, "database", "true"])
def test_nobody_enters_postgresql_without_the_password(
    server: Postgres, user: str, way: str, replication: str | None, wrong: dict[str, str], backend: str
) -> None:
    if way == "socket" and backend != "local":
        with pytest.raises(ConnlabError, match="inside its container"):
            print(server.socket_directory)
        return
    login = {"user": user, "dbname": "shop"}
    login |= {"host": server.socket_directory} if way == "socket" else {}
    login |= {"replication": replication} if replication else {}
    assert not enters(server, **login, **wrong)
    if user == "postgres":
        right = str(psycopg.conninfo.conninfo_to_dict(server.admin_dsn)["password"])
        assert enters(server, **login, password=right), "the test knocks at the right door"


@pytest.mark.parametrize("wrong", WRONG, ids=["no password", "a wrong password"])
@pytest.mark.parametrize("database", ["shop", "pgbouncer", "postgres"])
@pytest.mark.parametrize("user", ["app", "postgres", "console", "pgbouncer", "stats", ""])
def test_nobody_enters_pgbouncer_without_the_password(
    bouncer: PgBouncer, user: str, database: str, wrong: dict[str, str]
) -> None:
    assert not enters(bouncer, user=user or "nobody_at_all", dbname=database, **wrong)


def test_whoever_has_the_password_enters(server: Postgres, bouncer: PgBouncer) -> None:
    for dsn in (server.dsn, server.admin_dsn, bouncer.dsn, bouncer.admin_dsn):
        login = psycopg.conninfo.conninfo_to_dict(dsn)
        assert enters(server, **login)


def test_the_password_in_the_cache_opens_nothing(server: Postgres, local_only: None) -> None:
    found = [path.read_text() for path in (places.cache_dir() / "templates").glob("*/password")]
    assert found
    assert [word for word in found if enters(server, user="postgres", dbname="postgres", password=word)] == []


def test_one_nodes_password_does_not_open_another(start: Start, server: Postgres, bouncer: PgBouncer) -> None:
    other = start()
    front = other.pgbouncer()
    assert set(passwords(server, bouncer)).isdisjoint(passwords(other, front))
    assert len(passwords(other, front)) == 3 and all(len(word) >= 32 for word in passwords(other, front))


# --- SCRAM --------------------------------------------------------------------------------------------------------


def test_postgresql_knows_no_other_method(server: Postgres) -> None:
    rules = server.rows("select type, auth_method, error from pg_hba_file_rules")
    assert {rule["type"] for rule in rules} == {"local", "host"}
    assert {(rule["auth_method"], rule["error"]) for rule in rules} == {("scram-sha-256", None)}


@pytest.mark.parametrize("encryption", ["scram-sha-256", "md5"])
def test_postgresql_keeps_scram_secrets_alone(start: Start, encryption: str) -> None:
    pg = start(password_encryption=encryption)
    rows = pg.rows("select rolname, rolpassword from pg_authid where rolcanlogin")
    assert {row["rolname"] for row in rows} == {"app", "postgres"}
    assert all(row["rolpassword"].startswith("SCRAM-SHA-256$") for row in rows)


@pytest.mark.parametrize("user", ["app", "postgres", "console", "pgbouncer", "nobody_at_all"])
def test_scram_is_all_that_is_offered_on_the_wire(either: Node, user: str) -> None:
    kind, method, mechanisms = offered(either, user)
    assert (kind, method) == (b"R", SASL)
    assert set(mechanisms) <= {b"SCRAM-SHA-256", b"SCRAM-SHA-256-PLUS"} and mechanisms


def offered(node: Node, user: str) -> tuple[bytes, int, list[bytes]]:
    """What the node answers to the first packet: its kind, the method's number and SASL's mechanisms."""
    words = b"".join(word.encode() + b"\0" for word in ("user", user, "database", "shop")) + b"\0"
    with socket.create_connection(node.address, timeout=20) as wire, wire.makefile("rb") as answer:
        wire.sendall(struct.pack("!ii", len(words) + 8, 3 << 16) + words)
        kind, length = answer.read(1), struct.unpack("!i", answer.read(4))[0]
        body = answer.read(length - 4)
    return kind, struct.unpack("!i", body[:4])[0], [word for word in body[4:].split(b"\0") if word]


def test_pgbouncer_logs_in_with_scram_too(server: Postgres, bouncer: PgBouncer) -> None:
    assert dict((row["key"], row["value"]) for row in bouncer.rows("SHOW CONFIG"))["auth_type"] == "scram-sha-256"
    with psycopg.connect(bouncer.dsn) as connection:
        assert connection.pgconn.used_password
        if server.version >= (16,):
            assert connection.execute("select system_user").fetchone() == ("scram-sha-256:app",)


# --- no password is to be found -----------------------------------------------------------------------------------

TALKATIVE = {
    "log_statement": "all",
    "log_min_duration_statement": 0,
    "log_duration": True,
    "log_connections": True,
    "log_error_verbosity": "verbose",
    "log_min_messages": "debug2",
}


def test_no_password_is_in_the_process_list(start: Start) -> None:
    """Watched from before the start to the end, since programs that set things up are gone quickly."""
    with commands_seen() as seen:
        pg = start()
        bouncer = pg.pgbouncer()
        with pg.settings(max_connections=30), psycopg.connect(bouncer.dsn):
            pass
    words = passwords(pg, bouncer)
    assert [line for line in seen if any(word in line for word in words)] == []


@contextlib.contextmanager
def commands_seen() -> Iterator[set[str]]:
    """The command lines of all processes that are there at any moment of the block."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    seen.add(" ".join(process.cmdline()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
        assert until(lambda: any("postgres" in line for line in seen), PATIENCE)
    finally:
        over.set()
        watcher.join()


def test_no_password_is_in_a_log(start: Start) -> None:
    pg = start(**TALKATIVE)
    bouncer = pg.pgbouncer(verbose=3)
    with psycopg.connect(bouncer.dsn) as connection:
        connection.execute("select 'hello from the client'")
    for way in ("reload", "restart"):
        getattr(pg, way)()
    bouncer.reload()
    logs = pg.log() + bouncer.log()
    assert "hello from the client" in pg.log(), "it is as talkative as it was told to be"
    assert [word for word in passwords(pg, bouncer) if word in logs] == []
    assert "SCRAM-SHA-256$" not in pg.log()


def test_no_password_is_in_what_a_node_shows(server: Postgres, bouncer: PgBouncer) -> None:
    texts = [repr(server), repr(bouncer), server.conf, bouncer.ini, repr(vars(server)), repr(vars(bouncer))]
    with pytest.raises(StartError) as caught:
        server.pgbouncer(pool_mode="nonsense")
    texts.append(str(caught.value))
    assert [word for word in passwords(server, bouncer) for text in texts if word in text] == []
