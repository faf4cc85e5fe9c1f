"""A bar for what lasts over two seconds, where somebody watches."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any, Self

PATIENCE = 2.0
WIDTH = 30


class Bar:
    """How far it is: in a notebook below the cell, in a terminal a line; gone at the end.

    Nothing under pytest, and nothing where the output goes into a file: see ``connlab.live.is_static``.
    """

    def __init__(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()
        self._handle: Any = None
        self._written = False

    def show(self, share: float, requests: int) -> None:
        """``share`` of it is done, from 0 to 1, and so many requests are."""
        spent = time.monotonic() - self._began
        if spent < PATIENCE:
            return
        share, said = min(max(share, 0.0), 1.0), f"{self._what}: {spent:.0f} s, {requests:,} requests"
        if _in_notebook():
            self._display(f'<progress value="{share:.3f}"></progress> {said}')
        elif sys.stderr.isatty() and "PYTEST_CURRENT_TEST" not in os.environ:
            done = round(share * WIDTH)
            self._write(f"\r[{'#' * done}{'.' * (WIDTH - done)}] {said} ")

    def _display(self, html: str) -> None:
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(html), display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(HTML(html))  # type: ignore[no-untyped-call]

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
        self._written = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._display("")
        if self._written:
            self._write("\r\x1b[K")


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from connlab.live import is_static

    return not is_static()
