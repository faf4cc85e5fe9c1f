"""The images that the docker backend runs, what is in them, and how they are made.

``connlab doctor --fix`` and ``connlab start`` pull ``postgres:18`` and build ours on top of it; the script
deploy/build-offline-images does it without an image registry. Nothing is pulled or built in a lesson.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connlab import janitor
from connlab.engine import Engine
from connlab.errors import EngineError, ProgramMissing
from connlab.once import made_once
from connlab.places import cache_dir, project_dir
from connlab.version import Version

if TYPE_CHECKING:
    from docker.models.images import Image as DockerImage

BASE = "postgres:18"
NO_VOLUME = {"/var/lib/postgresql": ""}
"""The base image declares a volume there; a tmpfs in its place leaves none behind."""
INPUTS = "connlab.inputs"
"""The label that says what an image was made from: with another course comes another image."""
WAYS_OUT = (
    "`connlab doctor --fix`, once: it downloads postgres:18 and builds connlab's two images on it",
    "without internet: `sudo deploy/build-offline-images` on Debian, or `docker load -i FILE` of what it saved",
    "use the local backend, which needs no images: CONNLAB_BACKEND=local",
)


@dataclass(frozen=True)
class Image:
    """An image of connlab's, which holds one program."""

    tag: str
    folder: str
    """Its Dockerfile's, below ``deploy``."""
    directory: str
    """Where configuration and data are, in the container."""
    port: int
    inputs: tuple[str, ...] = ()
    """Files of the package that its Dockerfile copies."""


IMAGES = {
    "postgres": Image("connlab/postgres:18", "postgres", "/var/lib/connlab", 5432, ("schema.sql",)),
    "pgbouncer": Image("connlab/pgbouncer", "pgbouncer", "/etc/connlab", 6432),
}


@dataclass(frozen=True)
class Facts:
    """What an image holds: the program's version, and for PostgreSQL the superuser's password."""

    version: Version
    secret: str


def find(engine: Engine, kind: str) -> tuple[str, Facts]:
    """The id of the image for ``kind`` and what is in it. Raises ProgramMissing; nothing is pulled or built."""
    image = IMAGES[kind]
    found = _get(engine, image.tag)
    why = "no such image" if found is None else _outdated(image, found)
    if found is None or why:
        where = f"{image.tag} on the engine at {engine.address}: {why}"
        raise ProgramMissing(f"The docker backend lacks the image {image.tag}.", [where], WAYS_OUT)
    place = cache_dir() / "images" / str(found.id).removeprefix("sha256:")[:24]
    return str(found.id), made_once(place, lambda scratch: _read(engine, image, scratch), _facts)


def versions(engine: Engine) -> dict[str, Version]:
    """What each image runs, by its kind. Raises ProgramMissing as ``find`` does."""
    return {kind: find(engine, kind)[1].version for kind in IMAGES}


def lacking(engine: Engine) -> dict[str, str]:
    """The tags of the images that must be made, each with the reason."""
    found = {image: _get(engine, image.tag) for image in IMAGES.values()}
    whys = {image.tag: "missing" if got is None else _outdated(image, got) for image, got in found.items()}
    return {tag: why for tag, why in whys.items() if why}


def make(engine: Engine, say: Callable[[str], None]) -> None:
    """Pull ``postgres:18`` if it is missing, and build what is lacking; ``say`` gets a line for each step.

    Raises EngineError with the last lines of a build that failed.
    """
    wanted = lacking(engine)
    if wanted and _get(engine, BASE) is None:
        say(f"Downloading the image {BASE}")
        _pull(engine, say)
    for image in IMAGES.values():
        if image.tag in wanted:
            say(f"Building the image {image.tag} ({wanted[image.tag]})")
            _build(engine, image)


