"""What every pytest run of this checkout loads: the guard over the notebooks, what only CI runs, and `-m full`.

`notebook_guard` lies in tests/notebooks, which pyproject.toml puts on pytest's `pythonpath`. `pytester` runs
pytest inside a test; it has to be named here because pytest takes plugins from the root conftest only.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Generator

import pytest

pytest_plugins = ["pytester", "notebook_guard"]


def pytest_configure(config: pytest.Config) -> None:
    """Set the length of the notebooks and the backends, and hear interrupts.

    The fast setting of a notebook has fewer repetitions and the same lesson. A shell starts what it runs in the
    background with interrupts ignored, and so do our children.
    """
    os.environ.setdefault("CONNLAB_FAST", "0" if is_full(config) else "1")
    if config.option.backends is None:
        config.option.backends = ["local", "docker"] if is_full(config) else ["local"]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_full(config: pytest.Config) -> bool:
    """Whether everything was asked for: `pytest -m full` runs all that a plain run does, and what takes long."""
    return config.option.markexpr == "full"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which backends the tests run on."""
    parser.addoption(
        "--backends",
        type=_backends,
        default=None,
        help="local (the default), docker, or both with a comma between (the default with -m full): "
        "the tests run once on each",
    )


def _backends(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= {"local", "docker"}:
        raise argparse.ArgumentTypeError(f"{text!r}: write local, docker, or local,docker")
    return names


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where docker was asked for, a test of it that is skipped has not been run, which is a failure."""
    report = yield
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if report.skipped and parameters.get("backend") == "docker":
        report.outcome, report.longrepr = "failed", f"skipped, though --backends names docker: {report.longrepr}"
    return report


@pytest.hookimpl(tryfirst=True)  # before pytest itself chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs root, mounts something or restarts an engine, except where that is wanted."""
    if is_full(config):
        for item in items:
            item.add_marker(pytest.mark.full)
    if os.environ.get("CONNLAB_MACHINE") == "1":
        return
    for item in items:
        if item.get_closest_marker("machine"):
            item.add_marker(pytest.mark.skip(reason="changes the machine: runs where CONNLAB_MACHINE=1"))
