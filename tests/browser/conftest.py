"""What browser tests share: one JupyterLab and one Chromium for the whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from browser import jupyterlab_driver

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="package")  # playwright keeps an event loop running in this thread
def browser() -> Iterator[Browser]:
    """A headless Chromium; where there is none the test is skipped, in CI it fails."""
    if complaint := jupyterlab_driver.missing():
        if os.environ.get("CONNLAB_MACHINE") == "1":
            pytest.fail(complaint)
        pytest.skip(complaint)
    with jupyterlab_driver.running_browser() as running:
        yield running


@pytest.fixture(scope="package")  # playwright keeps an event loop running in this thread
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[jupyterlab_driver.Lab]:
    """A JupyterLab of the tests' own."""
    with jupyterlab_driver.running_lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page in a profile of its own."""
    with browser.new_context(viewport={"width": 1300, "height": 1000}) as context:
        yield context.new_page()
