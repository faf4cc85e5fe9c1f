"""Sentences about data, for those who cannot see a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float) -> str:
    """A number with as many digits as say something."""
    if not math.isfinite(value):
        return "unknown" if math.isnan(value) else "unlimited"
    return f"{value:.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"


def course_of(label: str, times: Sequence[float], values: Sequence[float]) -> str:
    """How a quantity went, such as "in use goes from 0 to 5, first at 1.2 s" or "idle stays 2"."""
    known = [(at, value) for at, value in zip(times, values, strict=True) if not math.isnan(value)]
    if not known:
        return f"{label} is unknown"
    first, last = known[0][1], known[-1][1]
    low, high = min(value for _, value in known), max(value for _, value in known)
    if low == high:
        return f"{label} stays {number(first)}"
    reached = next(at for at, value in known if value == high)
    if last == high:
        return f"{label} goes from {number(first)} to {number(high)}, first at {reached:.1f} s"
    peak = f"is highest at {reached:.1f} s with {number(high)}" if high > first else f"falls to {number(low)}"
    return f"{label} begins at {number(first)}, {peak}, and ends at {number(last)}"


def joined(parts: Sequence[str]) -> str:
    """Sentences out of parts that have no end of their own."""
    return " ".join(f"{part[0].upper()}{part[1:]}." for part in parts if part)
