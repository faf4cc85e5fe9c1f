"""Programs as plain processes of this machine: how each kind is found and prepared."""

from __future__ import annotations

from pathlib import Path

from connlab import programs, template
from connlab.errors import ConnlabError
from connlab.pack import unpack
from connlab.runtime import Program
from connlab.runtime.process import LocalProgram, no_room


class LocalRuntime:
    """Runs programs as processes: see ``connlab.runtime.Runtime``."""

    name = "local"

    def prepare(
        self, kind: str, *, port: int | None = None, on_disk: bool = False, choice: str | None = None
    ) -> Program:
        """See ``connlab.runtime.Runtime.prepare``."""
        if kind == "postgres":
            return self._postgres(port, on_disk)
        if kind == "pgbouncer":
            found = programs.pgbouncer_at(choice) if choice else programs.find_pgbouncer()
            return LocalProgram(kind, found.path, found.version, found.environment, port=port)
        raise ConnlabError(f"the local runtime knows no program {kind!r}; it knows postgres and pgbouncer")

    def choices(self) -> list[str]:
        """See ``connlab.runtime.Runtime.choices``."""
        found = programs.pgbouncers() or [programs.find_pgbouncer()]
        return [str(program.path) for program in found]

    def _postgres(self, port: int | None, on_disk: bool) -> Program:
        found = programs.find_postgres()
        made = template.initialised(found)
        program = LocalProgram(
            "postgres",
            found.bin / "postgres",
            found.version,
            found.environment,
            port=port,
            on_disk=on_disk,
            secret=made.password,
        )
        try:
            unpack(made.data, Path(program.directory) / "data", program.account)
        except OSError as problem:
            raise no_room(problem, program.directory) from problem
        return program
