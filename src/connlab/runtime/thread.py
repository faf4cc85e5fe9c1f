"""A TCP relay as a program of the runtime's kind: it runs in a thread of this process, on any backend."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, TypeVar

from connlab.errors import StartError
from connlab.runtime import Address
from connlab.version import Version

CHUNK = 1 << 16
MUTE_TICK = 0.005
T = TypeVar("T")
_LISTENERS: dict[int, socket.socket] = {}


@dataclass
class Behaviour:
    """What the relay does with bytes that pass; read anew for every piece of them.

    ``delay`` in seconds, for each direction; ``to_server`` and ``to_client`` False: that direction is mute.
    """

    delay: float = 0.0
    to_server: bool = True
    to_client: bool = True


class RelayProgram:
    """Passes bytes between clients and one server: see ``connlab.runtime.Program``."""

    kind, directory, socket_directory, secret = "relay", "", "", ""

    def __init__(self, target: Address) -> None:
        self.version = Version.find(version("connlab"))
        self.behaviour = Behaviour()
        self._target, self._address = target, Address("127.0.0.1", 0)
        self._frozen = False
        self._log = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

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
        listener = self._listener()
        self._address = Address(*listener.getsockname())
        self._loop = asyncio.new_event_loop()
        _LISTENERS[id(self)] = listener
        threading.Thread(target=_run_loop, args=[self._loop], name="connlab-relay", daemon=True).start()
        self._server = self._run(asyncio.start_server(self._serve, sock=listener))
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
        if self._loop is None:
            return
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        _LISTENERS.pop(id(self), None)
        self._loop, self._frozen = None, False

    remove = kill

    def freeze(self) -> None:
        """See ``Program``: connections are still accepted (by the kernel), nothing passes."""
        self._frozen = True

    def thaw(self) -> None:
        """See ``Program``."""
        self._frozen = False

    def drop(self) -> int:
        """Reset every open connection on both sides; returns how many. New ones are served."""
        return self._run(self._abort_all()) if self._loop else 0

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
            return socket.create_server(self._address)
        except OSError as problem:
            raise StartError(f"the relay cannot listen on {self._address}: {problem}") from problem

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _say(self, text: str) -> None:
        self._log += f"{datetime.now():%Y-%m-%d %H:%M:%S.%f} {text}\n".encode()

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._abort_all()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _abort_all(self) -> int:
        """Reset instead of close: SO_LINGER 0, as a firewall or a dead machine would look."""
        writers, self._writers = self._writers, set()
        for writer in writers:
            with contextlib.suppress(OSError):
                linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        self._say(f"dropped {len(writers) // 2} connections")
        return len(writers) // 2

    async def _serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        try:
            server_in, server_out = await asyncio.open_connection(*self._target)
        except OSError as problem:
            self._say(f"{self._target} cannot be reached: {problem}")
            client_out.transport.abort()
            return
        self._writers |= {client_out, server_out}
        up = self._pump(client_in, server_out, lambda: self.behaviour.to_server)
        down = self._pump(server_in, client_out, lambda: self.behaviour.to_client)
        try:
            await asyncio.gather(up, down)
        except OSError as problem:
            self._say(f"a connection ended with {type(problem).__name__}")
        except asyncio.CancelledError:
            self._say("a connection was cut by the relay's end")  # raised on, asyncio before 3.12 prints a traceback
        finally:
            self._writers -= {client_out, server_out}
            client_out.close()
            server_out.close()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, open_now: Callable[[], bool]
    ) -> None:
        """Pass bytes on in order, each ``delay`` after it came, also when the delay is longer than the gaps."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        delivery = asyncio.create_task(self._deliver(queue, target, open_now))
        try:
            data = b"first"
            while data:
                data = await source.read(CHUNK)
                await queue.put((asyncio.get_running_loop().time() + self.behaviour.delay, data))
            await delivery
        finally:
            delivery.cancel()

    async def _deliver(
        self, queue: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter, open_now: Callable[[], bool]
    ) -> None:
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            while self._frozen or not open_now():
                await asyncio.sleep(MUTE_TICK)
            if not data:
                target.write_eof()
                return
            target.write(data)
            await target.drain()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _close_in_child() -> None:
    """A forked child has no relay thread, and would keep the port beyond its parent's end."""
    for listener in _LISTENERS.values():
        listener.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
