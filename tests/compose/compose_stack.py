"""docker-compose.yml, brought up for tests: under a name and on ports of its own, beside whatever else runs here."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
OURS = ("docker-compose.yml", "deploy/compose", "src/connlab/schema.sql")
"""What compose reads of a checkout when the images are there."""
INSIDE = {"jupyter": 8888, "postgres": 5432, "pgbouncer": 6432}
"""The services that publish a port, and the port in the container."""
UP = ("up", "--detach", "--no-build", "--pull", "never", "--wait", "--wait-timeout", "120")


def compose_program() -> list[str]:
    """`docker compose`, or `docker-compose`, whichever is a version 2. The test fails when there is none."""
    found = []
    for command in (["docker", "compose"], ["docker-compose"]):
        if not shutil.which(command[0]):
            continue
        version = subprocess.run([*command, "version", "--short"], capture_output=True, text=True).stdout.strip()
        if version.lstrip("v").split(".")[0].isdecimal() and int(version.lstrip("v").split(".")[0]) >= 2:
            return command
        found.append(f"{' '.join(command)}: {version.splitlines()[0] if version else 'no such command'}")
    pytest.fail(
        f"there is no docker compose, version 2 ({'; '.join(found) or 'nothing found'}); on Debian: "
        "deploy/compose-from-debian FOLDER, then PATH=FOLDER:$PATH"
    )


def run(*command: str, check: bool = True, **options: Any) -> str:
    """What the command prints, its errors included."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert not check or done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}"
    printed: str = done.stdout
    return printed


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Stack:
    """One project of docker compose."""

    folder: Path
    program: list[str]
    project: str = field(default_factory=lambda: f"connlab-test-{secrets.token_hex(4)}")
    ports: dict[str, int] = field(default_factory=lambda: dict(zip(INSIDE, free_ports(len(INSIDE)), strict=True)))

    def compose(self, *arguments: str, **options: Any) -> str:
        """Run docker compose on this project, with its ports."""
        ours = {f"CONNLAB_{service.upper()}_PORT": str(port) for service, port in self.ports.items()}
        others = {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")}
        command = [*self.program, "--project-name", self.project, *arguments]
        return run(*command, cwd=self.folder, env={**others, **ours}, **options)

    def up(self) -> None:
        """Start what is there, and wait until all of it is healthy."""
        try:
            self.compose(*UP)
        except AssertionError as problem:
            problem.add_note(self.compose("logs", "--no-color", check=False))
            raise

    def exec(self, service: str, *command: str, options: tuple[str, ...] = (), check: bool = True) -> str:
        """Run a command in a service's container."""
        return self.compose("exec", "-T", *options, service, *command, check=check)

    def secret(self, name: str, service: str = "postgres") -> str:
        """A file of the volume with the passwords, read as the README says."""
        return self.exec(service, "cat", f"/run/connlab/{name}").strip()

    def all_secrets(self) -> dict[str, str]:
        """Every password, by its name."""
        ours = {name: self.secret(name) for name in ("postgres_password", "app_password")}
        return {**ours, "jupyter_token": self.secret("jupyter_token", "jupyter")}

    def containers(self) -> list[dict[str, Any]]:
        """What `docker inspect` says of each container, the ended one too."""
        ids = self.left("ps", "--all")
        found: list[dict[str, Any]] = json.loads(run("docker", "inspect", *ids)) if ids else []
        return found

    def left(self, *listing: str) -> list[str]:
        """Names of this project's objects: ``listing`` is "ps --all", "network ls", "volume ls"."""
        return run(
            "docker", *listing, "--quiet", "--filter", f"label=com.docker.compose.project={self.project}"
        ).split()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Stack]:
    """The project, up and healthy; nothing of it is left afterwards, whatever happens."""
    _check_out(folder)
    stack = Stack(folder, compose_program())
    try:
        stack.up()
        yield stack
    finally:
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")


def _check_out(folder: Path) -> None:
    """As a checkout under a strict umask: readable for its owner alone."""
    for name in OURS:
        source, target = CHECKOUT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _ = shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
