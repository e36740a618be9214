"""A relay without a way up lets one child look for another before it lets all go."""

from __future__ import annotations

from math import inf

from protocol.limits import PROBED_WITHIN, STRANDED_AFTER
from protocol.stranded import Stranded


def test_nobody_is_let_go_while_there_is_a_way_up() -> None:
    stranded = Stranded()
    assert stranded.due == inf
    assert stranded.advance(1e9, {1, 2}) == []


def test_one_child_is_let_go_first_and_all_when_it_does_not_come_back() -> None:
    stranded = Stranded()
    stranded.begin(0.0)
    assert stranded.advance(STRANDED_AFTER - 0.1, {1, 2, 3}) == []
    assert stranded.advance(STRANDED_AFTER, {1, 2, 3}) == [1]
    assert stranded.advance(stranded.due - 0.1, {2, 3}) == []
    assert stranded.due == STRANDED_AFTER + PROBED_WITHIN
    assert stranded.advance(stranded.due, {2, 3}) == [2, 3]


def test_after_one_that_came_back_another_is_tried() -> None:
    stranded = Stranded()
    stranded.begin(0.0)
    tried = []
    for _ in range(4):
        (child,) = stranded.advance(stranded.due, {1, 2, 3})
        tried.append(child)
        stranded.came(child, stranded.due - 1)
    assert tried == [1, 2, 3, 1]


def test_losing_the_way_up_again_meanwhile_does_not_begin_the_wait_anew() -> None:
    stranded = Stranded()
    stranded.begin(0.0)
    stranded.begin(10.0)
    assert stranded.due == STRANDED_AFTER


def test_a_way_up_ends_it_and_the_next_time_is_counted_from_its_loss() -> None:
    stranded = Stranded()
    stranded.begin(0.0)
    stranded.advance(STRANDED_AFTER, {1})
    stranded.end()
    assert stranded.due == inf
    stranded.begin(100.0)
    assert stranded.advance(100.0 + STRANDED_AFTER, {1, 2}) == [2]


def test_a_relay_that_slept_hears_those_who_came_back_before_it_lets_others_go() -> None:
    stranded = Stranded()
    stranded.begin(0.0)
    stranded.advance(STRANDED_AFTER, {1, 2})
    stranded.doubt(1_000.0)
    stranded.came(1, 1_000.0)
    assert stranded.advance(1_000.0 + STRANDED_AFTER, {1, 2}) == [2]


def test_without_children_nobody_is_tried() -> None:
    stranded = Stranded()
    stranded.begin(0.0)
    assert stranded.advance(STRANDED_AFTER, set()) == []
    assert stranded.due == 2 * STRANDED_AFTER
