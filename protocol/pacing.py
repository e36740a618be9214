"""How much of outcomes a relay sends up before its parent has passed it on, so that no relay holds what a slower link
above it can't take. Pure.

Both ends count the same bytes since the child attached. A parent says that it has passed some on only while it may send
itself, so a narrow link stops those below it, one after the other, down to the hosts, which keep their outcomes anyway.
Heartbeats, links, commands and streamed output (which has a credit of its own) wait for none of this.

The parent has said at least what the child has heard, and nothing is lost between them while the child is attached. So
who begins a message with more unheard than it may, lies; and who attaches again brings no new credit while much of what
it sent before is still held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from protocol.limits import FOLD_BYTES, OUTCOME_CREDIT, OUTCOME_LAST
from protocol.outcomes import Fold, size

#: What an outcome counts beside its texts, in bytes: about what a relay's memory needs to hold it.
_FOLD = 1_024


def weight(folds: Iterable[Fold]) -> int:
    """The bytes that outcomes count, the same at both ends."""
    return sum(size(fold) + _FOLD for fold in folds)


class Pace:
    """One relay's account with its parent, and those of its children with it."""

    def __init__(self) -> None:
        self._sent = self._heard = 0
        #: What came from each child since it attached, and what of it the child was told.
        self._came: dict[int, int] = {}
        self._told: dict[int, int] = {}
        #: What came from each before it attached, and may still be held here.
        self._before: dict[int, int] = {}
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

    @property
    def last_room(self) -> bool:
        """The same for outcomes of hosts that are gone, before the news of it goes."""
        return self._sent - self._heard < OUTCOME_LAST

    def sent(self, folds: Iterable[Fold]) -> None:
        """These went up."""
        self._sent += weight(folds)

    def heard(self, total: int) -> None:
        """The parent has passed on so much in all."""
        self._heard = max(self._heard, min(total, self._sent))

    # --- to the children ----------------------------------------------------------------------------------------------

    def attached(self, child: int) -> None:
        """It counts from nought."""
        self.lost(child)
        self._came[child] = self._told[child] = 0

    def lost(self, child: int) -> None:
        """It is gone."""
        unheard = self._unheard(child)
        if unheard:
            self._before[child] = self._before.get(child, 0) + unheard
        self._came.pop(child, None)
        self._told.pop(child, None)
        self._owed.discard(child)

    def _unheard(self, child: int) -> int:
        return self._came.get(child, 0) - self._told.get(child, 0)

    def clogged(self, child: int) -> bool:
        """Whether as much as a credit is held of what it sent before: it has to wait, or to go elsewhere."""
        return self._before.get(child, 0) + self._unheard(child) >= OUTCOME_CREDIT

    def came(self, child: int, folds: Sequence[Fold]) -> bool:
        """It sent these; false where it may not have."""
        may = self._unheard(child) < OUTCOME_LAST and sum(size(fold) for fold in folds[:-1]) < FOLD_BYTES
        self._came[child] = self._came.get(child, 0) + weight(folds)
        # Not at each: small outcomes, which are most, cost no answer.
        if self._unheard(child) >= OUTCOME_CREDIT // 2:
            self._owed.add(child)
        return may

    def due(self, held: int = 0) -> list[tuple[int, int]]:
        """The children that may send more, and what each is to be told, where `held` bytes wait here to go up."""
        # What waits for others that are equal goes within a FOLD_WINDOW; what comes meanwhile has no end.
        if not self.room or held > OUTCOME_CREDIT:
            return []
        self._before.clear()
        if not self._owed:
            return []
        due = [(child, self._came[child]) for child in sorted(self._owed)]
        self._told |= dict(due)
        self._owed.clear()
        return due
