"""What `connlab clean` does."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from connlab import engine, janitor, places, reaper
from connlab.errors import ConnlabError


def sweep() -> list[str]:
    """Remove what dead processes have left; returns a line for each of them, or one that says there was none."""
    removed = [*janitor.sweep(), *_containers()]
    lines = [f"removed {directory}: its process {_pid(directory)} is gone" for directory in removed]
    lines += [f"left {directory}: the Docker engine of its containers does not answer" for directory in janitor.dead()]
    return lines or ["nothing was left behind by processes that are gone"]


def _containers() -> list[Path]:
    """Of those whose directory is gone too, as after a restart of the machine."""
    try:
        address = engine.connect().address
    except ConnlabError:
        return []
    return [Path(owner) for owner in janitor.sweep_engine(address)]


def remove_cache() -> str:
    """Remove the cache and say how much it was.

    Raises ConnlabError while a process lives that runs servers: they load programs and libraries from there.
    No process can begin to run servers meanwhile.
    """
    cache = places.cache_dir()
    with contextlib.ExitStack() as locks:
        for root in _roots():
            locks.enter_context(reaper.root_lock(places.private_dir(root)))
        _require_nobody(cache)
        size = _size(cache)
        for child in cache.iterdir():
            if child not in places.run_roots():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
    with contextlib.suppress(OSError):  # something else of ours is in it
        cache.rmdir()
    return f"removed the cache {cache} ({size / 1e6:.0f} MB)" if size else f"the cache {cache} was empty"


def _roots() -> list[Path]:
    """Where servers of this user can be."""
    return [root for root in places.run_roots() if root.is_dir() or os.access(root.parent, os.W_OK | os.X_OK)]


def _require_nobody(cache: Path) -> None:
    directories = [path for root in _roots() for path in root.iterdir() if path.is_dir()]
    users = sorted({_pid(directory) for directory in directories if _is_used(directory)})
    if users:
        raise ConnlabError(
            f"the cache is in use and was left alone: servers run for process {', '.join(users)}\n"
            "Stop `connlab start` and shut down the kernels of your notebooks first."
        )
    if not all(_is_free(lock) for lock in cache.glob("*/*.lock")):
        raise ConnlabError("something is being put into the cache just now: it was left alone; try again in a minute")


def _is_used(directory: Path) -> bool:
    if _pid(directory) == str(os.getpid()):  # to look at our own lock would free it
        return True
    return not _is_free(directory / reaper.LOCK)


def _is_free(lock: Path) -> bool:
    descriptor = reaper.lock_file(lock, wait=False)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def _pid(directory: Path) -> str:
    return directory.name.partition("-")[0]


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
