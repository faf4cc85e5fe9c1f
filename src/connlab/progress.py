"""One line for whatever takes over a second: what it is, then how long it took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE = 1.0
"""Seconds after which a step is worth a line."""


class Progress:
    """Tells a person in a terminal what is being waited for.

    Example:
        >>> progress = Progress(sys.stdout)
        >>> with progress.step("Starting JupyterLab"):
        ...     time.sleep(3)
        Starting JupyterLab … done in 3.0 s
    """

    def __init__(self, screen: TextIO) -> None:
        self._screen = screen
        self._lock = threading.Lock()
        self._open = False

    def say(self, line: str) -> None:
        """Print one line, below a step that is under way."""
        with self._lock:
            self._write(("\n" if self._open else "") + line + "\n")
            self._open = False

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Announce ``what`` if it takes over a second, and end its line when it is done."""
        began = time.monotonic()
        announced = threading.Timer(PATIENCE, self._announce, [what])
        announced.daemon = True
        announced.start()
        outcome = "failed"
        try:
            yield
            outcome = "done"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            announced.cancel()
            announced.join()  # it may be writing just now
            self._end(what, outcome, time.monotonic() - began)

    def _announce(self, what: str) -> None:
        with self._lock:
            self._write(f"{what} … ")
            self._open = True

    def _end(self, what: str, outcome: str, seconds: float) -> None:
        spent = f"{outcome} in {seconds:.1f} s" if outcome == "done" else f"{outcome} after {seconds:.1f} s"
        with self._lock:
            if self._open:
                self._write(f"{spent}\n")
            elif seconds > PATIENCE:  # other lines have come between
                self._write(f"{what}: {spent}\n")
            self._open = False

    def _write(self, text: str) -> None:
        self._screen.write(text)
        self._screen.flush()
