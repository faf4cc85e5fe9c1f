"""Nothing survives: after any end of the process that started servers, and of a server, nothing of it remains."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from leftovers import (
    GONE_WITHIN,
    LINUX,
    Child,
    Person,
    Trace,
    assert_no_process_left,
    assert_nothing_left,
    contained_root,
    left,
    ordinary_person,
    until,
)

from connlab import places, programs

PAIR = "pg = Postgres.start(); bouncer = pg.pgbouncer()"
WAITING_PAIR = f"{PAIR}; tell(pg, bouncer); listen()"
KILLS = 200
AT_ONCE = 4

linux_only = pytest.mark.skipif(not LINUX, reason="the kernel's parent-death signal is Linux's")


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Person]:
    """An ordinary user whose cache is kept for this module."""
    with ordinary_person() as person:
        yield _must(person)


def _states(child: Child) -> set[str]:
    found = set()
    for pid in child.trace.servers:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.add(psutil.Process(pid).status())
    return found


@pytest.fixture
def newcomer() -> Iterator[Person]:
    """An ordinary user with an empty cache."""
    with ordinary_person() as person:
        yield _must(person)


@pytest.fixture(params=["me", "ordinary user"])
def person(request: pytest.FixtureRequest) -> Person:
    """Whoever runs the tests; and when that is root, an ordinary user too."""
    return _person(request)


@pytest.fixture(params=["me", "ordinary user", "root in a container"])
def anybody(request: pytest.FixtureRequest) -> Person:
    """The same, and root with the few rights that it has in a container."""
    return _person(request)


def _person(request: pytest.FixtureRequest) -> Person:
    if request.param == "me":
        return Person()
    if os.geteuid() != 0:
        pytest.skip("only root can run as somebody else")
    if request.param == "ordinary user":
        found: Person = request.getfixturevalue("ordinary")
        return found
    if not LINUX:
        pytest.skip("capabilities are Linux's")
    return contained_root()


def _must(person: Person | None) -> Person:
    if person is None:
        pytest.skip("no other user here can run a Python with connlab's dependencies")
    return person


def _watchdog(child: Child) -> int:
    (pid,) = child.trace.helpers
    assert "reaper.py" in " ".join(psutil.Process(pid).cmdline())
    return pid


def _kill_with_watchdog(child: Child) -> None:
    """Both in one instant, for what is stopped can start nobody."""
    child.send(signal.SIGSTOP)
    os.kill(_watchdog(child), signal.SIGKILL)
    child.kill()


# --- while the process goes on ------------------------------------------------------------------------------------


def test_stop_leaves_nothing(person: Person) -> None:
    with Child(person, WAITING_PAIR, "pg.stop(); tell(); listen()") as child:
        child.told()
        assert len(child.trace.servers) > 2 and len(child.trace.ports) == 2
        child.say()
        child.told()
        assert_nothing_left(child.trace, owner_lives=True, seconds=0)


def test_an_exception_in_the_with_block_leaves_nothing() -> None:
    script = """
    try:
        with Postgres.start() as pg, pg.pgbouncer() as bouncer:
            tell(pg, bouncer)
            raise RuntimeError("in the lesson")
    except RuntimeError:
        tell()
        listen()
    """
    with Child(Person(), script) as child:
        assert child.told()["servers"]
        child.told()
        assert_nothing_left(child.trace, owner_lives=True, seconds=0)


def test_a_start_that_fails_leaves_nothing() -> None:
    script = """
    pg = Postgres.start()
    for wrong in (lambda: Postgres.start(max_connections=1), lambda: Postgres.start(port=pg.address.port)):
        try:
            wrong()
        except StartError:
            pass
        else:
            raise AssertionError("it started")
    pg.stop()
    tell(pg)
    listen()
    """
    with Child(Person(), script) as child:
        child.told()
        assert_nothing_left(child.trace, owner_lives=True, seconds=0)


def test_an_interrupt_during_the_start_leaves_nothing_half_started() -> None:
    script = """
    tell()
    while listen():
        try:
            tell()
            pg = Postgres.start()
            bouncer = pg.pgbouncer()
            time.sleep(60)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for node in (pg,) if "pg" in globals() else ():
                node.stop()
            globals().pop("pg", None)
            tell(strangers=strangers())
            signal.signal(signal.SIGINT, signal.default_int_handler)
    """
    with Child(Person(), script) as child:
        child.told()
        for _ in range(25):
            child.say()
            child.told()
            time.sleep(random.uniform(0, 0.35))  # not a wait: the moment of the interrupt
            assert child.interrupt()["strangers"] == []
            assert_nothing_left(child.trace, owner_lives=True, seconds=0)
        child.kill()
        assert_nothing_left(child.trace)


@pytest.mark.parametrize("what", ["Postgres.start()", "pg.pgbouncer()", "pg.relay()"])
def test_an_interrupt_at_any_step_of_a_start_leaves_nothing_half_started(what: str) -> None:
    """A signal hits one given step in a thousand runs; raised by a tracer, its KeyboardInterrupt hits each once."""
    script = f"""
    pg = Postgres.start()
    at, steps = 0, 1
    while at <= steps:
        at, before = at + 1, having()
        tracer = interrupt_at(at)
        try:
            with tracer:
                node = {what}
            node.stop()
        except KeyboardInterrupt:
            pass
        until(lambda: threading.active_count() <= before[2], 5)  # a relay's thread ends a moment after the relay
        left = [now - then for now, then in zip(having(), before, strict=True)]
        tell(steps=tracer.steps, where=tracer.where, left=left)
        steps = max(steps, tracer.steps)
        listen()
    pg.stop()
    tell(pg)
    listen()
    """
    interrupted = 0
    with Child(Person(), script) as child:
        while (told := child.told()).get("steps"):
            assert told["left"] == [0, 0, 0], told["where"]  # processes, directories, threads
            interrupted += bool(told["where"])
            child.say()
        assert interrupted > 20
        assert_nothing_left(child.trace, owner_lives=True, seconds=0)


def test_kill_ends_busy_and_frozen_backends_and_restart_takes_the_server_up_again(anybody: Person) -> None:
    script = """
    pg = Postgres.start()
    pg.value("create table kept (id int)")
    for act in (lambda: None, pg.freeze):
        busy(pg); act(); tell(); listen()
        pg.kill(); tell(running=pg.running); listen()
        pg.restart()
    tell(pg, kept=pg.value("select count(*) from kept"))
    """
    with Child(anybody, script) as child:
        for _ in ("busy", "busy and frozen"):
            child.told()
            assert len(child.trace.servers) > 3
            child.say()
            assert child.told()["running"] is False
            assert _processes_left(child) == []
            child.say()
        assert child.told()["kept"] == 0


def _processes_left(child: Child) -> list[int]:
    lines = left(child.trace, owner_lives=True)
    return [int(line.split()[1]) for line in lines if line.startswith("process")]


def test_freeze_stops_a_busy_backend_too_and_thaw_lets_it_go_on(anybody: Person) -> None:
    script = """
    pg = Postgres.start()
    busy(pg); tell()
    pg.freeze(); tell()
    listen(); pg.thaw(); tell(answer=pg.value("select 42"))
    """
    with Child(anybody, script) as child:
        child.told()
        child.told()
        assert until(lambda: _states(child) <= {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}, GONE_WITHIN), _states(
            child
        )
        child.say()
        assert child.told()["answer"] == 42


# --- the end of the process ---------------------------------------------------------------------------------------

ENDINGS = {
    "the script's end": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an exception": ("1 / 0", 1),
    "an exception while a server is frozen": ("pg.freeze(); 1 / 0", 1),
    "sys.exit while a thread queries": ("busy(pg); sys.exit(4)", 4),
    "sys.exit while a thread starts servers": (
        "threading.Thread(target=lambda: [Postgres.start() for _ in range(9)], daemon=True).start(); sys.exit(5)",
        5,
    ),
    "os._exit": ("os._exit(6)", 6),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_an_end_without_stop_leaves_nothing(how: str) -> None:
    statement, code = ENDINGS[how]
    with Child(Person(), PAIR, "tell(pg, bouncer)", statement) as child:
        assert child.told()["servers"]
        assert child.ended() == code, child.errors()
        assert_nothing_left(child.trace)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_that_ends_the_process_leaves_nothing(number: signal.Signals) -> None:
    with Child(Person(), WAITING_PAIR) as child:
        child.told()
        child.send(number)
        assert child.ended() == -number
        assert_nothing_left(child.trace)


def test_kill_9_of_the_process_leaves_nothing(person: Person) -> None:
    with Child(person, PAIR, "busy(pg); tell(pg, bouncer); listen()") as child:
        child.told()
        child.kill()
        assert_nothing_left(child.trace)


def test_kill_9_of_the_process_leaves_no_frozen_server(anybody: Person) -> None:
    with Child(anybody, PAIR, "tell(pg, bouncer); bouncer.freeze(); pg.freeze(); tell(); listen()") as child:
        child.told()
        child.told()
        child.kill()
        assert_nothing_left(child.trace)


def test_kill_9_leaves_nothing_on_disk_either() -> None:
    with Child(Person(), "pg = Postgres.start(on_disk=True)\ntell(pg, where=pg.socket_directory)\nlisten()") as child:
        assert str(places.MEMORY) not in child.told()["where"]
        child.kill()
        assert_nothing_left(child.trace)


def test_the_last_owner_of_a_user_takes_the_users_directory_along(newcomer: Person) -> None:
    with Child(newcomer, WAITING_PAIR) as child:
        child.told()
        child.kill()
        assert_nothing_left(child.trace)
    roots = [Path(root) for root in child.trace.roots if newcomer.environment["HOME"] in root or newcomer.user]
    assert len(roots) >= 1
    assert until(lambda: not any(root.exists() for root in roots), GONE_WITHIN)


# --- kill -9 at any moment ----------------------------------------------------------------------------------------

CHAOS = """
def chaos(chance):
    pg = Postgres.start()
    bouncer = pg.pgbouncer(pool_mode="transaction")
    tell(pg, bouncer)
    with psycopg.connect(bouncer.dsn) as connection:
        connection.execute("select count(*) from users")
    if chance.random() < 0.3:
        busy(pg)
    acts = [
        lambda: (pg.freeze(), pg.thaw()),
        lambda: (bouncer.freeze(), bouncer.restart()),
        lambda: pg.freeze(),
        lambda: pg.restart(),
        lambda: (pg.kill(), tell(), pg.restart()),
        lambda: (bouncer.kill(), bouncer.restart()),
        lambda: bouncer.stop(),
    ]
    chance.choice(acts)()
    tell()
    pg.stop()

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
while seed := listen():
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        tell(seed=int(seed))
        chance = random.Random(int(seed))
        while True:
            chaos(chance)
