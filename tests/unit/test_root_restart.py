"""A root that began anew: hosts that hung below its predecessor are on their way, and not lost."""

from __future__ import annotations

from protocol import ranks
from protocol.commands import Below, Command, Member, Plan, Run
from protocol.events import Begin, Effect, FromChild, Submit, Tell, Tick, ToChild
from protocol.limits import LOST_AFTER, PAUSED_AFTER, RETURN_WITHIN
from protocol.messages import Attach, Deliver, Link, Manner
from protocol.outcomes import Lost
from protocol.relay import Relay, RootPart
from protocol.trust import Signer

SIGNER = Signer(b"\x01" * 32)
RUN = Run(argv=("true",), output_limit=0)


def root(incarnations: dict[int, int]) -> Relay:
    """A root with hosts 1, 2 and 3 in its plan; `incarnations` are those that its predecessor knew."""
    below = tuple(Below(rank, None, bytes([rank]) * 32) for rank in (1, 2, 3))
    plan = Plan(version=1, you=Member(None, "service", "198.18.0.1", 1, 2, b"\0" * 32), ancestors=(), below=below)
    part = RootPart(SIGNER, "fleet", lambda now: round(now * 1000), lambda rank: f"h{rank}", incarnations)
    relay = Relay(plan=plan, incarnation=0, draw=lambda: 0.5, nonce=lambda: b"n" * 16, root=part)
    relay.handle(Begin(), 0.0)
    return relay


def command(*targets: int) -> Submit:
    who = ranks.pack(ranks.union(targets))
    payload, signature = SIGNER.command(
        Command(fleet="fleet", id=7, targets=who, issued_ms=0, expires_ms=600_000, body=RUN)
    )
    return Submit(Deliver(7, who, None, Manner.WORK, payload, signature), RUN)


def told(effects: list[Effect]) -> dict[int, object]:
    return {
        rank: fold.outcome
        for effect in effects
        if isinstance(effect, Tell)
        for fold in effect.folds
        for rank in ranks.each(ranks.unpack(fold.ranks))
    }


def run(relay: Relay, now: float, until: float) -> list[Effect]:
    """Let time pass without a pause that would make the relay doubt itself."""
    effects: list[Effect] = []
    while now < until:
        now = min(now + PAUSED_AFTER / 2, until)
        effects += relay.handle(Tick(), now)
        relay.next_wakeup()
    return effects


def test_a_command_given_before_the_hosts_are_back_goes_to_them_when_they_are() -> None:
    relay = root({1: 10})
    assert told(relay.handle(command(1), 0.1)) == {}
    sent = relay.handle(FromChild(1, Attach(1, 1, (Link(1, None, 10, 2, True, ""),))), 3.0)
    assert any(isinstance(effect, ToChild) and isinstance(effect.message, Deliver) for effect in sent)


def test_a_host_that_does_not_come_back_is_lost_after_the_time_that_others_need() -> None:
    relay = root({1: 10, 2: 10})
    relay.handle(command(1, 2), 0.1)
    assert told(run(relay, 0.1, RETURN_WITHIN - 0.1)) == {}
    assert told(run(relay, RETURN_WITHIN - 0.1, RETURN_WITHIN)) == dict.fromkeys(
        (1, 2), Lost("did not come back after the service did")
    )


def test_a_host_that_never_was_in_the_tree_is_not_waited_for() -> None:
    assert told(root({1: 10}).handle(command(3), 0.1)) == {3: Lost("not in the tree when the command was given")}


def test_the_wait_for_hosts_is_over_when_it_is_over() -> None:
    relay = root({1: 10})
    run(relay, 0.0, RETURN_WITHIN)
    assert set(told(relay.handle(command(1), RETURN_WITHIN))) == {1}


def test_a_root_that_was_paused_waits_no_shorter_for_hosts() -> None:
    relay = root({1: 10})
    relay.handle(command(1), 0.1)
    relay.next_wakeup()
    slept = 2 * PAUSED_AFTER
    assert slept + LOST_AFTER < RETURN_WITHIN
    relay.handle(Tick(), slept)
    assert told(relay.handle(Tick(), slept + LOST_AFTER)) == {}


def test_what_a_predecessor_may_have_begun_is_asked_of_its_successor_and_not_given_to_it() -> None:
    relay = root({1: 10})
    given = command(1)
    relay.handle(Submit(given.delivery, RUN, ranks.only(1), ranks.only(1)), 0.1)
    sent = relay.handle(FromChild(1, Attach(1, 1, (Link(1, None, 10, 2, True, ""),))), 3.0)
    delivered = [effect.message for effect in sent if isinstance(effect, ToChild)]
    assert [message.manner for message in delivered if isinstance(message, Deliver)] == [Manner.RECALL]
