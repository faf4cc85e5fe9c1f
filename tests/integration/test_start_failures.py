"""Says what is wrong: a start that fails says why, at once, with what it ran and how to go on, and leaves nothing."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Start
from containers import containers_and_networks
from leftovers import LINUX, Child, Person, assert_nothing_left, ordinary_person

import connlab.node
from connlab import PgBouncer, Postgres, ProgramMissing, SettingError, StartError, places
from connlab.node import READY_WITHIN

AT_ONCE = READY_WITHIN / 3
"""Seconds for "at once" on a busy machine: well under the readiness timeout."""


@pytest.fixture(scope="module", autouse=True)
def _watchdog(server: Postgres) -> None:
    """The helpers that a process starts with its first server are there before anything is compared."""


@pytest.fixture(autouse=True)
def _nothing_remains() -> Iterator[None]:
    """After each test of this module: the servers, files and processes of before, and no more."""
    before = what_is_there()
    yield
    assert what_is_there() == before


def what_is_there() -> tuple[set[str], set[str], list[str]]:
    """What this process has: directories of servers, children, containers and networks."""
    directories = {str(path) for root in places.run_roots() for path in root.glob(f"{os.getpid()}-*/*/")}
    children = {f"{child.pid} {child.name()}" for child in psutil.Process().children()}
    return directories, children, containers_and_networks(os.getpid())


def failure(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """What ``call`` raises; it must do so at once."""
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        call()
    assert time.monotonic() - began < AT_ONCE
    assert type(caught.value) is kind
    return caught.value


def assert_complete(problem: StartError, reason: str, *, program: str, configuration: str) -> None:
    """The reason comes first; the command, the configuration and the last log lines come after it."""
    message = str(problem)
    assert reason in message.splitlines()[0]
    assert program in problem.command and configuration in problem.configuration and problem.log
    parts = [message.index(part) for part in ("Command:\n", "Configuration:\n", "Last log lines:\n")]
    assert parts == sorted(parts)
    for part in (problem.command, *problem.configuration.splitlines(), *problem.log.splitlines()):
        assert part in message


# --- settings of PostgreSQL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason", "hint"),
    [
        (
            {"max_conections": 20},
            'unrecognized configuration parameter "max_conections"',
            "did you mean max_connections",
        ),
        (
            {"quite_unheard_of": 1},
            'unrecognized configuration parameter "quite_unheard_of"',
            "check the setting's name",
        ),
        ({"work_mem": "a lot"}, 'invalid value for parameter "work_mem": "a lot"', "says what each setting takes"),
        ({"max_connections": 0}, '0 is outside the valid range for parameter "max_connections"', ""),
        ({"max_connections": 3}, "must be less than", ""),
        ({"conf": "max_connections = 20 30"}, "syntax error in file", ""),
        ({"conf": "include_dir = 'conf.d'"}, "could not open configuration directory", ""),
        ({"shared_preload_libraries": "no_such_library"}, 'could not access file "no_such_library"', ""),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_postgresql_does_not_take(start: Start, settings: Any, reason: str, hint: str) -> None:
    problem = failure(StartError, lambda: start(**settings))
    name = next(iter(settings.values() if "conf" in settings else settings))
    assert_complete(problem, reason, program="postgres", configuration=name)
    assert str(problem).startswith("PostgreSQL ")
    assert hint in problem.hint and (not hint or f"What to do: {problem.hint}" in str(problem).splitlines()[1])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"listen_addresses": "*"}, "listen_addresses cannot be set here: .*this machine alone"),
        ({"LISTEN_ADDRESSES": "*"}, "LISTEN_ADDRESSES cannot be set here"),
        ({"hba_file": "/tmp/open"}, "hba_file cannot be set here"),
        ({"data_directory": "/tmp/data"}, "data_directory cannot be set here: .*on_disk=True"),
        ({"logging_collector": True}, r"logging_collector cannot be set here: .*pg\.log\(\)"),
        ({"dynamic_shared_memory_type": "posix"}, "dynamic_shared_memory_type cannot be set here"),
        ({"port": "5432"}, "port takes a whole number, not '5432'"),
        ({"port": True}, "port takes a whole number, not True"),
        ({"work_mem": None}, "text, a number, True or False, not None"),
        ({"work_mem": "4MB\nfsync = off"}, "no line breaks"),
        ({"work mem": "4MB"}, "'work mem' is not the name of a setting"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_connlab_refuses(start: Start, settings: Any, reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        start(**settings)


# --- settings of PgBouncer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason", "hint"),
    [
        ({"pool_mode": "sesion"}, 'invalid value "sesion" for parameter pool_mode', "says what the setting takes"),
        ({"default_pool_size": "many"}, 'invalid value "many" for parameter default_pool_size', "takes"),
        ({"defautl_pool_size": 5}, "unknown parameter: pgbouncer/defautl_pool_size", "did you mean default_pool_size"),
        ({"quite_unheard_of": 5}, "unknown parameter: pgbouncer/quite_unheard_of", "check the setting's name"),
        (
            {"ini": "[pgbouncer]\npool_mode = session ; the default\n"},
            'invalid value "session ; the default" for parameter pool_mode',
            "a comment cannot stand behind a value",
        ),
        ({"ini": "pool_mode = session\n"}, "value without section: pool_mode", ""),
        ({"ini": "[pgbouncr]\npool_mode = session\n"}, 'invalid section "pgbouncr"', ""),
        ({"ini": "[pgbouncer]\npool_mode\n"}, "syntax error in configuration (pgbouncer.ini:2)", ""),
        ({"auth_file": "/no/such/file"}, "it runs and lets no query through", "leave auth_file out"),
        ({"auth_type": "plain"}, "it runs and lets no query through", "auth_type"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_pgbouncer_does_not_take(
    server: Postgres, backend: str, settings: Any, reason: str, hint: str
) -> None:
    problem = failure(StartError, lambda: server.pgbouncer(**settings))
    listening = "listen_addr = 127.0.0.1" if backend == "local" else "listen_addr = 198."
    assert_complete(problem, reason, program="pgbouncer", configuration=listening)
    assert str(problem).startswith("PgBouncer ")
    assert hint in problem.hint


def test_a_setting_that_a_newer_pgbouncer_has(server: Postgres, bouncer: PgBouncer) -> None:
    if bouncer.version >= (1, 21):
        with server.pgbouncer(max_prepared_statements=10) as front:
            assert "max_prepared_statements = 10" in front.ini
        return
    problem = failure(StartError, lambda: server.pgbouncer(max_prepared_statements=10))
    assert f"PgBouncer {bouncer.version} does not have it" in problem.hint


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"listen_addr": "*"}, "listen_addr cannot be set here: .*this machine alone"),
        ({"unix_socket_dir": "/tmp"}, "unix_socket_dir cannot be set here: .*without a password"),
        ({"logfile": "/tmp/log"}, r"logfile cannot be set here: .*bouncer\.log\(\)"),
        ({"user": "postgres"}, "user cannot be set here"),
        ({"listen_port": "6432"}, "listen_port takes a whole number, not '6432'"),
        ({"auth_type": "trust"}, "auth_type = trust asks for no password"),
        ({"ini": "[pgbouncer]\nauth_type = any\n"}, "auth_type = any asks for no password"),
        ({"pool_mode": ["session"]}, r"text, a number, True or False, not \['session'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_pgbouncer_setting_that_connlab_refuses(server: Postgres, settings: Any, reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        server.pgbouncer(**settings)


@pytest.mark.parametrize("name", ["listen_addr", "auth_type"])
def test_no_running_pgbouncer_is_opened_up(bouncer: PgBouncer, name: str) -> None:
    before = bouncer.ini
    with pytest.raises(SettingError), bouncer.settings(**{name: {"listen_addr": "*", "auth_type": "trust"}[name]}):
        pass
    assert bouncer.ini == before


def test_a_later_section_of_the_ini_opens_nothing(server: Postgres) -> None:
    text = "[pgbouncer]\npool_mode = session\n[databases]\nother = host=127.0.0.1\n[pgbouncer]\nlisten_addr = *\n"
    with server.pgbouncer(ini=text) as front:
        config = {row["key"]: row["value"] for row in front.rows("SHOW CONFIG")}
        assert (config["listen_addr"], config["unix_socket_dir"] or "") == (front.inner_address.host, "")


# --- ports --------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 where somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        yield somebody.getsockname()[1]


def test_a_port_that_is_taken(start: Start, server: Postgres, taken: int) -> None:
    for call in (lambda: start(port=taken), lambda: server.pgbouncer(listen_port=taken)):
        problem = failure(StartError, call)
        assert f"port {taken} of 127.0.0.1 cannot be had" in str(problem).splitlines()[0]
        assert "leave the port out to get one that is free" in problem.hint


def test_a_port_of_another_server_of_ours(start: Start, server: Postgres) -> None:
    problem = failure(StartError, lambda: start(port=server.address.port))
    assert f"port {server.address.port}" in str(problem)
    assert server.value("select 1") == 1


@pytest.mark.parametrize("port", [-1, 65536, 10**6])
def test_a_port_that_is_none(start: Start, port: int) -> None:
    assert f"port {port} " in str(failure(StartError, lambda: start(port=port)))


# --- programs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(local_only: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Makes the PgBouncer that is used a shell script: real ones that are too old or fail so are not to be had."""
    folder = Path(tempfile.mkdtemp(prefix="connlab-test-"))
    folder.chmod(0o755)  # the user that servers run as must get in

    def make(does: str, *, version: str = "1.22.0") -> Path:
        path = folder / "pgbouncer"
        path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo PgBouncer {version}; exit; fi\n{does}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CONNLAB_PGBOUNCER", str(path))
        return path

    yield make
    shutil.rmtree(folder)


