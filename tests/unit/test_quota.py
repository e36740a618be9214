"""What a relay passes up of others' output: all that honest hosts send, and of a liar no more than memory bears."""

from __future__ import annotations

import random
from collections import deque

import pytest

from protocol import ranks
from protocol.flow import Inflow, Outflow
from protocol.limits import STREAM_PIECE, STREAM_TOTAL
from protocol.messages import Grant
from protocol.quota import PASSED_MOST, STRANGE_MOST, Quota

CHILD, RANK, ID = 1, 2, 7


def flood(quota: Quota, ids: list[int], most: int) -> int:
    """How many bytes of a flood of pieces pass before the child is cut off."""
    passed = 0
    while quota.passes(CHILD, RANK, ids[passed // STREAM_PIECE % len(ids)], STREAM_PIECE):
        passed += STREAM_PIECE
        assert passed <= most
    return passed


def test_a_flood_beyond_all_credit_ends() -> None:
    quota = Quota()
    quota.given(ID)
    assert flood(quota, [ID], PASSED_MOST) == PASSED_MOST
    quota.granted(ID, RANK)
    assert flood(quota, [ID], PASSED_MOST) == PASSED_MOST


def test_a_flood_of_jobs_that_never_passed_here_ends_however_many_are_made_up() -> None:
    quota = Quota()
    flood(quota, list(range(1_000_000)), STRANGE_MOST)
    assert not len(quota), "what is made up is not remembered"
    quota.attached(CHILD, ranks.only(RANK))
    assert quota.passes(CHILD, RANK, 5, STREAM_PIECE), "whoever attaches may bring output along"


def test_empty_pieces_count_as_well() -> None:
    quota = Quota()
    quota.given(ID)
    assert sum(quota.passes(CHILD, RANK, ID, 0) for _ in range(PASSED_MOST // 64 + 10)) == PASSED_MOST // 64


@pytest.mark.parametrize("seed", range(8))
def test_an_honest_host_is_never_cut_off_whatever_is_lost_and_comes_again(seed: int) -> None:
    draw = random.Random(seed)
    quota, host, root = Quota(), Outflow(), Inflow([RANK])
    quota.given(ID)
    up: deque[tuple[int, int, bytes, int, bool]] = deque()
    above: deque[tuple[int, int, bytes, int, bool]] = deque()
    down: deque[Grant] = deque()
    total = 0
    while total < STREAM_TOTAL // 4:
        if not host.full:
            host.write(draw.choice((1, 2)), bytes(STREAM_PIECE))
        up.extend(host.take(fast=draw.random() < 0.5))
        for _ in range(draw.randrange(20) if up else 0):
            if not up:
                break
            assert quota.passes(CHILD, RANK, ID, len(up[0][2]))
            above.append(up.popleft())
        while above and draw.random() < 0.8:
            number, offset, data, has, fast = above.popleft()
            fresh = root.arrived(RANK, number, offset, data, has, fast=fast)
            total += len(fresh)
            root.read(RANK, len(fresh))
        for grant in root.grants():
            quota.granted(ID, RANK)
            down.append(grant)
        while down and draw.random() < 0.7:
            host.granted(down.popleft())
        if draw.random() < 0.1:
            host.forgo()
        if draw.random() < 0.05:  # the relay finds another parent: what was on its way up is lost
            above.clear()
            quota.anew(ranks.only(RANK))
            host.rewind()
        if draw.random() < 0.05:  # the host attaches anew: what was on its way to the relay is lost
            up.clear()
            down.clear()
            quota.attached(CHILD, ranks.only(RANK))
            host.rewind()
