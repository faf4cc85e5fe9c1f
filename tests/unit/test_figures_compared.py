"""Bars and curves: what a reader relies on, as for all figures."""

from __future__ import annotations

import pytest

from connlab import ConnlabError, figures


def test_bars_tell_their_parts_and_sums_and_draw_both() -> None:
    picture = figures.bars(
        {"trust": {"client": 0.5, "server": 3}, "SCRAM": {"client": 4, "server": 3.25}},
        title="CPU",
        xlabel="milliseconds of CPU",
        look="Look at the client.",
    )
    assert picture.look == "Look at the client."
    assert "milliseconds of CPU" in picture.alt
    assert "SCRAM: client 4, server 3.25, together 7.25" in picture.alt
    axis = picture.figure.axes[0]
    assert [round(bar.get_x() + bar.get_width(), 2) for bar in axis.patches] == [0.5, 4, 3.5, 7.25]
    assert {text.get_text() for text in axis.texts} >= {"3.5", "7.25"}
    legend = axis.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["client", "server"]


def test_bars_of_one_part_have_no_legend_and_a_part_may_be_missing_in_a_row() -> None:
    alone = figures.bars({"open": {"ms": 0.1}, "new": {"ms": 12}}, title="Queries", xlabel="ms")
    assert alone.figure.axes[0].get_legend() is None
    mixed = figures.bars({"a": {"x": 1}, "b": {"y": 2}}, title="t", xlabel="MB")
    assert [bar.get_width() for bar in mixed.figure.axes[0].patches] == [1, 0, 0, 2]


def test_every_part_of_a_bar_that_stands_alone_has_its_number_in_the_legend() -> None:
    picture = figures.bars({"setup": {"fork": 0.25, "authentication": 3.5, "rest": 2}}, title="Setup", xlabel="ms")
    axis = picture.figure.axes[0]
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["fork: 0.25", "authentication: 3.5", "rest: 2"]
    assert [text.get_text() for text in axis.texts] == ["5.75"]


def test_a_bar_in_one_part_has_its_number_once() -> None:
    rows = {"RSS": {"RSS": 54}, "PSS": {"PSS": 32}, "both": {"RSS": 20, "PSS": 30}}
    texts = [text.get_text() for text in figures.bars(rows, title="t", xlabel="MB").figure.axes[0].texts]
    assert sorted(texts) == ["20", "30", "32", "50", "54"]


def test_bars_that_are_all_zero_are_drawn() -> None:
    assert figures.bars({"a": {"x": 0}}, title="t", xlabel="MB").svg()


def test_curves_begin_at_zero_and_tell_every_point() -> None:
    picture = figures.curves(
        [0, 45, 90], {"RSS": [100, 600, 1100], "PSS": [50, 100, 150]}, title="Memory", xlabel="connections", ylabel="MB"
    )
    axis = picture.figure.axes[0]
    assert (axis.get_xlim()[0], axis.get_ylim()[0]) == (0, 0)
    assert len({(line.get_color(), line.get_marker()) for line in axis.lines}) == 2
    assert "MB over connections" in picture.alt
    assert "PSS: 0: 50, 45: 100, 90: 150" in picture.alt


@pytest.mark.parametrize(
    ("rows", "named"),
    [({}, "bars takes a dict"), ({"a": {}}, "bars takes a dict"), ({"a": {"x": -1}}, "a, x is -1")],
)
def test_bars_refuse_what_they_cannot_draw(rows: dict[str, dict[str, float]], named: str) -> None:
    with pytest.raises(ConnlabError, match=named):
        figures.bars(rows, title="t", xlabel="MB")


@pytest.mark.parametrize(
    ("at", "lines", "named"),
    [
        ([1], {"a": [1]}, "two places"),
        ([1, 2], {}, "two places"),
        ([1, 2], {"a": [1]}, "a has"),
        ([1, 2], {"a": [1, float("nan")]}, "a has"),
    ],
)
def test_curves_refuse_what_they_cannot_draw(at: list[float], lines: dict[str, list[float]], named: str) -> None:
    with pytest.raises(ConnlabError, match=named):
        figures.curves(at, lines, title="t", xlabel="x", ylabel="y")
