"""The tree's shape: no relay has too many children, nobody is moved, and it is as shallow as it can be."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.topology import Seat, ancestors, below, children_of, depth_for, even_fanout, grow

hosts = st.integers(0, 300)
fanouts = st.integers(1, 40)
some_sites = st.lists(st.sampled_from(["sophia", "rennes", "lille", "nancy"]), max_size=80)


def _depth(parents: dict[int, int | None]) -> int:
    return max((len(ancestors(parents, rank)) for rank in parents), default=0)


def _seats(count: int, first: int = 0) -> list[Seat]:
    return [Seat(rank) for rank in range(first, first + count)]


@given(hosts, fanouts)
def test_no_relay_has_more_children_than_the_fanout(count: int, fanout: int) -> None:
    parents = grow({}, {}, _seats(count), fanout)
    assert set(parents) == set(range(count))
    assert max(Counter(parents.values()).values(), default=0) <= fanout


@given(hosts, fanouts)
def test_the_tree_is_as_shallow_as_its_fanout_lets_it_be(count: int, fanout: int) -> None:
    assert _depth(grow({}, {}, _seats(count), fanout)) == depth_for(count, fanout)


@given(st.lists(st.integers(0, 40), max_size=6), fanouts)
def test_growing_moves_nobody_and_ends_as_shallow_as_planning_at_once(steps: list[int], fanout: int) -> None:
    parents: dict[int, int | None] = {}
    for step in steps:
        before = dict(parents)
        parents = grow(parents, {}, _seats(step, len(parents)), fanout)
        assert {rank: parents[rank] for rank in before} == before
    assert _depth(parents) == depth_for(len(parents), fanout)


@given(hosts, fanouts)
def test_each_parent_has_its_place_before_its_children(count: int, fanout: int) -> None:
    placed: set[int | None] = {None}
    for rank, parent in grow({}, {}, _seats(count), fanout).items():
        assert parent in placed
        placed.add(rank)


@given(some_sites, st.integers(1, 8))
def test_a_command_crosses_the_link_to_a_site_once(sites: list[str], fanout: int) -> None:
    seats = [Seat(rank, site) for rank, site in enumerate(sites)]
    parents = grow({}, {}, seats, fanout)
    if len(set(sites)) < 2:
        return
    for rank, parent in parents.items():
        assert parent is None or sites[parent] == sites[rank]
    heads = [sites[rank] for rank, parent in parents.items() if parent is None]
    assert sorted(heads) == sorted(set(sites))
    for site in set(sites):
        under_one_roof = Counter(parent for parent in parents.values() if parent is not None and sites[parent] == site)
        assert max(under_one_roof.values(), default=0) <= fanout
        levels = max(len(ancestors(parents, rank)) for rank in parents if sites[rank] == site)
        assert levels == 1 + depth_for(sites.count(site) - 1, fanout)


@given(some_sites, some_sites, st.integers(1, 8))
def test_growing_by_a_site_moves_nobody(first: list[str], second: list[str], fanout: int) -> None:
    before = grow({}, {}, [Seat(rank, site) for rank, site in enumerate(first)], fanout)
    more = [Seat(len(first) + index, site) for index, site in enumerate(second)]
    after = grow(before, dict(enumerate(first)), more, fanout)
    assert {rank: after[rank] for rank in before} == before
    for seat in more:
        assert ancestors(after, seat.rank)[-1] is None


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 6), st.data())
def test_a_host_that_is_down_gets_no_new_children(count: int, more: int, fanout: int, data: st.DataObject) -> None:
    before = grow({}, {}, _seats(count), fanout)
    closed = data.draw(st.sets(st.integers(0, count - 1)))
    after = grow(before, {}, _seats(more, count), fanout, closed)
    assert not {after[rank] for rank in range(count, count + more)} & closed


def test_1024_hosts_are_two_levels_of_32_and_a_thousand_more_make_a_third() -> None:
    assert depth_for(32 + 1_024, 32) == 2
    assert depth_for(32 + 1_025, 32) == 3
    parents = grow({}, {}, _seats(1_024), 32)
    assert set(Counter(parents.values()).values()) == {32, 31}


@given(st.integers(1, 5_000), st.integers(1, 64))
def test_an_even_fanout_is_the_smallest_that_costs_no_level(count: int, fanout: int) -> None:
    even = even_fanout(count, fanout)
    assert even <= fanout
    assert depth_for(count, even) == depth_for(count, fanout)
    if count > fanout:
        assert even == 1 or depth_for(count, even - 1) > depth_for(count, fanout)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        grow({}, {}, [], 0)
    with pytest.raises(ValueError, match="has a place already"):
        grow({1: None}, {}, [Seat(1)], 2)
    with pytest.raises(ValueError, match="circle"):
        ancestors({1: 2, 2: 1}, 1)


def test_ancestors_end_at_the_root_and_below_lists_parents_first() -> None:
    parents = {0: None, 1: 0, 2: 1, 3: 0}
    assert ancestors(parents, 2) == [1, 0, None]
    assert below(children_of(parents), 0) == [1, 3, 2]
    assert below(children_of(parents), None) == [0, 1, 3, 2]
