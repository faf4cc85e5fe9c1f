"""How a verdict looks in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from connlab.lesson import cards
from connlab.lesson.ledger import Entry
from connlab.lesson.rules import Measurement
from connlab.lesson.started import Environment
from connlab.lesson.verdicts import CONFIRMED, DEPENDS, REFUTED, Verdict

SIGNS = {CONFIRMED: "✓", DEPENDS: "◐", REFUTED: "✗"}


@dataclass(frozen=True)
class VerdictCard:
    """A claim, its verdict, and all that the verdict comes from."""

    entry: Entry
    verdict: Verdict
    told: str
    """What follows the verdict: on what it depends, or what is true instead."""
    meanings: Mapping[str, str]
    """The rules of "confirmed" and "refuted" in words."""
    other: str
    """What the counterexample would give."""
    where: Environment

    def show(self) -> None:
        """Show it in the notebook; elsewhere print its text."""
        cards.show("claim", self._markup(), self._text())

    def _text(self) -> str:
        lines = [
            f"Claim {self.entry.id} (guide, section {self.entry.section}): {self.entry.statement}",
            f"Verdict: {SIGNS[self.verdict.verdict]} {self.verdict.verdict} {self.told}".rstrip(),
            f"Measured here: {listed(self.verdict.evidence)}",
            *(f"It would be {name} if: {text}" for name, text in self.meanings.items()),
            self.other,
            f"Measured with {self.where}",
        ]
        return "\n".join(lines)

    def _markup(self) -> str:
        name, inline = self.verdict.verdict, cards.inline
        return (
            f"<p class='head'>Claim {self.entry.id} of the guide, section {self.entry.section}</p>\n"
            f"<p class='statement'>{inline(self.entry.statement)}</p>\n"
            f"<p class='verdict {name}'><strong>{SIGNS[name]} {name}</strong> <span>{inline(self.told)}</span></p>\n"
            f"{self._table()}\n{self._rules()}\n<p class='where'>Measured with {inline(str(self.where))}</p>"
        )

    def _table(self) -> str:
        rows = "".join(
            f"<tr><th scope='row'><code>{name}</code></th><td>{cards.inline(cards.number(value))}</td></tr>"
            for name, value in self.verdict.evidence.items()
        )
        return f"<table><caption>Measured here</caption><tbody>{rows}</tbody></table>"

    def _rules(self) -> str:
        items = "".join(f"<li>{name} if <code>{cards.inline(text)}</code></li>" for name, text in self.meanings.items())
        return (
            f"<details><summary {cards.KEYS}>How the verdict comes about</summary>"
            f"<ul>{items}<li>depends if neither holds</li></ul><p>{cards.inline(self.other)}.</p></details>"
        )


def listed(values: Mapping[str, Measurement]) -> str:
    """Measurements in one line, such as "connect_ms = 5.2, connections = 20"."""
    return ", ".join(f"{name} = {cards.number(value)}" for name, value in values.items())
