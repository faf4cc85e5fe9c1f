"""A real JupyterLab for tests, apart from the user's own, and a headless Chromium that drives it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

STARTS_WITHIN = 60.0
CELLS_WITHIN = 60_000
"""Milliseconds for a notebook of a test to run through."""
HIDDEN = ("PYTEST_CURRENT_TEST", "CONNLAB_STATIC")
"""What pytest, and a test's own environment, must not tell the kernels of a learner's JupyterLab."""
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def missing() -> str:
    """What is not here of what browser tests need; empty when all is."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is missing: `uv run --group browser pytest tests/browser` has it"
    return "" if chromium() else "chromium is missing: install your distribution's package `chromium`"


def chromium() -> str | None:
    """The path of the system's Chromium; None when there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab and the folder that it shows."""

    folder: Path
    url: str
    token: str

    def address(self, notebook: str) -> str:
        return f"{self.url}lab/tree/{notebook}?token={self.token}&reset"

    def write(self, name: str, *cells: str, outputs: dict[int, list[dict[str, Any]]] | None = None) -> None:
        """Write a notebook of these code cells; ``outputs`` of a cell make it one that somebody else has run."""
        written = [
            {
                "cell_type": "code",
                "id": f"cell-{number}",
                "metadata": {},
                "source": source,
                "execution_count": None,
                "outputs": (outputs or {}).get(number, []),
            }
            for number, source in enumerate(cells)
        ]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        notebook = {"cells": written, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        (self.folder / name).write_text(json.dumps(notebook))


@contextmanager
def running_lab(folder: Path) -> Iterator[Lab]:
    """A JupyterLab on 127.0.0.1 that shows ``folder / "course"`` and keeps all its files in ``folder``."""
    (folder / "course").mkdir()
    token = secrets.token_urlsafe(16)
    with (folder / "lab.log").open("wb") as log:
        process = subprocess.Popen(
            _command(folder), env=_environment(folder, token), stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield Lab(folder / "course", _url(folder, process), token)
    finally:
        _end(process)


def _command(folder: Path) -> list[str]:
    settings = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": 0,
        "ServerApp.root_dir": folder / "course",
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": os.geteuid() == 0,
        "LabApp.extension_manager": "readonly",
        "LabApp.expose_app_in_browser": True,  # for `save`
        "LanguageServerManager.autodetect": False,
    }
    return [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in settings.items())]


def _environment(folder: Path, token: str) -> dict[str, str]:
    news_off = folder / "config" / "labconfig" / "page_config.json"
    news_off.parent.mkdir(parents=True)
    news_off.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "CONNLAB_STATE": "state",
    }
    places = {name: str(folder / place) for name, place in own.items()}
    inherited = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    return {**inherited, **places, "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_TOKEN": token}


def _url(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """The address that JupyterLab has written down, once it listens."""
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        for file in (folder / "runtime").glob("jpserver-*.json"):
            if text := file.read_text():
                return str(json.loads(text)["url"])
        time.sleep(0.05)
    raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'lab.log').read_text(errors='replace')[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and its kernels: it asks for a second signal, or ends by itself."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def opened(page: Page, lab: Lab, notebook: str) -> Page:
    """The notebook in ``page``, its cells there; its kernel, where it gets one, idle."""
    page.goto(lab.address(notebook))
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=CELLS_WITHIN)
    return page


def run_all(page: Page) -> None:
    """Run every cell, and wait until the last has run."""
    page.locator("#jp-main-statusbar", has_text="Idle").wait_for(timeout=CELLS_WITHIN)  # before, Run All is lost
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(_ALL_NUMBERED, timeout=CELLS_WITHIN)


def save(page: Page) -> None:
    """Save the notebook, outputs and all; JupyterLab signs what was run here."""
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")


def end_kernels(lab: Lab) -> None:
    """End every session, so that a page that is opened anew has no kernel from before."""
    for session in json.loads(_ask(lab, "GET", "api/sessions")):
        _ask(lab, "DELETE", f"api/sessions/{session['id']}")


def _ask(lab: Lab, method: str, path: str) -> bytes:
    headers = {"Authorization": f"token {lab.token}"}
    request = urllib.request.Request(lab.url + path, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        body: bytes = answer.read()
        return body


_ALL_NUMBERED = """() => {
    const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
    return prompts.length > 0 && prompts.every(prompt => /\\[\\d+\\]/.test(prompt.textContent))
}"""
