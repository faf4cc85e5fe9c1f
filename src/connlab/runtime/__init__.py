"""The seam between nodes and the way programs run.

A *runtime* runs one program at a time: here as a local process, elsewhere as a container. Nodes write
configuration and speak SQL; they know nothing of processes or containers. Another program (HAProxy,
Prometheus) needs no new class here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from connlab.version import Version


class Address(NamedTuple):
    """Where a program listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Program(Protocol):
    """One program: prepared, then started, perhaps several times, in the end removed.

    Paths in commands and configuration are as the program sees them: below ``directory``.
    """

    @property
    def kind(self) -> str:
        """What it is, as ``prepare`` was told: "postgres", "pgbouncer"…"""

    @property
    def version(self) -> Version:
        """The program's version."""

    @property
    def directory(self) -> str:
        """Its directory, which is also its working directory, as the program sees it."""

    @property
    def listen(self) -> Address:
        """The address that its configuration must make it listen on."""

    @property
    def address(self) -> Address:
        """Where a learner's program on this machine reaches it."""

    @property
    def inner_address(self) -> Address:
        """Where another program of the same runtime reaches it."""

    @property
    def socket_directory(self) -> str:
        """Where programs on this machine find its Unix sockets; empty when they cannot."""

    @property
    def secret(self) -> str:
        """For "postgres": the password of the superuser in the initialised directory. Else empty."""

    def write(self, name: str, text: str) -> None:
        """Write the file ``name`` (relative to ``directory``), readable for the program alone."""

    def start(self, arguments: Sequence[str]) -> None:
        """Start it; returns once it runs, before it is ready."""

    def command(self) -> str:
        """The command of the last start, as one could type it."""

    def alive(self) -> bool:
        """Whether its main process runs (a frozen one does)."""

    def ended(self) -> str:
        """How it ended: "exit code 1", "signal SIGKILL"; empty while it runs."""

    def signal(self, number: int) -> None:
        """Send a signal to its main process."""

    def kill(self) -> None:
        """SIGKILL for every process of it; returns when none is left."""

    def freeze(self) -> None:
        """Stop every process of it without ending any, as SIGSTOP does."""

    def thaw(self) -> None:
        """Let a frozen program go on."""

    def log(self, since: int = 0) -> str:
        """What it has printed from byte ``since`` on."""

    def log_size(self) -> int:
        """Bytes printed so far: a mark for ``log``."""

    def settle(self) -> None:
        """Wait until all that has been printed by now is in ``log``."""

    def proc(self, name: str, pids: Iterable[int] | None = None) -> dict[int, str]:
        """The text of /proc/<pid>/``name`` of each of its processes, or of these; those that have ended are left out.

        The pids are those that the program itself knows. Raises ConnlabError where the system has no /proc.
        """

    def remove(self) -> None:
        """Kill it and remove everything of it. More than once is no error."""


class Runtime(Protocol):
    """A way to run programs."""

    @property
    def name(self) -> str:
        """``local`` or ``docker``."""

    def prepare(
        self, kind: str, *, port: int | None = None, on_disk: bool = False, choice: str | None = None
    ) -> Program:
        """A program of this kind, ready to be started: found, with a directory and a port of its own.

        For "postgres" the directory holds an initialised ``data``. ``port`` None: one that is free. ``choice``, for
        "pgbouncer": which one, as ``choices`` names them; None: the first.
        What it has made when it raises is left to its caller's ``janitor.all_or_nothing``.
        Raises ProgramMissing, StartError.
        """

    def choices(self) -> list[str]:
        """The PgBouncers that could run here, each version once: paths of programs, or the image's name."""
