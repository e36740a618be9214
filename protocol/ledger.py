"""The root's account of commands: which targets have their outcome, and which still owe one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec

from protocol import ranks
from protocol.messages import Deliver, Manner
from protocol.outcomes import RESTARTED, Cancelled, Fold, Lost, Outcome, Refused
from protocol.ranks import Ranks


def tells(outcome: Outcome) -> bool:
    """Whether a late outcome says what became of the command, rather than what this agent will not do any more."""
    match outcome:
        case Lost() | Cancelled(ran=False) | Refused(trust=True):
            return False
        case _:
            return True


@dataclass
class Account:
    """One command, and who still owes an outcome.

    `sent` are the targets that it has gone out to at least once; `again` is true where a restarted agent may be given
    it again (a plan). `reborn` are those whose agents began anew since they were given it: they are asked what is left
    of it. `lost` are those that were settled as lost and have not been heard of since. `deadline` is in seconds by the
    root's monotonic clock.
    """

    delivery: Deliver
    targets: Ranks
    missing: Ranks
    sent: Ranks
    deadline: float | None
    again: bool
    #: How long after the deadline an outcome may still come, in seconds.
    slack: float
    cancel: Deliver | None = None
    reborn: Ranks = ranks.NONE
    lost: Ranks = ranks.NONE

    def settle(self, folds: Iterable[Fold]) -> tuple[Fold, ...]:
        """Take outcomes in; returns what of them is new: each target is settled once, however often it is reported."""
        news = []
        for fold in folds:
            fresh = ranks.unpack(fold.ranks) & self.missing
            self.missing &= ~fresh
            if fold.outcome == Cancelled(ran=False) and fresh & self.reborn:
                # The cancel overtook the question: this agent has not begun it, and its predecessor may have.
                news.append(Fold(ranks.pack(fresh & self.reborn), Lost(RESTARTED)))
                fresh &= ~self.reborn
            if fresh:
                news.append(msgspec.structs.replace(fold, ranks=ranks.pack(fresh)))
        return tuple(news)

    def late(self, folds: Iterable[Fold]) -> tuple[Fold, ...]:
        """What hosts that were settled as lost say after all; what they can't say either is no news."""
        news = []
        for fold in folds:
            fresh = ranks.unpack(fold.ranks) & self.lost
            self.lost &= ~fresh
            if fresh and tells(fold.outcome):
                news.append(msgspec.structs.replace(fold, ranks=ranks.pack(fresh)))
        return tuple(news)

    def lose(self, which: Ranks, why: str) -> tuple[Fold, ...]:
        """Settle all of `which` that still owe an outcome as lost."""
        if not self.again:
            self.lost |= which & self.missing & self.sent
        return self.settle([Fold(ranks.pack(which), Lost(why))])

    def recall(self, which: Ranks) -> Deliver:
        """What to send to `which` to learn what became of the command, and to have it begun nowhere any more."""
        return msgspec.structs.replace(self.delivery, targets=ranks.pack(which), ttl_ms=None, manner=Manner.RECALL)

    def next_delivery(self, which: Ranks, now: float) -> Deliver:
        """What to send to `which`: the command with the time that remains, or its cancelling if it was cancelled."""
        delivery = self.cancel or self.delivery
        ttl = None if self.deadline is None else max(0, round((self.deadline - now) * 1000))
        return msgspec.structs.replace(delivery, targets=ranks.pack(which), ttl_ms=ttl)


@dataclass
class Absence:
    """Hosts that went out of reach together: since when (seconds, monotonic) and why."""

    who: Ranks
    since: float
    why: str

    def without(self, back: Ranks) -> Absence:
        """The same without those that came back."""
        return replace(self, who=self.who & ~back)
