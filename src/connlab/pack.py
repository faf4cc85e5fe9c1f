"""A directory tree in one file, made to be unpacked fast.

A data directory is a thousand small files; opening and reading each takes longer than writing it. Packed, the
contents come from one mapped file and only the copies are opened: half the time of ``shutil.copytree``.
The file holds a line of JSON (folders; names and sizes of files) and then the contents, in that order.
"""

from __future__ import annotations

import json
import mmap
import os
import pwd
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREADS = 2
"""More than two gain nothing: the copies wait for the directory, not for the processor."""

Span = tuple[str, int, int]
"""A file's name, and where its contents begin and end."""


def pack(source: Path, target: Path, *, without: str = "") -> None:
    """Write the tree below ``source`` into the file ``target``, readable for its owner alone.

    Files that match ``without`` (a pattern as for a shell) are left out.
    """
    paths = [path for path in sorted(source.rglob("*")) if not (without and path.match(without))]
    folders = [str(path.relative_to(source)) for path in paths if path.is_dir()]
    files = [path for path in paths if path.is_file()]
    sizes = [(str(path.relative_to(source)), path.stat().st_size) for path in files]
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(json.dumps([folders, sizes]).encode() + b"\n")
        for path in files:
            file.write(path.read_bytes())


def unpack(source: Path, target: Path, account: pwd.struct_passwd | None) -> None:
    """Make the directory ``target`` from the packed ``source``, for ``account`` (None: us) alone.

    Raises OSError, as for a full disk; what has been written by then stays.
    """
    with source.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Not closed by hand: an interrupt leaves threads that still read, and Python closes it after the last of them.
    start = mapped.find(b"\n") + 1
    folders, sizes = json.loads(mapped[:start])
    for folder in ["", *folders]:
        _make_folder(f"{target}/{folder}", account)
    _write_all(memoryview(mapped), _spans(sizes, start), str(target), account)


def _spans(sizes: list[tuple[str, int]], start: int) -> list[Span]:
    spans = []
    for name, size in sizes:
        spans.append((name, start, start + size))
        start += size
    return spans


def _write_all(contents: memoryview, spans: list[Span], target: str, account: pwd.struct_passwd | None) -> None:
    def write(share: list[Span]) -> None:
        for name, start, end in share:
            _write_file(f"{target}/{name}", contents[start:end], account)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(write, [spans[number::THREADS] for number in range(THREADS)]))


def _make_folder(path: str, account: pwd.struct_passwd | None) -> None:
    os.mkdir(path, 0o700)
    if account:
        os.chown(path, account.pw_uid, account.pw_gid)


def _write_file(path: str, content: memoryview, account: pwd.struct_passwd | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if account:
            os.fchown(descriptor, account.pw_uid, account.pw_gid)
        while content:
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)