def test_a_program_that_exits_is_reported_at_once(server: Postgres, stand_in: Callable[..., Path]) -> None:
    path = stand_in("echo something is wrong with me; exit 3")
    problem = failure(StartError, server.pgbouncer)
    assert str(problem).splitlines()[0] == "PgBouncer 1.22.0 did not start: it ended with exit code 3"
    assert problem.log == "something is wrong with me"
    assert problem.command == f"{path} pgbouncer.ini"


def test_a_program_that_is_killed_is_reported_at_once(server: Postgres, stand_in: Callable[..., Path]) -> None:
    stand_in("kill -9 $$")
    assert "it ended with signal SIGKILL" in str(failure(StartError, server.pgbouncer))


def test_what_a_wrapper_script_runs_ends_with_the_failed_start(
    server: Postgres, stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that runs in the end is none that connlab started by name."""
    monkeypatch.setattr(connlab.node, "READY_WITHIN", 0.5)
    folder = stand_in('echo $$ > "$(dirname "$0")/pid"; exec sleep 77').parent
    folder.chmod(0o777)  # the user that servers run as writes its pid there
    failure(StartError, server.pgbouncer)
    pid = int((folder / "pid").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_pgbouncer_through_which_nothing_gets_is_given_up(
    server: Postgres, taken: int, local_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody takes its connections and never says a word."""
    monkeypatch.setattr(connlab.node, "READY_WITHIN", 0.5)
    ini = f"[databases]\nshop = host=127.0.0.1 port={taken}\n"
    problem = failure(StartError, lambda: server.pgbouncer(ini=ini))
    assert_complete(problem, "no query got through within 0.5 s", program="pgbouncer", configuration=f"port={taken}")
    assert "the last try said: connection timeout expired" in str(problem).splitlines()[0]


def test_a_pgbouncer_without_a_server_is_reported_before_the_timeout(server: Postgres) -> None:
    problem = failure(StartError, lambda: server.pgbouncer(ini="[databases]\n* = host=127.0.0.1 port=1\n"))
    assert "no server answers it at 127.0.0.1:1" in str(problem).splitlines()[0]
    assert "[databases]" in problem.hint


def test_a_pgbouncer_that_is_too_old(server: Postgres, stand_in: Callable[..., Path]) -> None:
    path = stand_in("exit 3", version="1.17.0")
    problem = failure(ProgramMissing, server.pgbouncer)
    assert f"{path} is PgBouncer 1.17.0: too old, 1.18 or later is needed" in str(problem)
    assert problem.ways_out


@pytest.mark.parametrize("variable", ["CONNLAB_POSTGRES", "CONNLAB_PGBOUNCER"])
def test_a_program_that_is_not_there(
    server: Postgres, local_only: None, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "/no/such/place")
    start = server.pgbouncer if variable == "CONNLAB_PGBOUNCER" else Postgres.start
    problem = failure(ProgramMissing, start)
    message = str(problem)
    assert f"{variable} is set to /no/such/place" in message.splitlines()[0]
    assert message.index("Looked at:") < message.index("Ways out (one is enough):")
    assert f"unset {variable}" in message


# --- directories --------------------------------------------------------------------------------------------------

START = """
import tempfile
from pathlib import Path
from connlab import places

def outcome():
    try:
        with Postgres.start() as pg, pg.pgbouncer() as bouncer:
            with psycopg.connect(bouncer.dsn) as connection:
                connection.execute("select 1")
            return {"data": pg.value("show data_directory"), "socket": pg.socket_directory, **remains()}
    except Exception as problem:
        return {"kind": type(problem).__name__, "text": str(problem)}

def remains():
    return {"remains": sorted(str(path) for root in places.run_roots() for path in root.glob(f"{os.getpid()}-*/*/"))}
"""
CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 0x4000, 1 << 18
PR_SET_DUMPABLE = 4


@pytest.fixture
def newcomer(local_only: None) -> Iterator[Person]:
    """An ordinary user with a home and an empty cache of its own."""
    with ordinary_person() as person:
        if person is None:
            pytest.skip("no other user here can run a Python with connlab's dependencies")
        yield person


@pytest.fixture
def me(local_only: None) -> Iterator[Person]:
    """Whoever runs the tests, with a home of its own and the cache that is filled already."""
    home = Path(tempfile.mkdtemp(prefix="connlab-test-"))
    home.chmod(0o755)
    yield Person(environment={"HOME": str(home), "XDG_CACHE_HOME": str(places.cache_dir().parent)})
    shutil.rmtree(home)


def home_of(person: Person) -> Path:
    return Path(person.environment["HOME"])


def outcome(person: Person, *, script: str = "", variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What comes of a start in a process of its own, which leaves nothing, then or after its end."""
    person = dataclasses.replace(person, environment={**person.environment, **(variables or {})})
    with Child(person, START, script, "told = outcome(); tell(**{**remains(), 'told': told})") as child:
        told = child.told()
        assert child.ended() == 0
        assert_nothing_left(child.trace)
    assert told["remains"] == []
    found: dict[str, Any] = told["told"]
    return found


def mounting(person: Person, mounts: Mapping[Path, str]) -> Person:
    """The person with an empty file system in memory over each path, of the size given, seen by nobody else."""
    covered = dataclasses.replace(person, prepare=lambda: _mount(mounts))
    try:
        covered.popen(["-c", ""]).wait()
    except subprocess.SubprocessError:
        pytest.skip("this machine allows no mount namespaces")
    return covered


def _mount(mounts: Mapping[Path, str]) -> None:
    """Runs between fork and exec."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.geteuid(), os.getegid()

    def must(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno())

    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # whoever has dropped root may not write its own maps otherwise
    must(libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    must(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    for path, size in mounts.items():
        must(libc.mount(b"tmpfs", bytes(path), b"tmpfs", 0, f"size={size},mode=1777".encode()))


def without_memory(person: Person) -> Person:
    """The person where /dev/shm is as small as in a container, too small for servers."""
    return mounting(person, {places.MEMORY: "64m"} if places.MEMORY.is_dir() else {})


@pytest.mark.skipif(not LINUX, reason="mounts as Linux does")
@pytest.mark.parametrize("who", ["me", "newcomer"])
def test_a_full_disk(request: pytest.FixtureRequest, local_only: None, who: str) -> None:
    """Cloning the initialised directory fails, or making it when there is none yet."""
    person: Person = request.getfixturevalue(who)
    small = home_of(person) / "small"
    small.mkdir()
    person = mounting(person, {places.MEMORY: "20m", small: "20m"})
    found = outcome(person, variables={"TMPDIR": str(small)})
    assert found["kind"] == "StartError"
    assert "No space left on device" in found["text"]
    if who == "me":
        assert found["text"].startswith(f"cannot write to {small}/") and "MB free there)" in found["text"]
    assert "set TMPDIR to another place" in found["text"]


@pytest.mark.parametrize("how", ["not writable", "not readable", "a file", "its templates not writable"])
def test_a_cache_that_cannot_be_used(newcomer: Person, how: str) -> None:
    cache = home_of(newcomer) / "cache" / "connlab"
    spoil_cache(cache, how)
    found = outcome(newcomer)
    assert found["kind"] == "StateError"
    first = found["text"].splitlines()[0]
    assert str(cache) in first and "set XDG_CACHE_HOME to a place that is" in first


def spoil_cache(cache: Path, how: str) -> None:
    if how == "a file":
        shutil.rmtree(cache)
        cache.write_text("in the way")
    elif how == "its templates not writable":
        (cache / "templates").mkdir()
        (cache / "templates").chmod(0o555)
    else:
        cache.chmod(0o555 if how == "not writable" else 0)


@pytest.mark.skipif(not LINUX, reason="mounts as Linux does")
def test_a_directory_of_somebody_elses_where_ours_should_be(me: Person) -> None:
    """/dev/shm and /tmp belong to everybody: who comes first could hand us a directory that he can change."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory that belongs to somebody else")
    root = places.MEMORY / "connlab-0"
    script = f"os.mkdir({str(root)!r}); os.chown({str(root)!r}, 65534, 65534)"
    ask = f"tell(told=outcome(), left=os.listdir({str(root)!r}))"
    with Child(mounting(me, {places.MEMORY: "2g"}), START, script, ask) as child:
        told = child.told()
    assert told["told"]["kind"] == "StateError" and told["left"] == []
    assert f"{root} is not a directory of this user's (uid 0) but belongs to uid 65534" in told["told"]["text"]


NAMES = ["a 'b\" üß数", "one,two", "/".join(["a-long-name"] * 12)]
MOVE = """
base = Path(os.environ["HOME"]) / NAME
base.mkdir(parents=True)
(Path(os.environ["HOME"]) / "cache").rename(base / "cache")
(base / "t").mkdir()
tempfile.tempdir = None  # Python keeps its first choice
os.environ.update(TMPDIR=str(base / "t"), XDG_CACHE_HOME=str(base / "cache"), CONNLAB_STATE=str(base / "state"))
places.state_dir()
"""


@pytest.mark.skipif(not LINUX, reason="mounts as Linux does")
@pytest.mark.parametrize("name", NAMES, ids=["odd", "comma", "long"])
def test_directories_whatever_they_are_called(newcomer: Person, name: str) -> None:
    """Unix sockets take 107 bytes of path, and libpq takes a comma for the end of one: then servers run elsewhere."""
    found = outcome(without_memory(newcomer), script=f"NAME = {name!r}{MOVE}")
    assert "text" not in found, found
    temporary = home_of(newcomer) / name / "t"
    fits = "," not in name and len(name) < 20
    assert Path(found["data"]).is_relative_to(temporary) == fits
    assert found["socket"] == str(Path(found["data"]).parent)
    assert list(temporary.iterdir()) == []
    assert (home_of(newcomer) / name / "cache" / "connlab" / "templates").is_dir()


@pytest.mark.skipif(not LINUX, reason="mounts as Linux does")
def test_a_temporary_directory_that_servers_cannot_enter_is_passed_over(me: Person) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's servers run as another user")
    closed = home_of(me) / "closed"
    closed.mkdir(mode=0o700)
    found = outcome(without_memory(me), variables={"TMPDIR": str(closed)})
    assert "text" not in found, found
    assert not found["data"].startswith(str(closed))
