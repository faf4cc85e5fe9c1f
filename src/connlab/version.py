"""Versions of servers, comparable with each other and with plain tuples."""

from __future__ import annotations

import re

from connlab.errors import ConnlabError


class Version(tuple[int, ...]):
    """A version that compares like a tuple and prints as servers write it.

    Example:
        >>> Version.find("PgBouncer 1.24.1") >= (1, 21)
        True
        >>> print(Version.find("postgres (PostgreSQL) 18.6 (Debian 18.6-1)"))
        18.6
    """

    __slots__ = ()

    @classmethod
    def find(cls, text: str) -> Version:
        """The first number with a dot in ``text``; raises ConnlabError when there is none.

        PostgreSQL's development versions have no dot ("19devel", "18beta2"): their major counts.
        """
        match = re.search(r"\d+(?:\.\d+)+", text) or re.search(r"\d+(?=devel|beta|rc)", text)
        if match is None:
            raise ConnlabError(f"no version number in {text!r}")
        return cls(int(part) for part in match.group().split("."))

    def __str__(self) -> str:
        return ".".join(map(str, self))

    def __repr__(self) -> str:
        return f"Version('{self}')"
