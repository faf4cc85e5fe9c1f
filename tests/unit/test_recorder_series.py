"""What the recorder promises that needs no server: series with gaps, rates from totals, names, clear refusals."""

from __future__ import annotations

import math

import pytest

from connlab import ConnlabError, Recorder
from connlab.recorder import frame
from connlab.recorder.series import Series
from connlab.recorder.servers import unused


def a_series(**settings: frozenset[str]) -> Series:
    return Series("one", "pool", **settings)


def column(series: Series, metric: str) -> list[float]:
    return list(series.columns()[1][metric])


def test_a_gap_is_one_row_of_nan_and_ends_with_the_next_answer() -> None:
    series = a_series()
    series.add(1.0, {"in use": 2})
    series.gap(2.0, "no answer")
    series.gap(3.0, "connection refused")
    series.add(4.0, {"in use": 3})

    times, columns = series.columns()
    assert list(times) == [1.0, 2.0, 4.0]
    assert columns["in use"][0] == 2 and math.isnan(columns["in use"][1]) and columns["in use"][2] == 3
    assert [(gap.start, gap.end, gap.why) for gap in series.gaps] == [(2.0, 4.0, "no answer")]


def test_a_metric_that_turns_up_late_was_zero_before_and_unknown_in_a_gap() -> None:
    series = a_series()
    series.add(1.0, {"active": 1})
    series.gap(2.0, "no answer")
    series.add(3.0, {"active": 1, "active: Lock": 1})
    series.add(4.0, {"active": 0})

    first, second, *rest = column(series, "active: Lock")
    assert first == 0 and math.isnan(second) and rest == [1, 0]


def test_the_tail_begins_with_the_value_that_held_then() -> None:
    series = a_series()
    for second in range(10):
        series.add(second, {"in use": second})

    times, columns = series.columns(since=6.5)
    assert list(times) == [6.0, 7.0, 8.0, 9.0] and list(columns["in use"]) == [6.0, 7.0, 8.0, 9.0]


def test_rates_are_differences_of_totals_and_unknown_across_gaps_and_restarts() -> None:
    series = a_series(counters=frozenset({"queries"}))
    for at, total in [(0.0, 100), (0.5, 150), (1.0, 200)]:
        series.add(at, {"queries": total, "servers active": 1})
    series.gap(1.2, "no answer")
    series.add(2.0, {"queries": 230, "servers active": 1})
    series.add(3.0, {"queries": 5, "servers active": 1})
    series.add(4.0, {"queries": 15, "servers active": 1})

    rates = frame.rates([series], every=1.0)
    assert list(rates.metric.unique()) == ["queries per second"]
    assert list(rates.seconds) == [1.0, 2.0, 3.0, 4.0]
    first, gap, restart, last = rates.value
    assert first == 100 and math.isnan(gap) and math.isnan(restart) and last == 10


def test_a_frame_of_nothing_has_the_columns() -> None:
    assert list(frame.tidy([a_series()]).columns) == ["seconds", "source", "kind", "metric", "value"]


def test_names_that_clash_are_numbered() -> None:
    assert unused(["PgBouncer", "PgBouncer", "app"], ["app"]) == ["PgBouncer", "PgBouncer 2", "app 2"]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((), {}, "something to record"),
        (("postgresql://…",), {}, "not str"),
        ((), {"app": 3}, "not int"),
        ((), {"interval": 0}, "interval takes seconds from 0.005 to 60, not 0"),
        ((), {"interval": True}, "interval takes seconds"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name(
    arguments: tuple[object, ...], options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConnlabError, match=words):
        Recorder(*arguments, **options)  # type: ignore[arg-type]


def test_a_pool_that_keeps_no_count_is_refused() -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    from sqlalchemy.pool import NullPool

    engine = sqlalchemy.create_engine("postgresql+psycopg://localhost/", poolclass=NullPool)
    with pytest.raises(ConnlabError, match="NullPool: it keeps no count"):
        Recorder(engine)
