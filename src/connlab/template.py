"""The initialised data directory: made once per version, cloned for each server.

``initdb`` takes about a second; a clone a few hundredths. The cache holds, for each PostgreSQL, ``data.pack`` (a
stopped server's directory with the sample schema) and ``password`` (its superuser's, replaced at every start).
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import psycopg

from connlab import janitor, places
from connlab.errors import StartError
from connlab.once import made_once
from connlab.pack import pack
from connlab.programs import PostgresPrograms
from connlab.runtime.process import LocalProgram, wait_until

SUPERUSER, ROLE, DATABASE = "postgres", "app", "shop"
# A quarter of all files. A table without one counts as full until it is vacuumed: the next row goes to a new page
# (https://www.postgresql.org/docs/current/storage-fsm.html).
FREE_SPACE_MAPS = "*_fsm"
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
# One that fails leaves postmaster.pid, which tells the shared memory to remove.
INITDB += ["--no-clean"]
LITTLE_WAL = ["-c", "min_wal_size=2MB", "-c", "max_wal_size=2MB", "-c", "wal_recycle=off"]


@dataclass(frozen=True)
class Template:
    """An initialised data directory, packed (``connlab.pack``) in the cache, and its superuser's password."""

    data: Path
    password: str


def initialised(postgres: PostgresPrograms) -> Template:
    """The template for this PostgreSQL; made when it is missing, by one process however many ask."""
    place = places.cache_dir() / "templates" / _key(postgres)
    return made_once(place, lambda scratch: _make(postgres, scratch), _usable)


def _usable(place: Path) -> Template | None:
    """The template there, or None: the cache may be deleted at any time, by halves too."""
    if not (place / "data.pack").is_file() or not (place / "password").is_file():
        return None
    return Template(place / "data.pack", (place / "password").read_text())


def _key(postgres: PostgresPrograms) -> str:
    """Another version, build, schema or way of initialising (all of it stands in this file) gets another template."""
    program = postgres.bin / "postgres"
    parts = [str(program.resolve()), str(program.stat().st_mtime_ns), _schema(), Path(__file__).read_text()]
    return f"{postgres.version}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def _schema() -> str:
    return resources.files("connlab").joinpath("schema.sql").read_text()


@janitor.all_or_nothing
def _make(postgres: PostgresPrograms, scratch: Path) -> None:
    """Initialise where servers run, so that the watchdog sees to it; then copy to ``scratch``."""
    program = LocalProgram("template", postgres.bin / "postgres", postgres.version, postgres.environment, listens=False)
    try:
        password = _initdb(program)
        _load_schema(program, password)
        pack(Path(program.directory) / "data", scratch / "data.pack", without=FREE_SPACE_MAPS)
        (scratch / "password").touch(mode=0o600)
        (scratch / "password").write_text(password)
    finally:
        program.remove()


def _initdb(program: LocalProgram) -> str:
    password = secrets.token_urlsafe(24)
    program.write("password", password)
    data = f"{program.directory}/data"
    # Files instead of POSIX shared memory, which is small in containers and stays when initdb is killed.
    files = ["--set", "dynamic_shared_memory_type=mmap"] if program.version >= (16,) else []
    program.run("initdb", ["--pgdata", data, "--pwfile", f"{program.directory}/password", *INITDB, *files])
    program.write("data/pg_hba.conf", HBA)
    return password


def _load_schema(program: LocalProgram, password: str) -> None:
    """Run the schema through the socket, then stop the server in order."""
    data = f"{program.directory}/data"
    sockets = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={program.directory}"]
    quick = ["-c", "fsync=off", "-c", "autovacuum=off", "-c", "dynamic_shared_memory_type=mmap"]
    program.start(["-D", data, *quick, *LITTLE_WAL, *sockets])
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
