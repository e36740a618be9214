"""The root's account of commands: which targets have their outcome, and which still owe one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec

from protocol import ranks
from protocol.messages import Deliver
from protocol.outcomes import Fold, Lost
from protocol.ranks import Ranks


@dataclass
class Account:
    """One command that is not settled yet.

    `sent` are the targets that it has gone out to at least once; `again` is true where a restarted agent may be given
    it again (a plan), instead of being counted as lost. `deadline` is in seconds by the root's monotonic clock.
    """

    delivery: Deliver
    targets: Ranks
    missing: Ranks
    sent: Ranks
    deadline: float | None
    again: bool
    cancel: Deliver | None = None

    def settle(self, folds: Iterable[Fold]) -> tuple[Fold, ...]:
        """Take outcomes in; returns what of them is new: each target is settled once, however often it is reported."""
        news = []
        for fold in folds:
            fresh = ranks.unpack(fold.ranks) & self.missing
            if fresh:
                self.missing &= ~fresh
                news.append(msgspec.structs.replace(fold, ranks=ranks.pack(fresh)))
        return tuple(news)

    def lose(self, which: Ranks, why: str) -> tuple[Fold, ...]:
        """Settle all of `which` that still owe an outcome as lost."""
        return self.settle([Fold(ranks.pack(which), Lost(why))])

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
