"""The answers to the labs that lie beside the solutions, run with the labs' own checks."""

from __future__ import annotations

import importlib
import inspect
import linecache
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from connlab import Postgres
from connlab.checks.results import Result

Answer = Mapping[str, Any]
WRONG = {"name", "check", "says", "code"}
RIGHT = {"name", "code"}


def answers_of(solution: Path) -> dict[str, Any]:
    """The data beside a solution: ``given``, and lists ``wrong`` and ``right``."""
    data = solution.parent / "answers" / f"{solution.stem}.toml"
    return tomllib.loads(data.read_text(encoding="utf-8"))


def checks_of(solution: Path) -> ModuleType:
    """The module with the lab's checks: lab_02 for lab_02_replace_connect_per_request."""
    return importlib.import_module(f"connlab.checks.{'_'.join(solution.stem.split('_')[:2])}")


def names_of_checks(module: ModuleType) -> list[str]:
    """The functions that ``check`` has made, in order; others have no wrapped body."""
    made = (name for name, value in vars(module).items() if getattr(value, "__wrapped__", None))
    return [name for name in made if getattr(module, name).__module__ == module.__name__]


def defined(*sources: str) -> dict[str, Any]:
    """What these sources define, as if each were a cell of a notebook."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources):
        name = f"<cell {number}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), namespace)
    return namespace


def run_check(check: Callable[..., Result], given: str, code: str, pg: Postgres) -> Result:
    """Run a check on an answer, ``code``, with the cells before it, ``given``."""
    namespace = defined(given, code) | {"pg": pg}
    wanted = list(inspect.signature(check).parameters)[1:]  # without the trial
    return check(*(namespace[name] for name in wanted))
