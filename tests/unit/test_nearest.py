"""Suggestions: near names alone, and else those that there are."""

from __future__ import annotations

import pytest

from controller.nearest import hint, nearest


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("sofia", ["rennes", "sophia"], "sophia"),
        ("@rak", ["@all", "@rack1"], "@rack1"),
        ("nope", ["one", "all", "failed"], None),
        ("h99", ["h9", "h0"], None),
        ("hh9", ["h9"], "h9"),
        ("x", [], None),
    ],
)
def test_only_what_is_near_is_taken_for_a_slip(name: str, known: list[str], expected: str | None) -> None:
    assert nearest(name, known) == expected


def test_where_nothing_is_near_all_that_there_are_is_told_and_of_many_some() -> None:
    assert hint("nope", ["a", "b", "a"], more="ctl x") == "there are a, b"
    assert hint("nope", [], more="ctl x") == "there are none; see `ctl x`"
    told = hint("nope", [f"g{number}" for number in range(30)], more="ctl x")
    assert told.startswith("there are g0, g1, ")
    assert told.endswith(" and 20 more: `ctl x`")
