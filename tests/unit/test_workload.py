"""What a load says of its requests, and that both loops do what was asked of them. No server needed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from connlab import Load, SettingError, closed_loop, closed_loop_async, figures, open_loop, open_loop_async, schedule
from connlab.percentile import percentile
from connlab.workload.request import Request

PAUSE = 0.02


@contextlib.contextmanager
def borrowed(seconds: float = 0.0) -> Iterator[str]:
    """A connection that takes so long to get."""
    time.sleep(seconds)
    yield "connection"


@contextlib.asynccontextmanager
async def async_borrowed() -> Any:
    yield "connection"


def nap(*_: object) -> None:
    time.sleep(PAUSE)


async def async_nap(*_: object) -> None:
    await asyncio.sleep(PAUSE)


def of(latencies: list[float], **more: Any) -> Load:
    requests = [Request(0, 0.0, 0.0, 0.0, latency) for latency in latencies]
    return Load("closed loop, 1 client", requests, clients=1, began=0.0, **more)


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("connlab-client", "connlab-alarm"))]


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    yield
    assert ours() == []


# --- what a load says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 5, 33.3, 50, 90, 95, 99, 99.9, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 20, 1000])
def test_a_percentile_is_a_measured_value_by_the_definition_that_it_names(share: float, count: int) -> None:
    draw = random.Random(count)
    latencies = [draw.uniform(0.001, 1) for _ in range(count)]
    found = of(latencies).percentile(share)
    enough = Fraction(str(share)) * count / 100  # exactly: 999 of 1000 are 99.9 %
    assert found / 1000 == pytest.approx(
        min(value for value in latencies if sum(one <= value for one in latencies) >= enough)
    )
    assert found / 1000 == pytest.approx(percentile(np.sort(latencies), share))  # what figures draw


def test_percentiles_and_throughput_count_successes_alone() -> None:
    load = of([0.1, 0.2, 0.3, 10.0], seconds=5)
    load.requests[-1].failed(ValueError("no"))
    assert load.percentile(100) == pytest.approx(300)
    assert (load.succeeded, load.failed, len(load)) == (3, 1, 4)
    assert load.throughput == pytest.approx(3 / 10)  # until the failure, which was the last to end
    assert load.latencies == [0.1, 0.2, 0.3]


def test_a_load_without_success_has_no_percentile() -> None:
    load = closed_loop(lambda: 1 / 0, requests=3)
    assert math.isnan(load.percentile(50)) and load.throughput == 0
    assert "succeeded: none" in repr(load) and "failed: 3, ZeroDivisionError (division by zero)" in repr(load)


def test_percentiles_of_the_parts() -> None:
    load = open_loop(nap, borrow=lambda: borrowed(0.05), arrivals=[0.0] * 4, clients_at_most=1)
    assert load.percentile(50, of="waited") >= 50 and load.percentile(50, of="used") >= 1000 * PAUSE
    assert load.percentile(100, of="late") >= 3 * (50 + 1000 * PAUSE)
    with pytest.raises(SettingError, match="of takes latency, waited, used, late, not 'wait'"):
        load.percentile(50, of="wait")  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0, 101, "95", None, True])
def test_a_percentile_that_is_none(share: Any) -> None:
    with pytest.raises(SettingError, match="a share above 0, up to 100"):
        of([1.0]).percentile(share)


def test_the_frame_holds_every_request_and_its_parts_add_up() -> None:
    load = open_loop(nap, borrow=lambda: borrowed(0.01), rate=50, seconds=0.4, arrivals="fixed", clients_at_most=2)
    frame = load.frame()
    assert list(frame.columns) == [
        *("client", "intended", "started", "borrowed", "ended", "late_ms", "waited_ms", "used_ms", "latency_ms"),
        *("error", "sqlstate", "message"),
    ]
    assert len(frame) == 20 == len(load)
    assert np.allclose(frame.late_ms + frame.waited_ms + frame.used_ms, frame.latency_ms)
    assert np.allclose(frame.intended, np.arange(20) / 50)
    assert set(frame.client) == {0, 1} and frame.error.isna().all()
    assert (frame.started >= frame.intended).all()


def test_errors_are_counted_by_kind_with_their_first_and_last_moment() -> None:
    numbers = itertools.count()

    def work() -> None:
        time.sleep(0.01)
        if next(numbers) % 2:
            raise LookupError("odd")
        raise ValueError("even")

    load = closed_loop(work, requests=5)
    table = load.errors()
    assert list(zip(table.error, table.message, table["count"], strict=True)) == [
        ("ValueError", "even", 3),
        ("LookupError", "odd", 2),
    ]
    assert table.sqlstate.isna().all()
    assert 0 < table["first"][0] < table["first"][1] < table["last"][1] < table["last"][0] <= load.elapsed


def test_figures_take_what_a_load_gives() -> None:
    load = closed_loop(nap, clients=2, requests=6)
    bad = closed_loop(lambda: 1 / 0, requests=2)
    assert "n = 6" in figures.latencies({"some": load.latencies}).alt
    assert "2 times ZeroDivisionError" in figures.errors(bad.error_events(), until=bad.elapsed).alt
    rates = [closed_loop(nap, clients=clients, requests=4).throughput for clients in (1, 2, 4)]
    assert "by connections" in figures.sweep([1, 2, 4], rates).alt


def test_an_error_keeps_no_connection_alive() -> None:
    """An exception's traceback would."""

    class Connection:
        alive = 0

        def __enter__(self) -> Connection:
            Connection.alive += 1
            return self

        def __exit__(self, *_: object) -> None: ...

        def __del__(self) -> None:
            Connection.alive -= 1

    def work(_: Connection) -> None:
        raise ValueError("no")

    load = closed_loop(work, borrow=Connection, requests=5)
    assert load.failed == 5 and Connection.alive == 0


