"""A picture is what was said, whatever the order, the path and the number of times that it was said."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import ranks
from protocol.messages import Link
from protocol.picture import Picture, later
from protocol.ranks import Ranks


def _up(rank: int, parent: int | None, epoch: int = 1, incarnation: int = 1) -> Link:
    return Link(rank, parent, incarnation, epoch, True)


def _down(rank: int, parent: int | None, epoch: int = 1, incarnation: int = 1) -> Link:
    return Link(rank, parent, incarnation, epoch, False)


@st.composite
def _statements(draw: st.DrawFn) -> list[Link]:
    """Statements as agents make them: one attachment has one number, and one parent."""
    parents = draw(
        st.dictionaries(st.tuples(st.integers(0, 7), st.integers(1, 2), st.integers(1, 3)), st.integers(-1, 7))
    )
    made = []
    for (rank, incarnation, epoch), parent in parents.items():
        ups = draw(st.sampled_from([(True,), (False,), (True, False)]))
        made += [Link(rank, None if parent < 0 else parent, incarnation, epoch, up) for up in ups]
    return made


def _routes_from_scratch(links: dict[int, Link], me: int | None) -> dict[int, Ranks]:
    """The definition, computed anew each time."""
    children: dict[int | None, list[int]] = {}
    for link in links.values():
        if link.up:
            children.setdefault(link.parent, []).append(link.rank)
    routes = {}
    for child in children.get(me, []):
        found = [child]
        for rank in found:
            found += [low for low in children.get(rank, []) if low not in found]
        routes[child] = ranks.union(found)
    return routes


@given(_statements(), st.randoms(use_true_random=False), st.sampled_from([None, 0]))
@settings(max_examples=400)
def test_any_order_and_any_repetition_give_the_same_picture(made: list[Link], chance: object, me: int | None) -> None:
    one, other = Picture(me), Picture(me)
    one.apply(made)
    again = made * 2
    chance.shuffle(again)  # type: ignore[attr-defined]
    for link in again:
        other.apply([link])
    assert one.links == other.links
    assert one.routes == other.routes
    assert one.reachable == other.reachable


@given(_statements(), st.sampled_from([None, 0]))
@settings(max_examples=400)
def test_routes_kept_from_change_to_change_are_those_computed_from_scratch(made: list[Link], me: int | None) -> None:
    picture = Picture(me)
    for link in made:
        picture.apply([link])
        expected = _routes_from_scratch(picture.links, me)
        assert picture.routes == expected
        assert picture.reachable == ranks.union(rank for mask in expected.values() for rank in ranks.each(mask))


def test_down_beats_up_at_equal_numbers_and_a_new_attachment_beats_both() -> None:
    assert later(_down(1, 0), _up(1, 0))
    assert not later(_up(1, 0), _down(1, 0))
    assert later(_up(1, 0, epoch=2), _down(1, 0))
    assert later(_up(1, 0, epoch=1, incarnation=2), _up(1, 0, epoch=9, incarnation=1))


def test_only_news_is_told() -> None:
    picture = Picture(None)
    assert picture.apply([_up(0, None), _up(1, 0)]) == (_up(0, None), _up(1, 0))
    assert picture.apply([_up(0, None), _up(1, 0)]) == ()
    assert picture.apply([_up(1, None, epoch=2), _up(1, 0)]) == (_up(1, None, epoch=2),)
    assert picture.routes == {0: ranks.only(0), 1: ranks.only(1)}


def test_what_hangs_below_a_lost_relay_is_out_of_reach_until_it_comes_by_another_way() -> None:
    picture = Picture(None)
    picture.apply([_up(0, None), _up(1, 0), _up(2, 1), _up(3, 0)])
    picture.apply([_down(0, None)])
    assert picture.reachable == ranks.NONE
    picture.apply([_up(1, None, epoch=2)])
    assert picture.routes == {1: ranks.union([1, 2])}
    assert picture.under([1]) == ranks.union([1, 2])
    assert picture.under([0]) == ranks.NONE


def test_a_circle_is_nowhere() -> None:
    picture = Picture(None)
    picture.apply([_up(0, None), _up(1, 0), _up(2, 1)])
    picture.apply([_up(1, 2, epoch=2)])
    assert picture.reachable == ranks.only(0)
    picture.apply([_up(2, 0, epoch=2)])
    assert picture.reachable == ranks.union([0, 1, 2])


def test_a_relay_that_comes_back_without_a_child_contradicts_what_was_known_of_it() -> None:
    picture = Picture(None)
    picture.apply([_up(0, None), _up(1, 0), _up(2, 0), _up(3, 1)])
    back = [_up(0, None, epoch=2), _up(2, 0)]
    picture.apply(back)
    (gone,) = picture.contradicted(back, back)
    assert (gone.rank, gone.up) == (1, False), "3 below 1 may still be there, and is not declared down itself"
    picture.apply([gone])
    assert picture.reachable == ranks.union([0, 2])
    picture.apply([_up(1, 0, epoch=2)])
    assert picture.reachable == ranks.union([0, 1, 2, 3])


def test_a_list_says_nothing_of_those_that_have_moved_on_since() -> None:
    picture = Picture(None)
    picture.apply([_up(0, None), _up(1, None, epoch=2), _up(3, 1)])
    stale = [_up(0, None, epoch=2), _up(1, 0)]
    picture.apply(stale)
    assert picture.contradicted(stale, stale) == ()


def test_a_list_says_nothing_of_the_children_of_those_that_are_not_the_tellers() -> None:
    picture = Picture(None)
    picture.apply([_up(0, None), _up(1, None), _up(2, 1)])
    own = _up(0, None, epoch=2)
    assert picture.contradicted([own], [own, _up(1, None)]) == ()


def test_a_subtree_is_listed_in_ascending_order() -> None:
    picture = Picture(0)
    picture.apply([_up(5, 0), _up(3, 5), _up(9, 4)])
    assert [link.rank for link in picture.subtree()] == [3, 5]
