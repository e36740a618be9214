"""An agent's way up: the planned parent first, then each ancestor in turn, and never for ever without trying."""

from __future__ import annotations

from protocol.commands import Member
from protocol.events import Connect, Disconnect, Effect
from protocol.limits import ATTACH_JITTER, ATTACH_WITHIN, MAX_TEXT, PARENT_TRIES, RETRY_MOST, SILENT_AFTER
from protocol.uplink import Phase, Uplink


def _member(rank: int | None) -> Member:
    return Member(rank, f"h{rank}", "198.18.0.1", 1, 2, b"k" * 32)


_PARENT, _ROOT = _member(7), _member(None)


def _uplink(*ancestors: Member) -> Uplink:
    uplink = Uplink(ancestors or (_PARENT, _ROOT), lambda: 0.5)
    uplink.begin(0.0)
    return uplink


def _attached(uplink: Uplink, now: float = 0.0) -> None:
    uplink.advance(now)
    assert uplink.accepted(uplink.epoch, now)


def _next(uplink: Uplink) -> tuple[float, list[Effect]]:
    """Let time pass to the next thing that it does."""
    now = uplink.wakeup()
    return now, uplink.advance(now)


def test_it_attaches_to_its_planned_parent_at_once() -> None:
    uplink = _uplink()
    assert uplink.advance(0.0) == [Connect(_PARENT)]
    assert uplink.phase is Phase.ATTACHING
    assert uplink.accepted(1, 0.1)
    assert uplink.attached


def test_an_answer_to_an_earlier_attachment_counts_for_nothing() -> None:
    uplink = _uplink()
    uplink.advance(0.0)
    uplink.lost("refused", 0.1)
    _next(uplink)
    assert not uplink.accepted(1, 1.0)
    assert uplink.accepted(2, 1.0)


def test_a_lost_parent_is_followed_by_the_next_ancestor_within_the_jitter() -> None:
    uplink = _uplink()
    _attached(uplink)
    assert uplink.lost("connection closed", 5.0) == [Disconnect()]
    assert not uplink.attached
    now, effects = _next(uplink)
    assert effects == [Connect(_ROOT)]
    assert now <= 5.0 + ATTACH_JITTER
    assert uplink.why == "h7: connection closed"


def test_a_loss_that_is_reported_twice_counts_once() -> None:
    uplink = _uplink()
    _attached(uplink)
    uplink.lost("connection closed", 5.0)
    assert uplink.lost("connection closed", 5.0) == []
    assert _next(uplink)[1] == [Connect(_ROOT)]


def test_a_silent_parent_is_lost_and_one_that_is_heard_is_not() -> None:
    uplink = _uplink()
    _attached(uplink)
    uplink.heard = 3.0
    assert uplink.advance(SILENT_AFTER) == []
    assert uplink.advance(3.0 + SILENT_AFTER) == [Disconnect()]


def test_a_planned_parent_that_refuses_is_asked_a_few_times_and_one_that_is_silent_once() -> None:
    uplink = _uplink()
    tried = []
    now, effects = _next(uplink)
    while effects == [Connect(_PARENT)]:
        tried.append(now)
        uplink.lost("refused", now)
        now, effects = _next(uplink)
    assert effects == [Connect(_ROOT)]
    assert len(tried) == PARENT_TRIES + 1
    assert now < 2.0
    uplink = _uplink()
    _next(uplink)
    now, effects = _next(uplink)
    assert (now, effects) == (ATTACH_WITHIN, [Disconnect()])
    assert _next(uplink)[1] == [Connect(_ROOT)]


def test_when_all_have_failed_it_pauses_longer_each_time_up_to_a_limit_and_never_gives_up() -> None:
    uplink = _uplink()
    _attached(uplink)
    now, pauses, seen = 0.0, [], set()
    uplink.lost("closed", now)
    for _ in range(40):
        before = now
        now, effects = _next(uplink)
        (connect,) = effects
        assert isinstance(connect, Connect)
        seen.add(connect.member.rank)
        pauses.append(now - before)
        uplink.lost("closed", now)
    assert seen == {7, None}
    assert max(pauses) <= 1.5 * RETRY_MOST
    assert pauses[-1] >= 0.5 * RETRY_MOST


def test_a_new_plan_moves_it_and_one_with_the_same_parent_does_not() -> None:
    uplink = _uplink()
    _attached(uplink)
    uplink.replan((_PARENT, _member(3), _ROOT), 1.0)
    assert uplink.phase is Phase.ATTACHED
    other = _member(9)
    uplink.replan((other, _ROOT), 2.0)
    now, effects = _next(uplink)
    assert effects == [Connect(other)]
    assert now <= 2.0 + ATTACH_JITTER


def test_a_new_plan_brings_home_an_agent_that_hangs_elsewhere() -> None:
    uplink = _uplink()
    _attached(uplink)
    uplink.lost("closed", 1.0)
    _next(uplink)
    assert uplink.accepted(uplink.epoch, 2.0)
    uplink.replan((_PARENT, _ROOT), 3.0)
    assert _next(uplink)[1] == [Connect(_PARENT)]


def test_each_attachment_has_its_own_number() -> None:
    uplink = _uplink()
    epochs = []
    for _ in range(5):
        now, _effects = _next(uplink)
        epochs.append(uplink.epoch)
        uplink.lost("refused", now)
    assert epochs == [1, 2, 3, 4, 5]


def test_a_process_that_slept_does_not_blame_its_parent() -> None:
    uplink = _uplink()
    _attached(uplink)
    uplink.doubt(100.0)
    assert uplink.advance(100.0) == []
    assert uplink.attached


def test_a_reason_is_never_longer_than_a_parent_takes() -> None:
    uplink = _uplink()
    _attached(uplink)
    uplink.lost("rejected: " + "x" * MAX_TEXT, 1.0)
    assert len(uplink.why) == MAX_TEXT
