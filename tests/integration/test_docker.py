"""What the docker backend promises besides what every backend does: containers that are its own and leave nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import grp
import io
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from conftest import Start
from containers import containers_and_networks
from leftovers import PATIENCE, Child, Person, assert_nothing_left, ordinary_person, until
from test_kernel import Notebook

from connlab import (
    NodeStopped,
    Postgres,
    ProgramMissing,
    StartError,
    backends,
    doctor,
    engine,
    images,
    prepare,
    programs,
)
from connlab.progress import Progress

pytestmark = pytest.mark.usefixtures("docker_only")

SOCKET = Path("/var/run/docker.sock")
ON_DOCKER = Person(environment={"CONNLAB_BACKEND": "docker"})
WAITING_PAIR = "pg = Postgres.start(); bouncer = pg.pgbouncer(); tell(pg, bouncer); listen()"
GONE_WITHIN = 20.0


@pytest.fixture(scope="module")
def containers() -> Iterator[Any]:
    """Docker's own client."""
    client = docker.from_env()
    yield client
    client.close()


def inspected(client: Any, node: Postgres | Any) -> dict[str, Any]:
    """The container that publishes the node's port."""
    found = [container.attrs for container in client.containers.list(filters={"publish": node.address.port})]
    assert len(found) == 1
    return dict(found[0])


# --- what runs ----------------------------------------------------------------------------------------------------


def test_every_program_is_a_container_with_a_name_that_tells(start: Start, containers: Any) -> None:
    pg = start()
    names = [inspected(containers, node)["Name"] for node in (pg, pg.pgbouncer(), pg.pgbouncer())]
    assert [name.split("-")[1] for name in names] == ["postgres", "pgbouncer", "pgbouncer"]
    assert len(set(names)) == 3


def test_a_container_is_published_on_loopback_alone_and_has_no_rights(start: Start, containers: Any) -> None:
    pg = start()
    for node in (pg, pg.pgbouncer()):
        found = inspected(containers, node)
        bindings = [one for ports in found["NetworkSettings"]["Ports"].values() for one in ports or []]
        assert {one["HostIp"] for one in bindings} == {"127.0.0.1"}
        assert found["Config"]["User"] == "postgres"
        assert found["HostConfig"]["CapDrop"] == ["ALL"] and not found["HostConfig"]["Privileged"]
        assert [mount for mount in found["Mounts"] if mount["Type"] == "volume"] == []


def test_all_containers_of_a_process_share_a_private_network(start: Start, containers: Any) -> None:
    pg, other = start(), start()
    networks = [list(inspected(containers, node)["NetworkSettings"]["Networks"]) for node in (pg, other)]
    assert networks[0] == networks[1] and networks[0] != ["bridge"]
    assert pg.inner_address != other.inner_address and pg.inner_address.port == other.inner_address.port == 5432


def test_a_server_keeps_its_address_though_another_started_while_it_was_down(start: Start, containers: Any) -> None:
    pg = start()
    before = addresses(inspected(containers, pg))
    assert before == [pg.inner_address.host]
    pg.kill()
    other = start()
    pg.restart()
    assert addresses(inspected(containers, pg)) == before != addresses(inspected(containers, other))


def addresses(found: dict[str, Any]) -> list[str]:
    return [network["IPAddress"] for network in found["NetworkSettings"]["Networks"].values()]


def test_docker_logs_shows_what_the_node_tells(start: Start, containers: Any) -> None:
    pg = start()
    name = inspected(containers, pg)["Name"].strip("/")
    assert containers.containers.get(name).logs().decode() == pg.log()


def test_auto_takes_docker_where_local_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CONNLAB_BACKEND", *backends.LOCAL_PROGRAMS):
        monkeypatch.delenv(variable, raising=False)
    assert backends.choose().name == "local"
    monkeypatch.setattr(backends, "local_usable", lambda: False)
    assert backends.choose().name == "docker"
    monkeypatch.setenv("CONNLAB_POSTGRES", "/nowhere")
    assert backends.choose().name == "local", "whoever names a program is told that it is not there"


# --- what is wrong ------------------------------------------------------------------------------------------------


def test_a_container_that_exits_at_once_is_reported_at_once(start: Start) -> None:
    began = time.monotonic()
    with pytest.raises(StartError) as caught:
        start(shared_preload_libraries="no_such_library")
    spent = time.monotonic() - began
    assert 'could not access file "no_such_library"' in str(caught.value).splitlines()[0]
    assert "FATAL" in caught.value.log and "docker run connlab/postgres:18" in caught.value.command
    began = time.monotonic()
    start()
    assert spent < 3 * (time.monotonic() - began) + 1, "it took much longer than a start that goes well"


