"""The relay: one state machine, the same at the root and in every agent. The root is the relay with no parent.

`handle(event, now)` returns the effects that the shell must perform, `next_wakeup()` the time at which it must be
called with a Tick. Times are seconds of a monotonic clock. It holds three promises:

- every target of a command gets exactly one outcome at the root (`ledger`);
- no agent begins a command twice (`duty`);
- an outcome that an agent has reaches the root as soon as there is a path, for whoever attaches is asked again for
  what is missing, and answers from memory.

So a relay in the middle keeps nothing that matters: it splits targets on the way down and folds on the way up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import inf

import msgspec

from protocol import ranks
from protocol.commands import Below, Cancel, Plan, Push, Quiet, Settled
from protocol.duty import Answer, Duty
from protocol.events import (
    Admit,
    Advanced,
    Arrived,
    Begin,
    Carry,
    ChildLost,
    Connect,
    DropChild,
    Effect,
    Event,
    Finished,
    FromChild,
    FromParent,
    Observed,
    ParentLost,
    Replan,
    SavePlan,
    Submit,
    Tell,
    TellLinks,
    TellProgress,
    TellReports,
    TellSettled,
    TellStream,
    Tick,
    ToChild,
    ToParent,
    Warn,
    Wrote,
)
from protocol.folding import Folding
from protocol.ledger import Absence, Account
from protocol.limits import (
    BEAT_EVERY,
    CLOCK_EVERY,
    CLOCK_RETRY,
    CLOCK_RETRY_MOST,
    DEADLINE_SLACK,
    FOLD_BYTES,
    LOST_AFTER,
    PAUSED_AFTER,
    PLAN_GRACE,
    REPORT_WINDOW,
    RETURN_WITHIN,
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
    Deliver,
    Link,
    Links,
    Manner,
    Outcomes,
    Progress,
    Rejected,
    Report,
    Reports,
    Streamed,
    newest,
)
from protocol.never import assert_never
from protocol.outcomes import NO_OUTPUT, Exited, Fold, Refused, sentence
from protocol.picture import Picture, later
from protocol.ranks import Ranks
from protocol.trust import Guard, Signer, Untrusted
from protocol.uplink import Uplink

#: What one VM and one host cost in a report besides names: generously.
_REPORT_OVERHEAD = 300


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
    ) -> None:
        """An agent has a `guard` and no `root`; the root the other way round.

        `incarnation` counts the agent's starts; `draw` gives numbers in [0, 1), `nonce` 16 fresh random bytes.
        """
        if (guard is None) == (root is None):
            raise ValueError("a relay is either an agent, with a guard, or the root")
        self._plan = plan
        self._me = plan.you.rank
        self._incarnation = incarnation
        self._nonce = nonce
        self._guard = guard
        self._root = root
        self._duty = Duty(guard) if guard is not None else None
        self._uplink = Uplink(plan.ancestors, draw) if root is None else None
        self._picture = Picture(self._me)
        self._folding = Folding()
        #: The children that are attached, and when each was heard last.
        self._heard_at: dict[int, float] = {}
        #: Until when a child that speaks for others is forgiven.
        self._grace: dict[int, float] = {}
        #: By child, the links that were not the child's to tell by the present plan, and may be by the next.
        self._unheard: dict[int, dict[int, Link]] = {}
        #: No child is silent for too long before this, and none of the root's own things is due before that.
        self._silence_at = inf
        self._expiry_at = inf
        self._reports: dict[int, Report] = {}
        self._progress: dict[int, dict[int, int]] = {}
        self._reports_due: float | None = None
        self._beat_at = 0.0
        self._expected = 0.0
        self._clock_at = inf
        self._clock_pause = CLOCK_RETRY
        #: What has changed below since the Attach that the parent has not answered yet.
        self._untold: dict[int, Link] = {}
        self._effects: list[Effect] = []
        #: For each rank below, the ranks that may speak through it: by the present plan, and by that or the one before.
        self._planned: dict[int, Ranks] = {}
        self._allowed: dict[int, Ranks] = {}
        self._index(plan.below)
        self._was_reachable: Ranks = ranks.NONE
        # The root's own:
        self._accounts: dict[int, Account] = {}
        self._absences: list[Absence] = []
        self._incarnations: dict[int, int] = {} if root is None else dict(root.incarnations)

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
        due = min(self._beat_at, self._silence_at, self._expiry_at, self._clock_at)
        uplink = self._uplink
        times: list[float | None] = [self._reports_due]
        if uplink is None or uplink.attached:
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
        account = self._accounts.get(id_)
        return ranks.NONE if account is None else account.missing

    def kept(self) -> int:
        """How many commands this relay still remembers: owed, answered and not settled, or waited for from below."""
        return len(self._accounts) + len(self._folding) + (0 if self._duty is None else len(self._duty))

    def routed_through(self, child: int) -> Ranks:
        """The ranks that are reached through this child."""
        return self._picture.routes.get(child, ranks.NONE)

    # --- events -------------------------------------------------------------------------------------------------------

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Begin():
                self._beat_at = now + BEAT_EVERY
                self._effects.append(Admit(tuple((entry.key, entry.rank) for entry in self._plan.below)))
                if self._uplink is not None:
                    self._uplink.begin(now)
                else:
                    self._expect_back(ranks.union(set(self._incarnations) & set(self._planned)), now)
            case Tick():
                pass
            case FromParent(message):
                self._from_parent(message, now)
            case FromChild(rank, message):
                self._from_child(rank, message, now)
            case ParentLost(why):
                self._parent_lost(why, now)
            case ChildLost(rank, why):
                self._child_lost(rank, why, now)
            case Finished():
                self._finished(event, now)
            case Wrote(id_, stream, offset, data):
                self._up(Streamed(id_, self._rank(), stream, offset, data))
            case Observed(host, vms, whole):
                self._add_reports((Report(self._rank(), host, vms, whole),), now)
            case Advanced(id_, done):
                self._add_progress(id_, ((self._rank(), done),), now)
            case Submit(delivery, body, missing):
                self._submit(delivery, body, missing, now)
            case Replan(plan):
                self._replan(plan, now)
            case _:
                assert_never(event)

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
            case _:
                # The codec and the link let only known kinds through; this one goes the other way.
                self._parent_lost(f"it sent a {type(message).__name__}, which only children send", now)

    def _parent_lost(self, why: str, now: float) -> None:
        if self._uplink is None:
            raise RuntimeError("the root has no parent")
        self._uplink_changed(self._uplink.lost(why, now))

    def _uplink_changed(self, effects: list[Effect]) -> None:
        """The parent is gone, or the next one is tried.

        What is held for it stays; who is to answer will be said again.
        """
        self._effects += effects
        if effects:
            self._folding.expect_nobody()
            self._clock_at = inf
        if any(isinstance(effect, Connect) for effect in effects):
            self._untold = {}
            self._effects.append(ToParent(self._attachment()))

    def _arrived(self, now: float) -> None:
        """The parent has taken this agent in, or has itself a way up again.

        Those below are told, for what they sent up meanwhile got no further than here, and the root may be another that
        knows nothing of them.
        """
        if self._untold:
            self._up(Links(tuple(self._untold[rank] for rank in sorted(self._untold))))
            self._untold = {}
        self._clock_pause = CLOCK_RETRY
        self._ask_clock(now)
        self._effects.append(Arrived())
        if self._reports or self._progress:
            self._reports_due = now
        for rank in sorted(self._heard_at):
            self._effects.append(ToChild(rank, Attached(VERSION_MAX, self._picture.links[rank].epoch)))

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
        if delivery.manner is Manner.BULK and not mine:
            self._carry(delivery)
        self._pass_on(delivery, targets, now)
        if mine:
            if delivery.manner is not Manner.QUIET:
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
            while link is not None and link.rank in self._planned and link.rank not in told:
                told[link.rank] = link
                link = None if link.parent is None else self._picture.links.get(link.parent)
        if told:
            self._up(Links(tuple(told[rank] for rank in sorted(told))))

    def _pass_on(self, delivery: Deliver, targets: Ranks, now: float) -> Ranks:
        """Send the command to each child whose subtree has targets; returns those that it was sent to."""
        sent = ranks.NONE
        for child, mask in sorted(self._picture.routes.items()):
            share = targets & mask
            if share:
                self._effects.append(ToChild(child, msgspec.structs.replace(delivery, targets=ranks.pack(share))))
                sent |= share
        if sent and self._root is None and delivery.manner is not Manner.QUIET:
            self._folding.expect(delivery.id, sent)
        return sent

    def _deliver_here(self, delivery: Deliver, now: float) -> None:
        """A command that names this very host."""
        duty, guard = self._duty, self._guard
        if duty is None or guard is None:
            raise RuntimeError("the root does no work of its own")
        known, answer = duty.known(delivery.id)
        effects: list[Effect] = []
        if not known:
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
            if not duty.clock_known:
                answer = duty.postpone(delivery, command, now)
            else:
                ttl = None if delivery.ttl_ms is None else delivery.ttl_ms / 1000
                effects, answer = duty.deliver(command, ttl, now)
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
            self._folding.expect_nobody()
            self._clock_at = inf

    def _adopt(self, plan: Plan, now: float) -> None:
        previous, self._plan = self._plan, plan
        if plan.below != previous.below:
            self._effects.append(Admit(tuple((entry.key, entry.rank) for entry in plan.below)))
            self._index(plan.below)
            self._grace = dict.fromkeys(self._grace, now + PLAN_GRACE)
            for rank in sorted(set(self._heard_at) - set(self._planned)):
                why = "it is no longer planned below"
                self._effects.append(DropChild(rank, why))
                self._child_lost(rank, why, now)
            for rank in sorted(self._heard_at):
                allowed = self._may_speak_for(rank)
                links = tuple(link for link in self._unheard[rank].values() if not _named((link,)) & ~allowed)
                for link in links:
                    del self._unheard[rank][link.rank]
                self._changed(self._picture.apply(links), now)

    def _index(self, below: tuple[Below, ...]) -> None:
        """Note for each rank below who may speak through it: itself and those planned below it."""
        up = {entry.rank: entry.parent for entry in below}
        members: dict[int, list[int]] = {rank: [] for rank in up}
        for rank in up:
            at: int | None = rank
            for _ in range(len(up)):  # a circle in a signed plan would be our bug; it must not hang a relay
                if at is None or at not in members:
                    break
                members[at].append(rank)
                at = up[at]
        # Plans change while messages are on their way: what the previous plan allowed stays allowed until the next.
        before = self._planned
        self._planned = {rank: ranks.union(found) for rank, found in members.items()}
        self._allowed = {rank: found | before.get(rank, ranks.NONE) for rank, found in self._planned.items()}

    def _carry(self, delivery: Deliver) -> None:
        """Chunks will pass through: know which, after the same checks as a target's."""
        if self._guard is None:
            return
        try:
            command = self._guard.open_any(delivery)
        except Untrusted as error:
            self._effects.append(Warn(f"push {delivery.id} is not carried: {error}"))
            return
        if isinstance(command.body, Push):
            self._effects.append(Carry(delivery.id, command.body))

    # --- from below ---------------------------------------------------------------------------------------------------

    def _from_child(self, rank: int, message: object, now: float) -> None:
        if rank not in self._planned:
            self._effects.append(DropChild(rank, "it is not planned below"))
            return
        if isinstance(message, Attach):
            self._attach(rank, message, now)
            return
        if rank not in self._heard_at:
            self._effects.append(ToChild(rank, Rejected("attach first")))
            return
        self._heard_at[rank] = now
        claimed = self._claimed(message)
        if claimed is None:
            self._expel(rank, f"it sent a {type(message).__name__}, which only parents send", now)
            return
        foreign = claimed & ~self._may_speak_for(rank)
        if foreign:
            if now >= self._grace[rank]:
                self._expel(rank, "it spoke for hosts that are not below it", now)
                return
            self._effects.append(Warn(f"rank {rank} spoke for hosts that are not below it: not heard"))
            if isinstance(message, Links):
                self._unheard[rank] |= {link.rank: link for link in message.links if _named((link,)) & foreign}
            message = _without(message, foreign)
        self._heard(message, now)

    def _may_speak_for(self, child: int) -> Ranks:
        """Whoever is planned below the child, and whoever still hangs there since a plan that had it so."""
        return self._allowed[child] | self._picture.routes.get(child, ranks.NONE)

    @staticmethod
    def _claimed(message: object) -> Ranks | None:
        """The ranks that a child's message speaks for; None where children don't send such."""
        match message:
            case Beat():
                return ranks.NONE
            case Links(links=links):
                return _named(links)
            case Outcomes(folds=folds):
                claimed = ranks.NONE
                for fold in folds:
                    claimed |= ranks.unpack(fold.ranks)
                return claimed
            case Streamed(rank=rank) | ClockAsk(rank=rank):
                return ranks.only(rank)
            case Reports(reports=reports):
                return ranks.union(report.rank for report in reports)
            case Progress(done=done):
                return ranks.union(rank for rank, _ in done)
            case _:
                return None

    def _heard(self, message: object, now: float) -> None:
        """A child's message, found to be its to send."""
        match message:
            case Links(links=links):
                self._changed(self._picture.apply(links), now)
            case Outcomes(id=id_, folds=folds):
                self._outcomes(id_, folds, now)
            case Reports(reports=reports):
                self._add_reports(reports, now)
            case ClockAsk(rank=asker, nonce=nonce) if self._root is not None:
                told = self._root.signer.clock(self._root.fleet, asker, nonce, self._root.clock_ms(now))
                self._down_to(asker, told)
            case Streamed() if self._root is not None:
                self._effects.append(TellStream(message.id, message.rank, message.stream, message.offset, message.data))
            case Progress(id=id_, done=done):
                self._add_progress(id_, done, now)
            case ClockAsk() | Streamed():
                self._up(message)
            case _:
                pass

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
            return
        known = self._picture.links.get(rank)
        if known is not None and later(known, own):
            self._effects.append(ToChild(rank, Rejected("a later attachment of yours is known")))
            return
        self._heard_at[rank] = now
        self._grace[rank] = now + PLAN_GRACE
        self._silence_at = min(self._silence_at, now + SILENT_AFTER)
        self._effects.append(ToChild(rank, Attached(version, own.epoch)))
        links = message.links
        self._unheard[rank] = {}
        foreign = _named(links[1:]) & ~self._may_speak_for(rank)
        if foreign:
            self._effects.append(Warn(f"rank {rank} attached with hosts that are not below it: not heard"))
            links = (own, *_without_links(links[1:], foreign))
            self._unheard[rank] = {link.rank: link for link in message.links[1:] if _named((link,)) & foreign}
        news = self._picture.apply(links)
        news += self._picture.apply(self._picture.contradicted(links, message.links))
        self._changed(news, now)

    def _child_lost(self, rank: int, why: str, now: float) -> None:
        if self._heard_at.pop(rank, None) is None:
            return
        del self._grace[rank], self._unheard[rank]
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
        if self._root is not None:
            self._note_restarts(news)
            self._effects.append(TellLinks(news))
            self._account_for_changes(news, gone, back, now)
            return
        # What hangs below those who came is no news here, and yet may be to those above: all that is reachable here was
        # told in the Attach or since.
        named = ranks.union(link.rank for link in news)
        told = news + tuple(self._picture.links[rank] for rank in ranks.each(back & ~named))
        # Whoever comes anew, with all below it, is asked again for what it owes, and not waited for before.
        anew = self._picture.under(link.rank for link in told if link.up)
        self._folding.expect_only((self._picture.reachable | ranks.only(self._rank())) & ~anew)
        if self._uplink is not None and not self._uplink.attached:
            self._untold |= {link.rank: link for link in told}
            return
        # What a host answered must not come after the news that it is gone or began anew.
        for message in self._folding.all():
            self._up(message)
        self._up(Links(told))

    def _account_for_changes(self, news: tuple[Link, ...], gone: Ranks, back: Ranks, now: float) -> None:
        if back:
            self._absences = [a for a in (absence.without(back) for absence in self._absences) if a.who]
        if gone:
            downs = [link for link in news if not link.up]
            why = "; ".join(sorted({self._link_text(link) for link in downs})) or "moved away"
            self._absences.append(Absence(gone, now, sentence(why)))
            self._expiry_at = min(self._expiry_at, now + LOST_AFTER)
        # Whoever came, or came by another way with all below it, is asked for what it owes.
        ask = back | self._picture.under(link.rank for link in news if link.up)
        if ask:
            self._ask_again(ask, now)

    def _link_text(self, link: Link) -> str:
        """A lost link and its reason, as people read it."""
        if self._root is None:
            raise RuntimeError("only the root speaks to people")
        parent = "the service" if link.parent is None else self._root.name(link.parent)
        return f"link {self._root.name(link.rank)} - {parent}: {link.why}"

    def _note_restarts(self, news: tuple[Link, ...]) -> None:
        """An agent began anew: what its predecessor was given and did not report is lost, and never given again."""
        reborn = ranks.union(
            link.rank for link in news if self._incarnations.get(link.rank, link.incarnation) < link.incarnation
        )
        self._incarnations |= {link.rank: link.incarnation for link in news}
        for id_ in sorted(self._accounts) if reborn else ():
            account = self._accounts[id_]
            if not account.again:
                self._settle(id_, account.lose(account.missing & reborn, "its agent restarted"))

    def _ask_again(self, who: Ranks, now: float) -> None:
        for id_ in sorted(self._accounts):
            account = self._accounts[id_]
            share = account.missing & who
            if share:
                account.sent |= self._pass_on(account.next_delivery(share, now), share, now)

    # --- outcomes -----------------------------------------------------------------------------------------------------

    def _finished(self, event: Finished, now: float) -> None:
        if self._duty is None:
            return
        effects, answer = self._duty.finished(event)
        self._effects += effects
        if answer is not None:
            self._own_outcome(event.id, answer, now)

    def _own_outcome(self, id_: int, answer: Answer, now: float) -> None:
        self._outcomes(id_, (Fold(ranks.pack(ranks.only(self._rank())), *answer),), now)

    def _outcomes(self, id_: int, folds: tuple[Fold, ...], now: float) -> None:
        if self._root is not None:
            account = self._accounts.get(id_)
            if account is not None:
                self._settle(id_, account.settle(folds))
            return
        self._folding.add(id_, folds, now)
        if self._uplink is not None and not self._uplink.attached:
            given_up = self._folding.bound()
            if given_up:
                self._effects.append(
                    Warn(f"there is no way up: outcomes of {given_up} commands will be asked for again")
                )

    def _settle(self, id_: int, folds: tuple[Fold, ...]) -> None:
        if folds:
            self._effects.append(Tell(id_, folds))
        if id_ in self._accounts and not self._accounts[id_].missing:
            del self._accounts[id_]
            self._effects.append(TellSettled(id_))

    def _submit(self, delivery: Deliver, body: object, missing: Ranks | None, now: float) -> None:
        """Root: a command from a client, signed, or one from before the root itself began anew."""
        targets = ranks.unpack(delivery.targets)
        if isinstance(body, Settled):
            self._pass_on(delivery, targets, now)
            return
        if isinstance(body, Cancel):
            account = self._accounts.get(body.of)
            if account is not None:
                account.cancel = delivery
                self._pass_on(account.next_delivery(account.missing, now), account.missing, now)
            return
        deadline = None if delivery.ttl_ms is None else now + delivery.ttl_ms / 1000
        owing = targets if missing is None else missing
        account = Account(delivery, targets, owing, ranks.NONE, deadline, isinstance(body, Plan))
        self._accounts[delivery.id] = account
        if deadline is not None:
            self._expiry_at = min(self._expiry_at, deadline + DEADLINE_SLACK)
        # What was given before the service began anew may have gone out then.
        account.sent = self._pass_on(delivery, owing, now) | (missing or ranks.NONE)
        absent = owing & ~self._picture.reachable
        if absent and missing is not None:
            self._expect_back(absent, now)
            return
        for absence in self._absences:
            if absence.since + LOST_AFTER > now:
                absent &= ~absence.who  # it may still come back in time
        if absent:
            self._settle(delivery.id, account.lose(absent, "not in the tree when the command was given"))
        elif not owing:
            self._settle(delivery.id, ())

    def _expect_back(self, who: Ranks, now: float) -> None:
        """Root: it began anew, and hosts that hung below its predecessor find back by themselves."""
        if who:
            since = now + RETURN_WITHIN - LOST_AFTER
            self._absences.append(Absence(who, since, "did not come back after the service did"))
            self._expiry_at = min(self._expiry_at, since + LOST_AFTER)

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
        for absence in self._absences:
            absence.since = max(absence.since, now)
        for account in self._accounts.values():
            if account.deadline is not None:
                account.deadline = max(account.deadline, now)
        self._expected = now

    def _advance(self, now: float) -> None:
        if now >= self._silence_at:
            self._expire_children(now)
        if self._uplink is not None:
            self._uplink_changed(self._uplink.advance(now))
        if self._duty is not None:
            self._effects += self._duty.advance(now, childless=not self._heard_at)
        if now >= self._beat_at:
            self._beat_at = now + BEAT_EVERY
            self._up(Beat())
            self._effects += [ToChild(rank, Beat()) for rank in sorted(self._heard_at)]
        if now >= self._clock_at:
            self._ask_clock(now)
        if now >= self._expiry_at:
            self._expire(now)
        self._flush(now)

    def _expire_children(self, now: float) -> None:
        for rank in sorted(rank for rank, heard in self._heard_at.items() if now >= heard + SILENT_AFTER):
            self._child_lost(rank, f"silent for {SILENT_AFTER:g} s", now)
        self._silence_at = min(self._heard_at.values(), default=inf) + SILENT_AFTER

    def _expire(self, now: float) -> None:
        """Root: settle as lost what can't be known any more."""
        due = [absence for absence in self._absences if now >= absence.since + LOST_AFTER]
        self._absences = [absence for absence in self._absences if now < absence.since + LOST_AFTER]
        for id_ in sorted(self._accounts):
            account = self._accounts[id_]
            folds: tuple[Fold, ...] = ()
            for absence in due:
                folds += account.lose(absence.who & account.missing, absence.why)
            if account.deadline is not None and now >= account.deadline + DEADLINE_SLACK:
                folds += account.lose(account.missing, "no answer by the deadline")
            if folds:
                self._settle(id_, folds)
        times = [absence.since + LOST_AFTER for absence in self._absences]
        times += [a.deadline + DEADLINE_SLACK for a in self._accounts.values() if a.deadline is not None]
        self._expiry_at = min(times, default=inf)

    def _flush(self, now: float) -> None:
        """Send what is due. Without a way up it stays, and leaves when there is one."""
        if self._uplink is not None and not self._uplink.attached:
            if self._reports_due is not None and now >= self._reports_due:
                self._reports_due = None
            return
        for message in self._folding.ready(now):
            self._up(message)
        if self._reports_due is not None and now >= self._reports_due:
            self._reports_due = None
            self._flush_reports()

    def _flush_reports(self) -> None:
        progress, self._progress = self._progress, {}
        for id_ in sorted(progress):
            done = tuple(sorted(progress[id_].items()))
            if self._root is not None:
                self._effects.append(TellProgress(id_, done))
            else:
                self._up(Progress(id_, done))
        reports, self._reports = self._reports, {}
        for batch in _batches([reports[rank] for rank in sorted(reports)]):
            if self._root is not None:
                self._effects.append(TellReports(batch))
            else:
                self._up(Reports(batch))

    def _add_reports(self, reports: tuple[Report, ...], now: float) -> None:
        for report in reports:
            waiting = self._reports.get(report.rank)
            self._reports[report.rank] = report if waiting is None else newest(waiting, report)
        if self._reports_due is None:
            self._reports_due = now + REPORT_WINDOW

    def _add_progress(self, id_: int, done: tuple[tuple[int, int], ...], now: float) -> None:
        if self._uplink is not None and not self._uplink.attached:
            return  # nobody waits for how it once was
        self._progress.setdefault(id_, {}).update(done)
        if self._reports_due is None:
            self._reports_due = now + REPORT_WINDOW

    def _attachment(self) -> Attach:
        if self._uplink is None:
            raise RuntimeError("the root attaches to nobody")
        parent = self._uplink.parent.rank
        own = Link(self._rank(), parent, self._incarnation, self._uplink.epoch, True, self._uplink.why)
        # Why a link is as it is was told when it was news; a whole fleet's reasons would be too much for one message.
        below = (msgspec.structs.replace(link, why="") if link.why else link for link in self._picture.subtree())
        return Attach(VERSION_MIN, VERSION_MAX, (own, *below))

    def _up(self, message: Links | Outcomes | Streamed | Reports | ClockAsk | Progress | Beat) -> None:
        if self._uplink is not None and self._uplink.attached:
            self._effects.append(ToParent(message))

    def _down_to(self, rank: int, message: ClockTell) -> None:
        for child, mask in self._picture.routes.items():
            if ranks.holds(mask, rank):
                self._effects.append(ToChild(child, message))
                return


