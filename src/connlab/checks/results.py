"""What a check found, as a card in a notebook and as text in a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

from connlab.lesson import cards
from connlab.lesson.cards import inline

PASSED, FAILED, OPEN = "passed", "failed", "open"
UNSOLVED = "Not solved yet"
HEADINGS = {PASSED: "✓ Passed", FAILED: "✗ Not passed", OPEN: f"○ {UNSOLVED}"}


@dataclass(frozen=True)
class Row:
    """One expectation, and what was measured."""

    expected: str
    measured: str
    good: bool


@dataclass(frozen=True)
class Result:
    """The outcome of a check; ``passed`` says whether every expectation was met."""

    title: str
    status: str
    """"passed", "failed", or "open" while the exercise has its stub."""
    rows: tuple[Row, ...] = ()
    look: str = ""
    """Where to look next; what is asked, while it is open."""
    output: str = ""
    """The beginning of what the learner's code has printed."""

    @property
    def passed(self) -> bool:
        """Whether the exercise is solved and every expectation was met."""
        return self.status == PASSED

    def __str__(self) -> str:
        lines = [f"{HEADINGS[self.status]}: {self.title}"]
        for row in self.rows:
            lines += [f"  {'✓' if row.good else '✗'} expected: {row.expected}", f"    measured: {row.measured}"]
        if self.look:
            lines.append(f"  {self._word}: {self.look}")
        if self.output:
            lines += ["  Your code printed:", *(f"    {line}" for line in self.output.splitlines())]
        return "\n".join(lines).replace("`", "")

    def show(self) -> None:
        """Show it in the notebook; elsewhere print its text."""
        cards.show("check", self._markup(), str(self), style=_style())

    def _ipython_display_(self) -> None:
        """Nothing: the check has shown it, also where it ends a cell."""

    @property
    def _word(self) -> str:
        return "Asked" if self.status == OPEN else "Where to look next"

    def _markup(self) -> str:
        parts = [
            f"<p class='status {self.status}'><strong>{HEADINGS[self.status]}</strong> {inline(self.title)}</p>",
            self._table() if self.rows else "",
            f"<p><em>{self._word}:</em> {inline(self.look)}</p>" if self.look else "",
            self._printed() if self.output else "",
        ]
        return "\n".join(filter(None, parts))

    def _table(self) -> str:
        rows = "".join(
            f"<tr><td><span class='{'met' if row.good else 'unmet'}'>{'✓' if row.good else '✗'}</span> "
            f"{inline(row.expected)}</td>"
            f"<td>{inline(row.measured)}</td></tr>"
            for row in self.rows
        )
        head = "<tr><th scope='col'>expected</th><th scope='col'>measured</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"

    def _printed(self) -> str:
        text = inline(self.output.replace("`", "'"))
        return f"<details><summary {cards.KEYS}>What your code printed</summary><pre>{text}</pre></details>"


@cache
def _style() -> str:
    return resources.files("connlab.checks").joinpath("checks.css").read_text(encoding="utf-8")
