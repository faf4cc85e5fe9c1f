"""Verdicts in the state directory: one file for each claim and backend, replaced in one step."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from connlab import places
from connlab.errors import StateError
from connlab.lesson.ledger import ledger

CONFIRMED, DEPENDS, REFUTED, OPEN = "confirmed", "depends", "refuted", "open"
SETTLED = (CONFIRMED, DEPENDS, REFUTED)
FOLDER = "verdicts"
FIELDS = {
    "id": str,
    "verdict": str,
    "evidence": dict,
    "notebook": str,
    "backend": str | None,
    "versions": dict,
    "at": str,
}


@dataclass(frozen=True)
class Verdict:
    """The outcome of one claim's experiment."""

    id: str
    verdict: str
    """"confirmed", "depends", "refuted", or "open" when the experiment has not run."""
    evidence: dict[str, float | int | str]
    """What was measured, by name; the name carries the unit."""
    notebook: str
    backend: str | None
    versions: dict[str, str]
    at: str | None
    """When, as ISO 8601 in UTC; None when it has not run."""


def save(verdict: Verdict) -> Path:
    """Write the verdict's file, in one step: a reader finds the old one or the new one. Raises StateError."""
    file = _folder() / f"{verdict.id}.{verdict.backend or 'none'}.json"
    text = json.dumps(asdict(verdict), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        file.parent.mkdir(exist_ok=True)
        _replace(file, text)
    except OSError as problem:
        raise StateError(f"cannot write {file}: {problem.strerror}; make room or make it writable") from problem
    return file


def load() -> tuple[list[Verdict], list[str]]:
    """The verdicts of the last runs in the ledger's order, and a line for each file that holds none."""
    found: list[Verdict] = []
    broken: list[str] = []
    for file in sorted(_folder().glob("*.json")):
        try:
            found.append(_read(file))
        except (OSError, ValueError) as problem:
            broken.append(f"{file}: {problem}; remove it and run its notebook again")
    return sorted(found, key=_place), broken


def with_open(settled: Iterable[Verdict]) -> list[Verdict]:
    """``settled``, and an open verdict for each claim that it lacks, in the ledger's order."""
    found = list(settled)
    done = {verdict.id for verdict in found}
    waiting = [entry for entry in ledger().values() if entry.id not in done]
    found += [Verdict(entry.id, OPEN, {}, entry.notebook, None, {}, None) for entry in waiting]
    return sorted(found, key=_place)


def _place(verdict: Verdict) -> tuple[int, str]:
    return list(ledger()).index(verdict.id), verdict.backend or ""


def _folder() -> Path:
    return places.state_dir() / FOLDER


def _replace(file: Path, text: str) -> None:
    descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as written:
            written.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _read(file: Path) -> Verdict:
    """Raises OSError, or ValueError with what is wrong about the file."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"not JSON ({problem})") from None
    if complaint := _complaint(fields):
        raise ValueError(complaint)
    return Verdict(**fields)


def _complaint(fields: Any) -> str:
    if not isinstance(fields, dict) or set(fields) != set(FIELDS):
        return f"not the fields {', '.join(FIELDS)}"
    wrong = [name for name, kind in FIELDS.items() if not isinstance(fields[name], kind)]
    if wrong:
        return f"{wrong[0]} is {fields[wrong[0]]!r}"
    if odd := [name for name, value in fields["evidence"].items() if not _is_measurement(value)]:
        return f"its evidence {odd[0]!r} is neither number nor text"
    if fields["id"] not in ledger():
        return f"the ledger has no claim {fields['id']!r}"
    return "" if fields["verdict"] in SETTLED else f"{fields['verdict']!r} is no verdict"


def _is_measurement(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
