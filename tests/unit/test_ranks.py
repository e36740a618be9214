"""Sets of ranks behave as sets of numbers do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import ranks
from protocol.limits import MAX_BITMAP, MAX_RANK

some_ranks = st.sets(st.integers(0, 3_000), max_size=60)


@given(some_ranks)
def test_a_set_holds_what_it_was_made_of_in_ascending_order(members: set[int]) -> None:
    made = ranks.union(members)
    assert list(ranks.each(made)) == sorted(members)
    assert ranks.count(made) == len(members)
    assert all(ranks.holds(made, rank) for rank in members)
    assert not ranks.holds(made, 3_001)


@given(some_ranks, some_ranks)
def test_and_or_and_not_are_those_of_sets(a: set[int], b: set[int]) -> None:
    left, right = ranks.union(a), ranks.union(b)
    assert set(ranks.each(left & right)) == a & b
    assert set(ranks.each(left | right)) == a | b
    assert set(ranks.each(left & ~right)) == a - b


@given(some_ranks)
def test_a_packed_set_is_the_same_when_unpacked_and_has_no_trailing_zeros(members: set[int]) -> None:
    packed = ranks.pack(ranks.union(members))
    assert ranks.unpack(packed) == ranks.union(members)
    assert not packed.endswith(b"\0")


def test_only_one_is_the_union_of_one() -> None:
    assert ranks.only(17) == ranks.union([17])


def test_the_highest_rank_fits_and_the_next_does_not() -> None:
    highest = ranks.pack(ranks.only(MAX_RANK))
    assert len(highest) == MAX_BITMAP
    assert ranks.unpack(highest) == ranks.only(MAX_RANK)
    with pytest.raises(ValueError, match="may not go above"):
        ranks.unpack(ranks.pack(ranks.only(MAX_RANK + 1)))


def test_trailing_zeros_of_a_sender_that_packs_otherwise_change_nothing() -> None:
    assert ranks.unpack(b"\x05\0\0") == ranks.union([0, 2])
