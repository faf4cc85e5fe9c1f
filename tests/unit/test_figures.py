"""What a reader relies on in a figure: it is drawn, says what to look at, has a text, and leaves the notebook alone."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from connlab import ConnlabError, figures
from connlab.figures import colours, live
from connlab.figures.lanes import LANES
from connlab.figures.traces import bars
from connlab.recorder import Mark, Recorder
from connlab.recorder.series import Series
from connlab.recorder.servers import Hold


class Recorded(Recorder):
    """A recording with given samples: figures need no server."""

    def __init__(self, *series: Series, marks: tuple[Mark, ...] = (), end: float = 4.0) -> None:
        self._given, self._marks, self._ended, self._began = list(series), list(marks), end, 0.0
        self._holds: list[tuple[float, str, list[Hold]]] = []

    @property
    def series(self) -> list[Series]:
        return self._given


def pool_series(*, gap: bool = False) -> Series:
    """In use rises from 0 to 3 at 2 s; two wait from 3 s on."""
    series = Series("app", "pool")
    for tenth in range(40):
        at = tenth / 10
        if gap and at == 1.0:
            series.gap(at, "no answer")
        if gap and 1.0 <= at < 2.0:
            continue
        used = 3 if at >= 2 else 0
        idle, waiting = 3 - used, 2 if at >= 3 else 0
        series.add(at, {"in use": used, "idle": idle, "connecting": 0, "waiting": waiting, "size limit": 3})
    return series


def postgres_series() -> Series:
    series = Series("PostgreSQL", "postgres")
    for tenth in range(40):
        series.add(tenth / 10, {"active": 2, "active: Lock": 1, "idle": 1, "limit": 97})
    return series


def legend_of(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


ALL: dict[str, Any] = {
    "timeline": lambda: figures.timeline(Recorded(pool_series(), postgres_series())),
    "latencies": lambda: figures.latencies({"direct": [0.001, 0.002, 0.004] * 100}),
    "sweep": lambda: figures.sweep([1, 2, 4, 8], [100, 200, 390, 400], latency=[0.01, 0.01, 0.01, 0.02]),
    "errors": lambda: figures.errors([(1.0, ValueError("x")), (2.0, "TooMany")]),
    "errors, none": lambda: figures.errors([], until=5),
    "swimlanes": lambda: figures.swimlanes(held()),
}


def held() -> Recorder:
    rec = Recorded()
    rec._holds = [
        (
            tenth / 10,
            "PgBouncer",
            [Hold("client 1" if tenth < 5 else "client 2", "pid 7")] + ([Hold("client 2", None)] if tenth < 5 else []),
        )
        for tenth in range(10)
    ]
    return rec


@pytest.mark.parametrize("name", ALL)
def test_each_figure_has_a_title_labels_a_sentence_and_a_text(name: str) -> None:
    picture = ALL[name]()
    bundle = picture._repr_mimebundle_()
    axes = picture.figure.axes
    assert picture.figure.get_suptitle()
    assert all(axis.get_ylabel() for axis in axes) and axes[-1].get_xlabel()
    assert picture.look.endswith(".") and picture.alt.endswith(".")
    assert (
        f'<img alt="{picture.alt}"'.replace("'", "&#x27;") in bundle["text/html"]
        and picture.look in bundle["text/html"]
    )
    assert picture.alt in bundle["text/plain"]
    assert picture.png().startswith(b"\x89PNG") and "<svg" in picture.svg()


@pytest.mark.parametrize("name", ALL)
def test_figures_leave_the_notebooks_matplotlib_alone(name: str) -> None:
    import matplotlib.pyplot as plt

    with mpl.rc_context({"font.size": 31.0, "axes.grid": False}):
        before = dict(mpl.rcParams)
        ALL[name]().svg()
        assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_a_picture_can_be_saved(tmp_path: Path) -> None:
    picture = ALL["sweep"]()
    assert picture.save(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert picture.alt in picture.save(str(tmp_path / "a.svg")).read_text()
    with pytest.raises(ConnlabError, match=r"not as '?\.pdf"):
        picture.save(tmp_path / "a.pdf")


def test_text_that_looks_like_html_stays_text() -> None:
    bundle = figures.errors([(1.0, "<script>")], look="Look at <b>.")._repr_mimebundle_()
    assert "<script>" not in bundle["text/html"] and "<b>" not in bundle["text/html"]


# --- timeline -----------------------------------------------------------------------------------------------


def test_a_timelines_text_tells_what_happened() -> None:
    alt = figures.timeline(Recorded(pool_series(), marks=(Mark(2.0, "leak starts"),))).alt
    assert "in use goes from 0 to 3, first at 2.0 s" in alt
    assert "clients waiting goes from 0 to 2, first at 3.0 s" in alt
    assert "limit 3" in alt and "leak starts at 2.0 s" in alt


def test_a_gap_is_told_and_drawn_and_nothing_is_drawn_in_it() -> None:
    picture = figures.timeline(Recorded(pool_series(gap=True)))
    assert "no answer from 1.0 s to 2.0 s (no answer)" in picture.alt
    axis = picture.figure.axes[0]
    line = next(line for line in axis.lines if line.get_color() == colours.WAITING)
    inside = [y for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if 1.0 <= x < 2.0]
    assert inside and all(map(math.isnan, inside))
    assert any(patch.get_hatch() for patch in axis.patches)


def test_a_limit_far_above_is_told_but_does_not_flatten_the_lane() -> None:
    picture = figures.timeline(Recorded(postgres_series()))
    axis = picture.figure.axes[0]
    assert axis.get_ylim()[1] < 10
    assert "limit: 97, far above" in legend_of(axis)


def test_a_limit_that_the_recorder_does_not_know_can_be_given() -> None:
    picture = figures.timeline(Recorded(postgres_series()), limits={"PostgreSQL": 4})
    axis = picture.figure.axes[0]
    assert "limit: 4" in legend_of(axis) and "limit 4" in picture.alt
    assert any(list(line.get_ydata()) == [4, 4] for line in axis.lines)
    with pytest.raises(ConnlabError, match="'app' was not recorded; there is PostgreSQL"):
        figures.timeline(Recorded(postgres_series()), limits={"app": 4})


def test_who_failed_is_drawn_counted_and_told_in_the_lane_where_it_happened() -> None:
    recorded = Recorded(pool_series(), postgres_series())
    picture = figures.timeline(recorded, until=3.5, failures={"app": [3.2, 1.5, 3.9]})
    pool, server = picture.figure.axes
    crosses = [line for line in pool.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[1.5, 3.2]]
    assert "failed: 2" in legend_of(pool) and "failed: 2" not in legend_of(server)
    assert "2 failed, from 1.5 s to 3.2 s" in picture.alt
    with pytest.raises(ConnlabError, match="'pool' was not recorded; there is app, PostgreSQL"):
        figures.timeline(recorded, failures={"pool": [1.0]})


def test_an_axis_that_counts_waiting_clients_says_so() -> None:
    pool, server = figures.timeline(Recorded(pool_series(), postgres_series())).figure.axes
    assert "clients" in pool.get_ylabel() and "clients" not in server.get_ylabel()


def test_lanes_are_those_of_the_sources_that_are_there() -> None:
    assert len(figures.timeline(Recorded(pool_series())).figure.axes) == 1
    assert len(figures.timeline(Recorded(pool_series(), postgres_series())).figure.axes) == 2


def test_a_backend_that_waits_for_a_lock_is_counted_once() -> None:
    picture = figures.timeline(Recorded(postgres_series()))
    assert "active stays 1; waiting for a lock stays 1; idle stays 1" in picture.alt


def test_a_part_of_a_timeline_and_a_part_that_is_not_there() -> None:
    axis = figures.timeline(Recorded(pool_series()), since=1, until=2).figure.axes[0]
    assert axis.get_xlim() == (1.0, 2.0)
    with pytest.raises(ConnlabError, match="nothing was recorded between 9 s and 4 s"):
        figures.timeline(Recorded(pool_series()), since=9)


def test_a_colour_means_one_thing() -> None:
    meaning: dict[str, set[str]] = {}
    for lane in LANES.values():
        for layer in (*lane.bands, *lane.lines):
            meaning.setdefault(layer.colour, set()).add(layer.label)
    assert meaning[colours.WAITING] == {"clients waiting"} and meaning[colours.IDLE] == {"idle"}
    assert all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in meaning)


# --- latencies ----------------------------------------------------------------------------------------------


def test_percentiles_are_measured_values_and_n_is_stated() -> None:
    picture = figures.latencies([n / 1000 for n in range(1, 1001)])
    assert "n = 1000" in picture.alt and "p50 500 ms, p95 950 ms, p99 990 ms" in picture.alt
    assert picture.figure.axes[0].get_title() == "" or "n = 1000" in picture.figure.axes[0].get_title(loc="left")
    assert picture.figure.axes[0].get_xscale() == "log"


def test_a_percentile_that_few_samples_cannot_support_is_left_out() -> None:
    alt = figures.latencies([0.001] * 39 + [0.1]).alt
    assert "p50" in alt and "p95" in alt and "p99" not in alt


@pytest.mark.parametrize("samples", [[], {}, {"a": []}, [0.0, 1.0], [-1.0], [math.nan]])
def test_durations_that_are_none_are_refused(samples: Any) -> None:
    with pytest.raises(ConnlabError, match=r"samples|seconds above 0"):
        figures.latencies(samples)


# --- sweep --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("throughput", "expected"),
    [
        ([100, 200, 390, 400, 380], 4),
        ([100, 200, 300, 400, 410], 8),
        ([100, 200, 300, 400, 500], None),
        ([390, 400, 395, 400, 398], None),
        ([300, 390, 400, 200, 100], 2),
    ],
)
def test_the_knee_is_the_smallest_size_that_reaches_95_percent_of_the_best(
    throughput: list[float], expected: int | None
) -> None:
    assert figures.knee([1, 2, 4, 8, 16], throughput) == expected


def test_a_sweep_of_several_runs_marks_the_medians_knee() -> None:
    picture = figures.sweep([1, 2, 4, 8], [[90, 100, 110], [190, 200, 900], [390, 400, 405], [380, 400, 410]])
    assert "Knee at 4" in picture.alt and "n = 3 at each" in picture.alt
    assert "knee: 4" in [text.get_text() for text in picture.figure.axes[0].texts]


def test_a_sweep_without_a_knee_says_so() -> None:
    assert "No knee: it still rises" in figures.sweep([1, 2, 3], [1, 2, 3]).alt
    assert "No knee: the first size is almost as good" in figures.sweep([1, 2, 3], [3, 3, 3]).alt


@pytest.mark.parametrize(
    ("sizes", "results"),
    [
        ([1, 2], [1, 2]),
        ([1, 2, 3], [1, 2]),
        ([1, 3, 2], [1, 2, 3]),
        ([1, 2, 3], [1, [], 3]),
        ([1, 2, 3], [1, math.nan, 3]),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sizes: list[float], results: Any) -> None:
    with pytest.raises(ConnlabError, match="sweep"):
        figures.sweep(sizes, results)


# --- swim lanes and errors ----------------------------------------------------------------------------------


def test_a_hold_lasts_from_its_first_sample_to_its_last_and_breaks_where_one_is_missing() -> None:
    made = bars([(at, "a", "s") for at in (0.0, 0.1, 0.2, 0.5, 0.6)] + [(0.3, "b", "s")], 0.1)
    assert [(bar.client, round(bar.start, 2), round(bar.end, 2)) for bar in made] == [
        ("a", 0.0, 0.3),
        ("b", 0.3, 0.4),
        ("a", 0.5, 0.7),
    ]


def test_swim_lanes_tell_who_was_served_and_who_waited() -> None:
    alt = ALL["swimlanes"]().alt
    assert "2 clients on 1 server connections" in alt and "Pid 7 served 2 clients" in alt and "1 of the clients" in alt


def test_the_label_of_few_swim_lanes_does_not_reach_into_the_title() -> None:
    made = ALL["swimlanes"]().figure
    made.draw_without_rendering()
    axis, head = made.axes[0], made._suptitle
    label = axis.yaxis.label.get_window_extent()
    assert label.y1 < head.get_window_extent().y0 and label.y0 > 0


def test_swim_lanes_without_holds_say_how_to_record_them() -> None:
    with pytest.raises(ConnlabError, match="holds=True"):
        figures.swimlanes(Recorded())
    with pytest.raises(ConnlabError, match="no PgBouncer 'other'"):
        figures.swimlanes(held(), source="other")


def test_error_rain_has_a_lane_for_each_kind_and_every_drop() -> None:
    events = [(at / 10, TimeoutError() if at % 2 else "refused") for at in range(20)]
    picture = figures.errors(events)
    drops = sum(len(np.asarray(lane.get_offsets())) for lane in picture.figure.axes[0].collections)
    assert drops == 20 and "10 times TimeoutError, from 0.1 s to 1.9 s" in picture.alt


# --- live ---------------------------------------------------------------------------------------------------


def numbers(drawn: str) -> dict[tuple[str, str], str]:
    return {
        (source, metric): value
        for source, metric, value in re.findall(r'data-source="([^"]+)" data-metric="([^"]+)">([^<]+)<', drawn)
    }


def test_the_live_picture_has_the_newest_numbers_as_text() -> None:
    drawn = live.drawing(Recorded(pool_series(), postgres_series()), 10)
    shown = numbers(drawn)
    assert shown["app", "in use"] == "3" and shown["app", "idle"] == "0" and shown["app", "clients waiting"] == "2"
    assert shown["PostgreSQL", "active"] == "1" and shown["PostgreSQL", "waiting for a lock"] == "1"
    assert 'role="img"' in drawn and 'aria-label="app: in use 3' in drawn


def test_the_live_picture_says_when_a_source_is_silent() -> None:
    series = pool_series()
    series.gap(3.95, "connection refused")
    drawn = live.drawing(Recorded(series), 10)
    assert numbers(drawn)["app", "in use"] == "?" and "connection refused" in drawn


def test_the_live_picture_keeps_a_short_wait_in_a_long_window() -> None:
    series = Series("app", "pool")
    for tick in range(1200):
        waiting = 5 if tick == 600 else 0
        series.add(tick / 20, {"in use": 1, "idle": 0, "connecting": 0, "waiting": waiting, "size limit": 1})
    drawn = live.drawing(Recorded(series, end=60.0), 60)
    line = re.findall(r'd="([^"]*)" fill="none"', drawn)[0]
    heights = {float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)H", line)}
    assert len(heights) == 2 and len(re.findall("H", line)) <= live.POINTS + 1


def test_the_live_picture_before_the_first_sample() -> None:
    assert numbers(live.drawing(Recorded(Series("app", "pool")), 10))["app", "in use"] == "?"


def test_a_source_that_was_silent_from_the_beginning_is_a_gap_in_both() -> None:
    silent = Series("PgBouncer", "pgbouncer")
    silent.gap(0.1, "no answer")
    picture = figures.timeline(Recorded(pool_series(), silent))
    assert "PgBouncer: no answer from 0.1 s to the end (no answer)" in picture.alt
    assert numbers(live.drawing(Recorded(pool_series(), silent), 10))["PgBouncer", "held by a client"] == "?"