"""


def test_kill_9_at_random_moments_leaves_nothing(ordinary: Person) -> None:
    """Each process is forked from one that has imported everything, so that the moments lie where something happens."""
    seed = int(os.environ.get("CONNLAB_TEST_SEED") or random.SystemRandom().randrange(1 << 30))
    print(f"CONNLAB_TEST_SEED={seed}")
    share = KILLS // AT_ONCE
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [
            pool.submit(
                _kill_at_random,
                [Person(), ordinary][number % 2],
                range(seed + number * share, seed + (number + 1) * share),
            )
            for number in range(AT_ONCE)
        ]
        found = [one for job in jobs for one in job.result()]
    assert len(found) == KILLS
    # On a machine with ten times the work that it can do, a fifth gets so far.
    assert sum(1 for _, servers in found if servers) > KILLS / 10, "nearly all were killed before anything ran"
    assert [lines for lines, _ in found if lines] == [], f"repeat it with CONNLAB_TEST_SEED={seed}"


def _kill_at_random(person: Person, seeds: range) -> list[tuple[list[str], int]]:
    """For each seed what was left of a process killed at a moment of that seed's, and how many processes it had."""
    with Child(person, CHAOS) as nursery:
        found = [_kill_one(nursery, seed) for seed in seeds]
        assert nursery.errors() == ""
    return found


