"""One program as a container of its own."""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections.abc import Iterable, Sequence
from typing import Any

from connlab import janitor
from connlab.engine import Engine
from connlab.errors import EngineError, StartError
from connlab.images import NO_VOLUME, Facts, Image, archive
from connlab.reaper import IN_FLIGHT
from connlab.runtime import Address, ports
from connlab.runtime.network import Network
from connlab.runtime.output import Output

USER = 999
"""The user postgres of the official image, whom both images run as."""
STOP_WITHIN = 10.0
# Its own pid, then each line of each file behind the file's name.
READ_ALL = 'echo $$; exec grep -aHs "" /proc/[0-9]*/"$1"'


class ContainerProgram:
    """One program as a container: see ``connlab.runtime.Program``.

    The container is made at the first start, for its command cannot be changed; files wait until then.
    """

    socket_directory = ""

    def __init__(
        self, kind: str, image: Image, image_id: str, facts: Facts, engine: Engine, network: Network, port: int | None
    ) -> None:
        self.kind, self.version, self.secret, self.directory = kind, facts.version, facts.secret, image.directory
        self._image, self._image_id, self._engine, self._network = image, image_id, engine, network
        self._files: dict[str, bytes] = {}
        self._arguments: Sequence[str] = ()
        self._asked = self._made = self._paused = False
        self._output = Output()
        owner = janitor.owner()
        self.name, self._labels = owner.container(kind, engine.address)
        self._port = ports.hold(port)
        owner.at_exit(self.remove)
        self._place = network.join(self.name)

    @property
    def listen(self) -> Address:
        """See ``Program``: in the container; ``address`` is where it is published."""
        return self.inner_address

    @property
    def address(self) -> Address:
        """See ``Program``."""
        return Address(ports.HOST, self._port.number)

    @property
    def inner_address(self) -> Address:
        """See ``Program``."""
        return Address(self._place.address, self._image.port)

    def write(self, name: str, text: str) -> None:
        """See ``Program``."""
        if self._made:
            self._put({name: text.encode()})
        else:
            self._files[name] = text.encode()

    def start(self, arguments: Sequence[str]) -> None:
        """See ``Program``."""
        try:
            if not self._made:
                self._arguments = arguments
                self._make(arguments)
                self._put(self._files)
            with self._engine.asking(f"start the container {self.name}"):
                # Attached to before it starts, so that nothing it prints is lost.
                printed = self._engine.api.attach(self.name, stdout=True, stderr=True, stream=True, logs=False)
                self._output.follow(printed)
                self._engine.api.start(self.name)
        except EngineError as problem:
            raise StartError(str(problem), command=self.command()) from problem

    def command(self) -> str:
        """See ``Program``: what ``docker run`` would take, without the files."""
        return shlex.join(["docker", "run", self._image.tag, *self._arguments])

    def alive(self) -> bool:
        """See ``Program``. An engine that has gone took its containers along, or nobody can tell."""
        with contextlib.suppress(EngineError):
            return bool(self._state().get("Running"))
        return False

    def ended(self) -> str:
        """See ``Program``."""
        if not self._made:
            return ""
        try:
            state = self._state()
        except EngineError as problem:
            return str(problem)
        return "" if state.get("Running") else _how(state)

    def signal(self, number: int) -> None:
        """See ``Program``."""
        if self._made and self.alive():
            with contextlib.suppress(EngineError), self._engine.asking(f"send a signal to {self.name}"):
                self._engine.api.kill(self.name, number)

    def kill(self) -> None:
        """See ``Program``. The end of a container's first process is the end of all."""
        self.signal(signal.SIGKILL)
        self.thaw()
        deadline = time.monotonic() + STOP_WITHIN
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.01)

    def freeze(self) -> None:
        """See ``Program``."""
        self._paused = True
        self._switch("pause")

    def thaw(self) -> None:
        """See ``Program``."""
        if self._paused:
            self._switch("unpause")
            self._paused = False

    def log(self, since: int = 0) -> str:
        """See ``Program``."""
        return self._output.text(since)

    def log_size(self) -> int:
        """See ``Program``."""
        return self._output.size()

    def settle(self) -> None:
        """See ``Program``."""
        self._output.settle(running=self.alive())

    def proc(self, name: str, pids: Iterable[int] | None = None) -> dict[int, str]:
        """See ``Program``. The pids are the container's, which PostgreSQL shows too."""
        files = [f"/proc/{pid}/{name}" for pid in pids or ()]
        if not self._made or (pids is not None and not files):
            return {}
        command = ["grep", "-aHs", "", *files] if files else ["sh", "-c", READ_ALL, "sh", name]
        with self._engine.asking(f"read /proc in the container {self.name}"):
            started = self._engine.api.exec_create(self.name, command, stderr=False)
            printed = self._engine.api.exec_start(started["Id"]).decode(errors="replace")
        reader, _, listed = ("", "", printed) if files else printed.partition("\n")
        return {pid: text for pid, text in _contents(listed).items() if str(pid) != reader}

    def remove(self) -> None:
        """See ``Program``."""
        try:
            if self._asked:
                self._remove_container()
                self._asked = self._made = False
        finally:
            self._port.release()
            janitor.owner().forget(self.remove)
        self._network.leave(self.name)

    def _make(self, arguments: Sequence[str]) -> None:
        from docker.types import EndpointConfig, LogConfig

        self._asked = True
        with self._engine.asking(f"make the container {self.name}"):
            self._engine.docker.create(
                self._image_id,
                command=list(arguments),
                ports={f"{self._image.port}/tcp": (ports.HOST, self._port.number)},
                labels=self._labels,
                name=self.name,
                hostname=self.kind,
                network=self._place.network,
                networking_config={
                    self._place.network: EndpointConfig("1.41", ipv4_address=self._place.address),
                },
                tmpfs=NO_VOLUME,
                cap_drop=["ALL"],
                security_opt=["no-new-privileges"],
                log_config=LogConfig(type="json-file"),  # `docker logs` shows it too, whatever the engine's default
            )
        self._made = True

    def _put(self, files: dict[str, bytes]) -> None:
        with self._engine.asking(f"write {', '.join(files)} into the container {self.name}"):
            self._engine.api.put_archive(self.name, self.directory, archive(files, user=USER, mode=0o600))

    def _state(self) -> dict[str, Any]:
        if not self._made:
            return {}
        with self._engine.asking(f"look at the container {self.name}"):
            found: dict[str, Any] = self._engine.api.inspect_container(self.name)["State"]
            return found

    def _switch(self, verb: str) -> None:
        """Pause or unpause; a container that has ended meanwhile is no error."""
        with contextlib.suppress(EngineError), self._engine.asking(f"{verb} the container {self.name}"):
            getattr(self._engine.api, verb)(self.name)

    def _remove_container(self) -> None:
        """By its name: an interrupted request may have made one that we know nothing else of."""
        import docker.errors

        deadline = time.monotonic() + (0 if self._made else IN_FLIGHT)
        with self._engine.asking(f"remove the container {self.name}, which the next start or `connlab clean` will do"):
            while True:
                try:
                    self._engine.api.remove_container(self.name, force=True, v=True)
                    return
                except docker.errors.NotFound:
                    if time.monotonic() >= deadline:
                        return
                time.sleep(0.05)


def _how(state: dict[str, Any]) -> str:
    code = state.get("ExitCode", 0)
    if state.get("OOMKilled"):
        return "out of memory"
    if code > 128:  # as a shell tells it: 128 and the signal
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(code - 128).name}"
    return f"exit code {code}"


def _contents(listed: str) -> dict[int, str]:
    """Each process's text from lines like "/proc/7/status:Name: postgres"."""
    found: dict[int, str] = {}
    for line in listed.splitlines(keepends=True):
        path, _, text = line.partition(":")
        pid = int(path.split("/")[2])
        found[pid] = found.get(pid, "") + text
    return found
