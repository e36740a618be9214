"""An agent's own work: begun at most once, answered whenever it is asked for, forgotten when the root says so."""

from __future__ import annotations

import msgspec

from protocol import ranks
from protocol.commands import Body, Cancel, Command, Feed, Leave, Run, Settled
from protocol.duty import DEPART_AFTER, Duty
from protocol.events import Depart, Effect, Finished, Forget, Start, Stop, Type, Warn
from protocol.limits import KEEP_AFTER, KILL_AFTER, MAX_OUTPUT, MAX_TEXT, MAX_WAITING_FOR_CLOCK
from protocol.messages import Deliver, Manner
from protocol.outcomes import (
    NO_OUTPUT,
    RESTARTED,
    Cancelled,
    Exited,
    FailedToStart,
    Killed,
    Lost,
    Outcome,
    Output,
    Refused,
    TimedOut,
)
from protocol.trust import Guard, Signer

_SIGNER = Signer(b"\x01" * 32)
_RUN = Run(argv=("true",), output_limit=0)
#: The root's clock at local time zero, in seconds.
_EPOCH = 1_700_000_000.0


def _duty() -> Duty:
    guard = Guard(fleet="f", verify_key=_SIGNER.verify_key, rank=1, started=0.0)
    guard.time.ask(b"n" * 16, 0.0)
    told = _SIGNER.clock("f", 1, b"n" * 16, round(_EPOCH * 1000))
    guard.time.tell(told, 1, "f", _SIGNER.verify_key, 0.0)
    return Duty(guard)


def _command(id_: int = 1, body: Body = _RUN, issued: float = 1.0) -> Command:
    issued_ms = round((_EPOCH + issued) * 1000)
    return Command(
        fleet="f",
        id=id_,
        targets=ranks.pack(ranks.only(1)),
        issued_ms=issued_ms,
        expires_ms=issued_ms + 60_000,
        body=body,
    )


def _delivery(command: Command, ttl_ms: int | None = None) -> Deliver:
    payload, signature = _SIGNER.command(command)
    return Deliver(command.id, command.targets, ttl_ms, Manner.WORK, payload, signature)


def _begun(duty: Duty, id_: int = 1, ttl: float | None = None, now: float = 2.0) -> None:
    assert duty.deliver(_command(id_), ttl, now) == ([Start(id_, _RUN, ttl)], None)


def _quiet(duty: Duty, body: Body, now: float = 3.0) -> tuple[list[Effect], list[tuple[int, tuple[Outcome, Output]]]]:
    return duty.quiet(_command(99, body), now)


def test_a_command_is_begun_and_its_outcome_kept() -> None:
    duty = _duty()
    _begun(duty)
    assert duty.known(1) == (True, None)
    output = Output(out=b"hello")
    assert duty.finished(Finished(1, Exited(0), output), 3.0) == ([], (Exited(0), output))
    assert duty.known(1) == (True, (Exited(0), output))
    assert not duty.known(2)[0]


def test_work_that_ends_twice_ended_once() -> None:
    duty = _duty()
    _begun(duty)
    duty.finished(Finished(1, Exited(0)), 3.0)
    assert duty.finished(Finished(1, Exited(1)), 3.0) == ([], None)
    assert duty.finished(Finished(7, Exited(1)), 3.0) == ([], None)


def test_a_settled_command_is_forgotten_and_yet_never_begun_again() -> None:
    duty = _duty()
    _begun(duty)
    duty.finished(Finished(1, Exited(0)), 3.0)
    # 2 is none of its own, and yet its chunks may pass through here.
    assert _quiet(duty, Settled(ids=(1, 2))) == ([Forget((1, 2))], [])
    assert len(duty) == 0
    for id_ in (1, 2):
        known, answer = duty.known(id_)
        assert known
        assert answer is not None
        assert isinstance(answer[0], Refused)
        assert answer[0].trust


def test_a_command_that_the_root_gave_up_while_it_ran_is_forgotten_when_it_ends() -> None:
    duty = _duty()
    _begun(duty)
    assert _quiet(duty, Settled(ids=(1,))) == ([], [])
    assert duty.finished(Finished(1, Exited(0)), 3.0) == ([Forget((1,))], (Exited(0), NO_OUTPUT))
    assert len(duty) == 0


