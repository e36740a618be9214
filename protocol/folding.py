"""Folding: outcomes of one command wait for each other for a moment, and equal ones become one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from protocol import ranks
from protocol.limits import FOLD_BYTES, FOLD_WINDOW
from protocol.messages import Outcomes
from protocol.outcomes import Fold, Outcome, Output
from protocol.ranks import Ranks

#: What a fold costs beside its output: bitmap, outcome and framing, generously.
_FOLD_OVERHEAD = 100
#: Commands that a relay waits for at a time. Above it the oldest is no longer waited for: its outcomes then leave a
#: FOLD_WINDOW after they come, and none is lost.
_MOST = 4_096


class _Pending:
    """The outcomes of one command that have not gone up yet."""

    def __init__(self) -> None:
        self.waiting: Ranks = ranks.NONE
        self.folds: dict[tuple[Outcome, Output], Ranks] = {}
        self.bytes = 0
        self.due: float | None = None


class Folding:
    """All commands of which a relay expects or holds outcomes.

    A command's folds leave when everybody below has answered, when they have waited FOLD_WINDOW, or when there are
    FOLD_BYTES of them. Who has not answered is kept for the first reason only: nothing is lost where it is wrong.
    """

    def __init__(self) -> None:
        self._pending: dict[int, _Pending] = {}

    def expect(self, id_: int, who: Ranks) -> None:
        """A command went to `who`."""
        if len(self._pending) >= _MOST:
            idle = next((old for old, pending in self._pending.items() if not pending.folds), None)
            if idle is not None:
                del self._pending[idle]
        self._pending.setdefault(id_, _Pending()).waiting |= who

    def expect_only(self, reachable: Ranks) -> None:
        """Nobody but `reachable` hangs here now: no command waits for others."""
        for pending in self._pending.values():
            pending.waiting &= reachable

    def add(self, id_: int, folds: Iterable[Fold], now: float) -> None:
        """Outcomes came in."""
        pending = self._pending.setdefault(id_, _Pending())
        for fold in folds:
            who = ranks.unpack(fold.ranks)
            key = (fold.outcome, fold.output)
            if key not in pending.folds:
                pending.folds[key] = ranks.NONE
                pending.bytes += len(fold.output.out) + len(fold.output.err) + _FOLD_OVERHEAD
            pending.folds[key] |= who
            pending.waiting &= ~who
        if pending.due is None and pending.folds:
            pending.due = now + FOLD_WINDOW

    def ready(self, now: float) -> Iterator[Outcomes]:
        """The messages that are due, in order of command; what they hold is forgotten here."""
        for id_ in sorted(self._pending):
            pending = self._pending[id_]
            done = not pending.waiting
            if pending.folds and (done or pending.bytes >= FOLD_BYTES or (pending.due or 0) <= now):
                yield from self._messages(id_, pending)
                pending.folds, pending.bytes, pending.due = {}, 0, None
            if done:
                del self._pending[id_]

    def _messages(self, id_: int, pending: _Pending) -> Iterator[Outcomes]:
        """One message, or several where one would be too large for comfort."""
        batch: list[Fold] = []
        size = 0
        for (outcome, output), who in pending.folds.items():
            batch.append(Fold(ranks.pack(who), outcome, output))
            size += len(output.out) + len(output.err) + _FOLD_OVERHEAD
            if size >= FOLD_BYTES:
                yield Outcomes(id_, tuple(batch))
                batch, size = [], 0
        if batch:
            yield Outcomes(id_, tuple(batch))

    def drop(self) -> None:
        """Forget all that is held: the parent is gone, and the root will ask the agents again."""
        for pending in self._pending.values():
            pending.folds, pending.bytes, pending.due = {}, 0, None

    def wakeup(self) -> float | None:
        """When `ready` will have something by time alone."""
        return min((p.due for p in self._pending.values() if p.due is not None), default=None)

    def __len__(self) -> int:
        return len(self._pending)
