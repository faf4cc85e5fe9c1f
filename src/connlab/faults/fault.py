"""What a fault tells about itself, and how its connections are opened and ended."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from connlab.errors import ConnlabError, SettingError

ANSWER_WITHIN = 5.0
"""Seconds that a server gets to answer when a fault is taken back; then its connection is cut."""
Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass
class Fault:
    """What was done, with which server processes, since when. ``print`` shows it.

    ``pids`` are as ``pg_stat_activity`` has them; ``since`` has a time zone. ``error`` is what ended it early, if
    something did.
    """

    what: str
    pids: Sequence[int] = ()
    since: datetime = field(default_factory=lambda: datetime.now().astimezone())
    error: Exception | None = None

    @property
    def count(self) -> int:
        """How many server processes take part."""
        return len(self.pids)

    def __str__(self) -> str:
        began = f"{self.what} since {self.since:%H:%M:%S}.{self.since.microsecond // 1000:03d}"
        if not self.pids:
            return began
        return f"{began}, server process{'es' if self.count > 1 else ''} {', '.join(map(str, self.pids))}"


def connect(dsn: str, name: str, *, autocommit: bool = False) -> Connection:
    """A connection that pg_stat_activity shows under the fault's name. Raises SettingError, ConnlabError."""
    if not isinstance(dsn, str):
        raise SettingError(f"{name} takes a DSN such as pg.dsn or bouncer.dsn, not {dsn!r}")
    try:
        return psycopg.connect(dsn, application_name=name, autocommit=autocommit, connect_timeout=10)
    except psycopg.Error as problem:
        raise ConnlabError(f"{name} gets no connection; does the server run? It says: {problem}") from problem


@contextlib.contextmanager
def transaction(dsn: str, name: str) -> Iterator[Connection]:
    """A connection of the fault's own; what it has done is rolled back, and was, when the block is left."""
    connection = connect(dsn, name)
    try:
        yield connection
    finally:
        roll_back(connection)
        connection.close()


def roll_back(connection: Connection, seconds: float = ANSWER_WITHIN) -> None:
    """Have the server end the transaction; one that does not answer, or is gone, loses the connection instead."""
    if connection.info.transaction_status != TransactionStatus.IDLE:
        with contextlib.suppress(psycopg.Error), at_most(connection, seconds):
            connection.rollback()


@contextlib.contextmanager
def at_most(connection: Connection, seconds: float) -> Iterator[None]:
    """Cut ``connection`` when the block takes longer: psycopg would wait for a frozen server for ever."""
    with socket.socket(fileno=os.dup(connection.fileno())) as wire:
        timer = threading.Timer(seconds, cut, [wire])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


def cut(wire: socket.socket) -> None:
    """End a connection under whoever waits on it, who then sees it closed."""
    with contextlib.suppress(OSError):
        wire.shutdown(socket.SHUT_RDWR)


def check_count(name: str, value: object) -> int:
    """``value`` if it is a whole number from 0; raises SettingError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SettingError(f"{name} takes a whole number from 0, not {value!r}")
    return value


def check_seconds(name: str, value: object) -> float:
    """``value`` if it is a length of time; raises SettingError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise SettingError(f"{name} takes a number of seconds from 0, not {value!r}")
    return float(value)