#: More than any set of ranks holds: nobody may speak for all.
_EVERYBODY: Ranks = -1


def _named(links: Iterable[Link]) -> Ranks:
    """The ranks that these links are about, and those that they name as parents; everybody, where that is the root."""
    named = set()
    for link in links:
        if link.parent is None:
            return _EVERYBODY
        named.add(link.rank)
        named.add(link.parent)
    return ranks.union(named)


def _without_links(links: Iterable[Link], foreign: Ranks) -> tuple[Link, ...]:
    return tuple(link for link in links if link.parent is not None and not _named((link,)) & foreign)


def _without(message: object, foreign: Ranks) -> object:
    """A child's message without what it says of `foreign`; None where nothing is left."""
    match message:
        case Links(links=links):
            return Links(_without_links(links, foreign))
        case Outcomes(id=id_, folds=folds):
            left = (msgspec.structs.replace(f, ranks=ranks.pack(ranks.unpack(f.ranks) & ~foreign)) for f in folds)
            return Outcomes(id_, tuple(fold for fold in left if fold.ranks))
        case Reports(reports=reports):
            return Reports(tuple(report for report in reports if not ranks.holds(foreign, report.rank)))
        case Progress(id=id_, done=done):
            return Progress(id_, tuple((rank, size) for rank, size in done if not ranks.holds(foreign, rank)))
        case _:
            return None


def _batches(reports: Iterable[Report]) -> Iterator[tuple[Report, ...]]:
    """The reports in messages of a size that every relay takes."""
    batch: list[Report] = []
    size = 0
    for report in reports:
        batch.append(report)
        size += _REPORT_OVERHEAD + (4 * len(report.host.note) if report.host is not None else 0)
        for vm in report.vms:
            size += _REPORT_OVERHEAD + len(vm.name) + len(vm.deployment) + len(vm.reason)
        if size >= FOLD_BYTES:
            yield tuple(batch)
            batch, size = [], 0
    if batch:
        yield tuple(batch)