def test_an_image_that_is_missing_is_named_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(images.IMAGES["postgres"], tag="connlab/no-such-image:18")
    monkeypatch.setitem(images.IMAGES, "postgres", missing)
    with pytest.raises(ProgramMissing, match="lacks the image connlab/no-such-image:18") as caught:
        Postgres.start(backend="docker")
    assert any("connlab doctor --fix" in way for way in caught.value.ways_out)
    assert any("build-offline-images" in way for way in caught.value.ways_out)
    assert not backends.docker_usable()
    assert not doctor.look().backends["docker"].usable


def test_an_image_of_another_version_of_the_course_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(images.IMAGES["postgres"], inputs=())
    monkeypatch.setitem(images.IMAGES, "postgres", other)
    with pytest.raises(ProgramMissing, match="made for another version of the course"):
        Postgres.start(backend="docker")


@pytest.mark.parametrize(
    ("host", "says", "way"),
    [
        ("unix:///nowhere/docker.sock", "/nowhere/docker.sock: no such socket", "start the engine"),
        ("tcp://127.0.0.1:1", "tcp://127.0.0.1:1: .*refused", "start the engine"),
        ("tcp://192.0.2.1:2376", "it is on another machine", "unset DOCKER_HOST"),
        ("ssh://learner@192.0.2.1", "it is on another machine", "unset DOCKER_HOST"),
    ],
    ids=["no socket", "nobody listens", "another machine", "over ssh"],
)
def test_an_engine_that_cannot_be_used_is_named(host: str, says: str, way: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("DOCKER_HOST", host)
    began = time.monotonic()
    with pytest.raises(ProgramMissing, match=says) as caught:
        Postgres.start(backend="docker")
    assert any(way in line for line in caught.value.ways_out)
    assert time.monotonic() - began < PATIENCE / 3, "it waited for somebody who cannot answer"
    assert os.environ["DOCKER_HOST"] == host


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Person]:
    with ordinary_person() as person:
        assert person is not None, "no other user here can run a Python with connlab's dependencies"
        yield person


@pytest.mark.machine
def test_a_user_who_may_not_use_the_socket_is_told_how(ordinary: Person) -> None:
    script = """
    from connlab import ProgramMissing
    try:
        Postgres.start(backend="docker")
    except ProgramMissing as problem:
        tell(what=problem.what, ways=problem.ways_out)
    """
    with Child(ordinary, script) as child:
        told = child.told()
    assert "may not speak to the Docker engine at unix://" in told["what"]
    assert any("usermod -aG docker" in way for way in told["ways"])


# --- nothing survives ---------------------------------------------------------------------------------------------


def assert_all_gone(child: Child, *, owner_lives: bool = False, seconds: float = GONE_WITHIN) -> None:
    until(lambda: not containers_and_networks(child.trace.owner), seconds)
    assert containers_and_networks(child.trace.owner) == []
    assert_nothing_left(child.trace, owner_lives=owner_lives)


def test_stop_leaves_nothing() -> None:
    with Child(ON_DOCKER, WAITING_PAIR, "pg.stop(); tell(); listen()") as child:
        child.told()
        assert len(containers_and_networks(child.trace.owner)) == 3
        child.say()
        child.told()
        assert_all_gone(child, owner_lives=True, seconds=0)


@pytest.mark.parametrize("how", ["sys.exit()", "raise RuntimeError('in the lesson')", "os._exit(0)"])
def test_an_end_without_stop_leaves_nothing(how: str) -> None:
    with Child(ON_DOCKER, WAITING_PAIR, how) as child:
        child.told()
        child.say()
        child.ended()
        assert_all_gone(child)


@pytest.mark.parametrize("state", ["pass", "busy(pg)", "pg.freeze(); bouncer.freeze()", "pg.kill()"])
def test_kill_9_of_the_process_leaves_nothing(state: str) -> None:
    with Child(ON_DOCKER, WAITING_PAIR, f"{state}; tell(); listen()") as child:
        child.told()
        child.say()
        child.told()
        child.kill()
        assert_all_gone(child)


def test_kill_9_at_any_moment_of_the_start_leaves_nothing() -> None:
    for _ in range(8):
        with Child(ON_DOCKER, "tell(); listen()", WAITING_PAIR) as child:
            child.told()
            child.say()
            time.sleep(random.uniform(0, 1.5))  # not a wait: the moment of the kill
            child.kill()
            assert_all_gone(child)


