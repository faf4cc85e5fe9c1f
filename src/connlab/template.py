"""The initialised data directory: made once per version, cloned for each server.

``initdb`` takes about a second; a clone a few hundredths. The cache holds, for each PostgreSQL, ``data`` (a
stopped server's directory with the sample schema) and ``password`` (its superuser's, replaced at every start).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import psycopg

from connlab import places
from connlab.errors import StartError
from connlab.programs import PostgresPrograms
from connlab.runtime.process import LocalProgram, wait_until

SUPERUSER, ROLE, DATABASE = "postgres", "app", "shop"
HBA = """\
# Nobody gets in without a password, through the socket neither.
local  all          all       scram-sha-256
host   all          all  all  scram-sha-256
local  replication  all       scram-sha-256
host   replication  all  all  scram-sha-256
"""
INITDB = ["--username", SUPERUSER, "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C"]
# Small WAL segments make a small clone.
INITDB += ["--wal-segsize", "1", "--no-sync", "--no-instructions"]


_THREADS = threading.Lock()  # file locks exclude processes, not the threads of one


@dataclass(frozen=True)
class Template:
    """An initialised data directory in the cache, and its superuser's password."""

    data: Path
    password: str


def initialised(postgres: PostgresPrograms) -> Template:
    """The template for this PostgreSQL; made when it is missing, by one process however many ask."""
    place = places.cache_dir() / "templates" / _key(postgres)
    if not place.is_dir():
        place.parent.mkdir(exist_ok=True)
        with _THREADS, _lock(place.parent / f"{place.name}.lock"):
            if not place.is_dir():
                _make(postgres, place)
    return Template(place / "data", (place / "password").read_text())


def clone(source: Path, target: Path, account: pwd.struct_passwd | None) -> None:
    """Copy a data directory, readable for ``account`` (None: us) alone. Raises OSError, as for a full disk.

    Faster than ``shutil.copytree`` by a factor of two, for it looks at no file's times and rights.
    """
    target.mkdir(mode=0o700)
    if account:
        os.chown(target, account.pw_uid, account.pw_gid)
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                clone(Path(entry.path), target / entry.name, account)
            else:
                _copy_file(entry.path, f"{target}/{entry.name}", account)


def _copy_file(source: str, target: str, account: pwd.struct_passwd | None) -> None:
    with open(source, "rb", buffering=0) as origin:
        copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if account:
                os.fchown(copy, account.pw_uid, account.pw_gid)
            while data := origin.read(1 << 20):
                os.write(copy, data)
        finally:
            os.close(copy)


def _key(postgres: PostgresPrograms) -> str:
    """Another version, build, schema or way of initialising gets another template."""
    program = postgres.bin / "postgres"
    parts = [str(program.resolve()), str(program.stat().st_mtime_ns), _schema(), HBA, *INITDB]
    return f"{postgres.version}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def _schema() -> str:
    return resources.files("connlab").joinpath("schema.sql").read_text()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(postgres: PostgresPrograms, place: Path) -> None:
    """Initialise where servers run, so that the watchdog sees to it; then copy to the cache and rename."""
    program = LocalProgram("template", postgres.bin / "postgres", postgres.version, postgres.environment, listens=False)
    partial = place.parent / f"{place.name}.partial"
    try:
        password = _initdb(program)
        _load_schema(program, password)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed; we hold the lock
        partial.mkdir(mode=0o700)
        clone(Path(program.directory) / "data", partial / "data", None)
        (partial / "password").touch(mode=0o600)
        (partial / "password").write_text(password)
        partial.rename(place)
    except OSError as problem:
        raise StartError(f"cannot make the initialised data directory {place}: {problem}") from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        program.remove()


def _initdb(program: LocalProgram) -> str:
    password = secrets.token_urlsafe(24)
    program.write("password", password)
    data = f"{program.directory}/data"
    program.run("initdb", ["--pgdata", data, "--pwfile", f"{program.directory}/password", *INITDB])
    program.write("data/pg_hba.conf", HBA)
    return password


def _load_schema(program: LocalProgram, password: str) -> None:
    """Run the schema through the socket, then stop the server in order."""
    data = f"{program.directory}/data"
    sockets = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={program.directory}"]
    program.start(["-D", data, "-c", "fsync=off", "-c", "autovacuum=off", *sockets])
    login = psycopg.conninfo.make_conninfo(host=program.directory, user=SUPERUSER, password=password)
    first, second = _schema().split("\\connect shop")
    _until_it_answers(program, f"{login} dbname=postgres")
    for database, script in (("postgres", first), (DATABASE, second)):
        with psycopg.connect(f"{login} dbname={database}", autocommit=True) as connection:
            for statement in filter(str.strip, script.split(";")):
                connection.execute(statement)
            connection.execute("reset role")
            connection.execute("vacuum (analyze, freeze)")
    program.signal(2)  # SIGINT: fast shutdown
    if not wait_until(lambda: not program.alive(), 30):
        raise StartError("the server did not stop after it was initialised", log=program.log())


def _until_it_answers(program: LocalProgram, login: str) -> None:
    def answers() -> bool:
        try:
            psycopg.connect(login).close()
        except psycopg.OperationalError:
            return not program.alive()
        return True

    if not wait_until(answers, 60, pause=0.01) or not program.alive():
        raise StartError("the server did not start to be initialised", command=program.command(), log=program.log())
