"""Opens the learner's browser where there is a desktop to open it on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path


def open_browser(address: str, page: Path) -> str:
    """Open ``address``; returns an empty text, or why no browser was opened.

    ``page`` is a file, readable for this user alone, that leads to the address: a browser's arguments
    are everybody's to read, and the address carries the token.
    """
    if not _desktop():
        return "there is no desktop here"
    windows = _windows_opener()
    if windows:  # Windows does not see this system's files; whoever is there is one person
        subprocess.Popen([windows, address], stdin=subprocess.DEVNULL)
        return ""
    try:
        return "" if webbrowser.get().open(page.as_uri()) else "the browser did not start"
    except webbrowser.Error:
        return "no browser was found"


def _desktop() -> bool:
    if sys.platform == "darwin" or _windows_opener():
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _windows_opener() -> str | None:
    """Under WSL, the program that opens an address in Windows."""
    if not os.environ.get("WSL_DISTRO_NAME") or os.environ.get("BROWSER"):
        return None
    return shutil.which("wslview") or shutil.which("explorer.exe")
