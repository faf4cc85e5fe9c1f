"""Programs as containers, each its own, made through testcontainers: ``docker ps`` shows what runs."""

from __future__ import annotations

from connlab import engine, images
from connlab.errors import ConnlabError, SettingError
from connlab.runtime import Program
from connlab.runtime.container import ContainerProgram
from connlab.runtime.network import network


class DockerRuntime:
    """Runs programs as containers: see ``connlab.runtime.Runtime``."""

    name = "docker"

    def prepare(
        self, kind: str, *, port: int | None = None, on_disk: bool = False, choice: str | None = None
    ) -> Program:
        """See ``connlab.runtime.Runtime.prepare``. A container's data is always on disk."""
        if kind not in images.IMAGES:
            raise ConnlabError(f"the docker runtime knows no program {kind!r}; it knows {' and '.join(images.IMAGES)}")
        if choice and choice not in self.choices():
            raise SettingError(f"program={choice!r}: with the docker backend it is the image {self.choices()[0]}")
        found = engine.connect()
        image_id, facts = images.find(found, kind)
        return ContainerProgram(kind, images.IMAGES[kind], image_id, facts, found, network(found), port)

    def choices(self) -> list[str]:
        """See ``connlab.runtime.Runtime.choices``: connlab has one image of PgBouncer."""
        return [images.IMAGES["pgbouncer"].tag]
