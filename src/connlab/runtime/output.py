"""What a container prints, collected while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

SETTLED = 0.1
"""Seconds without a byte after which what was printed before has arrived: it goes through two pipes and the engine.

Without waiting 13 of 200 lines were missed on a busy two-core machine, with 0.02 s still 3.
"""
PATIENCE = 1.0


class Output:
    """Every byte that a container has printed, over all its starts."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._last = 0.0
        self._ended = threading.Event()
        self._ended.set()

    def follow(self, stream: Iterator[bytes]) -> None:
        """Collect what comes, until the container ends."""
        self._ended = threading.Event()
        threading.Thread(target=self._read, args=[stream, self._ended], name="connlab-output", daemon=True).start()

    def text(self, since: int) -> str:
        """What has arrived from byte ``since`` on."""
        return self._bytes[since:].decode(errors="replace")

    def size(self) -> int:
        """Bytes that have arrived."""
        return len(self._bytes)

    def settle(self, *, running: bool) -> None:
        """Of a container that has ended, wait for its last words; of one that runs, for what is on its way."""
        if not running:
            self._ended.wait(PATIENCE)
            return
        deadline = time.monotonic() + PATIENCE
        began = time.monotonic()
        while not self._ended.is_set() and time.monotonic() < deadline:
            rest = max(began, self._last) + SETTLED - time.monotonic()
            if rest <= 0:
                return
            time.sleep(rest)

    def _read(self, stream: Iterator[bytes], ended: threading.Event) -> None:
        try:
            for chunk in stream:
                self._bytes += chunk
                self._last = time.monotonic()
        finally:
            ended.set()
