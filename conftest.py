"""What every pytest run of this checkout loads: the guard over the notebooks, and what only CI runs.

`notebook_guard` lies in tests/notebooks, which pyproject.toml puts on pytest's `pythonpath`. `pytester` runs
pytest inside a test; it has to be named here because pytest takes plugins from the root conftest only.
"""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["pytester", "notebook_guard"]

# The fast setting of every notebook: fewer repetitions, the same lesson. CONNLAB_FAST=0 runs them at full length.
os.environ.setdefault("CONNLAB_FAST", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs root, mounts something or restarts an engine, except where that is wanted."""
    if os.environ.get("CONNLAB_MACHINE") == "1":
        return
    for item in items:
        if item.get_closest_marker("machine"):
            item.add_marker(pytest.mark.skip(reason="changes the machine: runs where CONNLAB_MACHINE=1"))
