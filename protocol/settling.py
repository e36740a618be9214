"""How the root settles every target of every command exactly once: what comes first, its outcome or the moment from
which nobody can say what became of it.

The moments: a host is not there when the command is given; it stays out of reach for LOST_AFTER, or ORPHANED_AFTER
where the link that broke is further up; its agent began anew; DEADLINE_SLACK has passed since the deadline. A host that
comes, or comes by another way, is asked again before that.
One that was settled as lost is asked as well, once it is back: what it says changes nothing, and is told beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

from protocol import ranks
from protocol.commands import Body, Cancel, Feed, Input, Plan, Settled
from protocol.duty import kill_after
from protocol.events import Effect, Tell, TellLate, TellSettled
from protocol.ledger import Absence, Account, tells
from protocol.limits import (
    DEADLINE_SLACK,
    KILL_AFTER,
    LATE_BYTES,
    LATE_COMMANDS,
    LOST_AFTER,
    ORPHANED_AFTER,
    RETURN_WITHIN,
)
from protocol.messages import Deliver, Link
from protocol.outcomes import Fold, sentence
from protocol.picture import Picture
from protocol.ranks import Ranks


class Settling:
    """The root's open commands, its absent hosts, and what time does to both.

    `send` passes a command on to those of a set who are in the tree, and returns them; `tell` takes the effects;
    `name` gives a host's name for reasons that people read. `incarnations` is what was known of agents before this
    root began: one with a higher incarnation has forgotten what it was given.
    """

    def __init__(
        self,
        *,
        picture: Picture,
        incarnations: Mapping[int, int],
        name: Callable[[int], str],
        send: Callable[[Deliver, Ranks], Ranks],
        tell: Callable[[Effect], None],
    ) -> None:
        self._picture = picture
        self._incarnations = dict(incarnations)
        self._name = name
        self._send = send
        self._tell = tell
        self._accounts: dict[int, Account] = {}
        #: Settled commands, the latest last, of which somebody was lost and may say more.
        self._late: dict[int, Account] = {}
        self._late_bytes = 0
        #: Who was lost of commands with lower numbers, only the service's record tells.
        self._remembered_from = inf
        self._absences: list[Absence] = []
        #: Nothing is settled by time alone before this.
        self.due = inf

    def __len__(self) -> int:
        return len(self._accounts)

    def missing(self, id_: int) -> Ranks:
        """Who still owes an outcome of this command."""
        account = self._accounts.get(id_)
        return ranks.NONE if account is None else account.missing

    # --- what is given and what comes back ----------------------------------------------------------------------------

    def begin(self, planned: Ranks, now: float) -> None:
        """The root begins; those who hung below its predecessor find back by themselves."""
        self._expect_back(ranks.union(self._incarnations) & planned, now)

    def submit(
        self, delivery: Deliver, body: Body, missing: Ranks | None, now: float, reborn: Ranks = ranks.NONE
    ) -> None:
        """A command from a client, signed; `missing` and `reborn` where it is one from before the root itself began
        anew."""
        targets = ranks.unpack(delivery.targets)
        if isinstance(body, Settled | Feed | Input):
            self._send(delivery, targets)
            return
        if isinstance(body, Cancel):
            account = self._accounts.get(body.of)
            if account is not None:
                account.cancel = delivery
                self._send(account.next_delivery(account.missing, now), account.missing)
            return
        deadline = None if delivery.ttl_ms is None else now + delivery.ttl_ms / 1000
        owing = targets if missing is None else missing
        slack = DEADLINE_SLACK + max(0.0, kill_after(body) - KILL_AFTER)
        account = Account(delivery, targets, owing, ranks.NONE, deadline, isinstance(body, Plan), slack)
        self._accounts[delivery.id] = account
        if missing is None:
            self._remembered_from = min(self._remembered_from, delivery.id)
        if deadline is not None:
            self.due = min(self.due, deadline + slack)
        # What was given before the service began anew may have gone out then.
        account.reborn = ranks.NONE if account.again else reborn & owing
        account.sent = self._send(delivery, owing & ~account.reborn) | (missing or ranks.NONE)
        if account.reborn:
            self._send(account.recall(account.reborn), account.reborn)
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

    def outcomes(self, id_: int, folds: tuple[Fold, ...]) -> None:
        """Outcomes came in; those of hosts that have theirs are ignored, unless they were lost."""
        account = self._accounts.get(id_) or self._late.get(id_)
        if account is None:
            late = tuple(fold for fold in folds if tells(fold.outcome)) if id_ < self._remembered_from else ()
        else:
            late = account.late(folds)
            if not account.lost and id_ in self._late:
                self._drop_late(id_)
            self._settle(id_, account.settle(folds))
        if late:
            self._tell(TellLate(id_, late))

    def _settle(self, id_: int, folds: tuple[Fold, ...]) -> None:
        if folds:
            self._tell(Tell(id_, folds))
        if id_ in self._accounts and not self._accounts[id_].missing:
            account = self._accounts.pop(id_)
            self._tell(TellSettled(id_))
            if account.lost:
                self._late[id_] = account
                self._late_bytes += len(account.delivery.payload)
                while len(self._late) > LATE_COMMANDS or self._late_bytes > LATE_BYTES:
                    oldest = next(iter(self._late))
                    self._remembered_from = max(self._remembered_from, oldest + 1)
                    self._drop_late(oldest)

    def _drop_late(self, id_: int) -> None:
        self._late_bytes -= len(self._late.pop(id_).delivery.payload)

    # --- the tree changes ---------------------------------------------------------------------------------------------

    def note_restarts(self, news: tuple[Link, ...]) -> None:
        """An agent began anew: what its predecessor was given and did not report is never given again. The successor is
        asked what it found of it on disk; without anything it is lost.

        What had not gone out to it yet goes out to its successor, which refuses what is from before its time.
        """
        reborn = ranks.union(
            link.rank for link in news if self._incarnations.get(link.rank, link.incarnation) < link.incarnation
        )
        self._incarnations |= {link.rank: link.incarnation for link in news}
        for id_ in sorted(self._accounts) if reborn else ():
            account = self._accounts[id_]
            if not account.again:
                account.reborn |= account.missing & account.sent & reborn

    def changed(self, news: tuple[Link, ...], gone: Ranks, back: Ranks, now: float) -> None:
        """These links changed, and by them `gone` went out of reach and `back` came."""
        if back:
            self._absences = [a for a in (absence.without(back) for absence in self._absences) if a.who]
        if gone:
            downs = [link for link in news if not link.up]
            why = "; ".join(sorted({self._link_text(link) for link in downs})) or "moved away"
            cut = ranks.union(link.rank for link in downs)
            # Those further down may hang below one that died in silence: they know no earlier than its parent would.
            deep = ranks.NONE if not cut else gone & ~cut & ~self._below(cut)
            for who, since in ((gone & ~deep, now), (deep, now + ORPHANED_AFTER - LOST_AFTER)):
                if who:
                    self._absences.append(Absence(who, since, sentence(why)))
                    self.due = min(self.due, since + LOST_AFTER)
        # Whoever came, or came by another way with all below it, is asked for what it owes.
        ask = back | self._picture.under(link.rank for link in news if link.up)
        if ask:
            self._ask_again(ask, now)

    def _below(self, parents: Ranks) -> Ranks:
        """The children of these, as far as is known."""
        return ranks.union(
            rank
            for rank, link in self._picture.links.items()
            if link.parent is not None and ranks.holds(parents, link.parent)
        )

    def _link_text(self, link: Link) -> str:
        """A lost link and its reason, as people read it."""
        parent = "the service" if link.parent is None else self._name(link.parent)
        return f"link {self._name(link.rank)} - {parent}: {link.why}"

    def _ask_again(self, who: Ranks, now: float) -> None:
        for id_ in sorted(self._accounts):
            account = self._accounts[id_]
            share = account.missing & who
            recalled = share & account.reborn | account.lost & who
            if recalled:
                self._send(account.recall(recalled), recalled)
            if account.cancel is None:
                share &= ~account.reborn
            if share:
                account.sent |= self._send(account.next_delivery(share, now), share)
        for account in self._late.values():
            recalled = account.lost & who
            if recalled:
                self._send(account.recall(recalled), recalled)

    def _expect_back(self, who: Ranks, now: float) -> None:
        if who:
            since = now + RETURN_WITHIN - LOST_AFTER
            self._absences.append(Absence(who, since, "did not come back after the service did"))
            self.due = min(self.due, since + LOST_AFTER)

    # --- time ---------------------------------------------------------------------------------------------------------

    def doubt(self, now: float) -> None:
        """This process was not run for a while: nobody is late before what waits has been read."""
        for absence in self._absences:
            absence.since = max(absence.since, now)
        for account in self._accounts.values():
            if account.deadline is not None:
                account.deadline = max(account.deadline, now)

    def advance(self, now: float) -> None:
        """Settle as lost what can't be known any more."""
        if now < self.due:
            return
        due = [absence for absence in self._absences if now >= absence.since + LOST_AFTER]
        self._absences = [absence for absence in self._absences if now < absence.since + LOST_AFTER]
        for id_ in sorted(self._accounts):
            account = self._accounts[id_]
            folds: tuple[Fold, ...] = ()
            for absence in due:
                folds += account.lose(absence.who & account.missing, absence.why)
            if account.deadline is not None and now >= account.deadline + account.slack:
                folds += account.lose(account.missing, "no answer by the deadline")
            if folds:
                self._settle(id_, folds)
        times = [absence.since + LOST_AFTER for absence in self._absences]
        times += [a.deadline + a.slack for a in self._accounts.values() if a.deadline is not None]
        self.due = min(times, default=inf)
