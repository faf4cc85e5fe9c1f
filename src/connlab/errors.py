"""The one tree of exceptions.

::

    ConnlabError
    ├── ProgramMissing      a program or engine is not to be had, with what was looked for and the ways out
    ├── StartError          a server did not start, with its command, configuration and last log lines
    ├── SettingError        a setting is refused, unknown or has a value that the server does not take
    ├── NodeStopped         the server is stopped, killed or frozen and cannot do what was asked
    ├── EngineError         the Docker engine has gone, or refuses what was asked of it
    └── StateError          a directory or lock of connlab's own cannot be used
"""

from __future__ import annotations

from collections.abc import Sequence


class ConnlabError(Exception):
    """What connlab raises, and nothing else: catch this one to catch them all."""


class ProgramMissing(ConnlabError):
    """A program is not to be had.

    ``looked`` holds one line for each place that was tried and why it did not do;
    ``ways_out`` one line for each remedy.
    """

    def __init__(self, what: str, looked: Sequence[str], ways_out: Sequence[str]) -> None:
        self.what, self.looked, self.ways_out = what, tuple(looked), tuple(ways_out)
        super().__init__(f"{what}\nLooked at:\n{_bullets(looked)}\nWays out (one is enough):\n{_bullets(ways_out)}")


class StartError(ConnlabError):
    """A server did not start.

    The message carries the reason first, then the command, the configuration and the last log lines.
    """

    def __init__(
        self, reason: str, *, command: str = "", configuration: str = "", log: str = "", hint: str = ""
    ) -> None:
        self.reason, self.command, self.configuration, self.log, self.hint = (
            reason,
            command,
            configuration,
            log,
            hint,
        )
        parts = [reason]
        parts += [f"What to do: {hint}"] if hint else []
        parts += [f"Command:\n{_indent(command)}"] if command else []
        parts += [f"Configuration:\n{_indent(configuration)}"] if configuration else []
        parts += [f"Last log lines:\n{_indent(log)}"] if log else []
        super().__init__("\n".join(parts))


class SettingError(ConnlabError, ValueError):
    """A setting is refused: its name, what is wrong with it and what to write instead."""


class NodeStopped(ConnlabError):
    """The server cannot do what was asked, for it is stopped, killed or frozen."""


class EngineError(ConnlabError):
    """The Docker engine does not answer any more, or refuses: what was asked of it, and what it says."""


class StateError(ConnlabError, OSError):
    """A directory or lock of connlab's own cannot be used: which one, why, and what to do."""


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"  - {line}" for line in lines)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
