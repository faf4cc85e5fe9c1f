"""The exceptions of lab 14: what is expected of the report, of the migration, and of what they leave to others."""

from __future__ import annotations

from connlab.checks.answers import Answer
from connlab.checks.ladder import Reads
from connlab.checks.probes import End
from connlab.checks.requests import REPORT, shown
from connlab.checks.requirement import (
    CONVOY,
    IN_THE_WAY,
    LEAKS,
    MARGIN,
    MOST_STOOD,
    READ,
    SLACK,
    STATEMENT,
    TRANSACTION,
)
from connlab.checks.rungs import ended_by
from connlab.checks.trial import Trial


def expect_nothing_left(trial: Trial, found: list[str], number: int) -> None:
    """What ``set`` has left on the server connections, seen by other clients who get each of them."""
    trial.expect(
        "another client of PgBouncer's finds no limit that somebody has set",
        f"`{found[0]}`, and {len(found)} such on {number} server connection{'s' if number > 1 else ''}"
        if found
        else "none",
        not found,
        LEAKS,
    )


def expect_report(trial: Trial, good: Answer, left: list[str], following: End, endless: Answer) -> None:
    """Expect the report's result, an end for one that hangs, and the role's own limit for whoever comes after it."""
    trial.expect(
        f"a report of {REPORT:g} s, with its result",
        shown(good),
        isinstance(good.value, tuple) and good.value == (1000, 1000),
        "The limit of the role holds for the report too. Inside one transaction `set local` gives it another: "
        "https://www.postgresql.org/docs/current/sql-set.html. Return the row as `fetchone()` gives it.",
    )
    expect_nothing_left(trial, left, 1)
    what = "a statement of another client, on the same server connection after it,"
    ended_by(trial, what, following, "57014", STATEMENT, look=LEAKS)
    trial.expect(
        f"a report that hangs ends, after at most {TRANSACTION:g} s ({MARGIN})",
        shown(endless),
        endless.problem is not None and endless.seconds <= TRANSACTION + SLACK,
        "Longer is not without end: 0 switches a limit off. Give the report what it needs, and some room.",
    )


def expect_migration(trial: Trial, reads: Reads, done: Answer, is_there: bool) -> None:
    """Expect that the migration comes through a transaction in its way, and that requests go on meanwhile."""
    trial.expect(
        f"{len(reads.ends)} requests that read the table while `migrate` runs, and none fails",
        f"{len(reads.failed)} failed, the first with {reads.failed[0]}" if reads.failed else "none did",
        not reads.failed,
        CONVOY,
    )
    trial.expect(
        f"the column is there, though a transaction was in the way for {IN_THE_WAY:g} s from its first attempt on",
        "it is" if is_there else f"it is not; `migrate` ended with {done.problem or repr(done.value)}",
        is_there,
        "Who gives up quickly must come again: who tries the statement once more, and for how long?",
    )
    trial.expect("`migrate` returns", str(done.problem) if done.problem else "it did", done.problem is None, READ)
    trial.expect(
        f"requests stand still for less than {MOST_STOOD:.0%} of these {IN_THE_WAY:g} s",
        f"{reads.stood:.0%}",
        reads.stood < MOST_STOOD,
        "Each attempt holds up all who come after it, for as long as it waits. How long does one attempt wait, and how "
        "long do requests have to themselves before the next?",
    )
