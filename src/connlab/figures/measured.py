"""What load measured: distributions of latency, and sweeps over a size with their knee."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from connlab.errors import SettingError
from connlab.figures import colours, style
from connlab.figures.picture import Picture
from connlab.figures.words import joined, number
from connlab.percentile import percentile

PERCENTILES = (50.0, 95.0, 99.0)
BEYOND = 2
"""A percentile is marked when so many samples lie beyond it: with fewer it would be a guess."""
NEAR = 0.95
FLAT = 0.8
Samples = Sequence[float]
Array = npt.NDArray[np.float64]


def latencies(
    samples: Mapping[str, Samples] | Samples,
    *,
    title: str = "How long it took",
    look: str = "Look at how far the last percentile lies from the middle: the axis is logarithmic.",
    percentiles: Sequence[float] = PERCENTILES,
) -> Picture:
    """The distribution of durations, given in seconds, on a logarithmic axis of milliseconds; one row for each name.

    Marks the ``percentiles`` that the number of samples supports, and states that number. Percentiles are
    values that were measured (the smallest one that has this share at or below it), none is interpolated.

    Raises SettingError for no samples, and for durations that are not above 0.

    Example:
        ``latencies({"direct": direct, "through PgBouncer": pooled}, look="Look at the second row's p99.")``
    """
    named = dict(samples) if isinstance(samples, Mapping) else {"": samples}
    rows = {name: _milliseconds(name, values) for name, values in named.items()}
    if not rows:
        raise SettingError("latencies needs samples: a list of seconds, or a dict of such lists")
    edges = _edges(list(rows.values()))
    with style.house_style():
        made, axes = style.figure(0.9 + 1.35 * len(rows), rows=len(rows))
        style.head(made, title)
        for axis, (name, values) in zip(axes, rows.items(), strict=True):
            _draw_distribution(axis, name, values, edges, percentiles)
        axes[-1].set_xscale("log")
        axes[-1].set_xlim(edges[0], edges[-1])
        axes[-1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] / edges[0] < 1000 else (1,)))
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes[-1].xaxis.set_minor_formatter(NullFormatter())
        axes[-1].set_xlabel("milliseconds (logarithmic)")
    return Picture(made, alt=_told_latencies(rows, percentiles), look=look)


def _milliseconds(name: str, seconds: Samples) -> Array:
    values = np.sort(np.asarray(seconds, dtype=float)) * 1000
    if not len(values):
        raise SettingError(f"no samples{f' of {name}' if name else ''} to draw")
    if not (np.isfinite(values).all() and values[0] > 0):
        raise SettingError(f"latencies takes seconds above 0; {name or 'the samples'} has {values[0] / 1000:g}")
    return values


def _edges(rows: Sequence[Array]) -> Array:
    low, high = min(values[0] for values in rows), max(values[-1] for values in rows)
    low, high = low / 1.3, high * 1.3
    return np.geomspace(low, high, max(int(math.log10(high / low) * 20), 12) + 1)


def _supported(values: Array, percentiles: Sequence[float]) -> list[tuple[float, float]]:
    return [(p, percentile(values, p)) for p in percentiles if len(values) * (1 - p / 100) >= BEYOND]


def _draw_distribution(axis: Axes, name: str, values: Array, edges: Array, percentiles: Sequence[float]) -> None:
    counts, _ = np.histogram(values, edges)
    axis.stairs(100 * counts / len(values), edges, fill=True, color=colours.WORKING, alpha=0.8)
    axis.set_title(f"{name}   n = {len(values)}" if name else f"n = {len(values)}", pad=14)
    axis.set_ylabel("% of samples")
    right = -1.0
    for share, at in _supported(values, percentiles):
        axis.axvline(at, color=colours.TEXT, linewidth=1.2)
        words = f"p{share:g} {number(at)} ms"
        # A label begins where the one before it has ended: on a narrow distribution they would cover each other.
        place = max(float(np.log(at / edges[0]) / np.log(edges[-1] / edges[0])), right)
        right = place + 0.012 * len(words)
        axis.text(place, 1.02, words, transform=axis.transAxes, fontsize=8.5)


def _told_latencies(rows: Mapping[str, Array], percentiles: Sequence[float]) -> str:
    parts = [f"distribution of durations, {len(rows)} row{'s' if len(rows) > 1 else ''} on a logarithmic axis"]
    for name, values in rows.items():
        marked = [f"p{share:g} {number(at)} ms" for share, at in _supported(values, percentiles)]
        extent = f"from {number(values[0])} to {number(values[-1])} ms"
        parts.append(f"{name or 'all'}: {', '.join([f'n = {len(values)}', extent, *marked])}")
    return joined(parts)


def knee(sizes: Sequence[float], throughput: Sequence[float], *, near: float = NEAR) -> float | None:
    """The smallest size that reaches ``near`` of the best throughput; None when the sweep shows no knee.

    It shows none when the first size already reaches ``FLAT`` of the best, or only the last one reaches ``near`` (it
    still rises there).

    Example:
        >>> knee([1, 2, 4, 8, 16], [100, 195, 380, 400, 390])
        4
        >>> knee([1, 2, 4], [100, 200, 400]) is None
        True
    """
    best = max(throughput)
    found = next(place for place, value in enumerate(throughput) if value >= near * best)
    return None if throughput[0] >= FLAT * best or found == len(throughput) - 1 else sizes[found]


def sweep(
    sizes: Sequence[float],
    throughput: Sequence[float | Sequence[float]],
    *,
    title: str = "Throughput over size",
    look: str = "Look at where the curve stops rising: everything to the right of it only queues.",
    xlabel: str = "connections",
    ylabel: str = "queries per second",
    latency: Sequence[float | Sequence[float]] | None = None,
    near: float = NEAR,
) -> Picture:
    """What came out at each size, with the knee marked: the smallest size with ``near`` of the best throughput.

    ``throughput`` holds a number, or the numbers of several runs, for each of ``sizes``; of several the median is
    drawn and a band from the lowest to the highest. ``latency`` (seconds, likewise) gets a panel of its own.

    Raises SettingError when there are fewer than three sizes, or not as many results.
    """
    runs = _runs(sizes, throughput, "throughput")
    waits = None if latency is None else [np.asarray(run) * 1000 for run in _runs(sizes, latency, "latency")]
    medians = [float(np.median(run)) for run in runs]
    found = knee(sizes, medians, near=near)
    with style.house_style():
        made, axes = style.figure(3.0 if waits is None else 4.6, rows=1 if waits is None else 2)
        style.head(made, title)
        _draw_runs(axes[0], sizes, runs, colours.WORKING, ylabel)
        if waits is not None:
            _draw_runs(axes[1], sizes, waits, colours.WAITING, "milliseconds (median)")
        _draw_knee(axes, sizes, medians, found, near)
        axes[-1].set_xlabel(xlabel)
    return Picture(made, alt=_told_sweep(sizes, runs, waits, found, near, xlabel, ylabel), look=look)


def _runs(sizes: Sequence[float], results: Sequence[float | Sequence[float]], what: str) -> list[Array]:
    if len(sizes) < 3 or len(sizes) != len(results):
        raise SettingError(f"a sweep needs three sizes or more and as many of {what}: {len(sizes)} and {len(results)}")
    if any(later <= earlier for earlier, later in itertools.pairwise(sizes)):
        raise SettingError(f"a sweep's sizes rise: {list(sizes)}")
    runs = [np.atleast_1d(np.asarray(result, dtype=float)) for result in results]
    if any(not len(run) or not np.isfinite(run).all() for run in runs):
        raise SettingError(f"a sweep needs a number, or some, for each size; {what} has an empty or unknown one")
    return runs


def _draw_runs(axis: Axes, sizes: Sequence[float], runs: Sequence[Array], colour: str, ylabel: str) -> None:
    axis.fill_between(sizes, [run.min() for run in runs], [run.max() for run in runs], color=colour, alpha=0.2)
    axis.plot(sizes, [np.median(run) for run in runs], color=colour, marker="o", markersize=5, linewidth=2)
    axis.set_ylabel(ylabel)
    axis.set_ylim(0, max(run.max() for run in runs) * 1.2)


def _draw_knee(
    axes: Sequence[Axes], sizes: Sequence[float], medians: Sequence[float], found: float | None, near: float
) -> None:
    best = max(medians)
    axes[0].axhline(near * best, color="#888888", linewidth=1, linestyle=":")
    where: dict[str, Any] = {"transform": axes[0].get_yaxis_transform(), "fontsize": 8.5, "color": "#555555"}
    axes[0].text(0.995, near * best, f"{near:.0%} of the best", ha="right", va="top", **where)
    if found is None:
        return
    for axis in axes:
        axis.axvline(found, color=colours.LIMIT, linestyle=(0, (4, 2)), linewidth=1.3)
    axes[0].annotate(
        f"knee: {number(found)}",
        (found, 0.04),
        xycoords=axes[0].get_xaxis_transform(),
        xytext=(5, 0),
        textcoords="offset points",
        fontweight="bold",
    )


def _told_sweep(
    sizes: Sequence[float],
    runs: Sequence[Array],
    waits: Sequence[Array] | None,
    found: float | None,
    near: float,
    xlabel: str,
    ylabel: str,
) -> str:
    medians = [float(np.median(run)) for run in runs]
    points = ", ".join(f"{number(size)}: {number(value)}" for size, value in zip(sizes, medians, strict=True))
    parts = [f"{ylabel} (n = {len(runs[0])} at each) by {xlabel}: {points}"]
    flat = (
        "the first size is almost as good" if medians[0] >= FLAT * max(medians) else "it still rises at the last size"
    )
    parts.append(f"no knee: {flat}" if found is None else f"knee at {number(found)}: {near:.0%} of the best is reached")
    if waits is not None:
        slow = [number(float(np.median(run))) for run in waits]
        parts.append(f"median latency goes from {slow[0]} to {slow[-1]} milliseconds")
    return joined(parts)
