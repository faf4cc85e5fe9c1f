"""A TCP relay as a program of the runtime's kind: it runs in a thread of this process, on any backend."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any, Literal, TypeVar

from connlab.errors import NodeStopped, StartError
from connlab.runtime import Address
from connlab.runtime.passing import Behaviour, Connection, Side, Traffic
from connlab.version import Version

BACKLOG = 1024
"""Clients that may knock at the same moment; a burst of more would wait for TCP to try again."""
How = Literal["reset", "close", "silent"]
T = TypeVar("T")
_RELAYS: weakref.WeakSet[RelayProgram] = weakref.WeakSet()


class RelayProgram:
    """Passes bytes between clients and one server: see ``connlab.runtime.Program``."""

    kind, directory, socket_directory, secret = "relay", "", "", ""

    def __init__(self, target: Address) -> None:
        self.version = Version.find(version("connlab"))
        self._target, self._address = target, Address("127.0.0.1", 0)
        self._log = bytearray()
        self._traffic = Traffic(self._say)
        self._maker = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listening: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread()
        self._connecting: set[asyncio.Task[None]] = set()

    @property
    def behaviour(self) -> Behaviour:
        """What it does with bytes that pass; a new one holds once it is set, for open connections too."""
        return self._traffic.behaviour

    @behaviour.setter
    def behaviour(self, new: Behaviour) -> None:
        self._change("behaviour", new)

    @property
    def address(self) -> Address:
        """See ``Program``."""
        return self._address

    listen = inner_address = address

    def write(self, name: str, text: str) -> None:
        """See ``Program``. A relay reads no files."""

    def command(self) -> str:
        """See ``Program``."""
        return f"relay {self._address} -> {self._target}"

    def start(self, arguments: Sequence[str]) -> None:
        """See ``Program``."""
        self._listening = self._listener()
        self._address = Address(*self._listening.getsockname())
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=[loop], name="connlab-relay", daemon=True)
        self._maker, self._loop, self._server = os.getpid(), loop, None
        _RELAYS.add(self)
        self._thread.start()
        self._run(self._listen(self._listening))
        self._say(f"listening on {self._address}, relaying to {self._target}")

    def alive(self) -> bool:
        """See ``Program``."""
        return self._loop is not None

    def ended(self) -> str:
        """See ``Program``."""
        return "" if self.alive() else "stopped"

    def signal(self, number: int) -> None:
        """See ``Program``. Every signal ends it."""
        self.kill()

    def kill(self) -> None:
        """See ``Program``: open connections are reset, new ones refused."""
        if self._loop is None or not self._is_ours():
            return
        if self._thread.is_alive():  # an interrupt of the start may have come first
            self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._listening is not None:
            self._listening.close()
        _RELAYS.discard(self)
        self._loop, self._traffic.frozen = None, False

    remove = kill

    def freeze(self) -> None:
        """See ``Program``: connections are still accepted (by the kernel), nothing passes."""
        self._change("frozen", True)

    def thaw(self) -> None:
        """See ``Program``."""
        self._change("frozen", False)

    def drop(self, how: How = "reset") -> int:
        """End every open connection in one of three ways; returns how many. New ones are served."""
        return self._run(self._drop(how)) if self._loop else 0

    def descriptors(self) -> list[int]:
        """The file descriptors of its sockets."""
        sides = [side for connection in list(self._traffic.connections) for side in connection.sides]
        numbers = [side.transport.get_extra_info("socket").fileno() for side in sides if side.transport]
        listening = self._listening.fileno() if self._listening else -1
        return [number for number in (listening, *numbers) if number >= 0]

    def log(self, since: int = 0) -> str:
        """See ``Program``."""
        return self._log[since:].decode()

    def log_size(self) -> int:
        """See ``Program``."""
        return len(self._log)

    def settle(self) -> None:
        """See ``Program``. It is there at once."""

    def proc(self, name: str, pids: Iterable[int] | None = None) -> dict[int, str]:
        """See ``Program``. It has no process of its own."""
        return {}

    def _listener(self) -> socket.socket:
        try:
            listener = socket.create_server(self._address)
        except OSError as problem:
            raise StartError(f"the relay cannot listen on {self._address}: {problem}") from problem
        # Accepted connections inherit it. asyncio sets it only on sockets whose protocol number says TCP.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return listener

    def _is_ours(self) -> bool:
        """Whether the thread is in this process: a forked child has none."""
        return self._maker == os.getpid()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None or not self._is_ours():
            work.close()
            raise NodeStopped("this relay runs in the process that made it; a forked child cannot change it")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _change(self, name: str, value: object) -> None:
        """Set something of the traffic's; returns when it holds."""
        if self._loop is None:
            setattr(self._traffic, name, value)
        else:
            self._run(self._set(name, value))

    async def _set(self, name: str, value: object) -> None:
        setattr(self._traffic, name, value)
        self._traffic.changed()

    def _say(self, text: str) -> None:
        self._log += f"{datetime.now():%Y-%m-%d %H:%M:%S.%f} {text}\n".encode()

    async def _listen(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._trouble)
        self._server = await loop.create_server(self._client, sock=listener, backlog=BACKLOG)

    def _trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio ends a direction late, when all is written, and does not expect the other side to have gone."""
        if isinstance(context.get("exception"), OSError):
            self._say(f"a connection ended with {type(context['exception']).__name__}")
        else:
            loop.default_exception_handler(context)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in list(self._traffic.connections):
            connection.reset()
        await asyncio.sleep(0)  # the transports say goodbye to the loop
        self._traffic.connections.clear()

    async def _drop(self, how: How) -> int:
        found = [connection for connection in self._traffic.connections if connection.open]
        ways: dict[How, Callable[[Connection], None]]
        ways = {"reset": Connection.reset, "close": Connection.close, "silent": Connection.forget}
        for connection in found:
            ways[how](connection)
        self._say(f"dropped {len(found)} connections ({how})")
        return len(found)

    def _client(self) -> Side:
        """A client has connected: connect to the server too; what the client sends meanwhile waits."""
        assert self._loop is not None
        connection = Connection(self._traffic, self._loop)
        self._traffic.add(connection)
        task = self._loop.create_task(self._reach_server(connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return connection.client

    async def _reach_server(self, connection: Connection) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: connection.server, *self._target)
        except OSError as problem:
            self._say(f"{self._target} cannot be reached: {problem}")
            connection.close()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _close_in_child() -> None:
    """A forked child has no relay thread, and would hold port and connections beyond their end in the parent.

    Each number is kept for the null device: a Python object that still has it would close another's file one day.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for relay in _RELAYS:
        for number in relay.descriptors():
            os.dup2(null, number, inheritable=False)
    os.close(null)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
