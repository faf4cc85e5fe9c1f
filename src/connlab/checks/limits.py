"""The limits of lab 14 as they are configured, beside what its checks measure: a rule must not depend on the machine.

A fault shows that a limit is there. Whether it is as short as required is read where it stands: in a new session of
the role, in PgBouncer, in what each request asks of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg

from connlab.checks.probes import LIMITS
from connlab.checks.requirement import (
    CALLER,
    LOCK,
    MARGIN,
    PAUSE,
    POOL,
    SLACK,
    STATEMENT,
    THIRD,
    TRANSACTION,
)
from connlab.checks.trial import Trial
from connlab.pgbouncer import PgBouncer

REQUIRED = dict(zip(LIMITS, (STATEMENT, LOCK, PAUSE, TRANSACTION), strict=True))
ALSO = "idle_session_timeout"
"""Limits sessions outside transactions, and is easily taken for the one that limits a pause inside them."""
IN_NUMBERS = (
    f"The faults were ended in time because a check allows {SLACK:g} s more, for a busy machine. What you set must "
    "keep to the table: which number is above it?"
)


@dataclass(frozen=True)
class Limits:
    """What a session begins with, in seconds; 0 is off."""

    seconds: dict[str, float]

    def __str__(self) -> str:
        shown = [
            f"`{name} = {f'{seconds * 1000:g}ms' if seconds else '0 (off)'}`"
            for name, seconds in self.seconds.items()
            if seconds or name != ALSO
        ]
        return ", ".join(shown)

    @property
    def within(self) -> bool:
        """Whether each is there, and not above what is required."""
        return all(0 < self.seconds[name] <= most for name, most in REQUIRED.items() if name in self.seconds)


def limits_of(dsn: str) -> Limits:
    """The limits that a new session begins with."""
    query = "select name, setting::int / 1000.0 from pg_settings where name = any(%s)"
    with psycopg.connect(dsn, autocommit=True, application_name="connlab") as conn:
        found: dict[str, Any] = dict(conn.execute(query, [[*LIMITS, ALSO]]).fetchall())
    return Limits({name: float(found[name]) for name in (*LIMITS, ALSO) if name in found})


def expect_within(trial: Trial, limits: Limits) -> None:
    """Expect the numbers of the table in a new session of the service's role."""
    trial.expect(
        "a new session of `app` has all of these limits, none above the table", f"{limits}", limits.within, IN_NUMBERS
    )


def expect_unlimited(trial: Trial, dsn: str) -> None:
    """Expect that the backup's sessions have no limit at all, be it ever so long."""
    limits = limits_of(dsn)
    trial.expect(
        "a new session of `postgres` has no limit at all",
        f"{limits}" if any(limits.seconds.values()) else "none",
        not any(limits.seconds.values()),
        "A backup takes hours at work: a limit that it does not meet here is still one. Which of your statements "
        "holds for `postgres`?",
    )


def setting_of(bouncer: PgBouncer, name: str) -> float:
    """That time of PgBouncer's, in seconds, as it has understood it."""
    return next(float(str(row["value"])) for row in bouncer.rows("SHOW CONFIG") if row["key"] == name)


def expect_setting(trial: Trial, bouncer: PgBouncer, name: str, most: float) -> None:
    """Expect that PgBouncer's setting is not above the table."""
    seconds = setting_of(bouncer, name)
    trial.expect(f"PgBouncer has a `{name}` of at most {most:g} s", f"{seconds:g} s", 0 < seconds <= most, IN_NUMBERS)


def expect_patience(trial: Trial, patience: float | None) -> None:
    """Expect that no request asks the pool to wait longer than it may."""
    if patience is None:  # no pool of psycopg's: what was measured must do
        return
    trial.expect(f"the pool's timeout is at most {POOL:g} s", f"{patience:g} s", patience <= POOL, IN_NUMBERS)


def expect_sum(trial: Trial, limits: Limits, queue: float, patience: float | None, measured: list[float]) -> None:
    """Expect that the limits add up to what a caller waits: by their numbers, which are the same on each machine."""
    numbers = [measured[0] if patience is None else patience, queue, THIRD]
    if "transaction_timeout" in limits.seconds:
        numbers.append(limits.seconds["transaction_timeout"])
    total = round(sum(numbers), 2)
    trial.expect(
        f"a request that meets them one after the other has its answer within {CALLER:.2f} s, by your numbers",
        f"pool, PgBouncer, PgBouncer's third{', transaction' if len(numbers) > 3 else ''}: {_added(numbers)}",
        total <= CALLER,
        "Each is within its own limit, and their sum is not: a caller may wait for a connection, then in "
        f"PgBouncer's queue (and up to {THIRD:g} s longer, until PgBouncer looks at it again), then for the "
        "transaction. Which of them can do with less?",
    )
    trial.expect(
        f"and so it was ({MARGIN} for each)",
        _added(measured),
        sum(measured) <= total + SLACK * len(measured),
        "One of them was ended much later than its number says. Does a request meet the same limit twice?",
    )


def _added(seconds: list[float]) -> str:
    return f"{' + '.join(f'{each:.2f}' for each in seconds)} = {sum(seconds):.2f} s"
