"""PostgreSQL and PgBouncer as a learner uses them: every fixed name, and what a node promises."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Start
from leftovers import until

from connlab import ConnlabError, NodeStopped, PgBouncer, Postgres, SettingError, places, reaper
from connlab.configuration import ini_values
from connlab.pgbouncer import REFUSED

Node = Postgres | PgBouncer
PATIENCE = 60.0
"""Seconds for what takes milliseconds on an idle machine."""
AT_ONCE = 5.0
"""Seconds that "at once" may take on a busy machine; the timeouts it is told from are longer."""


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=16) as pool:
        yield pool


def asked(dsn: str, query: str = "select 1") -> Any:
    """The first cell of a query of the ordinary role's; None when it gives no rows."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(query)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def shown(bouncer: PgBouncer) -> dict[str, str | None]:
    """What runs in PgBouncer, setting by setting."""
    return {row["key"]: row["value"] for row in bouncer.rows("SHOW CONFIG")}


def has(node: Node, name: str) -> str | None:
    """A setting's value as the server itself shows it."""
    if isinstance(node, PgBouncer):
        return shown(node)[name]
    value: str = node.value(f"show {name}")
    return value


def refused(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(tuple(address)) != 0


def still_waits(future: Future[Any], seconds: float = 0.4) -> bool:
    with contextlib.suppress(TimeoutError):
        future.result(seconds)
        return False
    return True


# --- starting -----------------------------------------------------------------------------------------------------


def test_keywords_are_settings_whatever_their_type(start: Start) -> None:
    pg = start(max_connections=23, fsync=False, random_page_cost=1.25, cluster_name="it's a \\ test", WORK_MEM="5MB")
    query = "select name, setting from pg_settings where source = 'configuration file'"
    values = {row["name"]: row["setting"] for row in pg.rows(query)}
    assert values["max_connections"] == "23"
    assert values["fsync"] == "off"
    assert values["random_page_cost"] == "1.25"
    assert values["cluster_name"] == "it's a \\ test"
    assert pg.value("show work_mem") == "5MB"


def test_the_with_block_ends_the_server(backend: str) -> None:
    with Postgres.start(backend=backend) as pg:
        assert asked(pg.dsn) == 1
    assert not pg.running and refused(pg.address)


def test_an_exception_in_the_with_block_passes_and_ends_the_server(backend: str) -> None:
    with pytest.raises(ZeroDivisionError), Postgres.start(backend=backend) as pg:
        raise ZeroDivisionError
    assert not pg.running and refused(pg.address)


def test_conf_is_the_text_of_postgresql_conf_and_keywords_win(start: Start) -> None:
    text = "# our settings\nmax_connections = 31   # comments are fine\nwork_mem = '7MB'"
    pg = start(conf=text, work_mem="9MB")
    assert (pg.value("show max_connections"), pg.value("show work_mem")) == ("31", "9MB")
    assert pg.conf.startswith(text)


def test_a_distributions_conf_runs_in_the_servers_own_directory(start: Start) -> None:
    """Such a file says where the distribution keeps things; here each server has its own."""
    pg = start(
        conf="""
        data_directory = '/var/lib/postgresql/15/main'
        hba_file = '/etc/postgresql/15/main/pg_hba.conf'
        ident_file = '/etc/postgresql/15/main/pg_ident.conf'
        external_pid_file = '/var/run/postgresql/15-main.pid'
        unix_socket_directories = '/var/run/postgresql'
        port = 5432
        listen_addresses = '*'
        dynamic_shared_memory_type = posix
        logging_collector = on
        log_destination = 'csvlog'
        work_mem = 6MB
        """
    )
    directory = pg.value("show data_directory")
    assert pg.value("show hba_file") == f"{directory}/pg_hba.conf"
    assert pg.value("show ident_file") == f"{directory}/pg_ident.conf"
    assert pg.value("show dynamic_shared_memory_type") == "mmap"
    assert pg.value("show external_pid_file") == ""
    assert pg.value("show work_mem") == "6MB"
    assert "ready to accept connections" in pg.log()


@pytest.mark.parametrize(
    "settings",
    [
        {"default_transaction_read_only": True},
        {"statement_timeout": 1},
        {"synchronous_standby_names": "nobody"},
        {"password_encryption": "md5"},
        {"max_connections": 1, "superuser_reserved_connections": 0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_hinder_every_session_do_not_hinder_the_start(start: Start, settings: dict[str, Any]) -> None:
    pg = start(**settings)
    assert pg.value("select 1") == 1


def test_a_port_can_be_asked_for(start: Start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pg = start(port=port)
    assert pg.address == ("127.0.0.1", port) and f":{port}/" in pg.dsn
    assert asked(pg.dsn) == 1


def test_a_name_that_is_no_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnlabError, match=r"no backend 'lokal'.*'auto'.*'local'"):
        Postgres.start(backend="lokal")
    monkeypatch.setenv("CONNLAB_BACKEND", "dokker")
    with pytest.raises(ConnlabError, match=r"no backend 'dokker'.*CONNLAB_BACKEND"):
        Postgres.start()


def test_the_variable_decides_for_auto_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONNLAB_BACKEND", backend)
    with Postgres.start() as pg:
        assert asked(pg.dsn) == 1
        assert (pg.inner_address == pg.address) == (backend == "local")
    monkeypatch.setenv("CONNLAB_BACKEND", "nonsense")
    with Postgres.start(backend=backend) as pg:
        assert asked(pg.dsn) == 1


def test_several_servers_run_side_by_side(start: Start) -> None:
    servers = [start() for _ in range(3)]
    bouncers = [pg.pgbouncer() for pg in servers for _ in range(2)]
    assert len({node.address for node in [*servers, *bouncers]}) == 9
    asked(servers[0].dsn, "create table only_here ()")
    assert [pg.value("select to_regclass('public.only_here') is null") for pg in servers] == [False, True, True]


def test_on_disk_keeps_data_out_of_memory(start: Start, local_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(places.MEMORY))  # as where /tmp is in memory
    assert not in_memory(start(on_disk=True).value("show data_directory"))


def test_data_is_in_memory_otherwise(start: Start, local_only: None) -> None:
    if not places.MEMORY.is_dir() or free_bytes(places.MEMORY) < places.ENOUGH_MEMORY:
        pytest.skip("less than 1 GB free in memory")
    assert in_memory(start().value("show data_directory"))


def in_memory(path: str) -> bool:
    """Whether a file system of memory holds ``path``, by /proc/mounts."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    over = [(len(point), kind) for _, point, kind, *_ in mounts if f"{path}/".startswith(f"{point.rstrip('/')}/")]
    return max(over, default=(0, "none that is known"))[1] in ("tmpfs", "ramfs")


def free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


# --- asking -------------------------------------------------------------------------------------------------------


def test_the_dsn_is_of_an_ordinary_role_in_the_sample_database(server: Postgres) -> None:
    query = "select current_user, rolsuper or rolcreaterole or rolcreatedb or rolreplication or rolbypassrls, "
    query += "current_database() from pg_roles where rolname = current_user"
    with psycopg.connect(server.dsn) as connection:
        assert connection.execute(query).fetchone() == ("app", False, "shop")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select * from pg_authid")
    assert server.dsn.startswith("postgresql://app:")


def test_the_sample_database_is_filled_and_the_role_owns_it(server: Postgres) -> None:
    counts = {table: asked(server.dsn, f"select count(*) from {table}") for table in ("users", "accounts", "orders")}
    assert counts == {"users": 1000, "accounts": 1000, "orders": 10000}
    lonely = "select count(*) from users u left join accounts a on a.user_id = u.id where a.id is null"
    assert asked(server.dsn, lonely) == 0
    assert asked(server.dsn, "update users set name = name where id = 1 returning id") == 1
    with psycopg.connect(server.dsn) as connection:
        connection.execute("create table mine (id int)")
        connection.rollback()


def test_planner_statistics_are_there_from_the_start(start: Start) -> None:
    assert start().value("select reltuples::int from pg_class where relname = 'orders'") == 10000


def test_the_server_is_the_same_on_every_backend(server: Postgres) -> None:
    shown = {name: server.value(f"show {name}") for name in SAME}
    assert shown == SAME
    assert server.value("select datcollate from pg_database where datname = 'shop'") == "C"
    assert sorted(row["relname"] for row in server.rows(TABLES)) == ["accounts", "orders", "users"]


SAME = {
    "server_encoding": "UTF8",
    "wal_segment_size": "1MB",
    "dynamic_shared_memory_type": "mmap",
    "password_encryption": "scram-sha-256",
}
TABLES = "select relname from pg_class where relkind = 'r' and relowner = 'app'::regrole"


@pytest.mark.skipif(not Path("/proc").exists(), reason="this system has no /proc")
def test_proc_tells_what_the_kernel_knows_of_each_process(start: Start) -> None:
    pg = start()
    with psycopg.connect(pg.dsn, autocommit=True) as connection:
        [pid] = connection.execute("select pg_backend_pid()").fetchone() or []
        commands = pg.proc("cmdline")
        assert commands[pid].startswith("postgres: app shop")
        assert sum("checkpointer" in command for command in commands.values()) == 1
        assert all("postgres" in command for command in commands.values()), "nobody else's"
        [status] = pg.proc("status", [pid, 99999999]).values()
        assert f"\nPid:\t{pid}\n" in status
        before = resident(pg, pid)
        connection.execute("create temp table t as select repeat('x', 100) from generate_series(1, 20000)")
        connection.execute("select count(*) from (select * from t order by 1) s")
        assert resident(pg, pid) > before + 500
    assert pg.proc("status", []) == {}
    bouncer = pg.pgbouncer()
    [command] = bouncer.proc("cmdline").values()
    assert "pgbouncer.ini" in command
    with pytest.raises(ConnlabError, match="no file of a process"):
        pg.proc("../../etc/passwd")


def test_a_system_without_proc_says_so(start: Start, local_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put on: no such system is at hand."""
    pg = start()
    with monkeypatch.context() as other_system, pytest.raises(ConnlabError, match="this system has no /proc"):
        other_system.setattr(reaper, "LINUX", False)
        pg.proc("status")


def test_servers_hear_the_signals_that_we_ignore(start: Start, local_only: None) -> None:
    """As in a program that a shell runs in the background: an old PgBouncer would outlive its stop by ten seconds."""
    numbers = (signal.SIGINT, signal.SIGQUIT)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        bouncer = start().pgbouncer()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    [status] = bouncer.proc("status").values()
    ignored = int(re.search(r"^SigIgn:\s+(\w+)$", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    assert not any(ignored & 1 << number - 1 for number in numbers)


def resident(pg: Postgres, pid: int) -> int:
    """Resident memory in kB."""
    [text] = pg.proc("smaps_rollup", [pid]).values()
    return int(re.search(r"^Rss:\s+(\d+) kB$", text, re.MULTILINE)[1])  # type: ignore[index]


def test_the_admin_dsn_is_a_superusers(server: Postgres) -> None:
    assert asked(server.admin_dsn, "show is_superuser") == "on"


def test_rows_are_dicts_and_value_is_the_first_cell(server: Postgres) -> None:
    assert server.rows("select 1 as one, 'x' as letter union all select 2, 'y' order by one") == [
        {"one": 1, "letter": "x"},
        {"one": 2, "letter": "y"},
    ]
    assert server.value("select 'first', 'second'") == "first"


def test_a_query_without_rows_gives_an_empty_list_and_none(server: Postgres) -> None:
    assert server.rows("select 1 where false") == [] and server.value("select 1 where false") is None
    assert server.rows("create temporary table gone ()") == []


def test_percent_signs_in_a_query_are_taken_as_they_are(server: Postgres) -> None:
    assert server.value("select count(*) from users where email like 'user1%'") == 112


def test_a_wrong_query_raises_what_the_server_says(server: Postgres) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable, match="no_such_table"):
        server.rows("select * from no_such_table")


def test_rows_leave_no_connection_behind(server: Postgres) -> None:
    server.rows("select 1")
    query = "select count(*) from pg_stat_activity where application_name = 'connlab' and pid <> pg_backend_pid()"
    assert until(lambda: server.value(query) == 0, PATIENCE)


def test_version_compares_with_tuples_and_prints_as_the_server_does(server: Postgres) -> None:
    said = server.value("show server_version")
    assert said.split()[0] == str(server.version)
    assert server.version >= (14,) and server.version < (1000,)
    assert server.version[0] == int(server.value("show server_version_num")) // 10000


def test_pgbouncers_version_is_the_one_it_tells(bouncer: PgBouncer) -> None:
    with psycopg.connect(bouncer.admin_dsn, autocommit=True, prepare_threshold=None) as console:
        notices: list[str] = []
        console.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
        said = [*map(str, (row[0] for row in console.execute("SHOW VERSION"))), *notices]
    assert f"PgBouncer {bouncer.version}" in " ".join(said).split(" (")[0]
    assert bouncer.version >= (1, 18)


def test_each_pgbouncer_that_is_here_can_be_chosen(start: Start) -> None:
    pg = start()
    programs = pg.pgbouncer_programs()
    versions = [pg.pgbouncer(program=program).version for program in programs]
    assert len(set(versions)) == len(programs) >= 1
    assert pg.pgbouncer().version == versions[0]


def test_a_pgbouncer_that_is_not_here_is_refused(start: Start) -> None:
    pg = start()
    with pytest.raises(ConnlabError, match="program='/nowhere/pgbouncer'"):
        pg.pgbouncer(program="/nowhere/pgbouncer")


def test_the_log_is_read_since_the_start_and_since_a_mark(server: Postgres) -> None:
    say(server, "before the mark")
    mark = server.mark()
    say(server, "after the mark")
    assert "before the mark" in server.log() and "database system is ready" in server.log()
    assert "before the mark" not in server.log(since=mark) and "after the mark" in server.log(since=mark)


def test_the_log_has_what_a_query_has_just_caused(server: Postgres) -> None:
    """Forty times: from a container the log comes a moment later than the query's answer."""
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        for number in range(40):
            with pytest.raises(psycopg.errors.UndefinedColumn):
                connection.execute(f"select column_{number}")
            assert f'column "column_{number}" does not exist' in server.log()


def test_the_log_can_be_read_after_stop(node: Node) -> None:
    begun, mark = node.log(), node.mark()
    node.stop()
    assert node.log().startswith(begun)
    assert node.log(since=mark) == node.log()[len(begun) :]


def test_postgresqls_last_words_are_in_its_log(start: Start) -> None:
    pg = start()
    pg.stop()
    assert "database system is shut down" in pg.log()


def test_pgbouncers_log_tells_of_its_clients(bouncer: PgBouncer) -> None:
    mark = bouncer.mark()
    asked(bouncer.dsn)
    assert until(lambda: "login attempt: db=shop user=app" in bouncer.log(since=mark), PATIENCE)


def say(pg: Postgres, text: str) -> None:
    pg.rows(f"do $$ begin raise log '{text}'; end $$")
    assert until(lambda: f"LOG:  {text}" in pg.log(), PATIENCE)


def test_repr_tells_what_it_is_and_how_it_is(node: Node) -> None:
    expected = f"<{node.label} {node.version} at {node.address}, "
    assert repr(node) == f"{expected}running>"
    node.freeze()
    assert repr(node) == f"{expected}frozen>"
    node.thaw()
    node.stop()
    assert repr(node) == f"{expected}stopped>"


def test_nodes_are_used_from_many_threads(start: Start, background: ThreadPoolExecutor) -> None:
    pg = start()
    bouncers = list(background.map(lambda _: pg.pgbouncer(), range(4)))
    assert len({bouncer.address for bouncer in bouncers}) == 4
    values = background.map(lambda n: (pg.value(f"select {n}"), len(bouncers[n % 4].rows("SHOW LISTS")) > 3), range(40))
    assert list(values) == [(n, True) for n in range(40)]


def test_servers_are_started_from_many_threads(start: Start, background: ThreadPoolExecutor) -> None:
    servers = list(background.map(lambda _: start(), range(4)))
    assert [asked(pg.dsn) for pg in servers] == [1] * 4


def test_stop_from_many_threads_keeps_the_log(node: Node, background: ThreadPoolExecutor) -> None:
    begun = node.log()
    list(background.map(lambda _: node.stop(), range(8)))
    assert node.log().startswith(begun) and begun


# --- getting in when it is full -----------------------------------------------------------------------------------


def test_a_superuser_gets_in_when_every_ordinary_slot_is_taken(start: Start) -> None:
    pg = start(max_connections=8)
    with contextlib.ExitStack() as held:
        fill(pg, held)
        assert asked(pg.admin_dsn) == 1
        assert pg.value("select count(*) from pg_stat_activity where usename = 'app'") == 5
        with pg.settings(work_mem="5MB"):
            assert pg.value("show work_mem") == "5MB"


def test_rows_gets_in_during_a_burst(start: Start, background: ThreadPoolExecutor) -> None:
    """Refused clients hold a slot for a moment each, a superuser's too."""
    pg = start(max_connections=8)
    over = [False]
    with contextlib.ExitStack() as held:
        fill(pg, held)
        bursts = [background.submit(knock, pg.dsn, over) for _ in range(8)]
        try:
            assert [pg.value("select 1") for _ in range(20)] == [1] * 20
        finally:
            over[0] = True
        told = set().union(*(burst.result(PATIENCE) for burst in bursts))
    assert any("too many clients" in text for text in told), told


def fill(pg: Postgres, held: contextlib.ExitStack) -> None:
    """Take every slot that an ordinary role gets."""
    with pytest.raises(psycopg.OperationalError, match=r"slots are reserved|too many clients"):
        while True:
            held.enter_context(psycopg.connect(pg.dsn, autocommit=True))


def knock(dsn: str, over: list[bool]) -> set[str]:
    """Try to get in until ``over``, and tell what the server said."""
    told = set()
    while not over[0]:
        try:
            psycopg.connect(dsn, connect_timeout=10).close()
        except psycopg.OperationalError as problem:
            told.add(str(problem))
    return told


def test_the_console_lets_in_when_pgbouncer_takes_no_more_clients(start: Start) -> None:
    bouncer = start().pgbouncer(max_client_conn=2)
    with contextlib.ExitStack() as held:
        with pytest.raises(psycopg.OperationalError, match="max_client_conn"):
            while True:
                held.enter_context(psycopg.connect(bouncer.dsn))
        assert bouncer.rows("SHOW POOLS")


# --- verbs --------------------------------------------------------------------------------------------------------


def test_reload_makes_a_changed_file_hold(start: Start) -> None:
    pg = start(work_mem="4MB")
    pg.rows("alter system set work_mem = '11MB'")
    assert pg.value("show work_mem") == "4MB"
    pg.reload()
    assert pg.value("show work_mem") == "11MB"


def test_restart_keeps_address_data_and_passwords(node: Node) -> None:
    asked(node.dsn, "create table kept as select 42 as number")
    before = (node.address, node.dsn, node.admin_dsn)
    mark = node.mark()
    with psycopg.connect(node.dsn) as old:
        node.restart()
        with pytest.raises(psycopg.OperationalError):
            old.execute("select 1")
    assert (node.address, node.dsn, node.admin_dsn) == before
    assert asked(node.dsn, "select number from kept") == 42
    assert 0 < mark < node.mark(), "the log goes on"


def test_stop_takes_everything_in_front_with_it(start: Start) -> None:
    pg = start()
    fronts = [pg.pgbouncer(), pg.pgbouncer(pool_mode="transaction")]
    with psycopg.connect(fronts[0].dsn, autocommit=True) as client:
        client.execute("select 1")
        pg.stop()
    assert [node.running for node in (pg, *fronts)] == [False] * 3
    assert all(refused(node.address) for node in (pg, *fronts))
    pg.stop()
    fronts[0].stop()


def test_a_pgbouncer_stops_alone(start: Start) -> None:
    pg = start()
    bouncer = pg.pgbouncer()
    with bouncer:
        assert asked(bouncer.dsn) == 1
    assert refused(bouncer.address) and asked(pg.dsn) == 1


def test_a_stopped_node_says_so(node: Node) -> None:
    node.stop()
    verbs = [node.reload, node.restart, node.kill, node.freeze, lambda: node.rows("select 1")]
    for verb in verbs:
        with pytest.raises(NodeStopped, match="was stopped"):
            verb()
    with pytest.raises(NodeStopped, match="was stopped"), node.settings(log_connections=1):
        pass
    if isinstance(node, Postgres):
        with pytest.raises(NodeStopped, match="was stopped"):
            node.pgbouncer()


def test_kill_loses_connections_but_nothing_committed(start: Start) -> None:
    pg = start()
    asked(pg.dsn, "create table kept as select 42 as number")
    with psycopg.connect(pg.dsn) as open_connection:
        open_connection.execute("insert into kept values (43)")
        pg.kill()
        assert not pg.running and refused(pg.address)
        with pytest.raises(psycopg.OperationalError):
            open_connection.execute("select 1")
    with pytest.raises(NodeStopped, match=r"has ended \(signal SIGKILL\); restart\(\) takes it up again"):
        pg.rows("select 1")
    mark = pg.mark()
    pg.restart()
    assert asked(pg.dsn, "select array_agg(number) from kept") == [42]
    assert "not properly shut down" in pg.log(since=mark)


def test_a_killed_pgbouncer_is_taken_up_again(start: Start) -> None:
    bouncer = start().pgbouncer()
    bouncer.kill()
    assert refused(bouncer.address)
    with pytest.raises(NodeStopped, match="has ended"):
        bouncer.rows("SHOW POOLS")
    bouncer.restart()
    assert asked(bouncer.dsn) == 1


def test_a_frozen_node_hangs_and_goes_on_after_thaw(node: Node, background: ThreadPoolExecutor) -> None:
    with psycopg.connect(node.dsn, autocommit=True) as connection:
        connection.execute("select 1")
        node.freeze()
        answer = background.submit(lambda: connection.execute("select 7").fetchone())
        assert still_waits(answer) and node.running
        node.thaw()
        assert answer.result(PATIENCE) == (7,)
    assert asked(node.dsn) == 1


def test_a_frozen_node_says_so_at_once(node: Node) -> None:
    node.freeze()
    began = time.monotonic()
    with pytest.raises(NodeStopped, match=r"is frozen.*thaw\(\)"):
        node.rows("select 1")
    assert time.monotonic() - began < AT_ONCE
    node.thaw()
    node.thaw()


@pytest.mark.parametrize("verb", ["restart", "kill", "stop"])
def test_a_frozen_node_is_restarted_killed_and_stopped(node: Node, verb: str) -> None:
    node.freeze()
    getattr(node, verb)()
    assert refused(node.address) == (verb != "restart")
    if verb == "kill":
        node.restart()
        assert asked(node.dsn) == 1


# --- settings -----------------------------------------------------------------------------------------------------

RELOADED = {"PostgreSQL": ("work_mem", "9MB"), "PgBouncer": ("default_pool_size", "7")}
RESTARTED = {"PostgreSQL": ("max_connections", "33"), "PgBouncer": ("listen_backlog", "33")}


@pytest.mark.parametrize(("how", "examples"), [("reload", RELOADED), ("restart", RESTARTED)])
def test_settings_hold_in_the_block_and_are_back_after_it(
    node: Node, how: str, examples: dict[str, tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = examples[node.label]
    before = has(node, name)
    with psycopg.connect(node.dsn, autocommit=True) as connection, node.settings(**{name: value}) as change:
        assert has(node, name) == value != before
        assert connection_lives(connection) == (how == "reload")
        assert (change.how, change.old, change.new) == (how, {name: before}, {name: value})
    assert capsys.readouterr().out == f"{node.label}, {how}: {name} {before} -> {value}\n"
    assert has(node, name) == before and asked(node.dsn) == 1


def connection_lives(connection: psycopg.Connection[Any]) -> bool:
    try:
        connection.execute("select 1")
    except psycopg.OperationalError:
        return False
    return True


def test_values_given_at_the_start_come_back(start: Start) -> None:
    pg = start(work_mem="6MB")
    bouncer = pg.pgbouncer(default_pool_size=3)
    with pg.settings(work_mem="9MB"), bouncer.settings(default_pool_size=4):
        assert (has(pg, "work_mem"), has(bouncer, "default_pool_size")) == ("9MB", "4")
    assert (has(pg, "work_mem"), has(bouncer, "default_pool_size")) == ("6MB", "3")
    pg.restart()
    bouncer.restart()
    assert (has(pg, "work_mem"), has(bouncer, "default_pool_size")) == ("6MB", "3")


def test_settings_nest(node: Node) -> None:
    (reloaded, value), (restarted, other) = RELOADED[node.label], RESTARTED[node.label]
    before = (has(node, reloaded), has(node, restarted))
    with node.settings(**{reloaded: value}):
        with node.settings(**{restarted: other}):
            assert (has(node, reloaded), has(node, restarted)) == (value, other)
        assert (has(node, reloaded), has(node, restarted)) == (value, before[1])
    assert (has(node, reloaded), has(node, restarted)) == before


def test_settings_are_back_after_an_exception(node: Node) -> None:
    name, value = RELOADED[node.label]
    before = has(node, name)
    with pytest.raises(ZeroDivisionError), node.settings(**{name: value}):
        raise ZeroDivisionError
    assert has(node, name) == before


@pytest.mark.parametrize("verb", ["kill", "freeze"])
def test_settings_are_back_when_the_node_was_killed_or_frozen_in_the_block(node: Node, verb: str) -> None:
    name, value = RELOADED[node.label]
    before = has(node, name)
    with node.settings(**{name: value}):
        getattr(node, verb)()
    assert has(node, name) == before and asked(node.dsn) == 1


def test_stop_in_the_block_is_no_error(node: Node) -> None:
    name, value = RELOADED[node.label]
    with node.settings(**{name: value}):
        node.stop()
    assert not node.running


TYPO = {"PostgreSQL": "max_conections", "PgBouncer": "defautl_pool_size"}
MEANT = {"PostgreSQL": "max_connections", "PgBouncer": "default_pool_size"}
BAD_VALUE = {"PostgreSQL": ("maintenance_work_mem", "a lot"), "PgBouncer": ("pool_mode", "sesion")}


def test_a_wrong_name_is_told_with_the_right_one(node: Node) -> None:
    with pytest.raises(SettingError) as caught, node.settings(**{TYPO[node.label]: 3}):
        pass
    assert f"{node.version} has no setting {TYPO[node.label]}; did you mean {MEANT[node.label]}" in str(caught.value)
    assert asked(node.dsn) == 1


def test_a_wrong_value_is_told_and_the_old_one_holds(node: Node) -> None:
    name, value = BAD_VALUE[node.label]
    good, new = RELOADED[node.label]
    before = (has(node, good), has(node, name))
    with pytest.raises(SettingError) as caught, node.settings(**{good: new, name: value}):
        pass
    message = str(caught.value)
    assert name in message and value in message and str(node.version) in message
    node.reload()
    assert (has(node, good), has(node, name)) == before
    node.restart()
    assert (has(node, good), has(node, name)) == before


def test_a_combination_that_does_not_start_leaves_the_old_server_running(start: Start) -> None:
    pg = start(max_connections=20)
    bouncer = pg.pgbouncer(server_login_retry=1)
    with pytest.raises(SettingError) as caught, pg.settings(max_connections=2, work_mem="9MB"):
        pass
    message = str(caught.value)
    assert "max_connections = 2" in message and "superuser_reserved_connections" in message
    assert "runs with the old settings again" in message
    assert (has(pg, "max_connections"), has(pg, "work_mem")) == ("20", "4MB")
    assert until(lambda: gets_through(bouncer.dsn), PATIENCE)


def test_settings_that_take_a_list_take_one(start: Start) -> None:
    pg = start()
    with pg.settings(shared_preload_libraries="auto_explain, pg_prewarm", search_path="public, pg_catalog") as change:
        assert change.how == "restart"
        assert pg.value("show shared_preload_libraries") == "auto_explain, pg_prewarm"
        assert asked(pg.dsn, "select current_schemas(false)::text") == "{public,pg_catalog}"


def test_settings_of_extensions_need_not_be_known(start: Start) -> None:
    pg = start()
    if pg.version < (17,):
        pytest.skip("ALTER SYSTEM takes them since PostgreSQL 17")
    with pg.settings(**{"my_app.tenant": "blue's"}):
        assert pg.value("show my_app.tenant") == "blue's"


@pytest.mark.parametrize(
    ("label", "name"), [("PostgreSQL", "port"), ("PostgreSQL", "listen_addresses"), ("PgBouncer", "listen_port")]
)
def test_a_node_keeps_its_address(server: Postgres, bouncer: PgBouncer, label: str, name: str) -> None:
    node = server if label == "PostgreSQL" else bouncer
    with pytest.raises(SettingError, match=f"{name} cannot be set here"), node.settings(**{name: 7000}):  # type: ignore[attr-defined]
        pass


def test_every_setting_that_pgbouncer_reloads_comes_back_as_it_was(bouncer: PgBouncer) -> None:
    rows = [row for row in bouncer.rows("SHOW CONFIG") if row["key"] not in REFUSED]
    plain = {row["key"]: row["value"] for row in rows if row["changeable"] == "yes" and row["value"] is not None}
    before = shown(bouncer)
    with bouncer.settings(**plain) as change:
        assert change.how == "reload" and shown(bouncer) == before
    assert shown(bouncer) == before and len(plain) > 50


def test_a_pgbouncer_setting_that_was_not_set_is_unset_again(start: Start) -> None:
    bouncer = start().pgbouncer()
    assert shown(bouncer)["auth_user"] is None
    with bouncer.settings(auth_user="app"):
        assert shown(bouncer)["auth_user"] == "app"
    assert shown(bouncer)["auth_user"] is None


# --- PgBouncer ----------------------------------------------------------------------------------------------------


def test_a_query_through_pgbouncer_runs_on_that_server(start: Start) -> None:
    here, elsewhere = start(), start()
    with psycopg.connect(here.pgbouncer().dsn) as connection:
        (pid,) = connection.execute("select pg_backend_pid()").fetchone() or (0,)
        query = f"select usename || ' ' || datname from pg_stat_activity where pid = {pid}"
        assert here.value(query) == "app shop"
    assert elsewhere.value("select count(*) from pg_stat_activity where usename = 'app'") == 0


def test_keywords_of_pgbouncer_are_settings_whatever_their_type(start: Start) -> None:
    bouncer = start().pgbouncer(
        pool_mode="transaction", default_pool_size=5, log_connections=False, query_wait_timeout=1.5
    )
    config = shown(bouncer)
    assert (config["pool_mode"], config["default_pool_size"]) == ("transaction", "5")
    assert (config["log_connections"], float(config["query_wait_timeout"] or 0)) == ("0", 1.5)
    assert "pool_mode = transaction\ndefault_pool_size = 5\n" in bouncer.ini


def test_several_pgbouncers_in_different_modes_stand_side_by_side(start: Start) -> None:
    pg = start()
    bouncers = {mode: pg.pgbouncer(pool_mode=mode) for mode in ("session", "transaction", "statement")}
    assert {mode: shown(bouncer)["pool_mode"] for mode, bouncer in bouncers.items()} == {
        mode: mode for mode in bouncers
    }
    for mode in ("session", "transaction"):
        with psycopg.connect(bouncers[mode].dsn) as connection:
            assert connection.execute("select 1").fetchone() == (1,)
    with (
        pytest.raises(psycopg.Error, match="transaction blocks not allowed"),
        psycopg.connect(bouncers["statement"].dsn) as connection,
    ):
        connection.execute("select 1")


def test_the_mode_is_real(start: Start) -> None:
    """With a pool of one server, a second client gets a turn between transactions, or not at all."""
    pg = start()
    shared = pg.pgbouncer(pool_mode="transaction", default_pool_size=1)
    held = pg.pgbouncer(pool_mode="session", default_pool_size=1, query_wait_timeout=1)
    with psycopg.connect(shared.dsn, autocommit=True) as first:
        first.execute("select 1")
        assert asked(shared.dsn) == 1
    with psycopg.connect(held.dsn, autocommit=True) as first:
        first.execute("select 1")
        with pytest.raises(psycopg.OperationalError, match="query_wait_timeout"):
            asked(held.dsn)


INI = """\
; as one would write it at work
[databases]
shop = host={host} port={port} pool_size=3
reports = host={host} port={port} dbname=shop

[pgbouncer]
listen_addr = *
listen_port = 7000
logfile = /var/log/postgresql/pgbouncer.log
pidfile = /var/run/postgresql/pgbouncer.pid
unix_socket_dir = /var/run/postgresql
user = postgres
admin_users = app
pool_mode = transaction
; max_client_conn = 1
max_client_conn = 77
"""


def test_the_text_of_an_ini_holds(server: Postgres) -> None:
    with server.pgbouncer(ini=INI.format(**server.inner_address._asdict()), max_client_conn=78) as bouncer:
        config = shown(bouncer)
        assert config["pool_mode"] == "transaction"
        assert config["max_client_conn"] == "78", "keywords win"
        assert {config[name] or "" for name in ("logfile", "pidfile", "unix_socket_dir", "user")} <= {""}
        assert {row["name"]: row["pool_size"] for row in bouncer.rows("SHOW DATABASES")}["shop"] == 3
        assert asked(bouncer.dsn.replace("/shop", "/reports"), "select current_database()") == "shop"
        assert asked(bouncer.dsn) == 1


def test_the_ini_is_what_runs(server: Postgres) -> None:
    with server.pgbouncer(ini=INI.format(**server.inner_address._asdict()), max_client_conn=78) as bouncer:
        config = shown(bouncer)
        written = ini_values(bouncer.ini, "pgbouncer")
        assert {name: config[name] or "" for name in written} == written
        assert written["listen_port"] == str(bouncer.inner_address.port) != "7000"


def test_an_administrator_in_the_ini_is_one(server: Postgres) -> None:
    with server.pgbouncer(ini=INI.format(**server.inner_address._asdict())) as bouncer:
        app_in_console = bouncer.dsn.replace("/shop", "/pgbouncer")
        with psycopg.connect(app_in_console, autocommit=True, prepare_threshold=None) as console:
            assert console.execute("SHOW POOLS").fetchall()
        assert bouncer.rows("SHOW POOLS")


def test_an_ini_may_say_as_little_as_one_line(server: Postgres) -> None:
    with server.pgbouncer(ini="[pgbouncer]\npool_mode = transaction") as bouncer:
        assert shown(bouncer)["pool_mode"] == "transaction" and asked(bouncer.dsn) == 1


def test_an_ini_without_the_sample_database_gets_it(server: Postgres) -> None:
    with server.pgbouncer(ini="[databases]\nelsewhere = host=127.0.0.1 port=1\n") as bouncer:
        assert asked(bouncer.dsn, "select current_database()") == "shop"
        assert {"elsewhere", "shop"} <= {row["name"] for row in bouncer.rows("SHOW DATABASES")}


def test_an_ini_from_windows_runs(server: Postgres) -> None:
    text = "[pgbouncer]\npool_mode = transaction\n".replace("\n", "\r\n")
    with server.pgbouncer(ini=text) as bouncer:
        assert shown(bouncer)["pool_mode"] == "transaction"


def test_pause_holds_queries_and_resume_lets_them_go_on(start: Start, background: ThreadPoolExecutor) -> None:
    bouncer = start().pgbouncer(pool_mode="transaction")
    assert bouncer.rows("PAUSE") == []
    answer = background.submit(asked, bouncer.dsn, "select 5")
    assert still_waits(answer)
    bouncer.rows("RESUME")
    assert answer.result(PATIENCE) == 5


def test_show_pools_tells_of_the_client_that_waits(start: Start, background: ThreadPoolExecutor) -> None:
    bouncer = start().pgbouncer(default_pool_size=1)
    with psycopg.connect(bouncer.dsn, autocommit=True) as first:
        first.execute("select 1")
        second = background.submit(asked, bouncer.dsn, "select 2")

        def shop() -> tuple[int, int, int]:
            (row,) = [row for row in bouncer.rows("SHOW POOLS") if row["database"] == "shop"]
            return row["sv_active"], row["cl_active"], row["cl_waiting"]

        assert until(lambda: shop() == (1, 1, 1), PATIENCE), shop()
    assert second.result(PATIENCE) == 2


def test_reload_reads_what_the_console_was_told_by_the_file(start: Start) -> None:
    bouncer = start().pgbouncer(default_pool_size=4)
    bouncer.rows("SET default_pool_size = 9")
    assert shown(bouncer)["default_pool_size"] == "9"
    bouncer.reload()
    assert shown(bouncer)["default_pool_size"] == "4"


def test_a_wrong_command_in_the_console_raises_what_it_says(bouncer: PgBouncer) -> None:
    with pytest.raises(psycopg.Error, match=r"(?i)invalid command|unsupported|syntax"):
        bouncer.rows("SHOW ME THE MONEY")


def test_clients_get_through_again_after_a_restart_of_the_server(start: Start) -> None:
    """The second login at the server is the one that a SCRAM secret must be passed on for once more."""
    pg = start()
    bouncer = pg.pgbouncer(server_login_retry=1, server_check_delay=0)
    assert asked(bouncer.dsn) == 1
    for _ in range(2):
        pg.restart()
        assert until(lambda: gets_through(bouncer.dsn), PATIENCE), bouncer.log()


def gets_through(dsn: str) -> bool:
    try:
        return bool(asked(dsn) == 1)
    except psycopg.OperationalError:
        return False
