"""One relay at a time: what it does with each message, who may send it what, and what becomes of those who may not."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from protocol import ranks
from protocol.commands import Below, Body, Cancel, Command, Member, Plan, Run, Settled
from protocol.events import (
    Admit,
    Advanced,
    Arrived,
    Begin,
    ChildLost,
    Connect,
    Disconnect,
    DropChild,
    Effect,
    Event,
    Finished,
    FromChild,
    FromParent,
    Granted,
    Grants,
    Observed,
    ParentLost,
    Replan,
    SavePlan,
    Start,
    Stop,
    Submit,
    Tell,
    TellLate,
    TellLinks,
    TellProgress,
    TellReports,
    TellSettled,
    TellStream,
    TellTaken,
    Tick,
    ToChild,
    ToParent,
    Warn,
    Wrote,
)
from protocol.limits import (
    BEAT_EVERY,
    CLOCK_EVERY,
    CLOCK_RETRY,
    FOLD_BYTES,
    FOLD_WINDOW,
    LOST_AFTER,
    ORPHANED_AFTER,
    OUTCOME_CREDIT,
    OUTCOME_LAST,
    PLAN_GRACE,
    REPORT_WINDOW,
    SILENT_AFTER,
)
from protocol.messages import (
    Ask,
    Attach,
    Attached,
    Beat,
    ClockAsk,
    ClockTell,
    Credit,
    Deliver,
    Grant,
    Heard,
    Link,
    Links,
    Manner,
    Outcomes,
    Progress,
    Rejected,
    Report,
    Reports,
    Streamed,
    Taken,
)
from protocol.outcomes import RESTARTED, Cancelled, Exited, Fold, Lost, Output, Refused
from protocol.pacing import weight
from protocol.relay import Relay, RootPart
from protocol.trust import Guard, Signer

_SIGNER = Signer(b"\x01" * 32)
_EPOCH = 1_700_000_000.0
_RUN = Run(argv=("true",), output_limit=0)
#: root - 1 - (2 - (4, 5), 3), and 9 beside 1
_PARENTS: dict[int, int | None] = {1: None, 2: 1, 3: 1, 4: 2, 5: 2, 9: None}


def _member(rank: int | None) -> Member:
    return Member(rank, f"h{rank}", "198.18.0.1", 1, 2, bytes([255 if rank is None else rank]) * 32)


def _below(rank: int | None, parents: dict[int, int | None]) -> tuple[Below, ...]:
    found: list[int] = []
    for host, parent in parents.items():
        if parent == rank or parent in found:
            found.append(host)
    return tuple(Below(host, parents[host], _member(host).key) for host in found)


def _plan(rank: int | None, version: int = 1, parents: dict[int, int | None] = _PARENTS) -> Plan:
    above, at = [], rank
    while at is not None:
        at = parents[at]
        above.append(_member(at))
    return Plan(version=version, you=_member(rank), ancestors=tuple(above), below=_below(rank, parents))


class _Bench:
    """A relay, and what it wants done."""

    def __init__(self, rank: int | None) -> None:
        self.now = 0.0
        self._nonces = 0
        if rank is None:
            root = RootPart(
                signer=_SIGNER, fleet="f", clock_ms=lambda now: round((now + _EPOCH) * 1000), name=lambda r: f"h{r}"
            )
            self.relay = Relay(plan=_plan(None), incarnation=1, draw=lambda: 0.5, nonce=self._nonce, root=root)
        else:
            guard = Guard(fleet="f", verify_key=_SIGNER.verify_key, rank=rank, started=0.0)
            self.relay = Relay(plan=_plan(rank), incarnation=1, draw=lambda: 0.5, nonce=self._nonce, guard=guard)
        self.begun = self(Begin())

    def _nonce(self) -> bytes:
        self._nonces += 1
        return self._nonces.to_bytes(16, "big")

    def __call__(self, event: Event, after: float = 0.0) -> list[Effect]:
        self.now += after
        effects = self.relay.handle(event, self.now)
        assert self.relay.next_wakeup() >= self.now or effects
        return effects

    def child(self, rank: int, message: Any, after: float = 0.0) -> list[Effect]:
        return self(FromChild(rank, message), after)

    def parent(self, message: Any, after: float = 0.0) -> list[Effect]:
        return self(FromParent(message), after)

    def attach(self, rank: int, *below: Link, epoch: int = 1, incarnation: int = 1) -> list[Effect]:
        parent = self.relay._me
        return self.child(rank, Attach(1, 1, (Link(rank, parent, incarnation, epoch, True), *below)))

    def wait(self, seconds: float) -> list[Effect]:
        """Let time pass as a shell does, at each time that was asked for."""
        effects: list[Effect] = []
        end = self.now + seconds
        while self.relay.next_wakeup() <= end:
            self.now = max(self.now, self.relay.next_wakeup())
            effects += self(Tick())
        self.now = end
        return effects + self(Tick())


def _agent(*, knows_time: bool = True, children: bool = True) -> _Bench:
    """Rank 1, attached to the root, with 2 (4 and 5 below it) and 3 below it."""
    bench = _Bench(1)
    bench.parent(Attached(1, 1))
    if knows_time:
        bench.parent(_SIGNER.clock("f", 1, (1).to_bytes(16, "big"), round(_EPOCH * 1000)))
    if children:
        bench.attach(2, Link(4, 2, 1, 1, True), Link(5, 2, 1, 1, True))
        bench.attach(3)
    return bench


def _root() -> _Bench:
    bench = _Bench(None)
    bench.attach(1, *(Link(rank, parent, 1, 1, True) for rank, parent in _PARENTS.items() if parent is not None))
    bench.attach(9)
    return bench


def _delivery(
    targets: set[int],
    body: Body = _RUN,
    id_: int = 1,
    *,
    now: float = 1.0,
    manner: Manner | None = None,
    ttl_ms: int | None = None,
) -> Deliver:
    issued = round((_EPOCH + now) * 1000)
    packed = ranks.pack(ranks.union(targets))
    command = Command(fleet="f", id=id_, targets=packed, issued_ms=issued, expires_ms=issued + 600_000, body=body)
    payload, signature = _SIGNER.command(command)
    if manner is None:
        manner = Manner.QUIET if isinstance(body, Cancel | Settled) else Manner.WORK
    return Deliver(id_, packed, ttl_ms, manner, payload, signature)


def _fold(*who: int, code: int = 0) -> Fold:
    return Fold(ranks.pack(ranks.union(who)), Exited(code))


def _sent_down(effects: list[Effect]) -> dict[int, set[int]]:
    """Child to targets, of the commands among these effects."""
    return {
        effect.rank: set(ranks.each(ranks.unpack(effect.message.targets)))
        for effect in effects
        if isinstance(effect, ToChild) and isinstance(effect.message, Deliver)
    }


def _sent_up(effects: list[Effect], kind: type) -> list[Any]:
    return [e.message for e in effects if isinstance(e, ToParent) and isinstance(e.message, kind)]


def _dropped(effects: list[Effect]) -> list[int]:
    return [effect.rank for effect in effects if isinstance(effect, DropChild)]


# --- beginning and attaching ------------------------------------------------------------------------------------------


def test_an_agent_admits_all_that_is_planned_below_it_and_attaches_to_its_parent() -> None:
    admit, connect, attach = _Bench(1).begun
    assert isinstance(admit, Admit)
    assert {rank for _, rank in admit.keys} == {2, 3, 4, 5}
    assert connect == Connect(_member(None))
    assert attach == ToParent(Attach(1, 1, (Link(1, None, 1, 1, True),)))


def test_the_root_admits_everybody_and_attaches_to_nobody() -> None:
    (admit,) = _Bench(None).begun
    assert isinstance(admit, Admit)
    assert {rank for _, rank in admit.keys} == set(_PARENTS)


def test_an_attached_agent_reports_anew_and_asks_for_the_time() -> None:
    bench = _Bench(1)
    effects = bench.parent(Attached(1, 1))
    assert Arrived() in effects
    assert _sent_up(effects, ClockAsk) == [ClockAsk(1, (1).to_bytes(16, "big"))]


def test_the_time_is_asked_for_until_it_is_told_and_now_and_then_afterwards() -> None:
    bench = _agent(knows_time=False, children=False)
    assert _sent_up(bench.wait(CLOCK_RETRY), ClockAsk)
    bench.parent(Beat())
    asked = _sent_up(bench.wait(2 * CLOCK_RETRY), ClockAsk)
    assert asked
    bench.parent(_SIGNER.clock("f", 1, asked[-1].nonce, round((_EPOCH + bench.now) * 1000)))
    silent: list[Effect] = []
    for _ in range(int(CLOCK_EVERY)):
        bench.parent(Beat())
        silent += bench.wait(1.0)
    assert len(_sent_up(silent, ClockAsk)) == 1


def test_a_child_that_attaches_is_answered_and_told_of_upwards() -> None:
    bench = _agent(children=False)
    link = Link(2, 1, 1, 4, True)
    effects = bench.attach(2, epoch=4)
    assert ToChild(2, Attached(1, 4)) in effects
    assert _sent_up(effects, Links) == [Links((link,))]


def test_children_of_a_relay_that_finds_a_new_way_up_are_told() -> None:
    bench = _agent()
    bench(ParentLost("connection closed"))
    bench.wait(1.0)
    effects = bench.parent(Attached(1, bench.relay._uplink.epoch if bench.relay._uplink else 0))
    assert {e.rank for e in effects if isinstance(e, ToChild) and isinstance(e.message, Attached)} == {2, 3}
    lower = _Bench(2)
    lower.parent(Attached(1, 1))
    again = lower.parent(Attached(1, 1))
    assert Arrived() in again


def test_who_came_while_the_attachment_was_on_its_way_is_told_of_when_it_is_answered() -> None:
    bench = _Bench(1)
    bench.attach(3)
    effects = bench.parent(Attached(1, 1))
    assert [link.rank for links in _sent_up(effects, Links) for link in links.links] == [3]


@pytest.mark.parametrize(("low", "high"), [(2, 9), (0, 0)])
def test_a_child_with_which_no_version_is_shared_is_told_so_in_a_sentence(low: int, high: int) -> None:
    bench = _agent(children=False)
    (rejected, warned, *_) = bench.child(2, Attach(low, high, (Link(2, 1, 1, 1, True),)))
    assert isinstance(rejected, ToChild)
    assert isinstance(rejected.message, Rejected)
    assert f"protocol versions {low} to {high}" in rejected.message.why
    assert "ctl up" in rejected.message.why
    assert isinstance(warned, Warn)
    assert bench.relay.reachable == ranks.NONE


def test_a_parent_that_wants_a_version_that_is_not_spoken_is_left() -> None:
    bench = _Bench(1)
    assert Disconnect() in bench.parent(Attached(2, 1))


def test_a_rejected_agent_tries_again() -> None:
    bench = _agent()
    assert bench.parent(Rejected("attach first")) == [Disconnect()]
    assert Connect(_member(None)) in bench.wait(1.0)


def test_an_older_attachment_does_not_replace_a_newer_one() -> None:
    bench = _agent(children=False)
    bench.attach(2, epoch=5)
    (effect,) = bench.attach(2, epoch=4)
    assert effect == ToChild(2, Rejected("a later attachment of yours is known"))


def test_a_child_that_was_given_up_must_attach_anew_before_it_is_heard() -> None:
    bench = _agent()
    bench(ChildLost(2, "connection closed"))
    assert bench.child(2, Beat()) == [ToChild(2, Rejected("attach first"))]
    (effect,) = bench.attach(2, epoch=1)
    assert effect == ToChild(2, Rejected("a later attachment of yours is known"))
    assert ToChild(2, Attached(1, 2)) in bench.attach(2, epoch=2)


def test_a_relay_that_comes_back_without_a_child_has_lost_it() -> None:
    root = _root()
    root(ChildLost(1, "connection closed"))
    effects = root.attach(1, Link(2, 1, 1, 1, True), Link(4, 2, 1, 1, True), Link(5, 2, 1, 1, True), epoch=2)
    told = next(effect for effect in effects if isinstance(effect, TellLinks))
    assert [(link.rank, link.up) for link in told.links] == [(1, True), (3, False)]
    assert root.relay.reachable == ranks.union([1, 2, 4, 5, 9])


def test_a_relay_that_forgot_is_told_of_all_that_hangs_below_whoever_comes() -> None:
    bench = _agent()
    bench.child(2, Links((Link(5, 2, 1, 1, False),)))
    bench(ChildLost(2, "connection closed"))
    effects = bench.attach(2, Link(4, 2, 1, 1, True), epoch=2)
    (links,) = _sent_up(effects, Links)
    assert [link.rank for link in links.links] == [2, 4], "4 is no news here, and may be above"


# --- who may say what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        _delivery({4}),
        Attached(1, 1),
        Rejected("x"),
        _SIGNER.clock("f", 4, b"n" * 16, 1),
        Ask(1, (0,)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_child_that_commands_is_cut_off_and_nothing_of_it_done(message: object) -> None:
    bench = _agent()
    effects = bench.child(2, message)
    assert _dropped(effects) == [2]
    assert not any(isinstance(effect, Start) for effect in effects)
    assert not _sent_down(effects)
    assert bench.relay.reachable == ranks.only(3)
    assert [link.up for links in _sent_up(effects, Links) for link in links.links] == [False]


_FOREIGN = [
    Outcomes(1, (_fold(3),)),
    Reports((Report(3, None, ()),)),
    Links((Link(3, 2, 1, 9, True),)),
    Links((Link(4, None, 1, 9, True),)),
    Links((Link(4, 3, 1, 9, True),)),
    Progress(1, ((3, 5),)),
    Streamed(1, 3, 1, 0, b"x", 0, False),
    Taken(1, 3, 1, True, True),
    ClockAsk(3, b"n" * 16),
]


@pytest.mark.parametrize("message", _FOREIGN, ids=lambda message: type(message).__name__)
def test_a_child_that_speaks_for_hosts_that_are_not_below_it_is_not_heard_and_in_the_end_cut_off(
    message: object,
) -> None:
    bench = _agent()
    before = dict(bench.relay.links)
    effects = bench.child(2, message)
    (warned,) = effects
    assert isinstance(warned, Warn)
    assert bench.relay.links == before
    for _ in range(int(PLAN_GRACE)):
        for rank in (2, 3):
            bench.child(rank, Beat())
        bench.parent(Beat())
        bench.wait(1.0)
    assert _dropped(bench.child(2, message)) == [2]


def test_what_a_child_says_of_its_own_is_heard_beside_what_it_may_not_say() -> None:
    root = _root()
    root(Submit(_delivery({2, 9}), _RUN))
    effects = root.child(1, Outcomes(1, (_fold(2, 9),)))
    assert [effect for effect in effects if isinstance(effect, Tell)] == [Tell(1, (_fold(2),))]
    assert root.relay.missing(1) == ranks.only(9)


def test_a_child_can_not_attach_as_another() -> None:
    bench = _agent(children=False)
    assert _dropped(bench.child(2, Attach(1, 1, (Link(3, 1, 1, 1, True),)))) == [2]
    assert _dropped(bench.child(2, Attach(1, 1, (Link(2, 7, 1, 1, True),)))) == [2]
    assert _dropped(bench.child(2, Attach(1, 1, (Link(2, 1, 1, 1, False),)))) == [2]
    assert bench.relay.reachable == ranks.NONE


def test_a_child_can_not_bring_others_children_with_it() -> None:
    bench = _agent(children=False)
    bench.attach(3)
    bench.attach(2, Link(3, 2, 1, 7, True))
    assert bench.relay.links[3].parent == 1


def test_an_unknown_rank_is_cut_off() -> None:
    assert _dropped(_agent().child(9, Beat())) == [9]
    assert _dropped(_agent().child(77, Attach(1, 1, (Link(77, 1, 1, 1, True),)))) == [77]


@pytest.mark.parametrize(
    "message", [Attach(1, 1, (Link(1, 1, 1, 1, True),)), Outcomes(1, (_fold(1),)), Links((Link(1, 1, 1, 1, True),))]
)
def test_a_parent_that_reports_is_left(message: object) -> None:
    assert Disconnect() in _agent().parent(message)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_command_is_split_by_child_and_begun_here() -> None:
    bench = _agent()
    effects = bench.parent(_delivery({1, 3, 4, 5}))
    assert _sent_down(effects) == {2: {4, 5}, 3: {3}}
    assert Start(1, _RUN, None) in effects


def test_the_payload_travels_as_the_root_signed_it() -> None:
    bench = _agent()
    delivery = _delivery({3})
    (sent,) = bench.parent(delivery)
    assert isinstance(sent, ToChild)
    assert sent.message == delivery


def test_a_command_that_comes_twice_is_begun_once_and_answered_from_memory() -> None:
    bench = _agent(children=False)
    assert Start(1, _RUN, None) in bench.parent(_delivery({1}))
    assert bench.parent(_delivery({1})) == []
    assert _sent_up(bench(Finished(1, Exited(3))), Outcomes) == [Outcomes(1, (_fold(1, code=3),))]
    again = bench.parent(_delivery({1}))
    assert again == [ToParent(Outcomes(1, (_fold(1, code=3),)))]


def test_outcomes_of_a_subtree_go_up_as_one() -> None:
    bench = _agent()
    bench.parent(_delivery({1, 2, 3, 4, 5}))
    assert bench.child(2, Outcomes(1, (_fold(2, 4, 5),))) == []
    assert bench(Finished(1, Exited(0))) == []
    assert bench.child(3, Outcomes(1, (_fold(3),))) == [ToParent(Outcomes(1, (_fold(1, 2, 3, 4, 5),)))]


def test_a_slow_child_delays_only_itself() -> None:
    bench = _agent()
    bench.parent(_delivery({2, 3}))
    bench.child(3, Outcomes(1, (_fold(3),)))
    assert _sent_up(bench.wait(FOLD_WINDOW), Outcomes) == [Outcomes(1, (_fold(3),))]
    assert bench.child(2, Outcomes(1, (_fold(2),))) == [ToParent(Outcomes(1, (_fold(2),)))]


def test_a_command_waits_for_the_roots_time_and_a_cancel_does_not() -> None:
    bench = _agent(knows_time=False, children=False)
    assert bench.parent(_delivery({1}, id_=1)) == []
    assert bench.parent(_delivery({1}, id_=2)) == []
    bench.parent(_delivery({1}, Cancel(of=2), id_=3))
    effects = bench.parent(_SIGNER.clock("f", 1, (1).to_bytes(16, "big"), round(_EPOCH * 1000)))
    assert [effect.id for effect in effects if isinstance(effect, Start)] == [1]


def test_a_forged_command_is_answered_as_refused_for_trust_and_not_begun() -> None:
    bench = _agent(children=False)
    effects = bench.parent(msgspec.structs.replace(_delivery({1}), signature=b"x" * 64))
    assert not any(isinstance(effect, Start) for effect in effects)
    (outcomes,) = _sent_up(effects + bench.wait(FOLD_WINDOW), Outcomes)
    refused = outcomes.folds[0].outcome
    assert isinstance(refused, Refused)
    assert refused.trust
    assert Start(1, _RUN, None) in bench.parent(_delivery({1})), "a forgery does not spend the true command"


def test_a_widened_command_is_refused_by_those_whom_it_was_not_for() -> None:
    bench = _agent(children=False)
    widened = msgspec.structs.replace(_delivery({3}), targets=ranks.pack(ranks.union([1, 3])))
    effects = bench.parent(widened)
    assert not any(isinstance(effect, Start) for effect in effects)


def test_what_a_host_answered_goes_up_before_the_news_that_it_is_gone() -> None:
    bench = _agent()
    bench.parent(_delivery({2, 3}))
    bench.child(3, Outcomes(1, (_fold(3),)))
    effects = bench(ChildLost(3, "connection closed"))
    sent = [effect.message for effect in effects if isinstance(effect, ToParent)]
    assert [type(message) for message in sent] == [Outcomes, Links]
    assert sent[0] == Outcomes(1, (_fold(3),))


def _large(*who: int, size: int = FOLD_BYTES) -> Fold:
    return Fold(ranks.pack(ranks.union(who)), Exited(0), Output(os.urandom(size), b"", size))


def test_a_child_that_sends_outcomes_that_nobody_asked_it_for_is_cut_off_before_they_fill_the_relay() -> None:
    bench = _agent()
    held, effects = [0], list[Effect]()
    for number in range(OUTCOME_LAST):  # the parent passes nothing on
        effects = bench.child(3, Outcomes(number, (_large(3),)))
        if _dropped(effects):
            break
        held.append(bench.relay.held())
    assert _dropped(effects) == [3]
    assert OUTCOME_LAST - OUTCOME_CREDIT <= held[-1] <= OUTCOME_LAST + FOLD_BYTES
    (refused,) = bench.attach(3, epoch=2)
    assert isinstance(refused, ToChild), "nor does it get more credit by attaching again"
    assert isinstance(refused.message, Rejected)
    bench.parent(Heard(2**62))
    while bench.relay.held():
        bench.parent(Heard(2**62))
    assert ToChild(3, Attached(1, 3)) in bench.attach(3, epoch=3)


def test_before_the_news_that_a_host_is_gone_its_outcomes_go_up_within_a_credit_of_their_own_and_no_others() -> None:
    bench = _agent()
    sent = []
    for number, who in enumerate((2, 2, 3, 3, 3)):
        sent += _sent_up(bench.child(who, Outcomes(number, (_large(who),))), Outcomes)
    assert [message.id for message in sent] == [0, 1], "what the credit allows"
    effects = bench(ChildLost(3, "connection closed"))
    *messages, links = _sent_up(effects, object)
    assert [message.id for message in messages] == [2, 3, 4]
    assert isinstance(links, Links)
    more = range(10, 8 + OUTCOME_LAST // FOLD_BYTES)
    for number in more:
        bench.child(2, Outcomes(number, (_large(4),)))
    effects = bench(ChildLost(2, "connection closed"))
    *before, links = _sent_up(effects, object)
    assert isinstance(links, Links)
    assert sum(weight(message.folds) for message in (*sent, *messages, *before)) < OUTCOME_LAST + 2 * FOLD_BYTES
    rest = []
    while bench.relay.held():
        rest += _sent_up(bench.parent(Heard(2**62)), Outcomes)
    assert [message.id for message in (*before, *rest)] == list(more)
    assert rest


def test_a_relay_does_not_speak_late_for_hosts_that_were_below_it_only_for_a_while() -> None:
    bench = _agent()
    for number in range(OUTCOME_LAST // FOLD_BYTES):
        bench.child(3, Outcomes(number, (_large(3),)))
    bench(ChildLost(3, "connection closed"))  # with all that may go before the news of it
    assert not _sent_up(bench.child(2, Outcomes(77, (_large(4, size=9), _large(5, size=9)))), Outcomes)
    parents = {rank: parent for rank, parent in _PARENTS.items() if rank != 5}
    bench(Replan(_plan(1, 2, parents)))
    for version in (3, 4):  # two plans later the parent would not take it
        bench(Replan(_plan(1, version, parents)))
    bench.attach(2, Link(4, 2, 1, 1, True), epoch=2)
    said = _sent_up(bench.parent(Heard(2**62)) + bench.wait(FOLD_WINDOW), Outcomes)
    folds = [fold for message in said if message.id == 77 for fold in message.folds]
    assert [set(ranks.each(ranks.unpack(fold.ranks))) for fold in folds] == [{4}]


def test_who_was_below_only_for_a_while_is_not_spoken_for_beside_one_that_goes_with_an_equal_outcome() -> None:
    bench = _agent()
    effects = list[Effect]()
    for number in range(OUTCOME_LAST // FOLD_BYTES):
        effects += bench.child(3, Outcomes(number, (_large(3),)))
    effects += bench(ChildLost(3, "connection closed"))  # with all that may go before the news of it
    effects += bench.child(2, Outcomes(77, (_fold(4, 5),)))
    parents = {rank: parent for rank, parent in _PARENTS.items() if rank != 5}
    for version in (2, 3, 4):
        effects += bench(Replan(_plan(1, version, parents)))
    effects += bench.attach(2, Link(4, 2, 1, 1, True), epoch=2)
    sent = _sent_up(effects, Outcomes)
    assert 77 not in {message.id for message in sent}
    # Of what was sent, so much that there is room before news and for nothing else.
    passed_on = sum(weight(message.folds) for message in sent) - OUTCOME_CREDIT - 1
    assert not _sent_up(bench.parent(Heard(passed_on)), Outcomes)
    *before, links = _sent_up(bench(ChildLost(2, "connection closed")), object)
    assert isinstance(links, Links)
    assert before == [Outcomes(77, (_fold(4),))]


def test_what_a_host_answered_that_a_plan_sends_elsewhere_goes_up_before_the_news_that_it_went() -> None:
    bench = _agent()
    bench.parent(_delivery({2, 3}))
    bench.child(3, Outcomes(1, (_fold(3),)))
    effects = bench(Replan(_plan(1, 2, {**_PARENTS, 3: 9})))
    assert _dropped(effects) == [3]
    outcomes, links = (effect.message for effect in effects if isinstance(effect, ToParent))
    assert outcomes == Outcomes(1, (_fold(3),))
    assert isinstance(links, Links)


def test_targets_that_are_not_below_are_told_upwards_for_what_is_known_of_them() -> None:
    bench = _agent()
    bench(ChildLost(2, "connection closed"))
    (links,) = _sent_up(bench.parent(_delivery({4})), Links)
    assert {(link.rank, link.up) for link in links.links} == {(4, True), (2, False)}


def test_a_cancel_goes_down_and_comes_back_as_outcomes() -> None:
    bench = _agent()
    bench.parent(_delivery({1, 3}))
    effects = bench.parent(_delivery({1, 3}, Cancel(of=1), id_=2))
    assert _sent_down(effects) == {3: {3}}
    assert Stop(1, hard=False) in effects
    bench(Finished(1, Exited(0)))
    (outcomes,) = _sent_up(
        bench.child(3, Outcomes(1, (Fold(ranks.pack(ranks.only(3)), Cancelled(ran=True)),))), Outcomes
    )
    assert outcomes.folds == (Fold(ranks.pack(ranks.union([1, 3])), Cancelled(ran=True)),)


def test_without_a_way_up_nothing_is_sent_and_outcomes_wait() -> None:
    bench = _agent()
    bench.parent(_delivery({1, 3}))
    bench(ParentLost("connection closed"))
    assert bench(Finished(1, Exited(0))) == []
    effects = bench.wait(1.0)
    assert not _sent_up(effects, Outcomes)
    uplink = bench.relay._uplink
    assert uplink is not None
    assert _sent_up(bench.parent(Attached(1, uplink.epoch)), Outcomes) == [Outcomes(1, (_fold(1),))]


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_newer_plan_is_kept_answered_and_followed() -> None:
    bench = _agent()
    parents = {**_PARENTS, 1: 9, 3: None}
    effects = bench.parent(_delivery({1}, _plan(1, 2, parents), id_=5))
    assert any(isinstance(effect, SavePlan) for effect in effects)
    assert _sent_up(effects, Outcomes) == [Outcomes(5, (_fold(1),))]
    admit = next(effect for effect in effects if isinstance(effect, Admit))
    assert {rank for _, rank in admit.keys} == {2, 4, 5}
    assert _dropped(effects) == [3]
    assert Connect(_member(9)) in bench.wait(1.0)


def test_an_older_plan_is_answered_and_not_followed() -> None:
    bench = _agent()
    effects = bench.parent(_delivery({1}, _plan(1, 1, {**_PARENTS, 1: 9}), id_=5))
    assert not any(isinstance(effect, SavePlan | Admit | Disconnect) for effect in effects)
    assert _sent_up(effects, Outcomes) == [Outcomes(5, (_fold(1),))]


def test_another_hosts_plan_is_refused() -> None:
    bench = _agent(children=False)
    effects = bench.parent(_delivery({1}, _plan(9, 2), id_=5))
    assert not any(isinstance(effect, SavePlan | Admit) for effect in effects)
    (outcomes,) = _sent_up(effects, Outcomes)
    assert isinstance(outcomes.folds[0].outcome, Refused)


def test_a_child_that_the_old_plan_gave_no_right_to_tell_all_is_asked_to_say_it_again_under_the_new_one() -> None:
    bench = _agent(children=False)
    bench.attach(3, Link(9, 3, 1, 1, True))
    assert bench.relay.reachable == ranks.only(3)
    effects = bench.parent(_delivery({1}, _plan(1, 2, {**_PARENTS, 9: 3}), id_=5))
    assert [
        effect.rank for effect in effects if isinstance(effect, ToChild) and isinstance(effect.message, Rejected)
    ] == [3]
    assert bench.relay.reachable == ranks.NONE


def test_who_could_not_be_heard_of_is_not_taken_for_lost_by_those_above() -> None:
    bench = _agent(children=False)
    bench.attach(3, Link(9, 3, 1, 1, True))
    (attach,) = _sent_up(bench(ParentLost("connection closed")) + bench.wait(1.0), Attach)
    assert attach.unsaid == ranks.pack(ranks.only(3))
    root = _root()
    again = (Link(1, None, 1, 2, True), Link(2, 1, 1, 1, True), Link(3, 1, 1, 1, True))
    root.child(1, Attach(1, 1, again, unsaid=ranks.pack(ranks.only(2))))
    assert root.relay.reachable == ranks.union([1, 2, 3, 4, 5, 9])
    root.child(1, Attach(1, 1, (msgspec.structs.replace(again[0], epoch=3), *again[1:])))
    assert root.relay.reachable == ranks.union([1, 2, 3, 9])


def test_the_root_drops_who_is_in_no_plan_any_more() -> None:
    root = _root()
    parents = {rank: parent for rank, parent in _PARENTS.items() if rank != 9}
    assert _dropped(root(Replan(_plan(None, 2, parents)))) == [9]
    assert not ranks.holds(root.relay.reachable, 9)


# --- the root ---------------------------------------------------------------------------------------------------------


def test_the_root_tells_each_outcome_once() -> None:
    root = _root()
    root(Submit(_delivery({1, 2, 9}), _RUN))
    assert root.child(1, Outcomes(1, (_fold(1, 2),))) == [Tell(1, (_fold(1, 2),))]
    assert root.child(1, Outcomes(1, (_fold(1, 2, code=1),))) == []
    assert root.child(9, Outcomes(1, (_fold(9),))) == [Tell(1, (_fold(9),)), TellSettled(1)]
    assert root.child(9, Outcomes(1, (_fold(9),))) == []


def test_the_root_does_not_hear_outcomes_of_hosts_that_are_no_targets() -> None:
    root = _root()
    root(Submit(_delivery({1}), _RUN))
    assert root.child(1, Outcomes(1, (_fold(2),))) == []


def test_a_lost_subtree_is_settled_at_once_when_it_did_not_come_back_in_time() -> None:
    lost = Lost("link h1 - the service: connection closed")
    root = _root()
    root(Submit(_delivery({1, 2, 3, 4, 5, 9}), _RUN))
    root(ChildLost(1, "connection closed"))
    told = []
    for seconds in (LOST_AFTER, ORPHANED_AFTER - LOST_AFTER):
        root.child(9, Beat())
        told.append([effect for effect in root.wait(seconds) if isinstance(effect, Tell)])
    children, deeper = ranks.union([1, 2, 3]), ranks.union([4, 5])
    assert told == [
        [Tell(1, (Fold(ranks.pack(children), lost),))],
        [Tell(1, (Fold(ranks.pack(deeper), lost),))],
    ]


def test_orphans_that_come_back_in_time_are_asked_again_and_are_not_lost() -> None:
    root = _root()
    root(Submit(_delivery({2, 3, 4}), _RUN))
    root(ChildLost(1, "connection closed"))
    effects = root.attach(2, Link(4, 2, 1, 1, True), epoch=2)
    assert _sent_down(effects) == {2: {2, 4}}
    told = [effect for effect in root.wait(LOST_AFTER) if isinstance(effect, Tell)]
    assert [set(ranks.each(ranks.unpack(fold.ranks))) for tell in told for fold in tell.folds] == [{3}]


def test_what_hangs_below_somebody_who_moved_is_asked_again_too() -> None:
    root = _root()
    root(Submit(_delivery({4, 5}), _RUN))
    effects = root.attach(2, Link(4, 2, 1, 1, True), Link(5, 2, 1, 1, True), epoch=2)
    assert _sent_down(effects) == {2: {4, 5}}


def _manners(effects: list[Effect]) -> dict[int, Manner]:
    """How each command that goes down is to be taken."""
    sent = [e.message for e in effects if isinstance(e, ToChild)]
    return {message.id: message.manner for message in sent if isinstance(message, Deliver)}


def test_a_restarted_agent_is_asked_for_what_it_was_given_and_given_its_plan_again() -> None:
    root = _root()
    root(Submit(_delivery({9}, id_=1), _RUN))
    root(Submit(_delivery({9}, _plan(9, 2), id_=2), _plan(9, 2)))
    effects = root.attach(9, incarnation=2)
    assert _manners(effects) == {1: Manner.RECALL, 2: Manner.WORK}
    lost = Fold(ranks.pack(ranks.only(9)), Lost(RESTARTED))
    assert Tell(1, (lost,)) in root.child(9, Outcomes(1, (lost,)))


def test_a_cancel_that_overtakes_the_question_does_not_say_that_the_predecessor_did_not_begin() -> None:
    root = _root()
    root(Submit(_delivery({9}), _RUN))
    root.attach(9, incarnation=2)
    not_begun = Fold(ranks.pack(ranks.only(9)), Cancelled(ran=False))
    effects = root.child(9, Outcomes(1, (not_begun,)))
    assert effects[0] == Tell(1, (Fold(not_begun.ranks, Lost(RESTARTED)),))


def _lost_by_absence(root: _Bench) -> None:
    """Command 1 went to 9, which went away for too long."""
    root(Submit(_delivery({9}), _RUN))
    root(ChildLost(9, "connection closed"))
    root.child(1, Beat())
    assert TellSettled(1) in root.wait(LOST_AFTER)


def test_who_was_lost_is_asked_once_more_and_its_answer_told_beside() -> None:
    root = _root()
    _lost_by_absence(root)
    assert _manners(root.attach(9, epoch=2)) == {1: Manner.RECALL}
    assert root.child(9, Outcomes(1, (_fold(9),))) == [TellLate(1, (_fold(9),))]
    assert root.child(9, Outcomes(1, (_fold(9),))) == [], "once"
    assert _manners(root.attach(9, epoch=3)) == {}


def test_who_was_lost_and_does_not_know_either_says_nothing_new() -> None:
    root = _root()
    _lost_by_absence(root)
    root.attach(9, epoch=2)
    for outcome in (Lost(RESTARTED), Cancelled(ran=False), Refused("it was settled", trust=True)):
        assert root.child(9, Outcomes(1, (Fold(ranks.pack(ranks.only(9)), outcome),))) == []
    assert _manners(root.attach(9, epoch=3)) == {}


def test_what_comes_late_of_a_command_of_the_service_before_this_one_is_left_to_its_record() -> None:
    root = _root()
    assert root.child(9, Outcomes(1, (_fold(9),))) == [TellLate(1, (_fold(9),))]
    root(Submit(_delivery({1}, id_=2), _RUN))
    root.child(1, Outcomes(2, (_fold(1),)))
    assert root.child(9, Outcomes(1, (_fold(9),))) == [TellLate(1, (_fold(9),))]
    assert root.child(1, Outcomes(2, (_fold(1),))) == []


def test_the_root_signs_the_time_for_whoever_asks() -> None:
    root = _root()
    (effect,) = root.child(1, ClockAsk(4, b"n" * 16))
    assert isinstance(effect, ToChild)
    assert effect.rank == 1
    assert isinstance(effect.message, ClockTell)
    assert (effect.message.rank, effect.message.nonce) == (4, b"n" * 16)


def test_the_root_passes_on_what_hosts_have_taken_of_an_input() -> None:
    assert _root().child(1, Taken(1, 4, 10, True, False)) == [TellTaken(1, 4, 10, True, False)]
    assert _agent().child(2, Taken(1, 4, 10, True, False)) == [ToParent(Taken(1, 4, 10, True, False))]


def test_grants_go_down_to_those_whom_they_are_for_and_to_nobody_else() -> None:
    own, below, beside, elsewhere = (Grant(rank, 100, 1, 2) for rank in (1, 4, 3, 9))
    bench = _agent()
    assert bench.parent(Credit(7, (own, below, beside, elsewhere))) == [
        Granted(7, own),
        ToChild(2, Credit(7, (below,))),
        ToChild(3, Credit(7, (beside,))),
    ]
    root = _root()
    assert root(Grants(7, (own, elsewhere))) == [ToChild(1, Credit(7, (own,))), ToChild(9, Credit(7, (elsewhere,)))]


@pytest.mark.parametrize("message", [Credit(7, (Grant(1, 2**40, 0, 0),)), ClockTell(1, b"n" * 16, 5, b"s" * 64)])
def test_a_child_that_grants_is_cut_off_and_nothing_is_granted(message: object) -> None:
    effects = _agent().child(2, message)
    assert any(isinstance(effect, DropChild) for effect in effects)
    assert not any(isinstance(effect, Granted) for effect in effects)


def test_the_root_passes_streams_progress_and_reports_on() -> None:
    root = _root()
    assert root.child(1, Streamed(1, 4, 2, 10, b"x", 0, False)) == [TellStream(1, 4, 2, 10, b"x", 0, False)]
    root.child(1, Progress(1, ((4, 5),)))
    root.child(9, Progress(1, ((9, 6), (9, 7))))
    root.child(1, Reports((Report(4, None, ()),)))
    effects = root.wait(REPORT_WINDOW)
    assert TellProgress(1, ((4, 5), (9, 7))) in effects
    assert TellReports((Report(4, None, ()),)) in effects


def test_a_command_taken_up_again_by_a_new_service_waits_for_those_who_are_not_back_yet() -> None:
    root = _Bench(None)
    assert root(Submit(_delivery({1, 9}), _RUN, missing=ranks.only(9))) == []
    assert _sent_down(root.attach(9)) == {9: {9}}
    assert root.child(9, Outcomes(1, (_fold(9),))) == [Tell(1, (_fold(9),)), TellSettled(1)]


# --- silence and time -------------------------------------------------------------------------------------------------


def test_beats_go_both_ways() -> None:
    effects = _agent().wait(BEAT_EVERY)
    assert ToParent(Beat()) in effects
    assert {e.rank for e in effects if isinstance(e, ToChild) and e.message == Beat()} == {2, 3}


def test_a_silent_child_is_given_up_and_told_of() -> None:
    bench = _agent()
    effects: list[Effect] = []
    for _ in range(8):
        bench.parent(Beat())
        bench.child(3, Beat())
        effects += bench.wait(1.0)
    gone = [link for links in _sent_up(effects, Links) for link in links.links]
    assert [(link.rank, link.up, link.why) for link in gone] == [(2, False, f"silent for {SILENT_AFTER:g} s")]


def test_a_relay_that_was_not_run_doubts_itself_before_its_peers() -> None:
    bench = _agent()
    effects = bench(Tick(), after=60.0)
    assert bench.relay.reachable == ranks.union([2, 3, 4, 5])
    assert Disconnect() not in effects


def test_reports_wait_for_one_another_and_for_a_way_up() -> None:
    bench = _agent()
    bench(Observed(None, (), whole=True))
    bench.child(3, Reports((Report(3, None, ()),)))
    (reports,) = _sent_up(bench.wait(REPORT_WINDOW), Reports)
    assert [report.rank for report in reports.reports] == [1, 3]
    bench(ParentLost("connection closed"))
    bench(Observed(None, (), whole=True))
    assert not _sent_up(bench.wait(1.0), Reports)
    uplink = bench.relay._uplink
    assert uplink is not None
    assert _sent_up(bench.parent(Attached(1, uplink.epoch)), Reports) == [Reports((Report(1, None, (), True),))]


def test_own_streams_and_progress_go_up_under_the_own_rank() -> None:
    bench = _agent()
    assert bench(Wrote(1, 1, 0, b"x")) == [ToParent(Streamed(1, 1, 1, 0, b"x", 0, False))]
    bench(Advanced(1, 500))
    assert _sent_up(bench.wait(REPORT_WINDOW), Progress) == [Progress(1, ((1, 500),))]


def test_the_answer_to_a_hosts_question_for_the_time_is_passed_on_to_it() -> None:
    bench = _agent()
    told = _SIGNER.clock("f", 4, b"n" * 16, 5)
    assert bench.parent(told) == [ToChild(2, told)]
    assert bench.child(2, ClockAsk(4, b"n" * 16)) == [ToParent(ClockAsk(4, b"n" * 16))]


def test_a_false_answer_about_the_time_is_not_believed() -> None:
    bench = _agent(knows_time=False, children=False)
    (warned,) = bench.parent(ClockTell(1, (1).to_bytes(16, "big"), 5, b"s" * 64))
    assert isinstance(warned, Warn)
    assert bench.parent(_delivery({1})) == []
