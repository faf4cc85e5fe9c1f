"""One request of a load, and what an error says of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

UNFINISHED = "Unfinished"
"""The error of a request that had not ended when the load was: at its deadline or by an interrupt."""
UNKNOWN = math.nan
Part = Literal["latency", "waited", "used", "late"]


@dataclass(slots=True)
class Request:
    """What happened to one request; times are seconds since the load's start.

    ``borrowed`` stays NaN when it got no connection, and when nothing was borrowed; ``ended`` until it has ended.
    """

    client: int
    intended: float
    started: float = UNKNOWN
    borrowed: float = UNKNOWN
    ended: float = UNKNOWN
    error: str | None = None
    sqlstate: str | None = None
    message: str | None = None
    borrows: bool = True
    """Whether it was to borrow a connection, so that its time falls into waiting and using."""

    @property
    def latency(self) -> float:
        """From the moment at which it was to start: what a user of the service waits."""
        return self.ended - self.intended

    @property
    def late(self) -> float:
        """How long after its moment it started: no client was free."""
        return self.started - self.intended

    @property
    def waited(self) -> float:
        """From its start until it had a connection, or until it failed to get one."""
        if not self.borrows:
            return UNKNOWN
        return (self.ended if math.isnan(self.borrowed) else self.borrowed) - self.started

    @property
    def used(self) -> float:
        """From the connection until that was given back."""
        return self.ended - self.borrowed

    def failed(self, problem: BaseException) -> None:
        """Keep what ``problem`` says; not itself, for its traceback holds the connection."""
        self.error, self.sqlstate, self.message = type(problem).__name__, sqlstate(problem), str(problem).strip()

    def given_up(self, at: float, why: str) -> None:
        """Mark it as one that had not ended ``at`` that moment."""
        self.ended, self.error, self.sqlstate, self.message = at, UNFINISHED, None, why


def sqlstate(problem: BaseException) -> str | None:
    """The SQLSTATE of a driver's error, or of the one inside SQLAlchemy's; None where there is none.

    A failure to connect has none in psycopg: its text is all there is.
    """
    for holder in (problem, getattr(problem, "orig", None)):
        found = getattr(holder, "sqlstate", None) or getattr(holder, "pgcode", None)
        if isinstance(found, str):
            return found
    return None