# --- loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 3, 16])
def test_as_many_requests_as_were_asked_for(clients: int) -> None:
    called: list[int] = []
    load = closed_loop(lambda: called.append(1), clients=clients, requests=100)
    assert load.succeeded == len(called) == 100


def test_as_many_async_requests_as_were_asked_for() -> None:
    load = asyncio.run(closed_loop_async(async_nap, borrow=async_borrowed, clients=7, requests=50))
    assert load.succeeded == 50 and set(load.frame().client) == set(range(7))


def test_no_request_starts_after_the_time_and_none_is_cut_off() -> None:
    load = closed_loop(nap, clients=2, seconds=0.2)
    assert load.succeeded == len(load) > 2
    assert load.frame().started.max() < 0.2 + PAUSE <= load.elapsed + PAUSE
    assert load.throughput == pytest.approx(load.succeeded / load.elapsed)


@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_a_client_thinks_between_its_requests(kind: str) -> None:
    if kind == "threads":
        load = closed_loop(lambda: None, clients=2, requests=8, think_seconds=0.05)
    else:
        load = asyncio.run(closed_loop_async(async_nap, clients=2, requests=8, think_seconds=0.05))
    frame = load.frame()
    for _, own in frame.groupby("client"):
        pauses = own.started.to_numpy()[1:] - own.ended.to_numpy()[:-1]
        assert len(pauses) >= 2 and (pauses >= 0.05).all()
    assert frame.latency_ms.max() < 50 + 1000 * PAUSE  # thinking is no latency


def test_clients_begin_one_after_the_other_in_a_ramp() -> None:
    first = closed_loop(nap, clients=5, seconds=0.5, ramp_seconds=0.4).frame().groupby("client").started.min()
    assert np.allclose(first, [0, 0.08, 0.16, 0.24, 0.32], atol=0.05) and first.is_monotonic_increasing


