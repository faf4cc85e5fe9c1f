"""Ports of 127.0.0.1 that stay ours until we are gone, with no file to sweep."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import sys
import weakref
from collections.abc import Iterable

from connlab.errors import StartError

HOST = "127.0.0.1"
RANGE = range(20000, 32000)
"""Below the ports that Linux (32768…) and macOS (49152…) give to outgoing connections."""
REFUSED_WITHIN = 0.5
"""Seconds. A connection to a port on which nobody listens is refused at once, unless a firewall drops it."""


class Port:
    """A port held by a socket that is bound but never listens.

    On Linux a server that sets SO_REUSEADDR, as PostgreSQL and PgBouncer do, can still listen on it, and
    everybody else finds it taken, also while our server restarts. Elsewhere such a socket would be in the
    server's way: there the port is only looked at.
    """

    def __init__(self, number: int, *, shared: bool = False) -> None:
        self.number = number
        self._socket = _bind(number, shared=shared)
        _HELD.add(self)
        if sys.platform != "linux":
            self.release()

    def release(self) -> None:
        """Give the port back."""
        self._socket.close()


_HELD: weakref.WeakSet[Port] = weakref.WeakSet()


def hold(number: int | None = None) -> Port:
    """Hold port ``number``, or any that is free; raises StartError naming what was tried."""
    if number is not None:
        return _hold_this(number)
    for candidate in _candidates():
        try:
            return Port(candidate)
        except OSError:
            continue
    raise StartError(f"no free port among {RANGE.start}…{RANGE.stop - 1} on {HOST}")


def _hold_this(number: int) -> Port:
    try:
        return Port(number, shared=True)
    except (OSError, OverflowError) as problem:
        raise StartError(
            f"port {number} of {HOST} cannot be had: {problem}",
            hint="leave the port out to get one that is free, or stop what listens there (ss -ltnp shows it)",
        ) from problem


def _candidates() -> Iterable[int]:
    return random.SystemRandom().sample(RANGE, 200)


def _bind(number: int, *, shared: bool) -> socket.socket:
    """Bind, then set SO_REUSEADDR to let our server in.

    Set before binding (``shared``) it passes over what lingers in TIME_WAIT, which somebody who asks for one
    port wants; but also over others' ports that are held like this one. The server's own start tells then.
    """
    with contextlib.ExitStack() as closed_on_error:
        held = closed_on_error.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, shared)
        held.bind((HOST, number))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
        _must_be_refused(number)
        closed_on_error.pop_all()
        return held


def _must_be_refused(number: int) -> None:
    """Raise OSError if connections to the port would not come to us, though it is ours.

    A rule of the firewall can send them elsewhere, as Docker without its userland proxy and podman do for the
    ports of containers, also of some that are gone.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(REFUSED_WITHIN)
        if client.connect_ex((HOST, number)) != errno.ECONNREFUSED:
            raise OSError("another program answers there, or a rule of the firewall sends its connections elsewhere")


def _release_in_child() -> None:
    """A forked child would keep its parent's ports beyond the parent's end."""
    for port in list(_HELD):
        port.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
