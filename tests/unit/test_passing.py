"""When a relay passes a piece on, to the clock and to the dice."""

from __future__ import annotations

import asyncio
import socket
import statistics
import threading
import time
from collections.abc import Iterator

import pytest

from connlab.runtime import Address
from connlab.runtime.passing import Behaviour, Connection, Line, Traffic
from connlab.runtime.thread import RelayProgram


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def lines(loop: asyncio.AbstractEventLoop, behaviour: Behaviour, number: int = 0) -> tuple[Line, Line]:
    """Both directions of the connection ``number``."""
    traffic = Traffic(print)
    traffic.behaviour = behaviour
    for _ in range(number + 1):
        connection = Connection(traffic, loop)
        traffic.add(connection)
    return connection.lines


def dues(line: Line) -> list[float]:
    return [line.due(100.0) for _ in range(50)]


def test_a_delay_alone_is_exact(loop: asyncio.AbstractEventLoop) -> None:
    up, down = lines(loop, Behaviour(delay_ms=20))
    assert set(dues(up) + dues(down)) == {100.02}


def test_jitter_comes_on_top_and_uses_its_whole_range(loop: asyncio.AbstractEventLoop) -> None:
    found = dues(lines(loop, Behaviour(delay_ms=20, jitter_ms=10))[0])
    assert 100.02 <= min(found) < 100.023
    assert 100.027 < max(found) <= 100.03


def test_a_seed_repeats_the_sequence(loop: asyncio.AbstractEventLoop) -> None:
    behaviour = Behaviour(jitter_ms=10, seed=7)
    first = dues(lines(loop, behaviour)[0])
    assert dues(lines(loop, behaviour)[0]) == first
    assert dues(lines(loop, Behaviour(jitter_ms=10, seed=8))[0]) != first
    assert dues(lines(loop, behaviour)[1]) != first, "both directions in step"
    assert dues(lines(loop, behaviour, number=1)[0]) != first, "two connections in step"


def test_without_a_seed_no_two_are_alike(loop: asyncio.AbstractEventLoop) -> None:
    behaviour = Behaviour(jitter_ms=10)
    assert dues(lines(loop, behaviour)[0]) != dues(lines(loop, behaviour)[0])


def test_a_change_starts_the_sequence_anew(loop: asyncio.AbstractEventLoop) -> None:
    traffic = Traffic(print)
    traffic.behaviour = Behaviour(jitter_ms=10, seed=7)
    gone, connection = Connection(traffic, loop), Connection(traffic, loop)
    traffic.add(gone)
    traffic.add(connection)
    del traffic.connections[gone]
    traffic.changed()
    assert dues(connection.lines[0]) == dues(lines(loop, traffic.behaviour)[0])


def test_a_slow_line_serves_one_after_another_in_each_direction() -> None:
    traffic = Traffic(print)
    assert traffic.reserve("to_server", 10.0, 0.5) == 10.5
    assert traffic.reserve("to_server", 10.1, 0.5) == 11.0
    assert traffic.reserve("to_client", 10.1, 0.5) == 10.6
    assert traffic.reserve("to_server", 20.0, 0.5) == 20.5


# --- small pieces -------------------------------------------------------------------------------------------------


def answer_in_three_pieces(listener: socket.socket) -> None:
    """As PgBouncer answers a login: small pieces, each as soon as it is there."""
    while True:
        try:
            client = listener.accept()[0]
        except OSError:
            return
        with client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            while client.recv(1):
                for piece in (b"a", b"b", b"c"):
                    client.sendall(piece)
                    time.sleep(0.001)


def seconds_for_an_answer(address: Address) -> float:
    taken = []
    with socket.create_connection((address.host, address.port)) as client:
        for _ in range(60):
            start, got = time.perf_counter(), b""
            client.sendall(b"?")
            while len(got) < 3:
                got += client.recv(3)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def test_small_pieces_do_not_wait_for_each_other() -> None:
    """Nagle's algorithm with delayed acknowledgements would add 40 ms to each answer of some 3 ms."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=answer_in_three_pieces, args=[listener], daemon=True).start()
    server = Address(*listener.getsockname())
    relay = RelayProgram(server)
    relay.start([])
    try:
        assert seconds_for_an_answer(relay.address) < 5 * seconds_for_an_answer(server)
    finally:
        relay.remove()
        listener.close()
