"""The process that runs the learner's code: does what the check asks for, until the check has gone.

Started by ``sandbox`` with a connection, a file for its last words, and the process id of the notebook's kernel.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from connlab.checks.drivers import Learner

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Take the learner's code, then one driver after the other."""
    commands, last_words, parent = (int(text) for text in sys.argv[1:4])
    _end_with(parent)
    for descriptor in (commands, last_words):
        os.set_inheritable(descriptor, False)
    logging.lastResort = _log()
    faulthandler.register(signal.SIGUSR1, file=last_words, all_threads=True)
    connection: Connection[Any, Any] = Connection(commands)
    try:
        learner = _loaded(connection)
        while True:
            driver, arguments, options = connection.recv()
            connection.send(_reply(learner, driver, arguments, options))
    except (EOFError, OSError):
        os._exit(0)  # nobody asks any more; threads of the learner's may still run


def _loaded(connection: Connection[Any, Any]) -> Learner:
    """The learner's code; says whether it could be loaded."""
    code = connection.recv_bytes()
    try:
        learner = Learner(pickle.loads(code))
    except Exception as problem:
        connection.send(("unloadable", f"{type(problem).__name__}: {problem}", ()))
        raise EOFError from problem
    connection.send(("ready", None, ()))
    return learner


def _reply(learner: Learner, driver: Any, arguments: Any, options: Any) -> tuple[str, Any, tuple[str, ...]]:
    try:
        value = driver(learner, *arguments, **options)
    except BaseException:
        return "broken", traceback.format_exc(), ()
    if learner.stubs:
        return "stub", tuple(name for name, begun in learner.stubs.items() if begun), tuple(learner.stubs)
    if learner.exits:
        return "exit", None, tuple(learner.exits)
    return "done", value, ()


def _log() -> logging.Handler:
    """Says of a line whose log it comes from, for learner's code that sets no logging up: it has not printed that."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("log of %(name)s: %(message)s"))
    return handler


def _end_with(parent: int) -> None:
    """End when the kernel does, also in a loop that never reads the connection. Elsewhere its closing must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
