"""Who has borrowed from the learner's pools and not given back: known at once, and by the line that borrowed.

A pool's own numbers need time to settle, while it replaces a connection that came back broken; and they do not say
who has what is missing. So getconn and putconn of psycopg_pool are counted, in the learner's process.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from psycopg_pool import ConnectionPool

from connlab.checks.answers import Place, is_learners


@dataclass(frozen=True)
class Borrowed:
    """A connection that is out."""

    by: str
    """The function that was called, by its name in the check."""
    place: Place | None
    """The learner's line that borrowed it."""

    def __str__(self) -> str:
        if self.place is None or self.place.function == self.by:
            return f"in {self.place}" if self.place else f"by `{self.by}`"
        return f"by `{self.by}`, in {self.place}"


class Book:
    """What is out. A connection that was lost can leave its id to a new one: each id has a list."""

    def __init__(self) -> None:
        self._out: defaultdict[int, list[Borrowed]] = defaultdict(list)
        self._mutex, self._local = threading.Lock(), threading.local()

    def begin(self, name: str) -> None:
        """What this thread borrows from now on is borrowed by the function ``name``."""
        self._local.name = name

    def out(self) -> list[Borrowed]:
        """What has not come back."""
        with self._mutex:
            return [each for several in self._out.values() for each in several]

    def clear(self) -> None:
        """Forget what is out."""
        with self._mutex:
            self._out.clear()

    def lend(self, connection: object, place: Place | None) -> None:
        """A connection has gone out."""
        self.restore(connection, Borrowed(getattr(self._local, "name", ""), place))

    def take_back(self, connection: object) -> Borrowed | None:
        """A connection comes back: the entry that is struck out."""
        with self._mutex:
            entries = self._out[id(connection)]
            return entries.pop() if entries else None

    def restore(self, connection: object, entry: Borrowed | None) -> None:
        """Write an entry for a connection, None for nothing."""
        if entry:
            with self._mutex:
                self._out[id(connection)].append(entry)


@functools.cache
def keep_book() -> Book:
    """The book of this process: counts from the first call on, for every pool, also for those made later."""
    book = Book()
    getconn: Callable[..., Any] = ConnectionPool.getconn
    putconn: Callable[..., Any] = ConnectionPool.putconn

    @functools.wraps(getconn)
    def lend(pool: Any, *args: Any, **kwargs: Any) -> Any:
        connection = getconn(pool, *args, **kwargs)
        book.lend(connection, _place())
        return connection

    @functools.wraps(putconn)
    def take_back(pool: Any, conn: Any) -> None:
        entry = book.take_back(conn)  # before it is there for the next one
        try:
            putconn(pool, conn)
        except BaseException:
            book.restore(conn, entry)
            raise

    for function in (lend, take_back):
        setattr(ConnectionPool, function.__name__, function)
    return book


def _place() -> Place | None:
    """The learner's innermost line that is running."""
    frame = sys._getframe(1)
    while frame and not is_learners(frame.f_code.co_filename):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return Place(frame.f_code.co_name, frame.f_lineno, frame.f_code.co_filename)
