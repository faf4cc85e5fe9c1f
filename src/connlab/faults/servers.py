"""A whole server that ends, freezes or restarts, and is there again afterwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from connlab.errors import NodeStopped, SettingError
from connlab.faults.fault import Fault, check_seconds
from connlab.node import Node


@contextlib.contextmanager
def killed(node: Node) -> Iterator[Fault]:
    """SIGKILL to every process of ``node``, as if its machine had lost power; started again when the block is left.

    What it does: ``node.kill()``, then ``node.restart()``. PostgreSQL goes through its crash recovery. One that was
    restarted inside the block stays as it is, one that was stopped there stays stopped.
    Raises SettingError for no node, NodeStopped for one that does not run or is frozen.

    Example:
        ``with faults.killed(bouncer): …``
    """
    shown = _running(node, "killed")
    try:
        node.kill()
        yield Fault(f"killed {shown}")
    finally:
        if not node.running:
            with contextlib.suppress(NodeStopped):
                node.restart()


@contextlib.contextmanager
def frozen(node: Node) -> Iterator[Fault]:
    """Stop all processes of ``node`` without ending any (SIGSTOP): connections stay open and nobody answers.

    What it does: ``node.freeze()``, then ``node.thaw()``. One that was killed or stopped inside the block stays so.
    Raises SettingError for no node, NodeStopped for one that does not run or is frozen already.

    Example:
        ``with faults.frozen(pg): …``
    """
    shown = _running(node, "frozen")
    try:
        node.freeze()
        yield Fault(f"froze {shown}")
    finally:
        node.thaw()


@contextlib.contextmanager
def restarting(node: Node, after: float = 0.0) -> Iterator[Fault]:
    """Restart ``node`` while the block runs, ``after`` seconds into it; it is up when the block has been left.

    What it does: ``threading.Timer(after, node.restart).start()``, and waits for the thread at the end. A block that
    ends before ``after`` seconds does not restart anything. A restart that fails raises StartError at the end;
    one that was stopped inside the block stays stopped.
    Raises SettingError for no node or a wrong time, NodeStopped for one that does not run or is frozen.

    Example:
        ``with faults.restarting(pg, after=0.5): load()``
    """
    shown = _running(node, "restarting")
    delay = check_seconds("after", after)
    fault = Fault(f"restarting {shown}")
    timer = threading.Timer(delay, _restart, [node, fault])
    timer.start()
    try:
        yield fault
    finally:
        timer.cancel()
        timer.join()
    if fault.error is not None and not isinstance(fault.error, NodeStopped):
        raise fault.error


def _restart(node: Node, fault: Fault) -> None:
    try:
        node.restart()
    except Exception as problem:
        fault.error = problem


def _running(node: Node, name: str) -> str:
    """What ``node`` is, for people; raises when nothing can be done to it."""
    if not isinstance(node, Node):
        raise SettingError(f"{name} takes a server such as pg or bouncer, not {node!r}")
    node._must_run()
    return f"{node.label} {node.version} at {node.address}"
