"""What pgbench writes: its report and its log of every transaction."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from connlab.workload.request import Request

FAILURES = {"serialization": "40001", "deadlock": "40P01", "failed": None}
"""What stands in the log in place of a time, and the SQLSTATE that it stands for. "failed": either of the two."""
SECOND = 1_000_000
LEAST = 1
WORDS = 12


class Report(NamedTuple):
    """The numbers of pgbench's report: transactions, those a second, and milliseconds for a connection (NaN: none)."""

    processed: int
    failed: int
    tps: float
    connect_ms: float


def parse(text: str) -> Report | None:
    """The numbers in a report; None when there is none, since pgbench has failed before.

    Example:
        >>> parse("number of transactions actually processed: 40/40\\ntps = 7480.8 (without initial connection time)")
        Report(processed=40, failed=0, tps=7480.8, connect_ms=nan)
    """
    processed, tps = _number(r"transactions actually processed: (\d+)", text), _number(r"tps = ([\d.]+)", text)
    if math.isnan(processed):
        return None
    failed = _number(r"number of failed transactions: (\d+)", text)
    connect = _number(r"(?:initial|average) connection time = ([\d.]+)", text)
    # Version 15 tells no rate when nothing was processed, and 14 no failures.
    failed, tps = (0.0 if math.isnan(value) else value for value in (failed, tps))
    return Report(int(processed), int(failed), tps, connect)


def transactions(lines: Iterable[str]) -> tuple[float, list[Request]]:
    """The requests that the lines of pgbench's logs tell of, and the Unix time of their 0, the earliest start.

    https://www.postgresql.org/docs/current/pgbench.html, Per-Transaction Logging: client, number, microseconds, script,
    seconds and microseconds of the end, and with --rate the microseconds by which it started late, which the time
    contains. A 0 (the answer was there when pgbench first looked) becomes 1 microsecond, the log's unit.
    """
    logged = [line.split() for line in lines]
    zero = min(map(_begin, logged), default=0)
    return zero / SECOND, [_request(words, zero) for words in logged]


def words(text: str) -> str:
    """What pgbench says of its failure: each complaint once, without the report."""
    lines = text.splitlines()
    first = next((place for place, line in enumerate(lines) if line.startswith("pgbench: ")), 0)
    said = [line for line in lines[first:] if line.strip() and not line.startswith(("number of", "pgbench (", "tps"))]
    return "\n".join(list(dict.fromkeys(said))[:WORDS])


def _begin(logged: Sequence[str]) -> int:
    """Microseconds of Unix time at which a transaction was to start: in whole numbers, a float is too coarse."""
    taken, seconds, micros = logged[2], int(logged[4]), int(logged[5])
    return seconds * SECOND + micros - (_late(logged) if taken in FAILURES else max(int(taken), LEAST))


def _late(logged: Sequence[str]) -> int:
    return int(logged[6]) if len(logged) > 6 else 0


def _request(logged: Sequence[str], zero: int) -> Request:
    taken, begin = logged[2], _begin(logged) - zero
    lasted = _late(logged) if taken in FAILURES else max(int(taken), LEAST)
    started, ended = begin + _late(logged), begin + lasted
    request = Request(int(logged[0]), begin / SECOND, started / SECOND, ended=ended / SECOND, borrows=False)
    if taken in FAILURES:
        request.error, request.sqlstate = taken, FAILURES[taken]
        request.message = "pgbench logs neither the time nor the text of a transaction that was rolled back"
    return request


def _number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    return float(match[1]) if match else math.nan
