"""Closed and open loops, as a lesson calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from connlab.errors import SettingError
from connlab.workload import tasks, threads
from connlab.workload.arrivals import Rate, given, number, positive, schedule, whole
from connlab.workload.load import Load
from connlab.workload.plan import Closed, Open

MOST_CLIENTS = 5000
AFTER = 30.0
"""Seconds after the planned end at which what is still under way is given up."""
UNPLANNED = 120.0


def closed_loop(
    work: threads.Work,
    *,
    borrow: threads.Borrow | None = None,
    clients: int = 1,
    seconds: float | None = None,
    requests: int | None = None,
    think_seconds: float = 0.0,
    ramp_seconds: float = 0.0,
    deadline: float | None = None,
) -> Load:
    """``clients`` threads that each make one request after the other: ``with borrow() as conn: work(conn)``.

    ``borrow``   anything to call that returns a context manager: ``pool.connection``, or for a connection each
                 ``lambda: psycopg.connect(dsn)``. None: ``work()`` is called with nothing, and waiting is not told
                 from using.
    ``seconds``  no request starts later; or
    ``requests`` so many in all, by whichever client is free.
    ``think_seconds``  between the end of a client's request and its next. ``ramp_seconds``: the clients begin one after
                 the other over this time. For a burst: as many ``requests`` as ``clients``.
    ``deadline`` seconds after the start at which all that is under way is given up: 30 s after the last start, or
                 120 s with ``requests``. Such a request is an error "Unfinished" in the result. Its query is cancelled
                 (then its connection shut), if it is psycopg's. Python cannot end a thread: one that still waits for
                 something else lives on until that ends (``load.left`` counts them) and makes no further request.

    Errors of ``work`` and ``borrow`` are part of the result; the client goes on. Throughput and latency of a closed
    loop belong together: while the server is slow, clients wait and ask for less. Use ``open_loop`` to see what
    users would have seen.

    An interrupt (Ctrl-C, the stop button) ends it as a deadline does and goes on to the caller, with the requests
    so far: ``except KeyboardInterrupt as stopped: stopped.load``. In the next cell: ``sys.last_value.load``.

    Raises SettingError.

    Example:
        >>> load = closed_loop(lambda conn: conn.execute("select 1"), borrow=pool.connection, clients=4, requests=100)
        >>> load.succeeded, load.errors().empty
        (100, True)
    """
    _check_sync(work, borrow)
    plan, limit = _closed(clients, seconds, requests, think_seconds, ramp_seconds, deadline)
    return threads.run(plan, work, borrow, limit)


async def closed_loop_async(
    work: tasks.Work,
    *,
    borrow: tasks.Borrow | None = None,
    clients: int = 1,
    seconds: float | None = None,
    requests: int | None = None,
    think_seconds: float = 0.0,
    ramp_seconds: float = 0.0,
    deadline: float | None = None,
) -> Load:
    """``closed_loop`` with asyncio: ``async with borrow() as conn: await work(conn)``, a task for each client.

    ``borrow`` may also be a coroutine function, such as ``lambda: AsyncConnection.connect(dsn)``. What is under way at
    the deadline is cancelled. A ``work`` that blocks without awaiting blocks everything, the deadline too. When
    ``await`` is interrupted or cancelled the requests so far are on the CancelledError, as ``.load``.

    Raises SettingError.

    Example:
        >>> load = await closed_loop_async(work, borrow=async_pool.connection, clients=100, seconds=2.0)
    """
    _check(work, borrow)
    plan, limit = _closed(clients, seconds, requests, think_seconds, ramp_seconds, deadline)
    return await tasks.run(plan, work, borrow, limit)


def open_loop(
    work: threads.Work,
    *,
    borrow: threads.Borrow | None = None,
    rate: Rate | None = None,
    seconds: float | None = None,
    arrivals: str | Sequence[float] = "poisson",
    seed: int | None = None,
    clients_at_most: int = 200,
    deadline: float | None = None,
) -> Load:
    """Requests that start at moments fixed beforehand, however slow those before are: ``with borrow() as conn: …``.

    ``rate``     arrivals a second; a pair, such as ``(10, 200)``, is a ramp from the first to the second.
    ``arrivals`` "poisson", "fixed", or a list of seconds in place of rate and seconds: ``[0.0] * 50`` is a burst.
                 See ``schedule``, which makes such lists; ``seed`` makes the same Poisson arrivals again.
    ``clients_at_most``  threads, made before the start. While all are busy requests start late.

    Latency counts from the moment at which a request was to start, so that no waiting is left out because the load
    waited too (*coordinated omission*: G. Tene, How NOT to Measure Latency, and https://github.com/giltene/wrk2). A
    late start is part of it and stands in ``load.frame().late_ms``; one that has not come until the deadline is an
    error "Unfinished".

    ``work``, ``borrow``, ``deadline`` (30 s after the last arrival), interrupts and errors: as in ``closed_loop``.

    Raises SettingError.

    Example:
        >>> load = open_loop(work, borrow=pool.connection, rate=100, seconds=2.0)
        >>> load.percentile(99), load.frame().late_ms.max()
        (12.5, 0.4)
    """
    _check_sync(work, borrow)
    plan, limit = _open(rate, seconds, arrivals, seed, clients_at_most, deadline)
    return threads.run(plan, work, borrow, limit)


async def open_loop_async(
    work: tasks.Work,
    *,
    borrow: tasks.Borrow | None = None,
    rate: Rate | None = None,
    seconds: float | None = None,
    arrivals: str | Sequence[float] = "poisson",
    seed: int | None = None,
    clients_at_most: int = 1000,
    deadline: float | None = None,
) -> Load:
    """``open_loop`` with asyncio: ``async with borrow() as conn: await work(conn)``. See also ``closed_loop_async``.

    A thread wakes the loop, whose own timers count whole milliseconds. All tasks share one core: with work that
    computes, or much load, threads start more exactly.

    Raises SettingError.

    Example:
        >>> load = await open_loop_async(work, borrow=async_pool.connection, rate=100, seconds=2.0)
    """
    _check(work, borrow)
    plan, limit = _open(rate, seconds, arrivals, seed, clients_at_most, deadline)
    return await tasks.run(plan, work, borrow, limit)


# --- what was asked for ---------------------------------------------------------------------------------------------


def _closed(
    clients: int, seconds: float | None, requests: int | None, think: float, ramp: float, deadline: float | None
) -> tuple[Closed, float]:
    if (seconds is None) == (requests is None):
        raise SettingError("say how long, seconds=2.0, or how many, requests=100: one of the two")
    whole(clients, "clients", MOST_CLIENTS)
    think, ramp = number(think, "think_seconds", 0), number(ramp, "ramp_seconds", 0)
    if seconds is not None:
        seconds = positive(seconds, "seconds")
    if requests is not None:
        whole(requests, "requests")
    return Closed(clients, seconds, requests, think, ramp), _deadline(deadline, seconds)


def _open(
    rate: Rate | None,
    seconds: float | None,
    arrivals: str | Sequence[float],
    seed: int | None,
    clients: int,
    deadline: float | None,
) -> tuple[Open, float]:
    whole(clients, "clients_at_most", MOST_CLIENTS)
    if not isinstance(arrivals, str):
        if rate is not None or seconds is not None:
            raise SettingError("arrivals is a list of moments: leave out rate and seconds")
        moments = given(arrivals)
        return Open(moments, clients, 0.0, "open loop, given arrivals"), _deadline(deadline, moments[-1])
    if rate is None or seconds is None:
        raise SettingError("say how many a second, and for how long: rate=100, seconds=2.0")
    moments = schedule(rate, seconds, arrivals, seed=seed)
    shown = f"{rate[0]:g} to {rate[1]:g}" if isinstance(rate, tuple) else f"{rate:g}"
    return Open(moments, clients, seconds, f"open loop, {shown}/s {arrivals}"), _deadline(deadline, seconds)


def _deadline(deadline: float | None, planned: float | None) -> float:
    if deadline is not None:
        return positive(deadline, "deadline")
    return UNPLANNED if planned is None else planned + AFTER


# --- whom it is done with -------------------------------------------------------------------------------------------


def _check_sync(work: Callable[..., object], borrow: Callable[..., object] | None) -> None:
    _check(work, borrow)
    for name, given_one in (("work", work), ("borrow", borrow)):
        inner = inspect.unwrap(given_one) if given_one else None
        if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
            raise SettingError(f"{name} is async: await closed_loop_async(…) or await open_loop_async(…)")


def _check(work: Callable[..., object], borrow: Any) -> None:
    if any(hasattr(type(borrow), name) for name in ("__enter__", "__aenter__")):
        raise SettingError(f"borrow takes what is called for each request, as pool.connection, not {_told(borrow)}")
    if borrow is not None and not callable(borrow):
        raise SettingError(f"borrow takes something to call, as pool.connection, not {_told(borrow)}")
    if not callable(work):
        raise SettingError(f"work takes a function, not {_told(work)}")
    wanted = "work(conn)" if borrow is not None else "work(), for there is no borrow=…"
    try:
        signature = inspect.signature(work)
    except (TypeError, ValueError):  # some of those in C do not tell
        return
    try:
        signature.bind(*([None] if borrow is not None else []))
    except TypeError as problem:
        raise SettingError(f"work cannot be called as {wanted}: {problem}") from None


def _told(thing: object) -> str:
    return f"{type(thing).__name__} ({thing!r})"
