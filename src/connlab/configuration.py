"""Settings as the servers write them: values, lines, and what a change of them did."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from connlab.errors import SettingError

Value = str | int | float | bool
"""A setting's value as Python has it; booleans become on/off (PgBouncer: 1/0)."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Change:
    """What ``with node.settings(…)`` did.

    ``how`` is "reload" or "restart"; ``new`` and ``old`` map each setting to its value as the server shows it.
    """

    label: str
    how: str
    new: Mapping[str, str]
    old: Mapping[str, str]
    file: str = field(default="", repr=False)
    """The configuration file as it was, to be put back."""

    def __str__(self) -> str:
        values = ", ".join(f"{name} {self.old[name]} -> {value}" for name, value in self.new.items())
        return f"{self.label}, {self.how}: {values}"


def check_names(settings: Iterable[str], refused: Mapping[str, str]) -> None:
    """Raise SettingError for a name that cannot be one, or that is ``refused`` (name to reason)."""
    for name in settings:
        if not NAME.fullmatch(name):
            raise SettingError(f"{name!r} is not the name of a setting")
        if name in refused:
            raise SettingError(f"{name} cannot be set here: {refused[name]}")


def postgres_value(value: Value) -> str:
    """A value as postgresql.conf takes it: bare where that is possible, else quoted.

    Example:
        >>> postgres_value(True), postgres_value(20), postgres_value("it's")
        ('on', '20', "'it''s'")
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int | float):
        return str(value)
    if "\n" in value:
        raise SettingError(f"a setting's value has no line breaks: {value!r}")
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def postgres_lines(settings: Mapping[str, Value]) -> str:
    """Settings as lines of postgresql.conf."""
    return "".join(f"{name} = {postgres_value(value)}\n" for name, value in settings.items())


def pgbouncer_value(value: Value) -> str:
    """A value as pgbouncer.ini takes it: everything after the equals sign, no comment behind it."""
    if isinstance(value, bool):
        return str(int(value))
    text = str(value)
    if "\n" in text:
        raise SettingError(f"a setting's value has no line breaks: {text!r}")
    return text


def ini_with(text: str, section: str, settings: Mapping[str, Value], note: str = "") -> str:
    """``text`` with settings at the end of ``section`` (made when missing), under a comment ``note``.

    PgBouncer takes the last of two lines for one setting, so these win.

    Example:
        >>> print(ini_with("[pgbouncer]\\npool_mode = session\\n", "pgbouncer", {"listen_port": 6432}))
        [pgbouncer]
        pool_mode = session
        listen_port = 6432
        <BLANKLINE>
    """
    added = [f"; {note}"] if note else []
    added += [f"{name} = {pgbouncer_value(value)}" for name, value in settings.items()]
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    start = next((n for n, line in enumerate(lines) if _section(line) == section), None)
    if start is None:
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        start = len(lines) - 1
    end = next((n for n in range(start + 1, len(lines)) if _section(lines[n])), len(lines))
    while end - 1 > start and not lines[end - 1].strip():
        end -= 1
    return "\n".join(lines[:end] + added + lines[end:]) + "\n"


def ini_names(text: str, section: str) -> set[str]:
    """The names that ``section`` of ``text`` sets."""
    found, current = set(), ""
    for line in text.splitlines():
        current = _section(line) or current
        if current == section and "=" in line and not line.lstrip().startswith((";", "#", "[")):
            found.add(line.split("=")[0].strip())
    return found


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A sentence that names the settings closest to ``name``, or an empty text."""
    near = difflib.get_close_matches(name.lower(), known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _section(line: str) -> str:
    match = re.match(r"\s*\[([^]]*)\]", line)
    return match.group(1).strip() if match else ""
