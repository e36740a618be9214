"""Outcomes that are many and large stay below a narrow link, and get through it all the same."""

from __future__ import annotations

from collections import deque

import pytest

from protocol import ranks
from protocol.folding import Folding
from protocol.limits import FOLD_BYTES, MAX_FOLDS, MAX_OUTPUT, MAX_TEXT, OUTCOME_CREDIT, OUTCOME_LAST
from protocol.outcomes import NO_OUTPUT, Exited, Fold, Lost, Output
from protocol.pacing import Pace, weight


def fold(rank: int, size: int) -> Fold:
    return Fold(ranks.pack(ranks.only(rank)), Exited(0), Output(b"%04d" % rank * (size // 4), b"", size))


def test_who_has_used_its_credit_waits_until_its_parent_has_passed_some_on() -> None:
    child, parent = Pace(), Pace()
    parent.attached(1)
    sent = 0
    while child.room:
        child.sent([fold(1, FOLD_BYTES)])
        parent.came(1, [fold(1, FOLD_BYTES)])
        sent += weight([fold(1, FOLD_BYTES)])
    assert OUTCOME_CREDIT <= sent < OUTCOME_CREDIT + 2 * FOLD_BYTES
    ((rank, total),) = parent.due()
    assert (rank, total, parent.due()) == (1, sent, [])
    child.heard(total)
    assert child.room


def test_small_outcomes_cost_no_answer() -> None:
    parent = Pace()
    parent.attached(1)
    told = 0
    for _ in range(100):
        parent.came(1, [Fold(b"\1", Exited(0), NO_OUTPUT)])
        told += len(parent.due())
    assert told == 0


def test_a_parent_that_may_send_no_more_tells_no_child_to() -> None:
    pace = Pace()
    pace.attached(1)
    pace.came(1, [fold(1, OUTCOME_CREDIT)])
    pace.sent([fold(1, OUTCOME_CREDIT)])
    assert pace.due() == []
    pace.heard(2**62)
    assert [rank for rank, _ in pace.due()] == [1]


def test_nobody_hears_more_than_it_sent_and_a_new_parent_counts_anew() -> None:
    pace = Pace()
    pace.heard(2**62)
    pace.sent([fold(1, OUTCOME_CREDIT)])
    assert not pace.room, "that was before"
    pace.begin()
    pace.attached(7)
    pace.attached(8)
    for child in (7, 8):
        pace.came(child, [fold(1, OUTCOME_CREDIT)])
    pace.lost(7)
    assert [child for child, _ in pace.due()] == [8]


def test_who_sends_on_though_nothing_was_heard_of_it_is_found_out() -> None:
    parent = Pace()
    parent.attached(1)
    parent.sent([fold(1, OUTCOME_CREDIT)])  # nothing more may go up from there
    sent = 0
    while parent.came(1, [fold(1, FOLD_BYTES)]):
        sent += weight([fold(1, FOLD_BYTES)])
        assert parent.due() == []
    assert OUTCOME_LAST <= sent <= OUTCOME_LAST + weight([fold(1, FOLD_BYTES)])


def test_texts_and_numbers_of_outcomes_count_as_well() -> None:
    assert weight([Fold(b"\1", Lost("x" * MAX_TEXT))]) > 4 * MAX_TEXT
    assert weight([Fold(bytes(8_000) + b"\1", Exited(0), Output(spool="/" * 1_000))]) > 12_000
    assert weight([Fold(b"\1", Exited(0))] * MAX_FOLDS) > OUTCOME_LAST, "what Python needs for each"


def test_a_message_that_holds_more_than_a_relay_puts_in_one_is_found_out() -> None:
    parent = Pace()
    parent.attached(1)
    assert parent.came(1, [fold(1, FOLD_BYTES // 2), fold(2, 2 * MAX_OUTPUT)])
    parent.due()
    assert not parent.came(1, [fold(1, FOLD_BYTES), fold(2, 8)])


def test_attaching_again_brings_no_credit_while_as_much_is_held_of_what_came_before() -> None:
    parent = Pace()
    parent.sent([fold(1, OUTCOME_CREDIT)])
    for turn in range(8):  # a little each time
        assert not parent.clogged(1), f"after {turn} attachments"
        parent.attached(1)
        assert parent.came(1, [fold(1, OUTCOME_CREDIT // 8)])
        if turn % 2:
            parent.lost(1)
    assert parent.clogged(1)
    assert not parent.clogged(2)
    parent.heard(2**62)
    assert parent.due(held=OUTCOME_CREDIT + 1) == [], "it may go up, and has not"
    assert parent.clogged(1)
    parent.due()
    assert not parent.clogged(1)


@pytest.mark.parametrize("size", [200, 100_000, MAX_OUTPUT])
def test_a_relay_behind_a_narrow_link_holds_a_credit_and_a_message_of_each_child_and_all_gets_through(
    size: int,
) -> None:
    children, each = range(1, 33), 6
    relay, folding = Pace(), Folding()
    paces = {child: Pace() for child in children}
    left = {child: deque(fold(100 * child + number, size) for number in range(each)) for child in children}
    for child in children:
        relay.attached(child)
    came: set[int] = set()
    above: deque[tuple[Fold, ...]] = deque()
    most = passed = 0
    for _ in range(10_000):
        for child, outcomes in left.items():
            while outcomes and paces[child].room:
                paces[child].sent([outcomes[0]])
                relay.came(child, [outcomes[0]])
                folding.add(1, [outcomes.popleft()], 0.0)
        for message in folding.ready(1.0) if relay.room else ():
            relay.sent(message.folds)
            above.append(message.folds)
            if not relay.room:
                break
        most = max(most, folding.held + sum(map(weight, above)))
        for child, total in relay.due():
            paces[child].heard(total)
        if above:  # the link takes a message at a time
            passed += weight(above[0])
            came |= {rank for one in above.popleft() for rank in ranks.each(ranks.unpack(one.ranks))}
            relay.heard(passed)
    assert len(came) == len(children) * each
    assert most <= (len(children) + 1) * (OUTCOME_CREDIT + FOLD_BYTES + size + 3_000)
    assert (folding.held, len(folding)) == (0, 0)