def test_an_interrupt_during_the_start_leaves_nothing_half_started() -> None:
    script = """
    import connlab.engine, connlab.runtime.docker
    connlab.engine.connect()
    tell()
    while listen():
        try:
            pg = Postgres.start(); bouncer = pg.pgbouncer()
            pg.stop()
            time.sleep(60)
        except KeyboardInterrupt:
            with contextlib.suppress(NameError):
                pg.stop()
        tell()
    """
    with Child(ON_DOCKER, script) as child:
        child.told()
        for _ in range(8):
            child.say()
            time.sleep(random.uniform(0, 1.2))  # not a wait: the moment of the interrupt
            child.interrupt()
            assert_all_gone(child, owner_lives=True, seconds=0)


def test_an_interrupt_at_any_step_of_a_start_leaves_neither_a_container_nor_the_network() -> None:
    """As for processes: raised by a tracer, for a signal hits one given step in a thousand runs."""
    script = """
    at, steps = 0, 1
    while at <= steps:
        at += 1
        tracer = interrupt_at(at, ("postgres", "runtime/docker", "runtime/network"))
        try:
            with tracer:
                pg = Postgres.start()
            pg.stop()
        except KeyboardInterrupt:
            pass
        steps = max(steps, tracer.steps)
        tell(steps=steps, where=tracer.where)
        listen()
    tell()
    """
    interrupted = 0
    with Child(ON_DOCKER, script) as child:
        while (told := child.told()).get("steps"):
            assert containers_and_networks(child.trace.owner) == [], told["where"]
            interrupted += bool(told["where"])
            child.say()
    assert interrupted > 15


def told_by(script: str) -> None:
    """Run it in a process of its own, to its end."""
    with Child(ON_DOCKER, script, "tell()") as child:
        child.told()
        child.ended()


def leave_a_pair(child: Child) -> None:
    """Kill it with its watchdog, both in one instant: what is stopped can start nobody."""
    child.told()
    [watchdog] = child.trace.helpers
    child.send(signal.SIGSTOP)
    os.kill(watchdog, signal.SIGKILL)
    child.kill()
    assert len(containers_and_networks(child.trace.owner)) == 3


def test_what_nobody_watched_is_swept_by_the_next_start_and_by_clean() -> None:
    for sweeper in ("Postgres.start().stop()", "from connlab import cleaning; print(cleaning.sweep())"):
        with Child(ON_DOCKER, WAITING_PAIR) as child:
            leave_a_pair(child)
            told_by(sweeper)
            assert_all_gone(child, seconds=0)


def test_containers_whose_owners_directory_is_gone_are_swept_too() -> None:
    """As after a restart of the machine: memory is empty, containers are still there."""
    with Child(ON_DOCKER, WAITING_PAIR) as child:
        leave_a_pair(child)
        for directory in child.trace.directories():
            for file in directory.iterdir():
                file.unlink()
            directory.rmdir()
        told_by("Postgres.start().stop()")
        assert_all_gone(child, seconds=0)


def test_a_living_process_is_never_swept() -> None:
    with Child(ON_DOCKER, WAITING_PAIR, "tell(answer=pg.value('select 42'))") as child:
        child.told()
        told_by("from connlab import cleaning; cleaning.sweep(); Postgres.start().stop()")
        child.say()
        assert child.told()["answer"] == 42


@pytest.mark.parametrize("leave", ["sys.exit()", "os._exit(0)"])
def test_a_forked_child_that_ends_leaves_its_parents_servers_alone(leave: str) -> None:
    script = f"""
    pg = Postgres.start()
    tell(pg)
    child = os.fork()
    assert all(pg.running for _ in range(200))  # both at the same time
    with Postgres.start() as own:
        assert own.value("select 2") == 2
        time.sleep(1)
    if child == 0:
        {leave}
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    tell(pg, answer=pg.value("select 42"))
    """
    with Child(ON_DOCKER, script) as child:
        child.told()
        assert child.told()["answer"] == 42
        child.ended()
        assert_all_gone(child)


def test_an_engine_on_a_tcp_port_of_this_machine_does() -> None:
    with relayed() as port:
        person = Person(environment={"CONNLAB_BACKEND": "docker", "DOCKER_HOST": f"tcp://127.0.0.1:{port}"})
        assert_it_works_and_goes(person)


def assert_it_works_and_goes(person: Person) -> None:
    with Child(person, WAITING_PAIR, "pg.restart(); tell(answer=pg.value('select 42')); listen()") as child:
        child.told()
        child.say()
        assert child.told()["answer"] == 42
        child.kill()
        assert_all_gone(child)