def test_a_cancel_ends_politely_and_then_for_certain() -> None:
    duty = _duty()
    _begun(duty)
    assert _quiet(duty, Cancel(of=1), 3.0) == ([Stop(1, hard=False)], [])
    assert _quiet(duty, Cancel(of=1), 3.5) == ([], []), "a second cancel adds nothing"
    assert duty.wakeup() == 3.0 + KILL_AFTER
    assert duty.advance(3.0 + KILL_AFTER - 0.1, childless=True) == []
    assert duty.advance(3.0 + KILL_AFTER, childless=True) == [Stop(1, hard=True)]
    assert duty.advance(100.0, childless=True) == []
    assert duty.finished(Finished(1, Killed(9)), 3.0) == ([], (Cancelled(ran=True), NO_OUTPUT))
    assert duty.wakeup() == 3.0 + KEEP_AFTER, "it was not acknowledged by then"
    _quiet(duty, Settled(ids=(1,)))
    assert duty.wakeup() is None


def test_a_cancel_keeps_what_was_written_before() -> None:
    duty = _duty()
    _begun(duty)
    _quiet(duty, Cancel(of=1))
    assert duty.finished(Finished(1, Killed(15), Output(out=b"half")), 3.0)[1] == (
        Cancelled(ran=True),
        Output(out=b"half"),
    )


def test_a_cancel_before_its_command_keeps_it_from_ever_beginning() -> None:
    duty = _duty()
    cancelled = (Cancelled(ran=False), NO_OUTPUT)
    assert _quiet(duty, Cancel(of=1)) == ([], [(1, cancelled)])
    assert duty.known(1) == (True, cancelled)
    _quiet(duty, Settled(ids=(1,)))
    known, answer = duty.known(1)
    assert known
    assert answer is not None


def test_a_cancel_after_the_end_tells_the_outcome_that_it_had() -> None:
    duty = _duty()
    _begun(duty)
    duty.finished(Finished(1, Exited(3), Output(out=b"x")), 3.0)
    assert _quiet(duty, Cancel(of=1)) == ([], [(1, (Exited(3), Output(out=b"x")))])
    _quiet(duty, Settled(ids=(1,)))
    assert _quiet(duty, Cancel(of=1)) == ([], [])


def test_the_deadline_ends_it_as_a_cancel_does_and_says_so() -> None:
    duty = _duty()
    _begun(duty, ttl=5.0, now=2.0)
    assert duty.wakeup() == 7.0
    assert duty.advance(6.9, childless=True) == []
    assert duty.advance(7.0, childless=True) == [Stop(1, hard=False)]
    assert duty.advance(7.0 + KILL_AFTER, childless=True) == [Stop(1, hard=True)]
    assert duty.finished(Finished(1, Killed(9)), 3.0)[1] == (TimedOut(), NO_OUTPUT)


def test_a_cancelled_command_that_meets_its_deadline_too_is_cancelled() -> None:
    duty = _duty()
    _begun(duty, ttl=5.0, now=2.0)
    _quiet(duty, Cancel(of=1), 6.5)
    duty.advance(7.5, childless=True)
    assert duty.finished(Finished(1, Killed(15)), 3.0)[1] == (Cancelled(ran=True), NO_OUTPUT)


def test_a_failure_to_start_stays_one_whoever_wanted_it_ended() -> None:
    duty = _duty()
    _begun(duty)
    _quiet(duty, Cancel(of=1))
    assert duty.finished(Finished(1, FailedToStart("no such file")), 3.0)[1] == (
        FailedToStart("no such file"),
        NO_OUTPUT,
    )


def test_a_command_without_time_left_is_not_begun() -> None:
    duty = _duty()
    assert duty.deliver(_command(), 0.0, 2.0) == ([], (TimedOut(), NO_OUTPUT))
    assert duty.known(1) == (True, (TimedOut(), NO_OUTPUT))


def test_a_refusal_for_age_is_final() -> None:
    duty = _duty()
    effects, answer = duty.deliver(_command(issued=-1.0), None, 2.0)
    assert not any(isinstance(effect, Start) for effect in effects)
    assert answer is not None
    assert answer[0] == Lost(RESTARTED)
    known, again = duty.known(1)
    assert known
    assert again == answer
    assert len(duty) == 0, "whoever replays old commands fills no memory"


