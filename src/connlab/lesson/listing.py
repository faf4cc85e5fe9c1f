"""What `connlab claims` prints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from connlab.lesson.ledger import ledger
from connlab.lesson.verdict_card import listed
from connlab.lesson.verdicts import OPEN, SETTLED, Verdict


def as_json(found: Iterable[Verdict]) -> str:
    """The verdicts as other programs read them."""
    return json.dumps([asdict(verdict) for verdict in found], indent=2, ensure_ascii=False)


def as_text(found: Sequence[Verdict]) -> str:
    """The verdicts for a person: how many of each, then a line for each claim that is settled, then what is open."""
    settled = [line for verdict in found if verdict.verdict != OPEN for line in _lines(verdict)]
    waiting = _waiting(found)
    return "\n".join([_counts(found), *([""] if settled else []), *settled, *([""] if waiting else []), *waiting])


def _counts(found: Sequence[Verdict]) -> str:
    """Verdicts by kind; a claim that was settled on two backends counts twice, and the line says how many claims."""
    counted = Counter(verdict.verdict for verdict in found)
    shown = ", ".join(f"{counted[name]} {name}" for name in (*SETTLED, OPEN))
    return f"{len({verdict.id for verdict in found})} claims: {shown}"


def _lines(verdict: Verdict) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in verdict.versions.items())
    return [
        f"{verdict.id}  {verdict.verdict:<9}  {ledger()[verdict.id].statement}",
        f"                {listed(verdict.evidence)}",
        f"                {verdict.notebook}, {verdict.backend or 'no server'}, {versions}, {verdict.at}",
    ]


def _waiting(found: Sequence[Verdict]) -> list[str]:
    by_notebook: dict[str, list[str]] = {}
    for verdict in found:
        if verdict.verdict == OPEN:
            by_notebook.setdefault(verdict.notebook, []).append(verdict.id)
    lines = [f"  {name:<32} {' '.join(ids)}" for name, ids in sorted(by_notebook.items())]
    return ["Open, for their notebook has not run here:", *lines] if lines else []
