"""How much of outcomes a relay sends up before its parent has passed it on, so that no relay holds what a slower link
above it can't take. Pure.

Both ends count the same bytes since the child attached. A parent says that it has passed some on only while it may send
itself, so a narrow link stops those below it, one after the other, down to the hosts, which keep their outcomes anyway.
Heartbeats, links, commands and streamed output (which has a credit of its own) wait for none of this.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol.limits import OUTCOME_CREDIT
from protocol.outcomes import Fold

#: What an outcome counts beside its output, in bytes: enough for many small ones to be held as well.
_FOLD = 64


def weight(folds: Iterable[Fold]) -> int:
    """The bytes that outcomes count, the same at both ends."""
    return sum(len(fold.output.out) + len(fold.output.err) + _FOLD for fold in folds)


class Pace:
    """One relay's account with its parent, and those of its children with it."""

    def __init__(self) -> None:
        self._sent = self._heard = 0
        #: What came from each child since it attached, and what of it the child was told.
        self._came: dict[int, int] = {}
        self._told: dict[int, int] = {}
        #: Children that are to be told more.
        self._owed: set[int] = set()

    # --- to the parent ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Attach to a parent, which counts from nought."""
        self._sent = self._heard = 0

    @property
    def room(self) -> bool:
        """Whether one more message may go: it may exceed the credit, so that the largest goes too."""
        return self._sent - self._heard < OUTCOME_CREDIT

    def sent(self, folds: Iterable[Fold]) -> None:
        """These went up."""
        self._sent += weight(folds)

    def heard(self, total: int) -> None:
        """The parent has passed on so much in all."""
        self._heard = max(self._heard, min(total, self._sent))

    # --- to the children ----------------------------------------------------------------------------------------------

    def attached(self, child: int) -> None:
        """It counts from nought."""
        self._came[child] = self._told[child] = 0
        self._owed.discard(child)

    def lost(self, child: int) -> None:
        """It is gone."""
        self._came.pop(child, None)
        self._owed.discard(child)

    def came(self, child: int, folds: Iterable[Fold]) -> None:
        """It sent these."""
        self._came[child] = self._came.get(child, 0) + weight(folds)
        # Not at each: small outcomes, which are most, cost no answer.
        if self._came[child] - self._told.get(child, 0) >= OUTCOME_CREDIT // 2:
            self._owed.add(child)

    def due(self) -> list[tuple[int, int]]:
        """The children that may send more, and what each is to be told."""
        if not self._owed or not self.room:
            return []
        due = [(child, self._came[child]) for child in sorted(self._owed)]
        self._told |= dict(due)
        self._owed.clear()
        return due
