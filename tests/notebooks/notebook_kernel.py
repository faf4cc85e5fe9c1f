"""A notebook kernel that says when it has died, keeps its stderr, and lets no mistake pass for success.

nbval 0.11 starts its kernel with stderr thrown away, notices a dead one when the cell's timeout is over, and
looks only at what is published on iopub: there, an unknown magic is a line of text, and a shell command that
failed is nothing at all.
"""

from __future__ import annotations

import inspect
import os
import signal
import tempfile
import textwrap
import time
from queue import Empty
from typing import Any

from jupyter_client.manager import KernelManager
from nbval.kernel import NbvalKernelspecManager, RunningKernel

HEARTBEAT = 0.5
"""Seconds between two looks at whether the kernel lives, while it is waited for."""

HIDDEN_TIMEOUT = 30.0
"""Seconds that the guard's own code may take in the kernel."""

STDERR_TAIL = 4000
"""How many of the last bytes of the kernel's stderr a report carries."""


class KernelDied(RuntimeError):
    """The kernel's process has ended while something was waited for from it."""


def _set_up(strict: bool) -> None:
    """Make mistakes errors; runs inside the kernel, whence the imports.

    Each mistake becomes an ordinary error message, which nbval (and `%%capture`, which swallows text) cannot
    overlook. IPython 9 has the switch for commands; without it `!false` would pass again, so say so.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if not shell.has_trait("system_raise_on_error"):
        raise RuntimeError("this IPython cannot raise when a shell command fails")
    shell.system_raise_on_error = strict
    shell.show_usage_error = lambda error: shell._showtraceback(type(error), error, [f"UsageError: {error}"])


def _code_to_set_up(strict: bool) -> str:
    """The kernel's input for `_set_up`, in a namespace of its own so that the notebook sees no trace of it."""
    source = textwrap.dedent(inspect.getsource(_set_up))
    return f"exec({source + f'_set_up({strict})'!r}, {{}})"


class WatchedKernel(RunningKernel):
    """nbval's kernel with its stderr kept, its death noticed, and its last reply remembered."""

    def __init__(self, kernel_name: str, cwd: str | None = None, startup_timeout: float = 60) -> None:
        self.reply: dict[str, Any] = {}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - read for as long as the report may want it
        self._stderr_start = 0
        try:
            self._start(kernel_name, cwd, startup_timeout)
        except BaseException as error:
            self.stop()
            error.add_note(f"stderr of the kernel:\n{self.tail}")
            raise
        self._stderr_start = self._stderr_size  # every kernel warns of something as it starts

    def _start(self, kernel_name: str, cwd: str | None, startup_timeout: float) -> None:
        # Not nbval's start_new_kernel: interrupted (Ctrl-C), it would leave a kernel that nobody knows.
        self.km = KernelManager(kernel_name=kernel_name, kernel_spec_manager=NbvalKernelspecManager())
        self.km.start_kernel(stderr=self._stderr, cwd=cwd)
        self.kc = self.km.client()
        self.kc.start_channels()
        self.kc.wait_for_ready(timeout=startup_timeout)
        self._ensure_iopub_up()
        self.set_up(strict=True)

    def set_up(self, *, strict: bool) -> None:
        """Make usage errors errors, and with `strict` shell commands that fail as well."""
        request = self.kc.execute(_code_to_set_up(strict), silent=True, store_history=False, allow_stdin=False)
        self.await_reply(request, timeout=HIDDEN_TIMEOUT)
        if self.reply["status"] != "ok":
            raise RuntimeError(f"the guard could not set up the kernel: {self.reply.get('evalue')}")

    def get_message(self, stream: str, timeout: float | None = None) -> dict[str, Any]:
        """The next message, as in nbval, but `KernelDied` as soon as none can come any more."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            left = deadline - time.monotonic()
            try:
                return self._remembered(stream, super().get_message(stream, timeout=min(HEARTBEAT, max(left, 0))))
            except Empty:
                self._raise_if_dead()
                if left <= HEARTBEAT:
                    raise

    def _remembered(self, stream: str, message: dict[str, Any]) -> dict[str, Any]:
        if stream == "shell":
            self.reply = message["content"]
        return message

    def _raise_if_dead(self) -> None:
        if not self.is_alive():
            raise KernelDied(self.how_it_ended)

    @property
    def how_it_ended(self) -> str:
        """Such as "killed by SIGKILL" or "exit status 1"."""
        process = getattr(getattr(self, "km", None) and self.km.provisioner, "process", None)
        if process is None or process.returncode is None:
            return "how is not known"
        if process.returncode >= 0:
            return f"exit status {process.returncode}"
        return f"killed by {signal.Signals(-process.returncode).name}"

    @property
    def tail(self) -> str:
        """The end of what the kernel's process wrote to its stderr since it was ready; it outlives the kernel."""
        start = max(self._stderr_size - STDERR_TAIL, self._stderr_start)
        return os.pread(self._stderr.fileno(), STDERR_TAIL, start).decode(errors="replace")

    @property
    def _stderr_size(self) -> int:
        return os.fstat(self._stderr.fileno()).st_size

    def stop(self) -> None:
        """End the kernel if it lives, and in any case remove its connection file; may be called twice."""
        if hasattr(self, "kc"):
            self.kc.stop_channels()
        if hasattr(self, "km"):
            if self.km.has_kernel:
                self.km.shutdown_kernel(now=True)
            del self.km
