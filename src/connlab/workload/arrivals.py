"""When requests of an open loop are to start: decided before the first one does."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

from connlab.errors import SettingError

Rate = float | tuple[float, float]
KINDS = ("poisson", "fixed")
MOST = 2_000_000


def schedule(rate: Rate, seconds: float, arrivals: str = "poisson", *, seed: int | None = None) -> list[float]:
    """The moments at which requests arrive, in seconds from 0 up to ``seconds``.

    ``rate``: arrivals a second, or a pair: it grows (or falls) evenly from the first to the second.
    ``arrivals``: "fixed", all at the same distance, the first at 0; or "poisson", at random and independent of each
    other, as of many users who know nothing of each other: exponential distances, about rate times seconds of them.
    ``seed`` makes the same ones again.

    A rate that changes is that of 1 stretched in time, by the inverse of the mean number of arrivals until then
    (E. Çinlar, Introduction to Stochastic Processes, 1975, section 4.7).

    Raises SettingError. Lists can be joined, and bursts are lists too:

        >>> schedule(4, 1.0, "fixed")
        [0.0, 0.25, 0.5, 0.75]
        >>> open_loop(work, borrow=pool.connection, arrivals=schedule(50, 2.0) + [1.0] * 100)   # a burst at 1 s
    """
    first, last = _rates(rate)
    seconds = positive(seconds, "seconds")
    if arrivals not in KINDS:
        raise SettingError(f'arrivals takes "poisson", "fixed" or a list of seconds, not {arrivals!r}')
    expected = (first + last) / 2 * seconds
    if expected > MOST:
        raise SettingError(f"{expected:,.0f} arrivals are more than {MOST:,}: take a lower rate, or pgbench")
    counts = _even() if arrivals == "fixed" else _random(seed)
    # A rounding error must not make one arrival more at the very end.
    within = itertools.takewhile(lambda count: count < expected * (1 - 1e-12), counts)
    return [_moment(count, first, last, seconds) for count in within]


def given(moments: Sequence[float]) -> list[float]:
    """Moments that somebody made themselves, in order; raises SettingError for what is none."""
    if isinstance(moments, str) or not isinstance(moments, Sequence):
        raise SettingError(f'arrivals takes "poisson", "fixed" or a list of seconds, not {moments!r}')
    ordered = sorted(number(moment, "an arrival", 0) for moment in moments)
    if not ordered:
        raise SettingError("arrivals is an empty list: nothing would be started")
    return ordered


def number(value: object, name: str, least: float) -> float:
    """``value`` as a number of at least ``least``; raises SettingError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise SettingError(f"{name} takes a number of {least:g} or more, not {value!r}")
    return float(value)


def positive(value: object, name: str) -> float:
    """``value`` as a number above 0; raises SettingError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SettingError(f"{name} takes a number above 0, not {value!r}")
    return float(value)


def whole(value: object, name: str, most: int = 1_000_000_000) -> int:
    """``value`` as a whole number from 1 to ``most``; raises SettingError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise SettingError(f"{name} takes a whole number from 1 to {most:,}, not {value!r}")
    return value


def _rates(rate: Rate) -> tuple[float, float]:
    if not isinstance(rate, tuple):
        rate = (positive(rate, "rate"), rate)
    if len(rate) != 2:
        raise SettingError(f"rate takes a number, or a pair (at the start, at the end), not {rate!r}")
    first, last = (number(each, "rate", 0) for each in rate)
    positive(first + last, "rate")
    return first, last


def _even() -> Iterator[float]:
    return map(float, itertools.count())


def _random(seed: int | None) -> Iterator[float]:
    draw = random.Random(seed)
    return itertools.accumulate(iter(lambda: draw.expovariate(1.0), None))


def _moment(count: float, first: float, last: float, seconds: float) -> float:
    """When ``count`` arrivals are expected: the solution t of first*t + (last - first)/(2*seconds) * t**2 = count."""
    root = math.sqrt(max(first * first + 2 * (last - first) / seconds * count, 0))
    return 2 * count / (first + root) if count else 0.0