def _kill_one(nursery: Child, seed: int) -> tuple[list[str], int]:
    nursery.trace = trace = Trace()
    nursery.say(str(seed))
    while nursery.told().get("seed") != seed:  # what its predecessor told before it was killed
        pass
    owner = trace.owner
    time.sleep(random.Random(seed).uniform(0, 1))  # not a wait: the moment of the kill
    trace.look()
    os.kill(owner, signal.SIGKILL)
    trace.look()
    until(lambda: not left(trace), GONE_WITHIN)
    return left(trace), len(trace.servers)


def test_kill_9_during_the_first_start_ever_leaves_nothing_and_the_next_start_works(ordinary: Person) -> None:
    moments = [random.uniform(0.2 * part, 0.2 * part + 0.2) for part in range(6)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(_kill_first_start, [ordinary] * len(moments), moments))
    assert found == [[] for _ in moments], f"killed after {moments}"


def _kill_first_start(ordinary: Person, moment: float) -> list[str]:
    cache = Path(ordinary.environment["HOME"]) / f"empty-{moment}"
    person = replace(ordinary, environment={**ordinary.environment, "XDG_CACHE_HOME": str(cache)})
    with Child(person, "tell(); listen(); pg = Postgres.start(); tell(pg); listen()") as child:
        child.told()
        child.say()
        time.sleep(moment)  # not a wait: the moment of the kill
        child.trace.look()
        child.kill()
        until(lambda: not left(child.trace), GONE_WITHIN)
        found = left(child.trace)
    with Child(person, "pg = Postgres.start(); tell(pg, answer=pg.value('select 42'))") as child:
        answer = child.told()["answer"]
    templates = [path for path in (cache / "connlab" / "templates").iterdir() if path.is_dir()]
    return found if answer == 42 and len(templates) == 1 else [*found, f"{answer=}", f"{templates=}"]


