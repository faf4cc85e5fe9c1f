"""When arrivals come, what is told to who asks for nonsense, pgbench's files, and the bar. No server needed."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from connlab import SettingError, closed_loop, open_loop, schedule
from connlab.workload import pgbench, report
from connlab.workload.progress import Bar


@contextlib.contextmanager
def borrowed() -> Iterator[str]:
    yield "connection"


@contextlib.asynccontextmanager
async def async_borrowed() -> Any:
    yield "connection"


def nap(*_: object) -> None: ...


async def async_nap(*_: object) -> None: ...


# --- arrivals -------------------------------------------------------------------------------------------------------


def test_fixed_arrivals_are_at_the_same_distance() -> None:
    moments = schedule(200, 2.0, "fixed")
    assert len(moments) == 400 and moments[0] == 0 and moments[-1] < 2
    assert np.allclose(np.diff(moments), 1 / 200)


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.7, 1.1, 2.9])
def test_a_rounding_error_makes_no_arrival_more(seconds: float) -> None:
    assert len(schedule(10, seconds, "fixed")) == round(10 * seconds)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_chance() -> None:
    moments = schedule(100, 100.0, seed=1)
    gaps = np.diff([0.0, *moments])
    assert 9_500 < len(moments) < 10_500  # five times the standard deviation, which is 100
    assert 0.9 < statistics.stdev(gaps) * 100 < 1.1  # of exponential distances it is the mean
    assert 0.33 < np.mean(gaps > 0.01) < 0.41  # 1/e
    assert moments == sorted(moments) and moments[-1] < 100


def test_a_seed_makes_the_same_arrivals_again() -> None:
    assert schedule(50, 2.0, seed=7) == schedule(50, 2.0, seed=7) != schedule(50, 2.0, seed=8)
    assert schedule(50, 2.0) != schedule(50, 2.0)


@pytest.mark.parametrize("arrivals", ["fixed", "poisson"])
def test_a_ramp_grows_from_the_first_rate_to_the_second(arrivals: str) -> None:
    moments = np.array(schedule((0, 200), 10.0, arrivals, seed=3))
    assert 900 < len(moments) < 1100
    quarters, _ = np.histogram(moments, bins=4, range=(0, 10))  # 1, 3, 5, 7 sixteenths
    assert np.allclose(quarters / len(moments), [1 / 16, 3 / 16, 5 / 16, 7 / 16], atol=0.04)


def test_a_falling_ramp_is_a_rising_one_backwards() -> None:
    moments = np.array(schedule((200, 0), 10.0, "fixed"))
    assert len(moments) == 1000 and moments[0] == 0
    assert np.mean(moments < 5) == pytest.approx(0.75, abs=0.01)


# --- nonsense -------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: closed_loop(nap), "seconds=2.0, or how many, requests=100"),
    (lambda: closed_loop(nap, seconds=1, requests=1), "one of the two"),
    (lambda: closed_loop(nap, clients=0, seconds=1), "clients takes a whole number from 1 to 5,000, not 0"),
    (lambda: closed_loop(nap, clients=1.5, seconds=1), "clients takes a whole number"),  # type: ignore[arg-type]
    (lambda: closed_loop(nap, seconds=0), "seconds takes a number above 0, not 0"),
    (lambda: closed_loop(nap, seconds=math.inf), "seconds takes a number above 0, not inf"),
    (lambda: closed_loop(nap, requests=-1), "requests takes a whole number"),
    (lambda: closed_loop(nap, requests=1, think_seconds=-1), "think_seconds takes a number of 0 or more"),
    (lambda: closed_loop(nap, requests=1, ramp_seconds="1"), "ramp_seconds takes a number"),  # type: ignore[arg-type]
    (lambda: closed_loop(nap, requests=1, deadline=0), "deadline takes a number above 0"),
    (lambda: closed_loop("select 1", requests=1), "work takes a function, not str"),  # type: ignore[arg-type]
    (lambda: closed_loop(lambda: None, borrow=borrowed, requests=1), r"cannot be called as work\(conn\)"),
    (lambda: closed_loop(lambda conn: None, requests=1), r"cannot be called as work\(\), for there is no borrow"),
    (lambda: closed_loop(nap, borrow=borrowed(), requests=1), "as pool.connection, not _GeneratorContextManager"),  # type: ignore[arg-type]
    (lambda: closed_loop(nap, borrow="dsn", requests=1), "borrow takes something to call"),  # type: ignore[arg-type]
    (lambda: closed_loop(async_nap, requests=1), "work is async: await closed_loop_async"),
    (lambda: closed_loop(nap, borrow=async_borrowed, requests=1), "borrow is async"),
    (lambda: open_loop(nap), "rate=100, seconds=2.0"),
    (lambda: open_loop(nap, rate=0, seconds=1), "rate takes a number above 0, not 0"),
    (lambda: open_loop(nap, rate=(1, 2, 3), seconds=1), "a pair"),  # type: ignore[arg-type]
    (lambda: open_loop(nap, rate=(0, 0), seconds=1), "rate takes a number above 0"),
    (lambda: open_loop(nap, rate=1, seconds=1, arrivals="random"), '"poisson", "fixed" or a list'),
    (lambda: open_loop(nap, rate=1, arrivals=[0.0]), "leave out rate and seconds"),
    (lambda: open_loop(nap, arrivals=[]), "an empty list"),
    (lambda: open_loop(nap, arrivals=[0.0, -1.0]), "an arrival takes a number of 0 or more, not -1.0"),
    (lambda: open_loop(nap, rate=10**6, seconds=10), "take a lower rate, or pgbench"),
    (lambda: open_loop(nap, rate=1, seconds=1, clients_at_most=0), "clients_at_most takes a whole number"),
    (lambda: pgbench("dbname=x", "select-onyl", transactions=1), "script takes SQL, or one of tpcb-like"),
    (lambda: pgbench("dbname=x", "select 1", transactions=0), "transactions takes a whole number"),
    (lambda: pgbench("dbname=x", "select 1", transactions=1, protocol="binary"), "protocol takes simple"),
    (lambda: pgbench("dbname=x", "select 1", transactions=1, rate=-1), "rate takes a number above 0"),
    (lambda: pgbench("no dsn", "select 1", transactions=1), "pgbench takes a DSN, such as pg.dsn: missing"),
    (lambda: pgbench(None, "select 1", transactions=1), "pgbench takes a DSN, such as pg.dsn, not NoneType"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "said"), WRONG, ids=[said for _, said in WRONG])
def test_who_asks_for_nonsense_is_told_what_to_write(call: Callable[[], object], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        call()


# --- pgbench's files ------------------------------------------------------------------------------------------------


def test_the_log_of_pgbench() -> None:
    zero, requests = report.transactions(
        [
            "0 1 2000 0 1795385326 823239",
            "1 1 0 0 1795385326 823300",
            "0 2 serialization 0 1795385327 0",
        ]
    )
    assert zero == pytest.approx(1795385326.821239, abs=1e-6)
    first, fast, failed = requests
    assert (first.intended, first.latency, first.late) == (0, pytest.approx(0.002, abs=1e-9), 0)
    assert fast.latency == pytest.approx(1e-6, abs=1e-9)  # 0: below the log's resolution
    assert (failed.error, failed.sqlstate) == ("serialization", "40001")
    assert math.isnan(first.waited) and math.isnan(first.used)


def test_the_log_of_pgbench_with_a_rate_says_how_late_it_started() -> None:
    _, (one,) = report.transactions(["0 1 14799 0 1795385326 963063 14450"])
    assert (one.latency, one.late) == (pytest.approx(0.014799), pytest.approx(0.01445))


def test_a_report_that_is_none() -> None:
    assert report.parse("pgbench: error: connection to server failed") is None


# --- the bar --------------------------------------------------------------------------------------------------------


class Terminal:
    def __init__(self, is_one: bool) -> None:
        self.text, self._is_one = "", is_one

    def isatty(self) -> bool:
        return self._is_one

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


@pytest.mark.parametrize(("is_one", "since", "shows"), [(True, 3, True), (True, 1, False), (False, 3, False)])
def test_a_bar_shows_itself_after_two_seconds_in_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, is_one: bool, since: float, shows: bool
) -> None:
    terminal = Terminal(is_one)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with Bar("closed loop") as bar:
        bar._began -= since
        bar.show(0.5, 1234)
    assert ("[###############...............] closed loop: 3 s, 1,234 requests" in terminal.text) is shows
    assert terminal.text.endswith("\r\x1b[K") is shows  # nothing of it stays


def test_no_bar_in_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Bar("closed loop") as bar:
        bar._began -= 60
        bar.show(0.5, 1)
    assert terminal.text == ""
