"""One relay against everything that can come its way, in any order: Hypothesis draws it and shrinks what breaks.

The agent's machine plays its parent, its children, its work and its clock; the root's plays all agents.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol import events, ranks
from protocol.commands import Below, Body, Cancel, Command, Member, Plan, Quiet, Run, Settled
from protocol.limits import DEADLINE_SLACK, KILL_AFTER, LOST_AFTER, PAUSED_AFTER, SILENT_AFTER
from protocol.messages import Attach, Attached, Beat, ClockAsk, Deliver, Link, Links, Manner, Outcomes
from protocol.outcomes import NO_OUTPUT, Cancelled, Exited, Fold, Killed, Outcome
from protocol.relay import Relay, RootPart
from protocol.trust import Guard, Signer

SIGNER = Signer(b"\x07" * 32)
RUN = Run(argv=("true",), output_limit=0)
#: The agent under test, and those below it.
ME, CHILDREN = 1, (2, 3)
IDS = st.integers(1, 6)
#: Commands from this number on are none of the fleet's, and from the next on quiet ones.
_FORGED, _QUIET = 100, 1_000
_BOUNDED = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def _key(rank: int | None) -> bytes:
    return bytes([255 if rank is None else rank]) * 32


def _member(rank: int | None) -> Member:
    return Member(rank, "root" if rank is None else f"h{rank}", "198.18.0.1", 1, 2, _key(rank))


def _delivery(id_: int, body: Body, targets: int, now: float, ttl: float | None = None) -> Deliver:
    """As the root signs it. Its clock is the test's, in milliseconds."""
    packed = ranks.pack(targets)
    issued = round(now * 1000)
    command = Command(fleet="f", id=id_, targets=packed, issued_ms=issued, expires_ms=issued + 600_000, body=body)
    payload, signature = SIGNER.command(command)
    manner = Manner.QUIET if isinstance(body, Quiet) else Manner.WORK
    return Deliver(id_, packed, None if ttl is None else round(ttl * 1000), manner, payload, signature)


