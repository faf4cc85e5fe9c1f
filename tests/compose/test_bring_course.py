"""How the course's files come into the folder of a learner in docker compose, and what of the learner's stays."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compose_stack import CHECKOUT

SCRIPT = CHECKOUT / "deploy" / "jupyter" / "bring_course.py"
specification = importlib.util.spec_from_file_location("bring_course", SCRIPT)
assert specification and specification.loader
bring_course = importlib.util.module_from_spec(specification)
specification.loader.exec_module(bring_course)

Version = Callable[..., None]


@pytest.fixture
def course(tmp_path: Path) -> Path:
    return tmp_path / "course"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    return made


@pytest.fixture
def version(course: Path) -> Version:
    """Makes ``course`` hold exactly the files given, by their names in notebooks/."""

    def make(**files: str) -> None:
        notebooks = course / "notebooks"
        notebooks.mkdir(parents=True, exist_ok=True)
        for path in notebooks.iterdir():
            path.unlink()
        for name, text in files.items():
            (notebooks / name).write_text(text)

    return make


def there(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "notebooks").iterdir()}


def test_the_first_start_brings_everything(course: Path, folder: Path, version: Version) -> None:
    version(a="first", b="first")
    assert bring_course.bring(course, folder) == []
    assert there(folder) == {"a": "first", "b": "first"}


def test_what_the_learner_has_changed_or_made_stays(course: Path, folder: Path, version: Version) -> None:
    version(a="first", b="first")
    bring_course.bring(course, folder)
    (folder / "notebooks" / "a").write_text("learner's")
    (folder / "notebooks" / "own").write_text("learner's")
    assert bring_course.bring(course, folder) == [], "there is no newer one to speak of"
    version(a="second", b="second", own="second")
    assert bring_course.bring(course, folder) == ["notebooks/a", "notebooks/own"]
    assert there(folder) == {"a": "learner's", "b": "second", "own": "learner's"}
    assert bring_course.bring(course, folder) == ["notebooks/a", "notebooks/own"], "it is said at every start"


def test_new_ones_come_and_dropped_ones_go_unless_changed(course: Path, folder: Path, version: Version) -> None:
    version(a="first", b="first", c="first")
    bring_course.bring(course, folder)
    (folder / "notebooks" / "c").write_text("learner's")
    version(a="first", new="second")
    assert bring_course.bring(course, folder) == []
    assert there(folder) == {"a": "first", "c": "learner's", "new": "second"}


def test_one_that_was_removed_comes_again(course: Path, folder: Path, version: Version) -> None:
    version(a="first")
    bring_course.bring(course, folder)
    (folder / "notebooks" / "a").unlink()
    bring_course.bring(course, folder)
    assert there(folder) == {"a": "first"}


def test_one_that_stays_the_same_is_not_written_again(course: Path, folder: Path, version: Version) -> None:
    version(a="first")
    bring_course.bring(course, folder)
    before = (folder / "notebooks" / "a").stat()
    bring_course.bring(course, folder)
    after = (folder / "notebooks" / "a").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "an open one is disturbed"


def test_the_command_says_what_stays(course: Path, folder: Path, version: Version) -> None:
    version(a="first")
    bring_course.bring(course, folder)
    (folder / "notebooks" / "a").write_text("learner's")
    version(a="second")
    done = subprocess.run([sys.executable, SCRIPT, course, folder], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("notebooks/a: ") and "stays" in done.stdout
    wrong = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "") and "usage" in wrong.stderr