# --- the watchdog -------------------------------------------------------------------------------------------------


def test_a_killed_watchdog_comes_back_and_does_its_work(person: Person) -> None:
    with Child(person, WAITING_PAIR, "while listen(): tell()") as child:
        child.told()
        child.say()
        first = _watchdog(child)
        os.kill(first, signal.SIGKILL)
        second = _another_watchdog(child, first)
        assert until(lambda: psutil.Process(second).status() == psutil.STATUS_SLEEPING, GONE_WITHIN)
        child.kill()
        assert_nothing_left(child.trace)


def _another_watchdog(child: Child, first: int) -> int:
    def come() -> bool:
        child.trace.helpers.pop(first, None)
        child.say()
        child.told()
        child.trace.helpers.pop(first, None)
        return bool(child.trace.helpers)

    assert until(come, GONE_WITHIN), "no other watchdog came"
    return _watchdog(child)


@linux_only
@pytest.mark.parametrize("sweeper", ["Postgres.start().stop()", "janitor.sweep()"])
def test_servers_end_without_a_watchdog_and_anybody_of_the_user_sweeps_their_directories(
    ordinary: Person, sweeper: str
) -> None:
    with Child(ordinary, PAIR, "busy(pg); tell(pg, bouncer); listen()") as child:
        child.told()
        _kill_with_watchdog(child)
        assert_no_process_left(child.trace)
        with Child(ordinary, sweeper) as other:
            assert other.ended() == 0, other.errors()
        assert left(child.trace) == []


