"""Recorded series as tidy pandas DataFrames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from connlab.recorder.series import NOTHING, Series
from connlab.recorder.servers import Hold

if TYPE_CHECKING:  # pandas takes most of a second to import, and a recording needs it only at the end
    import pandas as pd

COLUMNS = ("seconds", "source", "kind", "metric", "value")


def tidy(series: Iterable[Series]) -> pd.DataFrame:
    """One row for each value, in ``COLUMNS``, in order of time within a metric; a gap is a row with NaN."""
    import pandas as pd

    parts = [
        pd.DataFrame({"seconds": times, "source": one.source, "kind": one.kind, "metric": metric, "value": values})
        for one in series
        for times, columns in [one.columns()]
        for metric, values in columns.items()
    ]
    empty = pd.DataFrame(columns=list(COLUMNS)).astype({"seconds": float, "value": float})
    return pd.concat(parts, ignore_index=True) if parts else empty


def rates(series: Iterable[Series], every: float) -> pd.DataFrame:
    """What counters have grown by, per second, in windows of ``every`` seconds; ``seconds`` is a window's end.

    NaN for a window in which the source was silent, or counted from 0 again.
    """
    import pandas as pd

    rows = [
        (end, one.source, one.kind, f"{metric} per second", rate)
        for one in series
        for times, columns in [one.columns()]
        for metric in sorted(one.counters & columns.keys())
        for end, rate in _differences(times, columns[metric], every)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _differences(times: Sequence[float], totals: Sequence[float], every: float) -> Iterator[tuple[float, float]]:
    if not times:
        return
    began, before, silent = times[0], totals[0], False
    for seconds, total in zip(times, totals, strict=True):
        silent = silent or total != total
        if seconds - began < every:
            continue
        grown = total - before
        yield seconds, NOTHING if silent or grown < 0 else grown / (seconds - began)
        began, before, silent = seconds, total, total != total


def held(holds: Iterable[tuple[float, str, Sequence[Hold]]]) -> pd.DataFrame:
    """One row for each client that held or wanted a server connection at a sample."""
    import pandas as pd

    rows = [(seconds, source, hold.client, hold.server) for seconds, source, some in holds for hold in some]
    return pd.DataFrame(rows, columns=["seconds", "source", "client", "server"])
