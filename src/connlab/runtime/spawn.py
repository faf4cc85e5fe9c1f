"""Starts processes that end with us and hear nothing of the learner's interrupts.

Three things together, each for what the others miss: a session of its own (Jupyter's interrupt and a
terminal's Ctrl-C reach only us), the kernel's parent-death signal (Linux; PostgreSQL then shuts down in order),
and the watchdog in ``janitor``.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

PR_SET_PDEATHSIG = 1
# PyDLL keeps the interpreter lock: in the forked child nothing else may run.
_PRCTL = ctypes.PyDLL(None).prctl if sys.platform == "linux" else None


class _Spawner:
    """A thread that lives as long as the process.

    The parent-death signal comes at the end of the *thread* that started the child (prctl(2)), and learners
    start servers from threads of their own.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]]
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=self._work, name="connlab-spawner", daemon=True).start()

    def run(self, job: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        done: Future[subprocess.Popen[bytes]] = Future()
        try:
            self._jobs.put((job, done))
            return done.result()
        except BaseException:  # also an interrupt: nobody would know of what is started after it
            if not done.cancel():
                done.add_done_callback(_discard)
                wait([done], timeout=5)
                _discard(done)  # the callback may still be at it
            raise

    def _work(self) -> None:
        while True:
            job, done = self._jobs.get()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(job())
            except BaseException as problem:
                done.set_exception(problem)


def _discard(done: Future[subprocess.Popen[bytes]]) -> None:
    """End what was started for somebody who has been interrupted."""
    if done.done() and done.exception() is None:
        done.result().kill()
        done.result().wait()


_spawner: _Spawner | None = None


def spawn(
    command: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    account: pwd.struct_passwd | None,
    environment: Mapping[str, str],
    started: list[subprocess.Popen[bytes]],
) -> subprocess.Popen[bytes]:
    """Start ``command`` in ``cwd`` as ``account`` (None: as ourselves), appending its output to ``log``.

    The process is in ``started`` before anything else can happen: an interrupt may keep it from being returned.

    Its environment is ``environment`` with a plain PATH and the C locale, nothing of ours. Raises OSError.
    """
    global _spawner
    if _spawner is None or _spawner.pid != os.getpid():  # threads do not survive a fork
        _spawner = _Spawner()
    parent = os.getpid()

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", **environment},
                start_new_session=True,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
                umask=0o077,
                preexec_fn=lambda: _in_the_child(parent),
            )
        started.append(process)
        return process

    return _spawner.run(start)


def _in_the_child(parent: int) -> None:
    """After privileges are dropped: end when the parent ends, and hear the signals that end a server.

    A shell starts what it runs in the background with SIGINT and SIGQUIT ignored, which children inherit.
    """
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    if _PRCTL is None:
        return
    _PRCTL(PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