def test_a_sweep_ends_frozen_servers_that_nobody_watched(anybody: Person) -> None:
    with Child(anybody, PAIR, "pg.freeze(); bouncer.freeze(); tell(pg, bouncer); listen()") as child:
        child.told()
        _kill_with_watchdog(child)
        with Child(anybody, "janitor.sweep()") as other:
            assert other.ended() == 0, other.errors()
        assert left(child.trace) == []


def test_a_sweep_takes_the_shared_memory_of_a_killed_server_along(anybody: Person) -> None:
    """PostgreSQL that is killed with -9 leaves a segment, which its next start would remove: here there is none."""
    with Child(anybody, "pg = Postgres.start(); tell(pg); listen(); pg.kill(); tell(); listen()") as child:
        child.told()
        child.say()
        child.told()
        assert not LINUX or any("segment" in line for line in left(child.trace)), "nothing to be removed"
        _kill_with_watchdog(child)
        with Child(anybody, "janitor.sweep()") as other:
            assert other.ended() == 0, other.errors()
        assert left(child.trace) == []


# --- forks and threads --------------------------------------------------------------------------------------------

FORKS = {
    "os.fork": "child = os.fork()\nif child == 0:\n    time.sleep(600)\n",
    "multiprocessing": (
        "process = multiprocessing.get_context('fork').Process(target=time.sleep, args=[600])\n"
        "process.start()\nchild = process.pid\n"
    ),
}


@pytest.mark.parametrize("how", FORKS)
def test_kill_9_leaves_nothing_though_a_forked_child_lives_on(how: str, ordinary: Person) -> None:
    with Child(ordinary, PAIR, "tell(pg, bouncer)", FORKS[how], "tell(forked=child); listen()") as child:
        child.told()
        forked = psutil.Process(child.told()["forked"])
        child.trace.helpers.pop(forked.pid)
        try:
            child.kill()
            assert_nothing_left(child.trace)
            assert forked.is_running() and forked.status() != psutil.STATUS_ZOMBIE
        finally:
            forked.kill()


@pytest.mark.parametrize("leave", ["sys.exit()", "raise RuntimeError('in the forked child')", "os._exit(0)"])
def test_a_forked_child_that_ends_leaves_its_parents_servers_alone(leave: str) -> None:
    script = f"""
    with Postgres.start() as pg, pg.pgbouncer() as bouncer:
        child = os.fork()
        if child == 0:
            {leave}
        os.waitpid(child, 0)
        tell(pg, bouncer, answer=pg.value("select 42"), pools=len(bouncer.rows("SHOW POOLS")))
    """
    with Child(Person(), script) as child:
        told = child.told()
        assert told["answer"] == 42 and told["pools"] >= 1
        assert child.ended() == 0
        assert_nothing_left(child.trace)


def test_a_forked_child_has_servers_of_its_own_that_go_with_it() -> None:
    script = """
    pg = Postgres.start()
    child = os.fork()
    if child == 0:
        mine = Postgres.start()
        tell(mine, answer=mine.value("select 41"))
        listen()
    os.waitpid(child, 0)
    tell(pg, answer=pg.value("select 42"))
    """
    with Child(Person(), script) as child:
        assert child.told()["answer"] == 41
        forked, child.trace = child.trace, Trace()
        os.kill(forked.owner, signal.SIGKILL)
        assert child.told()["answer"] == 42
        assert child.trace.owner != forked.owner
        assert_nothing_left(forked)
        assert child.ended() == 0
        assert_nothing_left(child.trace)


def test_a_server_survives_the_thread_that_started_it() -> None:
    script = """
    nodes = []
    def start():
        nodes.append(Postgres.start())
        nodes.append(nodes[0].pgbouncer())
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    tell(*nodes, ended=until(lambda: thread.native_id not in [task.id for task in psutil.Process().threads()], 9))
    listen()
    tell(answer=nodes[0].value("select 42"), pools=len(nodes[1].rows("SHOW POOLS")))
    """
    with Child(Person(), script) as child:
        assert child.told()["ended"]
        child.say()
        assert child.told()["answer"] == 42
        assert child.ended() == 0
        assert_nothing_left(child.trace)


