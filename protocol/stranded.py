"""A relay without a way up for long, and what it owes those below: they may have a way that it has not.

It is cut off from those above, or out of the plan, and its children hear its beats and stay. So it lets one of them go
and look. One that is back soon has found nothing either, as when the root itself is away, and then nothing but that one
has moved; one that stays away has found a way, and the others are sent after it.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf

from protocol.limits import PROBED_WITHIN, STRANDED_AFTER


class Stranded:
    """When to let whom go. Times are seconds of a monotonic clock; `due` is infinite while there is a way up."""

    def __init__(self) -> None:
        self.due = inf
        self._probe: int | None = None
        self._last = -1

    def begin(self, now: float) -> None:
        """The way up is gone, or was not there."""
        if self.due == inf:
            self.due = now + STRANDED_AFTER

    def end(self) -> None:
        """There is a way up."""
        self.due, self._probe = inf, None

    def came(self, child: int, now: float) -> None:
        """A child attaches."""
        if child == self._probe:
            self._probe, self.due = None, now + STRANDED_AFTER

    def doubt(self, now: float) -> None:
        """This process was not run for a while: whoever came back may be waiting to be heard."""
        self.due = max(self.due, now + STRANDED_AFTER)

    def advance(self, now: float, children: Collection[int]) -> list[int]:
        """The children to let go now, in ascending order."""
        if now < self.due:
            return []
        self.due = now + STRANDED_AFTER
        if self._probe is not None:
            self._probe = None
            return sorted(children)
        if not children:
            return []
        self._last = self._probe = min((rank for rank in children if rank > self._last), default=min(children))
        self.due = now + PROBED_WITHIN
        return [self._probe]