def test_commands_that_come_before_the_clock_is_known_wait_once_each_and_lose_the_time_that_they_wait() -> None:
    duty = _duty()
    delivery = _delivery(_command(), ttl_ms=5_000)
    assert duty.postpone(delivery, _command(), 10.0) == ([], None)
    assert duty.postpone(delivery, _command(), 11.0) == ([], None)
    assert len(duty) == 1
    assert duty.take_postponed(12.0) == [msgspec.structs.replace(delivery, ttl_ms=3_000)]
    assert duty.take_postponed(12.0) == []


def test_only_so_many_commands_wait_for_the_clock() -> None:
    duty = _duty()
    for id_ in range(MAX_WAITING_FOR_CLOCK):
        assert duty.postpone(_delivery(_command(id_)), _command(id_), 0.0) == ([], None)
    one_more = _command(1_000)
    _, answer = duty.postpone(_delivery(one_more), one_more, 0.0)
    assert answer is not None
    assert isinstance(answer[0], Refused)
    assert duty.known(1_000) == (True, answer), "what was refused is not begun later"


def test_a_command_given_up_while_it_waited_for_the_clock_is_not_begun() -> None:
    duty = _duty()
    duty.postpone(_delivery(_command()), _command(), 0.0)
    _quiet(duty, Settled(ids=(1,)))
    assert duty.take_postponed(1.0) == []
    assert duty.known(1)[0]


def test_leaving_is_answered_at_once_and_done_when_the_root_has_the_answer_and_nobody_hangs_below() -> None:
    duty = _duty()
    leave = Leave(purge=True)
    assert duty.deliver(_command(1, leave), None, 2.0) == ([], (Exited(0), NO_OUTPUT))
    assert duty.advance(50.0, childless=True) == []
    _quiet(duty, Settled(ids=(1,)), 60.0)
    assert duty.advance(60.0, childless=False) == []
    assert duty.advance(61.0, childless=True) == [Depart(leave)]
    assert duty.advance(62.0, childless=True) == []


def test_leaving_does_not_wait_for_children_for_ever() -> None:
    duty = _duty()
    duty.deliver(_command(1, Leave()), None, 2.0)
    _quiet(duty, Settled(ids=(1,)), 60.0)
    assert duty.wakeup() == 60.0 + DEPART_AFTER
    assert duty.advance(60.0 + DEPART_AFTER, childless=False) == [Depart(Leave())]


def test_what_a_worker_says_at_length_is_cut_to_what_a_parent_takes() -> None:
    duty = _duty()
    _begun(duty)
    long = FailedToStart("x" * 10_000 + "\udcff")
    _, answer = duty.finished(Finished(1, long, Output(out=b"y" * (MAX_OUTPUT + 1))), 3.0)
    assert answer is not None
    outcome, output = answer
    assert isinstance(outcome, FailedToStart)
    assert len(outcome.why) == MAX_TEXT
    assert len(output.out) == MAX_OUTPUT


def test_old_numbers_are_forgotten_only_when_the_guard_would_refuse_them_anyway() -> None:
    duty = _duty()
    for id_ in range(3_000):
        now = 2.0 + id_
        assert duty.deliver(_command(id_, issued=now), None, now)[1] is None
        duty.finished(Finished(id_, Exited(0)), 3.0)
        _quiet(duty, Settled(ids=(id_,)), now)
        assert duty.known(id_)[0]
    assert len(duty._seen) < 2_100
    for id_ in range(3_000):
        if not duty.known(id_)[0]:
            _, answer = duty.deliver(_command(id_, issued=2.0 + id_), None, 3_002.0)
            assert answer is not None
            assert isinstance(answer[0], Refused)


def test_what_is_typed_goes_to_a_console_that_is_open_and_to_no_other() -> None:
    duty = _duty()
    feed = Feed(of=1, offset=0, data=b"x", seen=0)
    assert duty.quiet(_command(2, feed), 2.0) == ([], [])
    _begun(duty)
    assert duty.quiet(_command(3, feed), 2.0) == ([Type(feed)], [])
    duty.finished(Finished(1, Exited(0)), 2.0)
    assert duty.quiet(_command(4, feed), 2.0) == ([], [])


def test_what_was_typed_long_ago_or_to_the_agent_before_is_refused() -> None:
    duty = _duty()
    _begun(duty)
    for late in (_command(2, Feed(of=1, offset=0, data=b"x", seen=0), issued=-9.0), None):
        command = late or _command(3, Feed(of=1, offset=0, data=b"x", seen=0))
        effects, outcomes = duty.quiet(command, 2.0 if late else 100.0)
        assert [type(effect) for effect in effects] == [Warn]
        assert outcomes == []
