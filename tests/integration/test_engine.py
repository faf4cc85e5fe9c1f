"""An engine that stops in the middle: what a learner is told, and that nothing is left when it is back.

The engine is one of this test's own, in a network of its own: the machine's is not touched.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import containers_and_networks
from leftovers import PATIENCE, Child, Person, assert_nothing_left, until

from connlab.images import IMAGES

pytestmark = [pytest.mark.machine, pytest.mark.usefixtures("docker_only")]

CLONE_NEWNET = 0x40000000
WAITING_PAIR = "pg = Postgres.start(); bouncer = pg.pgbouncer(); tell(pg, bouncer); listen()"


class OwnEngine:
    """A Docker engine in a network namespace of its own, which is this process's to stop."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"unix://{folder}/docker.sock"
        self.namespace = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        until(lambda: self._net().readlink() != Path("/proc/self/ns/net").readlink(), PATIENCE)
        subprocess.run(["ip", "link", "set", "lo", "up"], preexec_fn=self.enter, check=True)
        self.engine: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        (self.folder / "docker.pid").unlink(missing_ok=True)
        places = [f"--data-root={self.folder}/data", f"--exec-root={self.folder}/exec"]
        with (self.folder / "log").open("ab") as log:
            self.engine = subprocess.Popen(
                ["dockerd", *places, f"--pidfile={self.folder}/docker.pid", f"--host={self.address}"],
                stdout=log,
                stderr=log,
                preexec_fn=self.enter,
            )
        assert until(lambda: self.docker("version").returncode == 0, PATIENCE), (self.folder / "log").read_text()[
            -2000:
        ]

    def docker(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["docker", "--host", self.address, *arguments], capture_output=True)

    def log(self) -> str:
        return (self.folder / "log").read_text()[-2000:]

    def stop(self) -> None:
        if self.engine:
            self.engine.terminate()
            self.engine.wait(PATIENCE)

    def end(self) -> None:
        self.stop()
        self.namespace.kill()
        self.namespace.wait()

    def enter(self) -> None:
        descriptor = os.open(self._net(), os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "the network namespace cannot be entered")

    def left(self, owner: int) -> list[str]:
        return containers_and_networks(owner, self.address)

    def _net(self) -> Path:
        return Path(f"/proc/{self.namespace.pid}/ns/net")


@pytest.fixture(scope="module")
def own_engine() -> Iterator[OwnEngine]:
    folder = Path(tempfile.mkdtemp(prefix="connlab-test-engine-"))
    engine = OwnEngine(folder)
    try:
        engine.start()
        with (folder / "images").open("wb") as file:
            subprocess.run(["docker", "save", *(image.tag for image in IMAGES.values())], stdout=file, check=True)
        assert engine.docker("load", "--input", str(folder / "images")).returncode == 0
        (folder / "images").unlink()
        yield engine
    finally:
        engine.end()
        shutil.rmtree(folder)


@pytest.fixture
def person(own_engine: OwnEngine) -> Iterator[Person]:
    """Somebody whose engine it is; it runs, before and after."""
    environment = {"CONNLAB_BACKEND": "docker", "DOCKER_HOST": own_engine.address}
    yield Person(environment=environment, prepare=own_engine.enter)
    if own_engine.engine and own_engine.engine.poll() is not None:
        own_engine.start()


def test_an_engine_that_stops_is_named_and_the_next_server_starts_when_it_is_back(
    own_engine: OwnEngine, person: Person
) -> None:
    script = """
    from connlab import ConnlabError
    said = []
    for act in (lambda: pg.value("select 1"), pg.restart, pg.stop, Postgres.start):
        try:
            act()
        except ConnlabError as problem:
            said.append(f"{type(problem).__name__}: {problem}")
    tell(said=said, log=len(pg.log()))
    listen()
    with Postgres.start() as other:
        tell(answer=other.value("select 42"))
    """
    with Child(person, WAITING_PAIR, script) as child:
        child.told()
        assert len(own_engine.left(child.trace.owner)) == 3
        own_engine.stop()
        child.say()
        told = child.told()
        asked, restarted, stopped, started = told["said"]
        assert asked.startswith("NodeStopped: ") and "does not answer" in asked
        assert restarted.startswith("StartError: ") and "does not answer" in restarted
        assert stopped.startswith("EngineError: ") and "connlab clean" in stopped
        assert "does not answer" in started
        assert told["log"] > 0, "the log of before is lost"
        own_engine.start()
        child.say()
        assert child.told()["answer"] == 42
        child.ended()
        assert until(lambda: own_engine.left(child.trace.owner) == [], PATIENCE), own_engine.left(child.trace.owner)
        assert_nothing_left(child.trace)


def test_what_a_killed_process_left_on_a_stopped_engine_goes_when_it_is_back(
    own_engine: OwnEngine, person: Person
) -> None:
    with Child(person, WAITING_PAIR) as child:
        child.told()
        own_engine.stop()
        [watchdog] = child.trace.helpers
        child.kill()
        until(lambda: not Path(f"/proc/{watchdog}").exists(), PATIENCE)  # it cannot do anything and gives up
        with Child(person, "from connlab import cleaning; tell(lines=cleaning.sweep())") as other:
            [line] = [line for line in other.told()["lines"] if f"/{child.trace.owner}-" in line]
            assert line.startswith("left ") and "does not answer" in line
            other.ended()
        own_engine.start()
        assert own_engine.left(child.trace.owner), "nothing was there to be swept"  # the engine may forget the network
        with Child(person, "from connlab import cleaning; tell(lines=cleaning.sweep())") as other:
            [line] = [line for line in other.told()["lines"] if f"/{child.trace.owner}-" in line]
            assert line.startswith("removed ")
            other.ended()
        assert own_engine.left(child.trace.owner) == []
        assert_nothing_left(child.trace)


def test_doctor_fix_says_what_it_could_not_download(own_engine: OwnEngine, person: Person) -> None:
    """The engine has no network, and after this none of our images."""
    own_engine.docker("rmi", "--force", *(image.tag for image in IMAGES.values()))
    fix = [sys.executable, "-m", "connlab.cli", "doctor", "--fix"]
    environment = {**os.environ, **person.environment}
    done = subprocess.run(fix, env=environment, preexec_fn=person.prepare, capture_output=True, text=True)
    assert done.returncode == 1
    assert "connlab doctor: download the image postgres:18: the Docker engine says: " in done.stderr
    assert "Traceback" not in done.stderr
