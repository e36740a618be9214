"""The relay: one state machine, the same at the root and in every agent. The root is the relay with no parent.

`handle(event, now)` returns the effects that the shell must perform, `next_wakeup()` the time at which it must be
called with a Tick. Times are seconds of a monotonic clock. It holds three promises:

- every target of a command gets exactly one outcome at the root (`settling`);
- no agent begins a command twice (`duty`);
- an outcome that an agent has reaches the root as soon as there is a path, for whoever attaches is asked again for
  what is missing, and answers from memory.

So a relay in the middle keeps nothing that matters: it splits targets on the way down and folds on the way up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

import msgspec

from protocol import ranks
from protocol.commands import Member, Plan, Quiet, Settled
from protocol.duty import Duty
from protocol.events import (
    Admit,
    Advanced,
    Arrived,
    Begin,
    ChildLost,
    Connect,
    DropChild,
    Effect,
    Event,
    Finished,
    FromChild,
    FromParent,
    Granted,
    Grants,
    Kept,
    LeftSource,
    Loaded,
    Observed,
    ParentLost,
    Replan,
    SavePlan,
    Submit,
    TellLinks,
    TellProgress,
    TellReports,
    TellStream,
    TellTaken,
    Tick,
    ToChild,
    Took,
    ToParent,
    Warn,
    Wrote,
)
from protocol.folding import Folding
from protocol.keeping import Answer
from protocol.limits import (
    BEAT_EVERY,
    CLOCK_EVERY,
    CLOCK_RETRY,
    CLOCK_RETRY_MOST,
    MAX_REASON,
    PAUSED_AFTER,
    SILENT_AFTER,
    VERSION_MAX,
    VERSION_MIN,
)
from protocol.messages import (
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
from protocol.never import assert_never
from protocol.outcomes import NO_OUTPUT, Exited, Fold, Refused, sentence
from protocol.pacing import Pace
from protocol.picture import Picture, later
from protocol.quota import Quota
from protocol.ranks import Ranks
from protocol.reporting import Reporting
from protocol.rights import Rights, claimed, links_without, named, without
from protocol.settling import Settling
from protocol.stranded import Stranded
from protocol.trust import Guard, Signer, Untrusted
from protocol.uplink import Uplink

#: Deliveries that whoever gets them answers sooner or later, so that it is worth a relay's while to wait for all.
_ANSWERED = frozenset({Manner.WORK, Manner.BULK})


@dataclass(frozen=True)
class RootPart:
    """What the root's relay has that no other has: the fleet's key, its clock in milliseconds as a function of
    `now`, and the hosts' names for the reasons that people read."""

    signer: Signer
    fleet: str
    clock_ms: Callable[[float], int]
    name: Callable[[int], str]
    #: What was known of agents' incarnations before this root began: a higher one has forgotten what it was given.
    incarnations: dict[int, int] = field(default_factory=dict)


