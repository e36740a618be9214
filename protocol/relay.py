"""The relay: one state machine, the same at the root and in every agent. The root is the relay with no parent.

`handle(event, now)` returns the effects that the shell must perform, `next_wakeup()` the time at which it must be called with a
Tick. Times are seconds of a monotonic clock. It holds three promises:

- every target of a command gets exactly one outcome at the root (`ledger`);
- no agent begins a command twice (`duty`);
- an outcome that an agent has reaches the root as soon as there is a path, for whoever attaches is asked again for
  what is missing, and answers from memory.

So a relay in the middle keeps nothing that matters: it splits targets on the way down and folds on the way up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import msgspec

from protocol import ranks
from protocol.commands import Below, Cancel, Plan, Push, Quiet, Settled
from protocol.duty import Duty
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
    DEADLINE_SLACK,
    LOST_AFTER,
    PAUSED_AFTER,
    REPORT_WINDOW,
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
from protocol.outcomes import NO_OUTPUT, Exited, Fold, Outcome, Output, Refused
from protocol.picture import Picture
from protocol.ranks import Ranks
from protocol.trust import Guard, Signer, Untrusted, open_command
from protocol.uplink import Uplink


@dataclass
class _Child:
    """A child that is attached: when it was heard last."""

    heard: float


@dataclass(frozen=True)
class RootPart:
    """What the root's relay has that no other has: the fleet's key, its clock in milliseconds as a function of
    `now`, and the hosts' names for the reasons that people read."""

    signer: Signer
    fleet: str
    clock_ms: Callable[[float], int]
    name: Callable[[int], str]


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
        self._children: dict[int, _Child] = {}
        self._reports: dict[int, Report] = {}
        self._reports_due: float | None = None
        self._beat_at = 0.0
        self._expected = 0.0
        self._effects: list[Effect] = []
        self._planned_below: dict[int, Ranks] = {}
        self._index(plan.below)
        # The root's own:
        self._accounts: dict[int, Account] = {}
        self._absences: list[Absence] = []
        self._was_reachable: Ranks = ranks.NONE
        self._incarnations: dict[int, int] = {}

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
        times = [self._beat_at, self._folding.wakeup(), self._reports_due]
        times += [child.heard + SILENT_AFTER for child in self._children.values()]
        if self._uplink is not None:
            times.append(self._uplink.wakeup())
        if self._duty is not None:
            times.append(self._duty.wakeup())
        times += [absence.since + LOST_AFTER for absence in self._absences]
        times += [
            account.deadline + DEADLINE_SLACK for account in self._accounts.values() if account.deadline is not None
        ]
        self._expected = min(time for time in times if time is not None)
        return self._expected

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
                settled = self._duty.finished(event, now) if self._duty is not None else None
                if settled is not None:
                    self._own_outcome(event.id, *settled, now)
            case Wrote(id_, stream, offset, data):
                self._up(Streamed(id_, self._rank(), stream, offset, data))
            case Observed(host, vms, whole):
                self._add_reports((Report(self._rank(), host, vms, whole),), now)
            case Advanced(id_, done):
                self._up(Progress(id_, ((self._rank(), done),)))
            case Submit(delivery, body):
                self._submit(delivery, body, now)
            case Replan(plan):
                self._adopt(plan)
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
                elif uplink.accepted(epoch, now):
                    self._ask_clock(now)
                    self._effects.append(Arrived())
                    if self._reports:
                        self._reports_due = now
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
        self._folding.drop()
        self._effects += self._uplink.lost(why, now)

    def _ask_clock(self, now: float) -> None:
        if self._guard is None:
            raise RuntimeError("the root asks nobody for the time")
        nonce = self._nonce()
        self._guard.time.ask(nonce, now)
        self._up(ClockAsk(self._rank(), nonce))

    def _clock_told(self, told: ClockTell, now: float) -> None:
        if told.rank != self._me:
            self._down_to(told.rank, told)
            return
        if self._guard is None or self._duty is None:
            raise RuntimeError("the root tells the time")
        try:
            self._guard.time.tell(told, self._rank(), self._guard.fleet, self._guard.verify_key)
        except Untrusted as error:
            self._effects.append(Warn(f"what time it is was not accepted: {error}"))
            return
        for delivery in self._duty.take_postponed():
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

    def _pass_on(self, delivery: Deliver, targets: Ranks, now: float) -> Ranks:
        """Send the command to each child whose subtree has targets; returns those that it was sent to."""
        sent = ranks.NONE
        for child, mask in self._picture.routes.items():
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
        # Whatever is about other commands or about the tree itself works before the clock is known; what it is, only
        # its signature tells, so look inside only where the fleet signed it.
        try:
            command = open_command(delivery.payload, delivery.signature, guard.verify_key, guard.fleet)
        except Untrusted as error:
            self._effects.append(Warn(f"command {delivery.id} refused: {error}"))
            self._own_outcome(delivery.id, Refused(str(error), trust=True), NO_OUTPUT, now)
            return
        if isinstance(command.body, Quiet):
            effects, outcomes = duty.quiet(delivery, now)
            self._effects += effects
            for id_, outcome in outcomes:
                self._own_outcome(id_, outcome, NO_OUTPUT, now)
        elif isinstance(command.body, Plan):
            self._planned(delivery, now)
        elif not duty.clock_known:
            refused = duty.postpone(delivery)
            if refused is not None:
                self._own_outcome(delivery.id, refused, NO_OUTPUT, now)
        else:
            effects, settled = duty.deliver(delivery, now)
            self._effects += effects
            if settled is not None:
                self._own_outcome(delivery.id, *settled, now)

    def _planned(self, delivery: Deliver, now: float) -> None:
        """My part of the membership."""
        if self._guard is None or self._uplink is None:
            raise RuntimeError("the root makes the plan")
        try:
            plan = self._guard.check(delivery, now).body
            if not isinstance(plan, Plan) or plan.you.rank != self._me:
                raise Untrusted("it is another host's plan")
        except Untrusted as error:
            self._own_outcome(delivery.id, Refused(str(error), trust=True), NO_OUTPUT, now)
            return
        if plan.version > self._plan.version:
            self._effects.append(SavePlan(delivery))
            # The answer goes up the old way first; where it is lost with the move, the root asks again.
            self._own_outcome(delivery.id, Exited(0), NO_OUTPUT, now)
            self._flush(now)
            self._adopt(plan)
            before = self._uplink.attached
            self._uplink.replan(plan.ancestors, now)
            if before and not self._uplink.attached:
                self._folding.drop()
        else:
            self._own_outcome(delivery.id, Exited(0), NO_OUTPUT, now)

    def _adopt(self, plan: Plan) -> None:
        previous, self._plan = self._plan, plan
        if plan.below != previous.below:
            self._effects.append(Admit(tuple((entry.key, entry.rank) for entry in plan.below)))
            self._index(plan.below)
            allowed = {entry.rank for entry in plan.below}
            for rank in sorted(set(self._children) - allowed):
                self._effects.append(DropChild(rank, "it is no longer planned below"))

    def _index(self, below: tuple[Below, ...]) -> None:
        """For each rank below, the ranks that may speak through it: its own and those planned below it."""
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
        before = self._planned_below
        self._planned_below = {rank: ranks.union(found) for rank, found in members.items()}
        for rank in self._planned_below:
            self._planned_below[rank] |= before.get(rank, ranks.NONE)

    def _carry(self, delivery: Deliver) -> None:
        """Chunks will pass through: know which, after the same checks as a target's."""
        if self._guard is None:
            return
        try:
            command = open_command(delivery.payload, delivery.signature, self._guard.verify_key, self._guard.fleet)
        except Untrusted as error:
            self._effects.append(Warn(f"push {delivery.id} is not carried: {error}"))
            return
        if isinstance(command.body, Push) and command.id == delivery.id:
            self._effects.append(Carry(delivery.id, command.body))

    # --- from below ---------------------------------------------------------------------------------------------------

    def _from_child(self, rank: int, message: object, now: float) -> None:
        if rank not in self._planned_below:
            self._effects.append(DropChild(rank, "it is not planned below"))
            return
        child = self._children.get(rank)
        if isinstance(message, Attach):
            self._attach(rank, message, now)
            return
        if child is None:
            self._effects.append(ToChild(rank, Rejected("attach first")))
            return
        child.heard = now
        allowed = self._planned_below[rank]
        claimed = self._claimed(message)
        if claimed is None:
            self._expel(rank, f"it sent a {type(message).__name__}, which only parents send", now)
        elif claimed & ~allowed:
            self._expel(rank, "it spoke for hosts that are not below it", now)
        else:
            self._heard(message, now)

    @staticmethod
    def _claimed(message: object) -> Ranks | None:
        """The ranks that a child's message speaks for; None where children don't send such."""
        match message:
            case Beat():
                return ranks.NONE
            case Links(links=links):
                return ranks.union(link.rank for link in links)
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
            case Progress(id=id_, done=done) if self._root is not None:
                self._effects.append(TellProgress(id_, done))
            case ClockAsk() | Streamed() | Progress():
                self._up(message)
            case _:
                pass

    def _attach(self, rank: int, message: Attach, now: float) -> None:
        own = message.links[0]
        claimed = ranks.union(link.rank for link in message.links)
        if own.rank != rank or own.parent != self._me or not own.up or claimed & ~self._planned_below[rank]:
            self._expel(rank, "it attached for hosts that are not below it", now)
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
        if known is not None and (own.incarnation, own.epoch) < (known.incarnation, known.epoch):
            self._effects.append(ToChild(rank, Rejected("a later attachment of yours is known")))
            return
        self._children[rank] = _Child(now)
        self._effects.append(ToChild(rank, Attached(version, own.epoch)))
        news = self._picture.apply(message.links)
        # An attachment is always told upwards, also where nothing in it is new here: the root asks again for
        # whatever the links above may have lost.
        self._changed(news, now, attached=message.links)

    def _child_lost(self, rank: int, why: str, now: float) -> None:
        if self._children.pop(rank, None) is None:
            return
        link = self._picture.links.get(rank)
        if link is not None and link.up and link.parent == self._me:
            gone = msgspec.structs.replace(link, up=False, why=why)
            self._changed(self._picture.apply([gone]), now)

    def _expel(self, rank: int, why: str, now: float) -> None:
        self._effects += [DropChild(rank, why), Warn(f"rank {rank} was cut off: {why}")]
        self._child_lost(rank, why, now)

    # --- the tree changes ---------------------------------------------------------------------------------------------

    def _changed(self, news: tuple[Link, ...], now: float, attached: tuple[Link, ...] = ()) -> None:
        """Links below have changed: tell those above, or, at the root, draw the conclusions."""
        told = attached or news
        if not told:
            return
        if self._root is None:
            self._folding.expect_only(self._picture.reachable | ranks.only(self._rank()))
            self._up(Links(told))
            return
        self._note_restarts(news)
        if news:
            self._effects.append(TellLinks(news))
        self._account_for_changes(news, attached, now)

    def _account_for_changes(self, news: tuple[Link, ...], attached: tuple[Link, ...], now: float) -> None:
        reachable = self._picture.reachable
        gone, back = self._was_reachable & ~reachable, reachable & ~self._was_reachable
        self._was_reachable = reachable
        if back:
            self._absences = [a for a in (absence.without(back) for absence in self._absences) if a.who]
        if gone:
            downs = [link for link in news if not link.up]
            why = "; ".join(sorted({self._link_text(link) for link in downs})) or "moved away"
            self._absences.append(Absence(gone, now, why))
        # Whoever came, or came again by another way, is asked for what it owes.
        ask = back | (ranks.union(link.rank for link in attached or news if link.up) & reachable)
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
                self._settle(id_, account.lose(account.sent & account.missing & reborn, "its agent restarted"))

    def _ask_again(self, who: Ranks, now: float) -> None:
        for id_ in sorted(self._accounts):
            account = self._accounts[id_]
            share = account.missing & who
            if share:
                account.sent |= self._pass_on(account.next_delivery(share, now), share, now)

    # --- outcomes -----------------------------------------------------------------------------------------------------

    def _own_outcome(self, id_: int, outcome: Outcome, output: Output, now: float) -> None:
        self._outcomes(id_, (Fold(ranks.pack(ranks.only(self._rank())), outcome, output),), now)

    def _outcomes(self, id_: int, folds: tuple[Fold, ...], now: float) -> None:
        if self._root is None:
            if self._uplink is not None and self._uplink.attached:
                self._folding.add(id_, folds, now)
            return  # detached: agents keep their outcomes, and the root will ask again
        account = self._accounts.get(id_)
        if account is not None:
            self._settle(id_, account.settle(folds))

    def _settle(self, id_: int, folds: tuple[Fold, ...]) -> None:
        if folds:
            self._effects.append(Tell(id_, folds))
        if id_ in self._accounts and not self._accounts[id_].missing:
            del self._accounts[id_]
            self._effects.append(TellSettled(id_))

    def _submit(self, delivery: Deliver, body: object, now: float) -> None:
        """Root: a command from a client, signed."""
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
        account = Account(delivery, targets, targets, ranks.NONE, deadline, isinstance(body, Plan))
        self._accounts[delivery.id] = account
        account.sent = self._pass_on(delivery, targets, now)
        absent = targets & ~self._picture.reachable
        for absence in self._absences:
            if absence.since + LOST_AFTER > now:
                absent &= ~absence.who  # it may still come back in time
        if absent:
            self._settle(delivery.id, account.lose(absent, "not in the tree when the command was given"))
        elif not targets:
            self._settle(delivery.id, ())

    # --- time ---------------------------------------------------------------------------------------------------------

    def _doubt_oneself(self, now: float) -> None:
        """A process that slept through its own wake-up has heard nobody because it did not listen."""
        if self._expected and now > self._expected + PAUSED_AFTER:
            for child in self._children.values():
                child.heard = now
            if self._uplink is not None:
                self._uplink.heard = now

    def _advance(self, now: float) -> None:
        for rank in sorted(self._children):
            child = self._children.get(rank)
            if child is not None and now >= child.heard + SILENT_AFTER:
                self._child_lost(rank, f"silent for {SILENT_AFTER:g} s", now)
        if self._uplink is not None:
            effects = self._uplink.advance(now)
            if effects:
                self._folding.drop()
            self._effects += effects
            if any(isinstance(effect, Connect) for effect in effects):
                self._effects.append(ToParent(self._attachment()))
        if self._duty is not None:
            self._effects += self._duty.advance(now, childless=not self._children)
        if now >= self._beat_at:
            self._beat_at = now + BEAT_EVERY
            self._up(Beat())
            self._effects += [ToChild(rank, Beat()) for rank in sorted(self._children)]
        self._expire(now)
        self._flush(now)

    def _expire(self, now: float) -> None:
        """Root: settle as lost what can't be known any more."""
        due = [absence for absence in self._absences if now >= absence.since + LOST_AFTER]
        if due:
            self._absences = [absence for absence in self._absences if absence not in due]
        for id_ in sorted(self._accounts):
            account = self._accounts[id_]
            folds: tuple[Fold, ...] = ()
            for absence in due:
                folds += account.lose(absence.who & account.missing, absence.why)
            if account.deadline is not None and now >= account.deadline + DEADLINE_SLACK:
                folds += account.lose(account.missing, "no answer by the deadline")
            if folds:
                self._settle(id_, folds)

    def _flush(self, now: float) -> None:
        for message in self._folding.ready(now):
            self._up(message)
        if self._reports_due is not None and now >= self._reports_due:
            attached = self._root is not None or (self._uplink is not None and self._uplink.attached)
            self._reports_due = None
            if attached:
                reports = tuple(self._reports[rank] for rank in sorted(self._reports))
                self._reports = {}
                if self._root is not None:
                    self._effects.append(TellReports(reports))
                else:
                    self._up(Reports(reports))

    def _add_reports(self, reports: tuple[Report, ...], now: float) -> None:
        for report in reports:
            waiting = self._reports.get(report.rank)
            self._reports[report.rank] = report if waiting is None else newest(waiting, report)
        if self._reports_due is None:
            self._reports_due = now + REPORT_WINDOW

    def _attachment(self) -> Attach:
        if self._uplink is None:
            raise RuntimeError("the root attaches to nobody")
        own = Link(
            self._rank(), self._uplink.parent.rank, self._incarnation, self._uplink.epoch, True, self._uplink.why
        )
        return Attach(VERSION_MIN, VERSION_MAX, (own, *self._picture.subtree()))

    def _up(self, message: Links | Outcomes | Streamed | Reports | ClockAsk | Progress | Beat) -> None:
        if self._uplink is not None and self._uplink.attached:
            self._effects.append(ToParent(message))

    def _down_to(self, rank: int, message: ClockTell) -> None:
        for child, mask in self._picture.routes.items():
            if ranks.holds(mask, rank):
                self._effects.append(ToChild(child, message))
                return
