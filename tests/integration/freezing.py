"""A server that answers nobody for a while, seen by load that runs meanwhile."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from connlab import Postgres

FROZEN = 0.5
"""Seconds."""


@contextlib.contextmanager
def freezing(pg: Postgres, after: float) -> Iterator[None]:
    """Half a second, some time from now, in which the server answers nobody."""

    def freeze() -> None:
        time.sleep(after)
        pg.freeze()
        time.sleep(FROZEN)
        pg.thaw()

    thread = threading.Thread(target=freeze)
    thread.start()
    yield
    thread.join()