class Relay:
    """One node of the tree."""

    def __init__(
        self,
        *,
        plan: Plan,
        incarnation: int,
        draw: Callable[[], float],
        nonce: Callable[[], bytes],
        guard: Guard | None = None,
        root: RootPart | None = None,
        found: Mapping[int, int] | None = None,
    ) -> None:
        """An agent has a `guard` and no `root`; the root the other way round.

        `incarnation` counts the agent's starts; `draw` gives numbers in [0, 1), `nonce` 16 fresh random bytes.
        `found` are the commands whose outcomes the agent's predecessor left on disk, with the bytes of each.
        """
        if (guard is None) == (root is None):
            raise ValueError("a relay is either an agent, with a guard, or the root")
        self._plan = plan
        self._me = plan.you.rank
        self._incarnation = incarnation
        self._nonce = nonce
        self._guard = guard
        self._root = root
        self._duty = Duty(guard, found) if guard is not None else None
        self._uplink = Uplink(plan.ancestors, draw) if root is None else None
        self._picture = Picture(self._me)
        self._folding = Folding()
        self._reporting = Reporting()
        self._rights = Rights(plan.below)
        self._stranded = Stranded()
        self._quota = Quota()
        self._pace = Pace()
        #: The children that are attached, and when each was heard last.
        self._heard_at: dict[int, float] = {}
        #: The version that was agreed on with each of them.
        self._versions: dict[int, int] = {}
        #: No child is silent for too long before this.
        self._silence_at = inf
        self._beat_at = 0.0
        self._expected = 0.0
        self._clock_at = inf
        self._clock_pause = CLOCK_RETRY
        #: What has changed below since the Attach that the parent has not answered yet.
        self._untold: dict[int, Link] = {}
        self._effects: list[Effect] = []
        self._was_reachable: Ranks = ranks.NONE
        self._settling: Settling | None = None
        if root is not None:
            self._settling = Settling(
                picture=self._picture,
                incarnations=root.incarnations,
                name=root.name,
                send=self._pass_on,
                tell=self._emit,
            )

    # --- the two calls ------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take an event in at time `now`; returns what must be done, in order."""
        self._doubt_oneself(now)
        self._take(event, now)
        self._advance(now)
        effects, self._effects = self._effects, []
        return effects

    def next_wakeup(self) -> float:
        """When `handle(Tick())` must be called at the latest."""
        due = min(self._beat_at, self._silence_at, self._clock_at, self._stranded.due)
        uplink = self._uplink
        times: list[float | None] = [self._reporting.due]
        if self._settling is not None:
            times.append(self._settling.due)
        if uplink is None or (uplink.attached and self._pace.room):
            times.append(self._folding.wakeup())
        if uplink is not None:
            times.append(uplink.wakeup())
        if self._duty is not None:
            times.append(self._duty.wakeup())
        for time in times:
            if time is not None and time < due:
                due = time
        self._expected = due
        return due

    def close(self) -> list[Effect]:
        """The process ends in good order: what is to be kept for the next one."""
        return [] if self._duty is None else self._duty.close()

    # --- what people ask of it ----------------------------------------------------------------------------------------

    @property
    def links(self) -> dict[int, Link]:
        """What is known of each rank's link, by rank."""
        return self._picture.links

    @property
    def reachable(self) -> Ranks:
        """All ranks that hang below now."""
        return self._picture.reachable

    @property
    def parent_name(self) -> str | None:
        """The parent's name while attached to it."""
        return self._uplink.parent.name if self._uplink is not None and self._uplink.attached else None

    def missing(self, id_: int) -> Ranks:
        """Root: who still owes an outcome of this command."""
        return ranks.NONE if self._settling is None else self._settling.missing(id_)

    def kept(self) -> int:
        """How many commands this relay still remembers: owed, answered and not settled, or waited for from below."""
        own = self._settling if self._duty is None else self._duty
        return len(self._folding) + (0 if own is None else len(own))

    def held(self) -> int:
        """How many bytes of outcomes wait here to go up, about."""
        return self._folding.held

    @property
    def rank(self) -> int | None:
        """This node's rank; the root has none."""
        return self._me

    @property
    def root(self) -> Member:
        """The root, as the plan has it."""
        return self._plan.ancestors[-1]

    def routed_through(self, child: int) -> Ranks:
        """The ranks that are reached through this child."""
        return self._picture.routes.get(child, ranks.NONE)

    # --- events -------------------------------------------------------------------------------------------------------

    def _take(self, event: Event, now: float) -> None:  # noqa: PLR0912  one case an event
        match event:
            case FromParent(message):
                self._from_parent(message, now)
            case FromChild(rank, message):
                self._from_child(rank, message, now)
            case Finished():
                self._finished(event, now)
            case Begin():
                self._beat_at = now + BEAT_EVERY
                self._effects.append(Admit(tuple((entry.key, entry.rank) for entry in self._plan.below)))
                if self._uplink is not None:
                    self._uplink.begin(now)
                    self._stranded.begin(now)
                if self._settling is not None:
                    self._settling.begin(ranks.union(self._rights.planned), now)
            case Tick():
                pass
            case ParentLost(why):
                self._parent_lost(why, now)
            case ChildLost(rank, why):
                self._child_lost(rank, why, now)
            case Kept():
                self._effects += [] if self._duty is None else self._duty.kept(event)
            case Loaded(id_):
                answer = None if self._duty is None else self._duty.loaded(event)
                if answer is not None:
                    self._own_outcome(id_, answer, now)
            case Wrote(id_, stream, offset, data, has, fast):
                self._up(Streamed(id_, self._rank(), stream, offset, data, has, fast))
            case Took(id_, taken, is_open, anew):
                self._up(Taken(id_, self._rank(), taken, is_open, anew))
            case Grants(id_, grants):
                self._grant(id_, grants)
            case Observed(host, vms, whole):
                self._reporting.add_reports((Report(self._rank(), host, vms, whole),), now)
            case Advanced(id_, done):
                self._add_progress(id_, ((self._rank(), done),), (), now)
            case LeftSource(id_, source, why):
                self._add_progress(id_, (), ((self._rank(), source, why[:MAX_REASON]),), now)
            case Submit(delivery, body, missing, reborn):
                if self._settling is None:
                    raise RuntimeError("only the root gives commands")
                self._settling.submit(delivery, body, missing, now, reborn)
            case Replan(plan):
                self._replan(plan, now)
            case _:
                assert_never(event)

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def _rank(self) -> int:
        if self._me is None:
            raise RuntimeError("the root has no rank, and does no work of its own")
        return self._me

    # --- from above ---------------------------------------------------------------------------------------------------

    def _from_parent(self, message: object, now: float) -> None:
        uplink = self._uplink
        if uplink is None:
            raise RuntimeError("the root has no parent")
        uplink.heard = now
        match message:
            case Attached(version=version, epoch=epoch):
                if not VERSION_MIN <= version <= VERSION_MAX:
                    self._parent_lost(f"it wants protocol version {version}, which I do not speak", now)
                elif uplink.accepted(epoch, now) or (uplink.attached and epoch == uplink.epoch):
                    self._arrived(now)
            case Rejected(why=why):
                self._parent_lost(f"rejected: {why}", now)
            case Beat():
                pass
            case Deliver():
                self._deliver(message, now)
            case ClockTell():
                self._clock_told(message, now)
            case Credit(id=id_, grants=grants):
                self._grant(id_, grants)
            case Heard(total=total):
                self._pace.heard(total)
            case _:
                # The codec and the link let only known kinds through; this one goes the other way.
                self._parent_lost(f"it sent a {type(message).__name__}, which only children send", now)

    def _parent_lost(self, why: str, now: float) -> None:
        if self._uplink is None:
            raise RuntimeError("the root has no parent")
        self._uplink_changed(self._uplink.lost(why, now), now)

    def _uplink_changed(self, effects: list[Effect], now: float) -> None:
        """The parent is gone, or the next one is tried.

        What is held for it stays; who is to answer will be said again.
        """
        self._effects += effects
        if effects:
            self._folding.expect_nobody()
            self._clock_at = inf
            self._stranded.begin(now)
        if any(isinstance(effect, Connect) for effect in effects):
            self._untold = {}
            self._pace.begin()
            self._effects.append(ToParent(self._attachment()))

    def _arrived(self, now: float) -> None:
        """The parent has taken this agent in, or has itself a way up again.

        Those below are told, for what they sent up meanwhile got no further than here, and the root may be another that
        knows nothing of them.
        """
        if self._untold:
            self._up(Links(tuple(self._untold[rank] for rank in sorted(self._untold))))
            self._untold = {}
        self._stranded.end()
        self._clock_pause = CLOCK_RETRY
        self._ask_clock(now)
        self._effects.append(Arrived())
        self._reporting.way_up(now)
        self._quota.anew(self._picture.reachable)
        for rank in sorted(self._heard_at):
            self._effects.append(ToChild(rank, Attached(self._versions[rank], self._picture.links[rank].epoch)))

    def _ask_clock(self, now: float) -> None:
        if self._guard is None:
            raise RuntimeError("the root asks nobody for the time")
        nonce = self._nonce()
        self._guard.time.ask(nonce, now)
        self._up(ClockAsk(self._rank(), nonce))
        # Doubled, since an answer that takes longer than the pause answers the question before the last.
        self._clock_at = now + self._clock_pause
        self._clock_pause = min(self._clock_pause * 2, CLOCK_RETRY_MOST)

    def _clock_told(self, told: ClockTell, now: float) -> None:
        if told.rank != self._me:
            self._down_to(told.rank, told)
            return
        if self._guard is None or self._duty is None:
            raise RuntimeError("the root tells the time")
        try:
            self._guard.time.tell(told, self._rank(), self._guard.fleet, self._guard.verify_key, now)
        except Untrusted as error:
            self._effects.append(Warn(f"what time it is was not accepted: {error}"))
            return
        self._clock_at = now + CLOCK_EVERY
        for delivery in self._duty.take_postponed(now):
            self._deliver_here(delivery, now)

    def _deliver(self, delivery: Deliver, now: float) -> None:
        """A command for some of my subtree."""
        targets = ranks.unpack(delivery.targets)
        mine = self._me is not None and ranks.holds(targets, self._me)
        self._pass_on(delivery, targets)
        if mine:
            if delivery.manner in _ANSWERED:
                self._folding.expect(delivery.id, ranks.only(self._rank()))
            self._deliver_here(delivery, now)
        astray = targets & ~self._picture.reachable
        if astray:
            self._tell_astray(ranks.each(astray & ~ranks.only(self._rank())))

    def _tell_astray(self, astray: Iterable[int]) -> None:
        """Those above think that these hang here.

        What is known of them, and of those that they hung below, says not.
        """
        told: dict[int, Link] = {}
        for rank in astray:
            link = self._picture.links.get(rank)
            while link is not None and link.rank in self._rights.planned and link.rank not in told:
                told[link.rank] = link
                link = None if link.parent is None else self._picture.links.get(link.parent)
        if told:
            self._up(Links(tuple(told[rank] for rank in sorted(told))))

    def _pass_on(self, delivery: Deliver, targets: Ranks) -> Ranks:
        """Send the command to each child whose subtree has targets; returns those that it was sent to."""
        sent = ranks.NONE
        if delivery.manner is Manner.QUIET:
            self._quota.anew(targets)  # a console's host is told by such how much of it was seen
        else:
            self._quota.given(delivery.id)
        for child, mask in sorted(self._picture.routes.items()):
            share = targets & mask
            if share:
                self._effects.append(ToChild(child, msgspec.structs.replace(delivery, targets=ranks.pack(share))))
                sent |= share
        if sent and self._root is None and delivery.manner in _ANSWERED:
            self._folding.expect(delivery.id, sent)
        return sent

    def _deliver_here(self, delivery: Deliver, now: float) -> None:
        """A command that names this very host."""
        duty, guard = self._duty, self._guard
        if duty is None or guard is None:
            raise RuntimeError("the root does no work of its own")
        known, answer = duty.known(delivery.id)
        effects: list[Effect] = []
        if known and answer is None:
            effects = duty.load(delivery.id, delivery.signature)
        elif not known:
            # What kind of command it is, only its signature tells: nothing in it is believed before.
            try:
                command = guard.open(delivery)
            except Untrusted as error:
                self._effects.append(Warn(f"command {delivery.id} refused: {error}"))
                self._own_outcome(delivery.id, (Refused(sentence(str(error)), trust=True), NO_OUTPUT), now)
                return
            if isinstance(command.body, Quiet):
                if isinstance(command.body, Settled):
                    self._folding.settled(command.body.ids)
                effects, outcomes = duty.quiet(command, now)
                self._effects += effects
                for id_, settled in outcomes:
                    self._own_outcome(id_, settled, now)
                return
            if isinstance(command.body, Plan):
                self._planned_anew(delivery, command.body, now)
                return
            if delivery.manner is Manner.RECALL:
                answer = duty.recall(command, now)
            elif not duty.clock_known:
                effects, answer = duty.postpone(delivery, command, now)
            else:
                ttl = None if delivery.ttl_ms is None else delivery.ttl_ms / 1000
                effects, answer = duty.deliver(command, ttl, now, delivery.signature)
        self._effects += effects
        if answer is not None:
            self._own_outcome(delivery.id, answer, now)

    def _planned_anew(self, delivery: Deliver, plan: Plan, now: float) -> None:
        """My part of the membership, as the fleet signed it."""
        if self._uplink is None:
            raise RuntimeError("the root makes the plan")
        if plan.you.rank != self._me:
            refused = Refused("it is another host's plan", trust=True)
            self._own_outcome(delivery.id, (refused, NO_OUTPUT), now)
            return
        # The answer goes up the old way first; where it is lost with the move, the root asks again.
        self._own_outcome(delivery.id, (Exited(0), NO_OUTPUT), now)
        if plan.version <= self._plan.version:
            return
        self._effects.append(SavePlan(delivery))
        self._flush(now)
        self._move(plan, now)

    def _replan(self, plan: Plan, now: float) -> None:
        """The membership changed at the root, or an agent was enrolled anew while it ran."""
        if self._uplink is None:
            self._adopt(plan, now)
        elif plan.version > self._plan.version and plan.you.rank == self._me:
            self._move(plan, now)

    def _move(self, plan: Plan, now: float) -> None:
        """Take a newer plan over, and go where it says."""
        if self._uplink is None:
            raise RuntimeError("the root has no place in the plan")
        self._adopt(plan, now)
        before = self._uplink.attached
        self._uplink.replan(plan.ancestors, now)
        if before and not self._uplink.attached:
            self._stranded.begin(now)
            self._folding.expect_nobody()
            self._clock_at = inf

    def _adopt(self, plan: Plan, now: float) -> None:
        previous, self._plan = self._plan, plan
        if plan.below != previous.below:
            self._effects.append(Admit(tuple((entry.key, entry.rank) for entry in plan.below)))
            self._rights.replan(plan.below, now)
            for rank in sorted(set(self._heard_at) - set(self._rights.planned)):
                why = "it is no longer planned below"
                self._effects.append(DropChild(rank, why))
                self._child_lost(rank, why, now)
            for rank in sorted(self._heard_at):
                if self._rights.has_more_to_say(rank, self.routed_through(rank)):
                    # All above must hear it with a later epoch: by this one they may have concluded that it is not so.
                    why = "more of what you said is yours to say by now: say it again"
                    self._effects.append(ToChild(rank, Rejected(why)))
                    self._child_lost(rank, why, now)

    # --- from below ---------------------------------------------------------------------------------------------------

    def _from_child(self, rank: int, message: object, now: float) -> None:
        if rank not in self._rights.planned:
            self._effects.append(DropChild(rank, "it is not planned below"))
            return
        if isinstance(message, Attach):
            self._attach(rank, message, now)
            return
        if rank not in self._heard_at:
            self._effects.append(ToChild(rank, Rejected("attach first")))
            return
        self._heard_at[rank] = now
        claims = claimed(message)
        if claims is None:
            self._expel(rank, f"it sent a {type(message).__name__}, which only parents send", now)
            return
        if isinstance(message, Outcomes) and not self._pace.came(rank, message.folds):
            self._expel(rank, "it sent more outcomes than its credit allows", now)
            return
        foreign = self._rights.foreign(rank, claims, self.routed_through(rank))
        if foreign:
            if not self._rights.forgives(rank, now):
                self._expel(rank, "it spoke for hosts that are not below it", now)
                return
            self._effects.append(Warn(f"rank {rank} spoke for hosts that are not below it: not heard"))
            if isinstance(message, Links):
                self._rights.withhold(rank, message.links, foreign)
            message = without(message, foreign)
        # The root keeps no more than it granted.
        piece = message if isinstance(message, Streamed) and self._root is None else None
        if piece is not None and not self._quota.passes(rank, piece.rank, piece.id, len(piece.data)):
            self._expel(rank, f"it sent more output of command {piece.id} than any host may", now)
            return
        self._heard(message, now)

    def _heard(self, message: object, now: float) -> None:
        """A child's message, found to be its to send."""
        match message:
            case Links(links=links):
                self._changed(self._picture.apply(links), now)
            case Outcomes(id=id_, folds=folds):
                self._outcomes(id_, folds, now)
            case Reports(reports=reports):
                self._reporting.add_reports(reports, now)
            case ClockAsk(rank=asker, nonce=nonce) if self._root is not None:
                told = self._root.signer.clock(self._root.fleet, asker, nonce, self._root.clock_ms(now))
                self._down_to(asker, told)
            case Streamed() if self._root is not None:
                self._tell_stream(message)
            case Taken() if self._root is not None:
                self._effects.append(TellTaken(message.id, message.rank, message.taken, message.open, message.anew))
            case Progress(id=id_, done=done, left=left):
                self._add_progress(id_, done, left, now)
            case ClockAsk() | Streamed() | Taken():
                self._up(message)
            case _:
                pass

    def _tell_stream(self, piece: Streamed) -> None:
        told = TellStream(piece.id, piece.rank, piece.stream, piece.offset, piece.data, piece.has, piece.fast)
        self._effects.append(told)

    def _attach(self, rank: int, message: Attach, now: float) -> None:
        own = message.links[0]
        if own.rank != rank or own.parent != self._me or not own.up:
            self._expel(rank, "it attached as another, or to another", now)
            return
        version = min(message.version_max, VERSION_MAX)
        if version < max(message.version_min, VERSION_MIN):
            why = (
                f"it speaks protocol versions {message.version_min} to {message.version_max}, "
                f"and its parent {VERSION_MIN} to {VERSION_MAX}: run `ctl up` again to bring both to one version"
            )
            self._effects += [ToChild(rank, Rejected(why)), Warn(f"rank {rank} may not attach: {why}")]
            # The child can tell nobody but its log: those above, and the people there, learn it from here.
            refused = msgspec.structs.replace(own, up=False, why=sentence(f"its parent refused it: {why}"))
            self._child_lost(rank, why, now)
            self._changed(self._picture.apply([refused]), now)
            return
        known = self._picture.links.get(rank)
        if known is not None and later(known, own):
            self._effects.append(ToChild(rank, Rejected("a later attachment of yours is known")))
            return
        if self._pace.clogged(rank):
            why = "outcomes that you sent before are still on their way: wait, or find another way up"
            self._effects.append(ToChild(rank, Rejected(why)))
            self._child_lost(rank, why, now)
            return
        self._heard_at[rank] = now
        self._rights.begin(rank, now)
        self._stranded.came(rank, now)
        self._silence_at = min(self._silence_at, now + SILENT_AFTER)
        self._versions[rank] = version
        self._pace.attached(rank)
        self._quota.attached(rank, self.routed_through(rank) | ranks.only(rank))
        self._effects.append(ToChild(rank, Attached(version, own.epoch)))
        links = message.links
        foreign = self._rights.foreign(rank, named(links[1:]), self.routed_through(rank))
        if foreign:
            self._effects.append(Warn(f"rank {rank} attached with hosts that are not below it: not heard"))
            self._rights.withhold(rank, links[1:], foreign)
            links = (own, *links_without(links[1:], foreign))
        news = self._picture.apply(links)
        unsaid = ranks.unpack(message.unsaid)
        self._rights.leave_unsaid(rank, unsaid, self.routed_through(rank))
        complete = [link for link in links if not ranks.holds(unsaid, link.rank)]
        news += self._picture.apply(self._picture.contradicted(complete, message.links))
        self._changed(news, now)

    def _child_lost(self, rank: int, why: str, now: float) -> None:
        if self._heard_at.pop(rank, None) is None:
            return
        del self._versions[rank]
        self._pace.lost(rank)
        self._rights.end(rank)
        link = self._picture.links.get(rank)
        if link is not None and link.up and link.parent == self._me:
            gone = msgspec.structs.replace(link, up=False, why=sentence(why))
            self._changed(self._picture.apply([gone]), now)

    def _expel(self, rank: int, why: str, now: float) -> None:
        self._effects += [DropChild(rank, why), Warn(f"rank {rank} was cut off: {why}")]
        self._child_lost(rank, why, now)

    # --- the tree changes ---------------------------------------------------------------------------------------------

    def _changed(self, news: tuple[Link, ...], now: float) -> None:
        """Links below have changed: tell those above, or, at the root, draw the conclusions."""
        if not news:
            return
        reachable = self._picture.reachable
        gone, back = self._was_reachable & ~reachable, reachable & ~self._was_reachable
        self._was_reachable = reachable
        if self._settling is not None:
            self._settling.note_restarts(news)
            self._effects.append(TellLinks(news))
            self._settling.changed(news, gone, back, now)
            return
        # What hangs below those who came is no news here, and yet may be to those above: all that is reachable here was
        # told in the Attach or since.
        named = ranks.union(link.rank for link in news)
        told = news + tuple(self._picture.links[rank] for rank in ranks.each(back & ~named))
        # Whoever comes anew, with all below it, is asked again for what it owes, and not waited for before.
        anew = self._picture.under(link.rank for link in told if link.up)
        self._quota.anew(anew)
        self._folding.expect_only((self._picture.reachable | ranks.only(self._rank())) & ~anew)
        if self._uplink is not None and not self._uplink.attached:
            self._untold |= {link.rank: link for link in told}
            return
        # What a host answered shall not come after the news that it is gone or began anew.
        for message in self._folding.about(gone | named | anew) if self._pace.last_room else ():
            self._up_outcomes(self._to_say(message, gone))
            if not self._pace.last_room:
                break  # the rest comes late
        self._up(Links(told))

    # --- outcomes -----------------------------------------------------------------------------------------------------

    def _finished(self, event: Finished, now: float) -> None:
        if self._duty is None:
            return
        effects, answer = self._duty.finished(event, now)
        self._effects += effects
        if answer is not None:
            self._own_outcome(event.id, answer, now)

    def _own_outcome(self, id_: int, answer: Answer, now: float) -> None:
        self._outcomes(id_, (Fold(ranks.pack(ranks.only(self._rank())), *answer),), now)

    def _outcomes(self, id_: int, folds: tuple[Fold, ...], now: float) -> None:
        if self._settling is not None:
            self._settling.outcomes(id_, folds)
            return
        self._folding.add(id_, folds, now)
        if self._uplink is not None and not self._uplink.attached:
            given_up = self._folding.bound()
            if given_up:
                self._effects.append(
                    Warn(f"there is no way up: outcomes of {given_up} commands will be asked for again")
                )

    # --- time ---------------------------------------------------------------------------------------------------------

    def _doubt_oneself(self, now: float) -> None:
        """A process that slept through its own wake-up has heard nobody because it did not listen.

        What was sent to it meanwhile is still to be read, so nobody is silent, late or lost before that.
        """
        slept = now - self._expected
        if not self._expected or slept <= PAUSED_AFTER:
            return
        self._heard_at = dict.fromkeys(self._heard_at, now)
        self._silence_at = now + SILENT_AFTER if self._heard_at else inf
        if self._uplink is not None:
            self._uplink.doubt(now)
            self._stranded.doubt(now)
        if self._settling is not None:
            self._settling.doubt(now)
        self._expected = now

    def _advance(self, now: float) -> None:
        if now >= self._silence_at:
            self._expire_children(now)
        if self._uplink is not None:
            self._uplink_changed(self._uplink.advance(now), now)
            for rank in self._stranded.advance(now, self._heard_at):
                why = "there is no way up from here: look for another"
                self._effects.append(ToChild(rank, Rejected(why)))
                self._child_lost(rank, why, now)
        if self._duty is not None:
            self._effects += self._duty.advance(now, childless=not self._heard_at)
        if now >= self._beat_at:
            self._beat_at = now + BEAT_EVERY
            self._up(Beat())
            self._effects += [ToChild(rank, Beat()) for rank in sorted(self._heard_at)]
        if now >= self._clock_at:
            self._ask_clock(now)
        if self._settling is not None:
            self._settling.advance(now)
        self._flush(now)

    def _expire_children(self, now: float) -> None:
        for rank in sorted(rank for rank, heard in self._heard_at.items() if now >= heard + SILENT_AFTER):
            self._child_lost(rank, f"silent for {SILENT_AFTER:g} s", now)
        self._silence_at = min(self._heard_at.values(), default=inf) + SILENT_AFTER

    def _flush(self, now: float) -> None:
        """Send what is due. Without a way up it stays, and leaves when there is one."""
        if self._uplink is not None and not self._uplink.attached:
            self._reporting.rest(now)
            return
        for message in self._folding.ready(now) if self._pace.room else ():
            self._up_outcomes(self._to_say(message))
            if not self._pace.room:
                break  # the rest stays until the parent has passed some on
        self._effects += [ToChild(rank, Heard(total)) for rank, total in self._pace.due(self._folding.held)]
        for report in self._reporting.ready(now):
            if self._root is None:
                self._up(report)
            elif isinstance(report, Progress):
                self._effects.append(TellProgress(report.id, report.done, report.left))
            else:
                self._effects.append(TellReports(report.reports))

    def _add_progress(
        self, id_: int, done: tuple[tuple[int, int], ...], left: tuple[tuple[int, int, str], ...], now: float
    ) -> None:
        if self._uplink is not None and not self._uplink.attached:
            done = ()  # nobody waits for how it once was
        if done or left:
            self._reporting.add_progress(id_, done, left, now)

    def _attachment(self) -> Attach:
        if self._uplink is None:
            raise RuntimeError("the root attaches to nobody")
        parent = self._uplink.parent.rank
        own = Link(self._rank(), parent, self._incarnation, self._uplink.epoch, True, self._uplink.why)
        # Why a link is as it is was told when it was news; a whole fleet's reasons would be too much for one message.
        below = (msgspec.structs.replace(link, why="") if link.why else link for link in self._picture.subtree())
        return Attach(VERSION_MIN, VERSION_MAX, (own, *below), ranks.pack(self._rights.unsaid))

    def _up(self, message: Links | Outcomes | Streamed | Taken | Reports | ClockAsk | Progress | Beat) -> None:
        if self._uplink is not None and self._uplink.attached:
            self._effects.append(ToParent(message))

    def _up_outcomes(self, message: Outcomes | None) -> None:
        if message is not None:
            self._pace.sent(message.folds)
            self._up(message)

    def _to_say(self, message: Outcomes, gone: Ranks = ranks.NONE) -> Outcomes | None:
        """What of it is this relay's to say, where those above still have `gone` below it: who was only for a while
        below, and went elsewhere before its outcome could go up, is asked again there."""
        claims = claimed(message)
        here = self._rights.below | self._picture.reachable | ranks.only(self._rank()) | gone
        foreign = ranks.NONE if claims is None else claims & ~here
        if not foreign:
            return message
        left = without(message, foreign)
        return left if isinstance(left, Outcomes) and left.folds else None

    def _grant(self, id_: int, grants: tuple[Grant, ...]) -> None:
        """Whoever hangs here may send so much more of a command's output."""
        left = {grant.rank: grant for grant in grants}
        own = left.pop(self._me, None) if self._me is not None else None
        if own is not None:
            self._effects.append(Granted(id_, own))
        if not left:
            return
        for rank in left:
            self._quota.granted(id_, rank)
        for child, mask in sorted(self._picture.routes.items()):
            share = tuple(grant for rank, grant in left.items() if ranks.holds(mask, rank))
            if share:
                self._effects.append(ToChild(child, Credit(id_, share)))

    def _down_to(self, rank: int, message: ClockTell) -> None:
        for child, mask in self._picture.routes.items():
            if ranks.holds(mask, rank):
                self._effects.append(ToChild(child, message))
                return