def test_a_burst_is_a_list_of_moments() -> None:
    load = open_loop(nap, arrivals=[*schedule(20, 0.5, "fixed"), *[0.2] * 15])
    assert len(load) == 25 and (load.frame().intended == 0.2).sum() == 16
    assert load.elapsed < 0.2 + 15 * PAUSE + 0.5 * 10  # beside each other


def test_an_open_loop_with_too_few_clients_starts_late_and_latency_says_so() -> None:
    load = open_loop(nap, rate=100, seconds=0.5, arrivals="fixed", clients_at_most=1)
    frame = load.frame()
    assert frame.late_ms.iloc[-1] > 1000 * (50 * PAUSE - 0.5) * 0.9
    assert (frame.latency_ms >= frame.late_ms + 1000 * PAUSE * 0.99).all()
    assert "started over 10 ms late" in repr(load) and "1 clients at most" in repr(load)


def test_async_arrivals() -> None:
    load = asyncio.run(open_loop_async(async_nap, borrow=async_borrowed, rate=100, seconds=0.5, arrivals="fixed"))
    assert load.succeeded == 50
    assert load.frame().started.max() < 0.5 + 10 * PAUSE
    assert len(set(load.frame().client)) > 1  # beside each other


@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_what_does_not_end_is_given_up_at_the_deadline(kind: str) -> None:
    release, started, calls = threading.Event(), time.monotonic(), []

    def stuck() -> None:
        calls.append(1)
        release.wait(20)

    async def stuck_async() -> None:
        calls.append(1)
        await asyncio.sleep(20)

    try:
        if kind == "threads":
            load = closed_loop(stuck, clients=2, requests=10, deadline=0.2)
            assert load.left == 2 and "2 threads could not be stopped" in repr(load)
        else:
            load = asyncio.run(closed_loop_async(stuck_async, clients=2, requests=10, deadline=0.2))
            assert load.left == 0
        assert time.monotonic() - started < 10
        assert load.unfinished == load.failed == 2 and load.throughput == 0
        assert set(load.errors().message) == {"had not ended 0.2 s after the start, which is the deadline"}
        before = load.frame()
    finally:
        release.set()
        for thread in ours():
            thread.join(5)
    assert len(calls) == 2  # a client that was given up makes no more requests,
    assert load.frame().equals(before)  # and changes nothing of what was told


def test_arrivals_that_no_client_took_before_the_deadline_are_not_left_out() -> None:
    release = threading.Event()
    try:
        load = open_loop(release.wait, rate=50, seconds=1.0, arrivals="fixed", clients_at_most=3, deadline=0.5)
    finally:
        release.set()
        for thread in ours():
            thread.join(5)
    frame = load.frame()
    assert load.unfinished == len(load) and 24 <= len(load) <= 28  # those of the first half second
    assert (frame.client == -1).sum() == len(load) - 3 and frame.started.isna().sum() == len(load) - 3
    assert frame.latency_ms.max() >= 499


def test_work_that_exits_ends_its_request_alone() -> None:
    load = closed_loop(sys.exit, clients=2, requests=4)
    assert load.errors()["count"].tolist() == [4] and load.errors().error.tolist() == ["SystemExit"]


def test_a_coroutine_that_nobody_awaits_is_an_error() -> None:
    load = closed_loop(lambda: async_nap(), requests=1)
    assert "await closed_loop_async" in load.errors().message[0]
    load = asyncio.run(closed_loop_async(nap, requests=1))  # type: ignore[arg-type]
    assert "async def" in load.errors().message[0]


def test_it_can_be_cancelled() -> None:
    async def lesson() -> Load:
        task = asyncio.create_task(closed_loop_async(async_nap, clients=2, seconds=60))
        await asyncio.sleep(5 * PAUSE)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError as stopped:
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return stopped.load  # type: ignore[attr-defined, no-any-return]
        raise AssertionError("not cancelled")

    load = asyncio.run(lesson())
    assert load.succeeded >= 2 and load.unfinished <= 2
