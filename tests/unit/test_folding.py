"""Equal outcomes travel once, different ones each, and none waits for long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol import codec, ranks
from protocol.folding import Folding
from protocol.limits import FOLD_BYTES, FOLD_KEEP, FOLD_WINDOW, MAX_BODY, MAX_OUTPUT, MAX_RANK
from protocol.messages import Outcomes
from protocol.outcomes import Exited, Fold, Lost, Outcome, Output


def _fold(*who: int, outcome: Outcome = Exited(0), out: bytes = b"") -> Fold:  # noqa: B008  frozen
    return Fold(ranks.pack(ranks.union(who)), outcome, Output(out=out))


def _ready(folding: Folding, now: float) -> list[Outcomes]:
    return list(folding.ready(now))


def test_equal_outcomes_leave_as_one_when_all_have_answered() -> None:
    folding = Folding()
    folding.expect(1, ranks.union([1, 2, 3]))
    folding.add(1, [_fold(1)], 0.0)
    folding.add(1, [_fold(2)], 0.0)
    assert _ready(folding, 0.001) == []
    folding.add(1, [_fold(3)], 0.002)
    assert _ready(folding, 0.002) == [Outcomes(1, (_fold(1, 2, 3),))]
    assert len(folding) == 0


def test_outcomes_that_differ_in_anything_stay_apart() -> None:
    folding = Folding()
    folding.expect(1, ranks.union([1, 2, 3]))
    folds = [_fold(1), _fold(2, out=b"x"), _fold(3, outcome=Exited(1))]
    folding.add(1, folds, 0.0)
    assert _ready(folding, 0.0) == [Outcomes(1, tuple(folds))]


def test_nobody_waits_longer_than_the_window_for_a_slow_host() -> None:
    folding = Folding()
    folding.expect(1, ranks.union([1, 2]))
    folding.add(1, [_fold(1)], 5.0)
    assert folding.wakeup() == 5.0 + FOLD_WINDOW
    assert _ready(folding, 5.0 + FOLD_WINDOW / 2) == []
    assert _ready(folding, 5.0 + FOLD_WINDOW) == [Outcomes(1, (_fold(1),))]
    assert folding.wakeup() is None
    folding.add(1, [_fold(2)], 9.0)
    assert _ready(folding, 9.0) == [Outcomes(1, (_fold(2),))]
    assert len(folding) == 0


def test_outcomes_that_nobody_expected_wait_for_their_like_and_are_forgotten_when_sent() -> None:
    folding = Folding()
    folding.add(1, [_fold(1)], 0.0)
    folding.add(1, [_fold(2)], 0.01)
    assert _ready(folding, 0.01) == []
    assert _ready(folding, FOLD_WINDOW) == [Outcomes(1, (_fold(1, 2),))]
    assert len(folding) == 0


def test_nothing_is_waited_for_from_hosts_that_are_gone() -> None:
    folding = Folding()
    folding.expect(1, ranks.union([1, 2]))
    folding.expect(2, ranks.only(2))
    folding.add(1, [_fold(1)], 0.0)
    folding.expect_only(ranks.only(1))
    assert _ready(folding, 0.0) == [Outcomes(1, (_fold(1),))]
    assert len(folding) == 0


def test_large_outputs_do_not_wait_to_be_larger() -> None:
    folding = Folding()
    folding.expect(1, ranks.union(range(10)))
    folding.add(1, [_fold(1, out=b"x" * FOLD_BYTES)], 0.0)
    assert len(_ready(folding, 0.0)) == 1


def test_without_a_way_up_outcomes_stay_and_leave_when_there_is_one() -> None:
    folding = Folding()
    folding.expect(1, ranks.union([1, 2]))
    folding.expect(2, ranks.only(2))
    folding.add(1, [_fold(1)], 0.0)
    folding.expect_nobody()
    assert len(folding) == 1
    assert _ready(folding, 100.0) == [Outcomes(1, (_fold(1),))]
    assert len(folding) == 0


def test_what_is_kept_without_a_way_up_is_bounded_oldest_first() -> None:
    folding = Folding()
    pieces = FOLD_KEEP // MAX_OUTPUT + 3
    for id_ in range(pieces):
        folding.add(id_, [_fold(1, out=bytes([id_]) * MAX_OUTPUT)], 0.0)
    given_up = folding.bound()
    assert 0 < given_up < 6
    assert [message.id for message in folding.ready(1.0)] == list(range(given_up, pieces))


def test_settled_commands_are_waited_for_no_more_and_what_came_for_them_leaves() -> None:
    folding = Folding()
    folding.expect(1, ranks.union([1, 2]))
    folding.expect(2, ranks.union([1, 2]))
    folding.add(2, [_fold(1)], 0.0)
    folding.settled([1, 2, 3])
    assert _ready(folding, 0.0) == [Outcomes(2, (_fold(1),))]
    assert len(folding) == 0


def test_the_oldest_expectation_goes_when_there_are_too_many_and_its_outcomes_still_leave() -> None:
    folding = Folding()
    for id_ in range(5_000):
        folding.expect(id_, ranks.only(1))
    assert len(folding) <= 4_096
    folding.add(0, [_fold(1)], 0.0)
    assert _ready(folding, FOLD_WINDOW) == [Outcomes(0, (_fold(1),))]


def test_what_is_held_of_hosts_leaves_when_news_of_them_must_not_overtake_it() -> None:
    folding = Folding()
    folding.expect(1, ranks.union([1, 2, 3, 4]))
    folding.add(1, [_fold(1), _fold(3, 4, out=b"x")], 0.0)
    folding.add(2, [_fold(3)], 0.0)
    assert list(folding.about(ranks.only(1))) == [Outcomes(1, (_fold(1),))]
    assert list(folding.about(ranks.only(1))) == []
    assert list(folding.about(ranks.only(4))) == [Outcomes(1, (_fold(3, 4, out=b"x"),))]
    folding.add(1, [_fold(2)], 0.0)
    assert _ready(folding, 0.0) == [Outcomes(1, (_fold(2),))]
    assert _ready(folding, FOLD_WINDOW) == [Outcomes(2, (_fold(3),))]
    assert (folding.held, len(folding)) == (0, 0)


@given(
    st.lists(st.tuples(st.integers(0, MAX_RANK), st.integers(0, 40_000), st.integers(0, 500)), min_size=1, max_size=60)
)
def test_no_message_is_larger_than_a_receiver_takes_and_none_is_lost(answers: list[tuple[int, int, int]]) -> None:
    folding = Folding()
    for number, (rank, size, why) in enumerate(answers):
        outcome = Lost(f"{number}" + "é" * why)
        folding.add(1, [Fold(ranks.pack(ranks.only(rank)), outcome, Output(out=b"x" * size))], 0.0)
    messages = _ready(folding, 1.0)
    for message in messages:
        assert len(codec.encode(message)[1]) <= MAX_BODY
    assert sum(len(message.folds) for message in messages) == len(answers)


def test_two_full_outputs_and_a_full_batch_before_them_still_fit() -> None:
    folding = Folding()
    folding.add(1, [_fold(1, out=b"a" * (FOLD_BYTES - 100))], 0.0)
    both = Output(out=b"b" * MAX_OUTPUT, err=b"c" * MAX_OUTPUT)
    folding.add(1, [Fold(ranks.pack(ranks.only(MAX_RANK)), Exited(0), both)], 0.0)
    for message in _ready(folding, 1.0):
        codec.encode(message)
