"""The ledger: the guide's claims, in our words, with the notebook that settles each."""

from __future__ import annotations

import difflib
import functools
import tomllib
from dataclasses import dataclass
from importlib import resources

from connlab.lesson.errors import LessonError


@dataclass(frozen=True)
class Entry:
    """One claim of the guide."""

    id: str
    statement: str
    section: str
    """The section of the guide, such as "20.2.4"."""
    notebook: str
    """The notebook that settles it, such as "13_leaks"."""


@functools.cache
def ledger() -> dict[str, Entry]:
    """Every claim by its id, in the order of the guide's sections.

    Example:
        >>> ledger()["G04"].notebook
        '01_what_a_connection_costs'
    """
    text = resources.files("connlab").joinpath("claims.toml").read_text(encoding="utf-8")
    return {name: Entry(name, **fields) for name, fields in tomllib.loads(text).items()}


def find(name: str) -> Entry:
    """The claim with the id ``name``; raises LessonError, which names ids that are near."""
    if name in ledger():
        return ledger()[name]
    raise LessonError(f"the ledger has no claim {name!r}; {_near(str(name).strip().upper())}")


def _near(name: str) -> str:
    padded = f"{name[:1]}{name[1:].zfill(2)}"  # G1 is G01
    near = [padded] if padded in ledger() else difflib.get_close_matches(name, ledger(), n=3)
    return f"did you mean {' or '.join(near)}?" if near else "ids are such as G01, A01, B01, S01 and L01"
