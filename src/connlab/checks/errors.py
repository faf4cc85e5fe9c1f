"""What keeps a check from going through to its end.

::

    ConnlabError
    ├── Unfinished      the learner's function still has its stub
    ├── Trouble         the learner's code did something that ends a check: what was expected, what was seen, what to do
    │   ├── Hangs           no answer within the time
    │   ├── Ended           it ended its program, or something killed it
    │   ├── Floods          it prints without end
    │   ├── Rooted          it uses something of the notebook that cannot leave the notebook
    │   ├── Unloadable      a fresh Python cannot load it
    │   └── ServerDown      the server was down when the check was done
    └── CheckError      the check itself is written wrongly
"""

from __future__ import annotations

from connlab.checks.answers import Place
from connlab.errors import ConnlabError

WAITS = (
    "Whoever waits for a connection needs somebody who gives one back. Follow each path through the function, also "
    "that of an exception: which line gives the connection back?"
)
STUCK = (
    "A loop that does not end, or a wait that nobody ends: what would end the loop around this line, and what does the "
    "line wait for?"
)


class Unfinished(ConnlabError):
    """The functions ``names`` still have their stubs; those in ``begun`` have code above it."""

    def __init__(self, names: tuple[str, ...], begun: tuple[str, ...] = ()) -> None:
        self.names, self.begun = names, begun
        super().__init__(f"still to be written: {', '.join(names)}")


class Trouble(ConnlabError):
    """Ends a check as not passed."""

    def __init__(self, expected: str, measured: str, look: str) -> None:
        self.expected, self.measured, self.look = expected, measured, look
        super().__init__(measured)


class Hangs(Trouble):
    """No answer came in time; ``place`` is where the learner's code was."""

    def __init__(self, within: float, place: Place | None) -> None:
        self.place = place
        self.in_pool = place is not None and place.in_pool
        where = f"; your code was in {place}" if place else ""
        super().__init__(
            f"an answer within {within:g} s",
            f"none{where}",
            WAITS if self.in_pool else STUCK,
        )


class Ended(Trouble):
    """The program that ran the learner's code is gone, or was asked to go."""

    def __init__(self, how: str) -> None:
        super().__init__(
            "a function that returns or raises an exception",
            how,
            "Take calls such as `sys.exit()`, `exit()` and `os._exit()` out: they would end the whole service, with "
            "all the requests that it is working on.",
        )


class Floods(Trouble):
    """The learner's code prints without end."""

    def __init__(self, megabytes: float) -> None:
        super().__init__(
            "few lines of output, or none",
            f"more than {megabytes:g} MB, so it was stopped",
            "There is a `print` in a loop without an end, or one that runs for every row. What it printed first stands "
            "below.",
        )


class Rooted(Trouble):
    """The learner's code uses what cannot leave the notebook."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(
            "functions that make what they need, or get it as an argument",
            f"they use `{name}` of the notebook ({kind}), which cannot leave it",
            f"Checks run your functions in a program of their own, as a service would. `{name}` does not exist there: "
            "make such an object inside the function that starts the service, and take the DSN from its argument.",
        )


class Unloadable(Trouble):
    """A fresh Python cannot load the learner's code."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            "functions that a fresh Python can load",
            f"`{problem}`",
            "Checks run your functions in a program of their own, where only what can be imported is there. Write "
            "helpers into the notebook, or into a module beside it.",
        )


class ServerDown(Trouble):
    """The server was down when the check was done, and the check had not stopped it."""

    def __init__(self, again: bool) -> None:
        after = "It has been started again." if again else "Run the cell that starts it again."
        super().__init__(
            "a server that runs",
            "it was down",
            f"Nothing that your code has to do stops or kills the server, nor the notebook between checks. {after}",
        )


class CheckError(ConnlabError):
    """A check is written wrongly: what is wrong, and what to write instead."""
