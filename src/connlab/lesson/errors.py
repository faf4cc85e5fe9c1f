"""What is raised when a lesson is written wrongly, or when its rules settle nothing.

::

    ConnlabError
    └── LessonError         a call of predict, quiz or claim is wrong: what about it, and what to write
        └── VerdictError    the rules of a claim do not tell one outcome of the experiment from another
"""

from __future__ import annotations

from connlab.errors import ConnlabError


class LessonError(ConnlabError, ValueError):
    """A lesson is written wrongly: what is wrong, and what to write instead."""


class VerdictError(LessonError):
    """The rules of a claim settle nothing: both are true, or the counterexample gets the same verdict."""
