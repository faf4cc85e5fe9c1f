"""Bring the course's files into the learner's folder, and never overwrite what the learner has changed.

    python3 bring_course.py COURSE FOLDER

A file that is missing comes; one that is as an earlier version of the course brought it is replaced by this version's,
or removed when this version has none. One that the learner has changed stays as it is, and a line says so. What
was brought is written down in FOLDER/.connlab/course.json, a digest for each file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

PARTS = ("notebooks", "labs", "solutions")
RECORD = Path(".connlab") / "course.json"


def bring(course: Path, folder: Path) -> list[str]:
    """Bring ``course`` up to date in ``folder``; returns the files that the learner has changed and that stay."""
    brought = _read(folder / RECORD)
    offered = {str(path.relative_to(course)): path for path in _files(course)}
    kept = []
    for name in sorted(offered.keys() | brought.keys()):
        ours, before, yours = _digest(offered.get(name)), brought.get(name), _digest(folder / name)
        if yours not in (None, ours, before):
            kept += [name] if ours not in (None, before) else []
            continue
        if yours != ours:
            _put(offered.get(name), folder / name)
        brought[name] = ours
    _write(folder / RECORD, {name: brought.get(name) for name in offered})
    return kept


def _files(course: Path) -> list[Path]:
    found = (path for part in PARTS for path in (course / part).rglob("*"))
    return [path for path in found if path.is_file()]


def _digest(path: Path | None) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None


def _put(source: Path | None, target: Path) -> None:
    """Make ``target`` what ``source`` is, in one step: a container may be killed at any moment."""
    if source is None:
        target.unlink(missing_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, new)
    os.replace(new, target)


def _read(record: Path) -> dict[str, str | None]:
    return dict(json.loads(record.read_text())) if record.exists() else {}


def _write(record: Path, brought: dict[str, str | None]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    new = record.with_suffix(".new")
    new.write_text(json.dumps(brought, indent=1, sort_keys=True))
    os.replace(new, record)


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) != 2:
        print("usage: bring_course.py COURSE FOLDER", file=sys.stderr)
        return 2
    for name in bring(Path(arguments[0]), Path(arguments[1])):
        print(f"{name}: yours has changed and stays; rename it and start again to get this version's")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
