"""How a relay passes bytes on: when, how fast, and whether at all. Everything here runs in the relay's one thread."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

HOLD = 1 << 20
"""Bytes that one direction of a connection holds at most; then it reads no more, and the sender's kernel fills up."""
SLICE = 0.02
"""Seconds of a slow line that one connection takes at a time, before it is another's turn."""
CATCH_UP = 0.2
"""Seconds of a slow line that are made up for when this thread was late."""
Way = Literal["to_server", "to_client"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Behaviour:
    """What the relay does with bytes that pass.

    Each direction: a piece passes ``delay_ms`` after it came, and a random part of ``jitter_ms`` later still
    (uniform; ``seed`` repeats the sequence). ``kb_per_s``: kB (1,000 bytes) a second that all connections share.
    ``to_server`` and ``to_client`` False: that direction is mute. A new behaviour starts the sequence of its seed anew.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    kb_per_s: float = math.inf
    to_server: bool = True
    to_client: bool = True
    seed: int | None = None

    @property
    def at_once(self) -> bool:
        """Whether what passes does so without waiting."""
        return not self.delay_ms and not self.jitter_ms and math.isinf(self.kb_per_s)


class Traffic:
    """All connections of a relay and what they share: the behaviour and a slow line for each direction."""

    def __init__(self, say: Say) -> None:
        self.behaviour, self.frozen, self.say = Behaviour(), False, say
        self.connections: dict[Connection, None] = {}
        self._free: dict[Way, float] = {"to_server": 0.0, "to_client": 0.0}
        self._numbered = 0

    def add(self, connection: Connection) -> None:
        """Take in a connection that a client has opened."""
        self.connections[connection] = None
        self._number(connection)

    def changed(self) -> None:
        """The behaviour is another: it holds for pieces that come from now on, mute and the speed for all."""
        self._free, self._numbered = {"to_server": 0.0, "to_client": 0.0}, 0
        for connection in list(self.connections):
            self._number(connection)
            for line in connection.lines:
                line.changed()

    def passes(self, way: Way) -> bool:
        """Whether bytes pass in this direction now."""
        return not self.frozen and cast(bool, getattr(self.behaviour, way))

    def reserve(self, way: Way, since: float, seconds: float) -> float:
        """Take the slow line for ``seconds``, at ``since`` or when it is free; returns when they are over."""
        self._free[way] = max(self._free[way], since) + seconds
        return self._free[way]

    def _number(self, connection: Connection) -> None:
        """The same seed gives the n-th connection the same jitter, in each direction another."""
        seed = self.behaviour.seed
        for line in connection.lines:
            line.random = random.Random(None if seed is None else f"{seed} {line.way} {self._numbered}")
        self._numbered += 1


class Connection:
    """One client's connection and the one to the server that goes with it."""

    def __init__(self, traffic: Traffic, loop: asyncio.AbstractEventLoop) -> None:
        self.traffic, self.forgotten = traffic, False
        self.client, self.server = Side(self), Side(self)
        up = Line(traffic, loop, "to_server", self.client, self.server)
        down = Line(traffic, loop, "to_client", self.server, self.client)
        self.lines = (up, down)
        self.client.out, self.client.into = up, down
        self.server.out, self.server.into = down, up

    @property
    def sides(self) -> tuple[Side, Side]:
        """Client's and server's."""
        return self.client, self.server

    @property
    def open(self) -> bool:
        """Whether neither side has ended it and it is not forgotten."""
        return not (self.forgotten or self.client.ended or self.server.ended)

    def reset(self) -> None:
        """End both sides with a reset."""
        for side in self.sides:
            side.reset()

    def close(self) -> None:
        """End both sides in order."""
        for side in self.sides:
            side.close()

    def forget(self) -> None:
        """Swallow from now on whatever comes, the end of a side too, and tell nobody."""
        self.forgotten = True
        for line in self.lines:
            line.clear()

    def settle(self) -> None:
        """Close it when both directions have come to their end; take it from the list when both sides are gone."""
        if all(line.done for line in self.lines):
            self.close()
        if all(side.gone for side in self.sides):
            self.traffic.connections.pop(self, None)


class Side(asyncio.Protocol):
    """One end of a connection."""

    out: Line
    into: Line

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.transport: asyncio.Transport | None = None
        self.full = self.ended = self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        self.transport = cast(asyncio.Transport, transport)
        if self.gone:  # the client has been cut off meanwhile
            self.transport.abort()
        self.into.changed()

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``. What need not wait goes straight through: no queue, no timer, no task."""
        line = self.out
        if line.clear_way and line.target.transport is not None:
            line.target.transport.write(data)
        else:
            line.put(memoryview(data))

    def eof_received(self) -> bool:
        """See ``asyncio.Protocol``. The other direction stays open, unless there is none any more."""
        if not self.ended:
            self.ended = True
            self.out.put(memoryview(b""))
        return not self.connection.forgotten

    def connection_lost(self, problem: Exception | None) -> None:
        """See ``asyncio.Protocol``. A reset travels on like bytes; a mute direction does not pass it either."""
        self.ended = self.gone = True
        self.into.finish()
        if problem is not None:
            self.connection.traffic.say(f"a connection ended with {type(problem).__name__}")
            self.out.put(None)
        self.connection.settle()

    def pause_writing(self) -> None:
        """See ``asyncio.Protocol``: who should read does not."""
        self.full = True
        self.into.changed()

    def resume_writing(self) -> None:
        """See ``asyncio.Protocol``."""
        self.full = False
        self.into.changed()

    def reset(self) -> None:
        """End it with a reset (SO_LINGER 0), as a firewall or a crashed machine does."""
        if self.transport is None:
            self.gone = True
            return
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()

    def end(self) -> None:
        """Send nothing more (FIN); it may still be sent to."""
        assert self.transport is not None
        try:
            self.transport.write_eof()
        except OSError:  # who has reset it while nobody read from it
            self.transport.abort()

    def close(self) -> None:
        """End it in order (FIN)."""
        if self.transport is None:
            self.gone = True
        else:
            self.transport.close()


Piece = memoryview | None
"""Bytes; an empty one is the end of a direction (FIN), None a reset."""


class Line:
    """What is on its way in one direction of one connection, in order."""

    def __init__(self, traffic: Traffic, loop: asyncio.AbstractEventLoop, way: Way, source: Side, target: Side) -> None:
        self.way: Way = way
        self.source, self.target = source, target
        self.random = random.Random()
        self.clear_way = self.done = False
        """``clear_way``: nothing waits and nothing has to; ``done``: its end has been passed on."""
        self._traffic, self._loop = traffic, loop
        self._queue: deque[tuple[float, Piece]] = deque()
        self._held = 0
        self._timer: asyncio.TimerHandle | None = None
        self._turn: tuple[float, int] | None = None
        self._passed = 0.0

    def put(self, piece: Piece) -> None:
        """Take a piece; it passes when its time has come."""
        over = self.target.gone if piece is None else self.done  # a reset comes through after an end, too
        if over or self.source.connection.forgotten:
            return
        if piece is None and self.target.full:
            self._drop_queue()  # a reset does not wait for somebody to read what is before it
        self._queue.append((self.due(self._loop.time()), piece))
        self._held += len(piece or b"")
        self._go()

    def due(self, now: float) -> float:
        """When a piece that comes ``now`` may pass, in seconds of the loop's clock."""
        behaviour = self._traffic.behaviour
        return now + (behaviour.delay_ms + behaviour.jitter_ms * self.random.random()) / 1000

    def changed(self) -> None:
        """Look again at what waits: something else holds now."""
        self._turn = None
        self._go()

    def clear(self) -> None:
        """Throw away what waits."""
        self._drop_queue()
        self._go()

    def finish(self) -> None:
        """Nobody is there any more to whom anything could be passed."""
        self.done = True
        self.clear()

    def _drop_queue(self) -> None:
        self._queue.clear()
        self._held, self._turn = 0, None

    def _go(self) -> None:
        """Pass on what is due, and come again when the next piece is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and self._may_pass():
            if (wait := self._pass_first()) > 0:
                self._timer = self._loop.call_later(wait, self._go)
                break
        self._passed = self._passed if self._queue else 0.0
        self.clear_way = self._is_clear()
        self._hold_back()

    def _may_pass(self) -> bool:
        full = self.target.full and self._queue[0][1] is not None
        return self.target.transport is not None and not full and self._traffic.passes(self.way)

    def _pass_first(self) -> float:
        """Pass on the first piece, or as much of it as a slow line lets through; else the seconds to wait."""
        (due, piece), now = self._queue[0], self._loop.time()
        if due > now:
            return due - now
        size = len(piece or b"")
        if size and math.isfinite(self._traffic.behaviour.kb_per_s):
            when, size = self._turn = self._turn or self._take_turn(now, size)
            if when > now:
                return when - now
            self._turn, self._passed = None, when
        self._queue.popleft()
        self._held -= size
        if piece and size < len(piece):
            self._queue.appendleft((due, piece[size:]))
        self._write(piece and piece[:size])
        return 0.0

    def _take_turn(self, now: float, size: int) -> tuple[float, int]:
        """When how many bytes have gone over the slow line. Connections take turns, a slice each."""
        rate = self._traffic.behaviour.kb_per_s * 1000
        size = min(size, max(1, int(rate * SLICE)))
        since = max(self._passed, now - CATCH_UP) if self._passed else now
        return self._traffic.reserve(self.way, since, size / rate), size

    def _write(self, piece: Piece) -> None:
        assert self.target.transport is not None
        if piece:
            self.target.transport.write(piece)
            return
        self.done = True
        if piece is None:
            self.target.reset()
        else:
            self.target.end()
        self.source.connection.settle()

    def _is_clear(self) -> bool:
        held = self._queue or self.done or self.target.full or self.target.transport is None
        forgotten = self.source.connection.forgotten
        return not held and not forgotten and self._traffic.behaviour.at_once and self._traffic.passes(self.way)

    def _hold_back(self) -> None:
        """Read on or not: what is held must end somewhere."""
        if self.source.transport is None or self.source.ended:
            return
        if self._held >= HOLD:
            self.source.transport.pause_reading()
        elif self._held <= HOLD // 2:
            self.source.transport.resume_reading()