# --- others -------------------------------------------------------------------------------------------------------


def test_a_living_process_is_never_swept(person: Person) -> None:
    with Child(person, WAITING_PAIR, "tell(answer=pg.value('select 42'))") as child:
        child.told()
        before = sorted(path for found in child.trace.directories() for path in found.iterdir())
        with Child(person, "janitor.sweep(); Postgres.start().stop(); janitor.sweep()") as other:
            assert other.ended() == 0, other.errors()
        assert sorted(path for found in child.trace.directories() for path in found.iterdir()) == before
        child.say()
        assert child.told()["answer"] == 42


def test_another_users_directories_are_never_touched(ordinary: Person) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can run as somebody else")
    with Child(ordinary, WAITING_PAIR) as child:
        child.told()
        _kill_with_watchdog(child)
        with Child(Person(), "janitor.sweep(); Postgres.start().stop()") as other:
            assert other.ended() == 0, other.errors()
        assert len(child.trace.directories()) == 1
        with Child(ordinary, "janitor.sweep()") as owner:
            assert owner.ended() == 0, owner.errors()
        assert left(child.trace) == []


@pytest.fixture
def sleeper() -> Iterator[Path]:
    """A folder with two programs: a PgBouncer, and a sleep that stands for somebody's shell."""
    folder = Path(tempfile.mkdtemp(prefix="connlab-test-"))
    folder.chmod(0o755)
    for name, program in (("pgbouncer", str(programs.find_pgbouncer().path)), ("sleep", shutil.which("sleep"))):
        shutil.copy(str(program), folder / name)
    yield folder / "sleep"
    shutil.rmtree(folder)


@pytest.mark.parametrize("verb", ["pg.kill(); bouncer.kill()", "pg.stop()", "os._exit(0)"])
def test_a_shell_that_looks_around_in_a_servers_directory_survives(sleeper: Path, verb: str) -> None:
    """Though it lies beside the server's program, as it does where both are in /usr/bin."""
    environment = {**programs.find_pgbouncer().environment, "CONNLAB_PGBOUNCER": str(sleeper.with_name("pgbouncer"))}
    with Child(Person(environment=environment), WAITING_PAIR, verb, "tell(); listen()") as child:
        child.told()
        folders = [path for found in child.trace.directories() for path in found.iterdir() if path.is_dir()]
        assert len(folders) == 2
        shells = [subprocess.Popen([sleeper, "600"], cwd=folder) for folder in folders]
        try:
            child.trace.besides = {shell.pid for shell in shells}
            child.say()
            with contextlib.suppress(AssertionError):
                child.told()
            child.kill()
            assert_nothing_left(child.trace)
            assert [shell.poll() for shell in shells] == [None, None]
        finally:
            for shell in shells:
                shell.kill()
                shell.wait()


@pytest.mark.parametrize("cache", ["warm", "empty"])
def test_ten_processes_at_once_do_not_get_in_each_others_way(cache: str, request: pytest.FixtureRequest) -> None:
    person: Person = request.getfixturevalue("ordinary" if cache == "warm" else "newcomer")
    script = ("tell(); listen()", PAIR, "tell(pg, bouncer, where=pg.socket_directory); listen()")
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(person, *script)) for _ in range(10)]
        for child in children:
            child.told()
        for child in children:
            child.say()
        told = [child.told() for child in children]
        assert len({port for one in told for port in one["ports"]}) == 20
        assert len({one["where"] for one in told}) == 10
        templates = Path(person.environment["XDG_CACHE_HOME"]) / "connlab" / "templates"
        assert len([path for path in templates.iterdir() if path.is_dir()]) == 1
        for child in children:
            child.kill()
        for child in children:
            assert_nothing_left(child.trace)