def context(image: Image) -> dict[str, bytes]:
    """The files that the image is built from, by name."""
    dockerfile = _dockerfile(image)
    package = resources.files("connlab")
    return {"Dockerfile": dockerfile.read_bytes(), **{name: (package / name).read_bytes() for name in image.inputs}}


def _dockerfile(image: Image) -> Traversable | Path:
    """In the package, where it was installed from a wheel; in deploy/ of a checkout."""
    installed = resources.files("connlab") / "deploy" / image.folder / "Dockerfile"
    return installed if installed.is_file() else project_dir() / "deploy" / image.folder / "Dockerfile"


def _digest(image: Image) -> str:
    """As deploy/build-offline-images computes it."""
    return hashlib.sha256(b"".join(context(image).values())).hexdigest()[:16]


def _outdated(image: Image, found: DockerImage) -> str:
    labels = found.labels or {}
    return "" if labels.get(INPUTS) == _digest(image) else "made for another version of the course"


def _get(engine: Engine, tag: str) -> DockerImage | None:
    import docker.errors

    with engine.asking(f"look for the image {tag}"):
        try:
            return engine.docker.client.images.get(tag)
        except docker.errors.ImageNotFound:
            return None


def _pull(engine: Engine, say: Callable[[str], None]) -> None:
    repository, tag = BASE.split(":")
    with engine.asking(f"download the image {BASE}"):
        layers = engine.api.pull(repository, tag, stream=True, decode=True)
        for layer in _done_layers(layers):
            say(f"  {BASE}: layer {layer} is here")


def _done_layers(lines: Iterator[dict[str, Any]]) -> Iterator[str]:
    for line in lines:
        if "error" in line:
            raise EngineError(f"download the image {BASE}: {line['error']}")
        if line.get("status") == "Pull complete":
            yield line["id"]


def _build(engine: Engine, image: Image) -> None:
    import docker.errors

    with engine.asking(f"build the image {image.tag}"):
        try:
            engine.docker.client.images.build(
                fileobj=archive(context(image)),
                custom_context=True,
                tag=image.tag,
                labels={INPUTS: _digest(image)},
                rm=True,
                forcerm=True,
                network_mode="host",  # a resolver that this machine reaches is not always in a container's reach
            )
        except docker.errors.BuildError as problem:
            said = "".join(str(line.get("stream", "")) for line in problem.build_log).splitlines()
            last = "\n".join(f"    {line}" for line in said[-15:])
            raise EngineError(f"the image {image.tag} could not be built: {problem.msg}\n{last}") from problem


def archive(files: dict[str, bytes], *, user: int = 0, mode: int = 0o644) -> io.BytesIO:
    """A tar file of ``files`` (name to content), owned by ``user``."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid, member.gid = len(content), mode, user, user
            tar.addfile(member, io.BytesIO(content))
    made.seek(0)
    return made


# --- what is in an image --------------------------------------------------------------------------------------


def _facts(place: Path) -> Facts | None:
    try:
        return Facts(Version.find((place / "version").read_text()), (place / "password").read_text().strip())
    except FileNotFoundError:
        return None


def _read(engine: Engine, image: Image, scratch: Path) -> None:
    """Take the files out of a container that is made and never started."""
    name, labels = janitor.owner().container("look", engine.address)
    with engine.asking(f"look into the image {image.tag}"):
        container = engine.docker.create(image.tag, name=name, labels=labels, network="none", tmpfs=NO_VOLUME)
        try:
            for file in ("version", "password"):
                (scratch / file).touch(mode=0o600)
                (scratch / file).write_text(_file(container, f"{image.directory}/{file}"))
        finally:
            container.remove(force=True, v=True)


def _file(container: Any, path: str) -> str:
    """The text of a file in a container; empty when there is no such file."""
    import docker.errors

    try:
        chunks, _ = container.get_archive(path)
    except docker.errors.NotFound:
        return ""
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
        member = tar.extractfile(tar.getmembers()[0])
        return member.read().decode() if member else ""
