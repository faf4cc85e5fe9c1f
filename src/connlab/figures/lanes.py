"""What the timeline draws of each kind of source, for the static figure and the live one alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from connlab.figures import colours

Columns = Mapping[str, Sequence[float]]


class Layer(NamedTuple):
    """One band or line: its label, the metrics that it sums, its colour, and the metrics that it leaves out again."""

    label: str
    metrics: tuple[str, ...]
    colour: str
    less: tuple[str, ...] = ()


class Lane(NamedTuple):
    """What one source shows: ``bands`` stacked on each other, ``lines`` for who waits, ``limit`` dashed."""

    title: str
    unit: str
    bands: tuple[Layer, ...]
    lines: tuple[Layer, ...]
    limit: str | None


FAR = 3
"""A limit that is more than so many times what was used would make all else flat: it is told, not drawn."""
WAITING_CLIENTS = "clients waiting"
LANES = {
    "pool": Lane(
        "application pool",
        "connections",
        (
            Layer("in use", ("in use",), colours.WORKING),
            Layer("being opened", ("connecting",), colours.OPENING),
            Layer("idle", ("idle",), colours.IDLE),
        ),
        (Layer(WAITING_CLIENTS, ("waiting",), colours.WAITING),),
        "size limit",
    ),
    "pgbouncer": Lane(
        "PgBouncer",
        "server connections",
        (
            Layer("held by a client", ("servers active",), colours.WORKING),
            Layer("being opened", ("servers login", "servers tested"), colours.OPENING),
            Layer("idle", ("servers idle",), colours.IDLE),
        ),
        (Layer(WAITING_CLIENTS, ("clients waiting",), colours.WAITING),),
        None,
    ),
    "postgres": Lane(
        "PostgreSQL",
        "backends",
        (
            Layer("active", ("active",), colours.WORKING, less=("active: Lock",)),
            Layer("waiting for a lock", ("active: Lock",), colours.LOCK),
            Layer("idle in transaction", ("idle in transaction",), colours.IN_TRANSACTION),
            Layer("… aborted", ("idle in transaction (aborted)",), colours.ABORTED),
            Layer("starting", ("starting", "unknown"), colours.OPENING),
            Layer("idle", ("idle",), colours.IDLE),
        ),
        (),
        "limit",
    ),
}


def summed(columns: Columns, layer: Layer, length: int) -> list[float]:
    """The layer's height at each of ``length`` times: NaN in a gap, 0 where none of its metrics has been seen."""
    if not columns:
        return [math.nan] * length  # silent from the beginning
    total = [0.0] * length
    for sign, metrics in ((1, layer.metrics), (-1, layer.less)):
        for metric in metrics:
            if metric in columns:
                total = [so_far + sign * value for so_far, value in zip(total, columns[metric], strict=True)]
    return total