@contextlib.contextmanager
def relayed() -> Iterator[int]:
    """A port of 127.0.0.1 behind which the engine's socket is."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=[listener], daemon=True).start()
        yield listener.getsockname()[1]


def _accept(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(SOCKET))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=_pass_on, args=[source, target], daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.machine
def test_an_ordinary_user_who_may_use_the_socket_gets_the_same(ordinary: Person) -> None:
    group = SOCKET.stat().st_gid
    assert group != 0 and grp.getgrgid(group), "the engine's socket belongs to a group, as Debian's package has it"
    environment = {**ordinary.environment, "CONNLAB_BACKEND": "docker"}
    assert_it_works_and_goes(dataclasses.replace(ordinary, groups=[group], environment=environment))


def test_a_container_that_somebody_removed_is_reported(start: Start, containers: Any) -> None:
    pg = start()
    containers.api.remove_container(inspected(containers, pg)["Name"].strip("/"), force=True)
    with pytest.raises(NodeStopped, match="No such container"):
        pg.value("select 1")
    pg.stop()


# --- what is got ready --------------------------------------------------------------------------------------------


@pytest.fixture
def other_tags(monkeypatch: pytest.MonkeyPatch, containers: Any) -> Iterator[list[str]]:
    """Images of other names, which are not there yet; they are removed after the test."""
    tags = {kind: f"connlab-test/{kind}:{os.getpid()}" for kind in images.IMAGES}
    for kind, tag in tags.items():
        monkeypatch.setitem(images.IMAGES, kind, dataclasses.replace(images.IMAGES[kind], tag=tag))
    yield list(tags.values())
    for tag in tags.values():
        with contextlib.suppress(docker.errors.ImageNotFound):
            containers.images.remove(tag, force=True)


def test_missing_images_are_made_once_and_said(other_tags: list[str]) -> None:
    said = io.StringIO()
    assert sorted(images.lacking(engine.connect())) == sorted(other_tags)
    prepare.docker(Progress(said))
    assert [tag for tag in other_tags if f"Building the image {tag}" not in said.getvalue()] == []
    assert images.lacking(engine.connect()) == {}
    with Postgres.start(backend="docker") as pg, pg.pgbouncer() as bouncer:
        assert f"PostgreSQL {pg.version} and PgBouncer {bouncer.version} (docker)" in said.getvalue()
        assert bouncer.value("SHOW VERSION") == f"PgBouncer {bouncer.version}"
    again = io.StringIO()
    prepare.docker(Progress(again))
    assert "Building" not in again.getvalue()


def test_doctor_tells_what_the_chosen_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONNLAB_BACKEND", "docker")
    found = doctor.look()
    assert found.chosen == "docker" and found.backends["docker"].usable
    with Postgres.start() as pg, pg.pgbouncer() as bouncer:
        assert (found.postgres, found.pgbouncer) == (str(pg.version), str(bouncer.version))


def test_doctor_recommends_docker_when_pgbouncer_is_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "pgbouncer"
    program.write_text("#!/bin/sh\necho PgBouncer 1.20.1\n")
    program.chmod(0o755)
    monkeypatch.setattr(programs, "_require_readable", lambda _: None)
    monkeypatch.setattr(programs, "server_account", lambda: None)
    monkeypatch.setenv("CONNLAB_PGBOUNCER", str(program))
    assert "CONNLAB_BACKEND=docker has PgBouncer 1." in doctor.as_text(doctor.look())


# --- a kernel -----------------------------------------------------------------------------------------------------


def test_kill_9_of_a_kernel_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONNLAB_BACKEND", "docker")
    notebook = Notebook()
    try:
        notebook.run("pg = Postgres.start(); bouncer = pg.pgbouncer(); busy(pg); tell(pg, bouncer)")
        owner = notebook.trace.owner
        assert len(containers_and_networks(owner)) == 3
        os.kill(owner, signal.SIGKILL)
        assert until(lambda: not containers_and_networks(owner), GONE_WITHIN), containers_and_networks(owner)
        assert_nothing_left(notebook.trace)
    finally:
        notebook.end()


@pytest.mark.parametrize("now", [True, False])
def test_a_restart_of_the_kernel_leaves_nothing(monkeypatch: pytest.MonkeyPatch, now: bool) -> None:
    monkeypatch.setenv("CONNLAB_BACKEND", "docker")
    notebook = Notebook()
    try:
        notebook.run("pg = Postgres.start(); tell(pg)")
        owner = notebook.trace.owner
        notebook.restart(now=now)
        assert until(lambda: not containers_and_networks(owner), GONE_WITHIN), containers_and_networks(owner)
        assert notebook.run("pg = Postgres.start(); tell(pg, answer=pg.value('select 42'))")["answer"] == 42
    finally:
        notebook.end()
    assert until(lambda: not containers_and_networks(notebook.trace.owner), GONE_WITHIN)