class Agent(RuleBasedStateMachine):
    """An agent below the root, with two hosts planned below it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        guard = Guard(fleet="f", verify_key=SIGNER.verify_key, rank=ME, started=self.now)
        below = tuple(Below(rank, ME, _key(rank)) for rank in CHILDREN)
        plan = Plan(version=1, you=_member(ME), ancestors=(_member(None),), below=below)
        self.nonces = 0
        self.relay = Relay(plan=plan, incarnation=1, draw=lambda: 0.5, nonce=self._nonce, guard=guard)
        self.connected = self.attached = False
        self.epoch = 0
        self.asked: ClockAsk | None = None
        self.children: dict[int, int] = {}
        self.epochs = dict.fromkeys(CHILDREN, 0)
        self.given: dict[int, Deliver] = {}
        self.running: set[int] = set()
        self.begun: set[int] = set()
        self.done: dict[int, Outcome] = {}
        self.answers: dict[int, Outcome] = {}
        self.over: set[int] = set()
        self.next_quiet = _QUIET

    def _nonce(self) -> bytes:
        self.nonces += 1
        return self.nonces.to_bytes(16, "big")

    def feed(self, event: events.Event) -> None:
        """Let it happen, and look at all that comes of it."""
        effects = self.relay.handle(event, self.now)
        self.relay.next_wakeup()  # as the shell asks each time: by it a relay knows that it slept
        for effect in effects:
            match effect:
                case events.Connect():
                    self.connected, self.attached = True, False
                case events.Disconnect():
                    self.connected = self.attached = False
                case events.ToParent(message):
                    self._sent_up(message)
                case events.ToChild(rank, Deliver() as delivery):
                    assert rank in self.children, "a command goes to attached children alone"
                    assert ranks.unpack(delivery.targets) == ranks.only(rank)
                case events.Start(id_):
                    assert id_ < _FORGED, "nobody signed it"
                    assert id_ not in self.begun, f"command {id_} is begun twice"
                    assert id_ not in self.over, f"command {id_} is begun after it was over"
                    self.begun.add(id_)
                    self.running.add(id_)
                case events.Stop(id_):
                    assert id_ in self.running
                case events.DropChild(rank):
                    raise AssertionError(f"nobody did wrong, and yet {rank} is dropped: {effect.why}")
                case _:
                    pass

    def _sent_up(self, message: object) -> None:
        if isinstance(message, Attach):
            assert self.connected
            assert message.links[0].epoch > self.epoch, "each attempt to attach has a higher epoch"
            self.epoch = message.links[0].epoch
            assert {link.rank for link in message.links[1:]} == set(self.children)
            return
        assert self.attached, f"{message} goes up before anybody has said that we are in"
        if isinstance(message, ClockAsk) and message.rank == ME:
            self.asked = message
        if isinstance(message, Outcomes):
            for fold in message.folds:
                if ranks.holds(ranks.unpack(fold.ranks), ME) and message.id not in self.over:
                    known = self.answers.setdefault(message.id, fold.outcome)
                    assert known == fold.outcome, f"two answers for command {message.id}: {known}, {fold.outcome}"

    @initialize()
    def begin(self) -> None:
        self.feed(events.Begin())

    # --- from above ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.connected and not self.attached)
    @rule()
    def parent_takes_us_in(self) -> None:
        self.attached = True
        self.feed(events.FromParent(Attached(1, self.epoch)))

    @precondition(lambda self: self.connected and not self.attached and self.epoch > 1)
    @rule()
    def parent_answers_an_older_attempt(self) -> None:
        self.feed(events.FromParent(Attached(1, self.epoch - 1)))

    @precondition(lambda self: self.connected)
    @rule()
    def parent_is_lost(self) -> None:
        self.connected = self.attached = False
        self.feed(events.ParentLost("connection closed"))

    @precondition(lambda self: self.attached and self.asked)
    @rule()
    def root_tells_the_time(self) -> None:
        assert self.asked is not None
        self.feed(events.FromParent(SIGNER.clock("f", ME, self.asked.nonce, round(self.now * 1000))))
        self.asked = None

    @precondition(lambda self: self.attached)
    @rule(id_=IDS, who=st.sets(st.sampled_from((ME, *CHILDREN)), min_size=1), ttl=st.sampled_from((None, 0.0, 3.0)))
    def root_gives_or_asks_again(self, id_: int, who: set[int], ttl: float | None) -> None:
        if id_ in self.over:
            return
        if id_ not in self.given:
            self.given[id_] = _delivery(id_, RUN, ranks.union((ME, *CHILDREN)), self.now, ttl)
        first = self.given[id_]
        share = Deliver(id_, ranks.pack(ranks.union(who)), first.ttl_ms, first.manner, first.payload, first.signature)
        self.feed(events.FromParent(share))

    @precondition(lambda self: self.attached)
    @rule(id_=IDS)
    def root_cancels(self, id_: int) -> None:
        self.next_quiet += 1
        delivery = _delivery(self.next_quiet, Cancel(of=id_), ranks.only(ME), self.now)
        if id_ not in self.begun:
            self.over.add(id_)
        self.feed(events.FromParent(delivery))

    @precondition(lambda self: self.attached)
    @rule(id_=IDS)
    def root_settles(self, id_: int) -> None:
        self.next_quiet += 1
        self.over.add(id_)
        self.feed(events.FromParent(_delivery(self.next_quiet, Settled(ids=(id_,)), ranks.only(ME), self.now)))

    @precondition(lambda self: self.attached and self.over)
    @rule(data=st.data())
    def what_is_over_comes_late(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.over)))
        self.feed(events.FromParent(self.given.setdefault(id_, _delivery(id_, RUN, ranks.only(ME), self.now))))

    @precondition(lambda self: self.attached)
    @rule(id_=IDS)
    def relay_above_forges(self, id_: int) -> None:
        good = _delivery(_FORGED + id_, RUN, ranks.only(ME), self.now)
        forged = Deliver(good.id, good.targets, None, good.manner, good.payload, bytes(64))
        self.feed(events.FromParent(forged))

    # --- from below, and here -----------------------------------------------------------------------------------------

    @rule(rank=st.sampled_from(CHILDREN))
    def child_attaches(self, rank: int) -> None:
        self.epochs[rank] += 1
        self.children[rank] = self.epochs[rank]
        self.feed(events.FromChild(rank, Attach(1, 1, (Link(rank, ME, 1, self.epochs[rank], True, ""),))))

    @precondition(lambda self: self.children)
    @rule(data=st.data(), id_=IDS, code=st.integers(0, 1))
    def child_answers(self, data: st.DataObject, id_: int, code: int) -> None:
        rank = data.draw(st.sampled_from(sorted(self.children)))
        fold = Fold(ranks.pack(ranks.only(rank)), Exited(code))
        self.feed(events.FromChild(rank, Outcomes(id_, (fold,))))

    @precondition(lambda self: self.children)
    @rule(data=st.data())
    def child_is_lost(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.children)))
        del self.children[rank]
        self.feed(events.ChildLost(rank, "connection closed"))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from((Exited(0), Exited(1), Killed(9))))
    def work_ends(self, data: st.DataObject, outcome: Outcome) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(id_)
        self.feed(events.Finished(id_, outcome))

    # --- time ---------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from((0.01, 0.1, 1.0, 2.5)))
    def time_passes(self, seconds: float) -> None:
        self._pass(seconds)

    @rule(seconds=st.sampled_from((PAUSED_AFTER + 5, 60.0)))
    def process_sleeps(self, seconds: float) -> None:
        before = set(self.children), self.attached
        self.now += seconds
        self.feed(events.Tick())
        assert (set(self.children), self.attached) == before, "who slept takes nobody for silent"

    def _pass(self, seconds: float) -> None:
        """Tick when it wants to be called; those around it beat."""
        end = self.now + seconds
        while True:
            due = self.relay.next_wakeup()
            if due > end:
                break
            self.now = max(self.now, due)
            for rank in sorted(self.children):
                self.feed(events.FromChild(rank, Beat()))
            if self.attached:
                self.feed(events.FromParent(Beat()))
            self.feed(events.Tick())
            assert self.relay.next_wakeup() > self.now, "it wants to be called again at once, without end"
        self.now = end
        for rank in sorted(self.children):
            self.feed(events.FromChild(rank, Beat()))
        if self.attached:
            self.feed(events.FromParent(Beat()))
        # A relay may let its children go while it has no way up.
        self.children = {rank: self.children[rank] for rank in self.children if ranks.holds(self.relay.reachable, rank)}

    @invariant()
    def it_keeps_no_more_than_it_was_given(self) -> None:
        assert self.relay.kept() <= 2 * (6 + 6) + 2

    def teardown(self) -> None:
        """Once there is a way up, whatever is asked again is answered."""
        for _ in range(200):
            if self.attached:
                break
            if self.connected:
                self.parent_takes_us_in()
            else:
                self._pass(0.5)
        assert self.attached, "it finds its way up"
        if self.asked is not None:
            self.root_tells_the_time()
        for id_ in sorted(self.running):
            self.running.discard(id_)
            self.feed(events.Finished(id_, Exited(0)))
        self.answers.clear()
        open_ = [id_ for id_ in sorted(self.given) if id_ not in self.over]
        for id_ in open_:
            self.root_gives_or_asks_again(id_, {ME}, None)
        for id_ in sorted(self.running):
            self.running.discard(id_)
            self.feed(events.Finished(id_, Exited(0)))
        self._pass(KILL_AFTER)
        assert set(open_) <= set(self.answers), "each command that is asked for is answered"


@dataclass
class _Host:
    """One agent as the root sees it. `link` is None while it is not attached."""

    incarnation: int = 1
    epoch: int = 0
    attached: bool = False
    given: set[int] = field(default_factory=set)


class Root(RuleBasedStateMachine):
    """The root with three hosts below it; the third hangs below the second where that is attached."""

    HOSTS = (1, 2, 3)

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        below = (Below(1, None, _key(1)), Below(2, None, _key(2)), Below(3, 2, _key(3)))
        plan = Plan(version=1, you=_member(None), ancestors=(), below=below)
        part = RootPart(SIGNER, "f", lambda now: round(now * 1000), lambda rank: f"h{rank}")
        self.relay = Relay(plan=plan, incarnation=1, draw=lambda: 0.5, nonce=lambda: bytes(16), root=part)
        self.hosts = {rank: _Host() for rank in self.HOSTS}
        self.told: dict[int, int] = {}
        self.targets: dict[int, int] = {}
        self.settled: set[int] = set()
        self.next_id = 1
        self.feed(events.Begin())

    def feed(self, event: events.Event) -> None:
        """Let it happen, and look at all that comes of it."""
        effects = self.relay.handle(event, self.now)
        self.relay.next_wakeup()  # as the shell asks each time: by it a relay knows that it slept
        for effect in effects:
            match effect:
                case events.Tell(id_, folds):
                    for fold in folds:
                        who = ranks.unpack(fold.ranks)
                        assert not who & self.told[id_], "nobody has two outcomes"
                        assert who & self.targets[id_] == who, "nobody has an outcome who was not asked"
                        assert id_ not in self.settled
                        self.told[id_] |= who
                case events.TellSettled(id_):
                    assert self.told[id_] == self.targets[id_], "settled is what everybody has an outcome of"
                    assert id_ not in self.settled
                    self.settled.add(id_)
                case events.ToChild(rank, Deliver() as delivery):
                    assert self.hosts[rank].attached
                    if delivery.manner is Manner.WORK:
                        for target in ranks.each(ranks.unpack(delivery.targets)):
                            self.hosts[target].given.add(delivery.id)
                case events.DropChild(rank, why):
                    raise AssertionError(f"nobody did wrong, and yet {rank} is dropped: {why}")
                case _:
                    pass

    def _via(self, rank: int) -> int:
        return 2 if rank == 3 else rank

    @rule(rank=st.sampled_from((1, 2)), restarted=st.booleans())
    def host_attaches(self, rank: int, restarted: bool) -> None:
        host = self.hosts[rank]
        if restarted:
            host.incarnation, host.epoch, host.given = host.incarnation + 1, 0, set()
        host.epoch += 1
        host.attached = True
        links = [Link(rank, None, host.incarnation, host.epoch, True, "")]
        if rank == 2 and self.hosts[3].attached and not restarted:
            links.append(Link(3, 2, self.hosts[3].incarnation, self.hosts[3].epoch, True, ""))
        elif rank == 2:
            self.hosts[3].attached = False
        self.feed(events.FromChild(rank, Attach(1, 1, tuple(links))))

    @precondition(lambda self: self.hosts[2].attached)
    @rule(up=st.booleans(), restarted=st.booleans())
    def third_comes_or_goes(self, up: bool, restarted: bool) -> None:
        host = self.hosts[3]
        if up:
            if restarted:
                host.incarnation, host.epoch, host.given = host.incarnation + 1, 0, set()
            host.epoch += 1
        host.attached = up
        self.feed(events.FromChild(2, Links((Link(3, 2, host.incarnation, host.epoch, up, "w"),))))

    @rule(rank=st.sampled_from((1, 2)))
    def host_is_lost(self, rank: int) -> None:
        if self.hosts[rank].attached:
            self.hosts[rank].attached = False
            self.feed(events.ChildLost(rank, "connection closed"))

    @rule(who=st.sets(st.sampled_from(HOSTS)), ttl=st.sampled_from((None, 0.0, 2.0)))
    def somebody_gives_a_command(self, who: set[int], ttl: float | None) -> None:
        id_, self.next_id = self.next_id, self.next_id + 1
        self.targets[id_], self.told[id_] = ranks.union(who), ranks.NONE
        self.feed(events.Submit(_delivery(id_, RUN, self.targets[id_], self.now, ttl), RUN))

    @precondition(lambda self: self.targets)
    @rule(data=st.data())
    def somebody_cancels(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.targets)))
        self.next_id += 1
        body = Cancel(of=id_)
        self.feed(events.Submit(_delivery(10_000 + self.next_id, body, self.targets[id_], self.now), body))

    @rule(data=st.data(), rank=st.sampled_from(HOSTS), outcome=st.sampled_from((Exited(0), Cancelled(True))))
    def host_answers(self, data: st.DataObject, rank: int, outcome: Outcome) -> None:
        given = sorted(self.hosts[rank].given)
        if given and self.hosts[rank].attached and self.hosts[self._via(rank)].attached:
            id_ = data.draw(st.sampled_from(given))
            fold = Fold(ranks.pack(ranks.only(rank)), outcome, NO_OUTPUT)
            self.feed(events.FromChild(self._via(rank), Outcomes(id_, (fold,))))

    @rule(seconds=st.sampled_from((0.1, 1.0, 3.0, LOST_AFTER)))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self.relay.next_wakeup() <= end:
            self.now = max(self.now, self.relay.next_wakeup())
            for rank in (1, 2):
                if self.hosts[rank].attached:
                    self.feed(events.FromChild(rank, Beat()))
            self.feed(events.Tick())
            assert self.relay.next_wakeup() > self.now, "it wants to be called again at once, without end"
        self.now = end

    @rule(seconds=st.sampled_from((PAUSED_AFTER + 5, 60.0)))
    def process_sleeps(self, seconds: float) -> None:
        settled, told = set(self.settled), dict(self.told)
        self.now += seconds
        self.feed(events.Tick())
        assert (self.settled, self.told) == (settled, told), "who slept takes nobody for lost"

    @invariant()
    def who_is_not_settled_is_missing(self) -> None:
        for id_, targets in self.targets.items():
            assert self.relay.missing(id_) == targets & ~self.told[id_]

    @invariant()
    def its_picture_is_what_it_was_told(self) -> None:
        there = {rank for rank in (1, 2) if self.hosts[rank].attached}
        if self.hosts[2].attached and self.hosts[3].attached:
            there.add(3)
        assert self.relay.reachable == ranks.union(there)

    def teardown(self) -> None:
        """When all have gone, all is settled."""
        for rank in (1, 2):
            self.host_is_lost(rank)
        self.hosts[3].attached = False
        self.time_passes(SILENT_AFTER + LOST_AFTER + DEADLINE_SLACK)
        assert self.settled == set(self.targets)
        assert self.relay.kept() == 0


TestAgent = Agent.TestCase
TestAgent.settings = _BOUNDED
TestRoot = Root.TestCase
TestRoot.settings = _BOUNDED
