"""Spans side by side: what a reader relies on, as for all figures."""

from __future__ import annotations

import pytest

from connlab import ConnlabError, figures

LANES = {
    "thread 1": [("runs", 0, 100)],
    "thread 2": [("waits", 0, 100), ("runs", 100, 250)],
    "thread 3": [("fails", 0, 50), ("fails", 50, 120.0)],
}
KINDS = {"runs": "working", "waits": "waiting", "fails": "failing"}


def test_each_span_is_drawn_where_it_was_and_told() -> None:
    picture = figures.spans(
        LANES, KINDS, title="Threads", xlabel="milliseconds", look="Look down.", marks=[(60, "cut")]
    )
    axis = picture.figure.axes[0]
    drawn = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches]
    assert drawn == [(0, 0, 100), (1, 0, 100), (1, 100, 250), (2, 0, 50), (2, 50, 120)]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == list(LANES)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("milliseconds", "threads")
    assert picture.look == "Look down."
    for said in (
        "3 lanes, milliseconds.",
        "Thread 2: runs from 100 to 250, waits from 0 to 100.",
        "Thread 3: 2 times fails from 0 to 120.",
        "Mark at 60: cut.",
    ):
        assert said in picture.alt
    assert picture.svg()


def test_kinds_differ_without_colour_and_the_legend_names_them() -> None:
    picture = figures.spans(LANES, KINDS, title="t", xlabel="ms")
    bars = picture.figure.axes[0].patches
    assert len({(bars[index].get_hatch(), bars[index].get_facecolor()[3] > 0) for index in (0, 1, 3)}) == 3
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == list(KINDS)


def test_a_lane_may_be_empty_and_a_span_have_no_length() -> None:
    picture = figures.spans({"a": [], "b": [("runs", 1, 1)]}, KINDS, title="t", xlabel="ms")
    assert "A: nothing. B: runs from 1 to 1." in picture.alt


@pytest.mark.parametrize(
    ("lanes", "kinds", "named"),
    [
        ({}, KINDS, "there is none"),
        ({"a": []}, KINDS, "there is none"),
        ({"a": [("sleeps", 0, 1)]}, KINDS, "a: spans was not told what 'sleeps' means, only runs, waits, fails"),
        ({"a": [("runs", 0, 1)]}, {"runs": "blue"}, "'runs' means 'blue'; spans knows working, waiting"),
        ({"a": [("runs", 2, 1)]}, KINDS, "a: runs from 2 until 1 is no span"),
        ({"a": [("runs", 0, float("nan"))]}, KINDS, "a: runs from 0 until nan is no span"),
    ],
)
def test_spans_refuse_what_they_cannot_draw(
    lanes: dict[str, list[tuple[str, float, float]]], kinds: dict[str, str], named: str
) -> None:
    with pytest.raises(ConnlabError, match=named):
        figures.spans(lanes, kinds, title="t", xlabel="ms")
