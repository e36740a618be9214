"""Folding: outcomes of one command wait for each other for a moment, and equal ones become one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from protocol import ranks
from protocol.limits import FOLD_BYTES, FOLD_KEEP, FOLD_WINDOW
from protocol.messages import Outcomes
from protocol.outcomes import Fold, Outcome, Output, size
from protocol.ranks import Ranks

#: Commands that a relay waits for at a time. Above it the oldest is no longer waited for: its outcomes then leave a
#: FOLD_WINDOW after they come, and none is lost.
_MOST = 4_096


class _Pending:
    """The outcomes of one command that have not gone up yet."""

    def __init__(self) -> None:
        #: Whether it is known who will answer; without it nobody can say that all have.
        self.expected = False
        self.waiting: Ranks = ranks.NONE
        self.folds: dict[tuple[Outcome, Output], Ranks] = {}
        self.bytes = 0
        self.due: float | None = None

    @property
    def complete(self) -> bool:
        """Whether nobody's answer is waited for."""
        return self.expected and not self.waiting


class Folding:
    """All commands of which a relay expects or holds outcomes.

    A command's folds leave when everybody below has answered, when they have waited FOLD_WINDOW, or when there are
    FOLD_BYTES of them. Who has not answered is kept for the first reason only: nothing is lost where it is wrong.
    """

    def __init__(self) -> None:
        self._pending: dict[int, _Pending] = {}
        #: Commands that may have something to send before any time has passed.
        self._hot: set[int] = set()
        #: No command has something to send by time alone before this.
        self._due: float | None = None
        #: Bytes of all outcomes that have not gone up.
        self.held = 0

    def expect(self, id_: int, who: Ranks) -> None:
        """A command went to `who`."""
        if len(self._pending) >= _MOST and id_ not in self._pending:
            idle = next((old for old, pending in self._pending.items() if not pending.folds), None)
            if idle is not None:
                del self._pending[idle]
                self._hot.discard(idle)
        pending = self._pending.setdefault(id_, _Pending())
        pending.expected = True
        pending.waiting |= who

    def expect_only(self, reachable: Ranks) -> None:
        """Nobody but `reachable` hangs here now: no command waits for others."""
        for id_, pending in self._pending.items():
            pending.waiting &= reachable
            if pending.complete:
                self._hot.add(id_)

    def settled(self, ids: Iterable[int]) -> None:
        """The root wants no more outcomes of these commands: whoever has not answered is not waited for."""
        for id_ in ids:
            pending = self._pending.get(id_)
            if pending is not None:
                pending.waiting = ranks.NONE
                self._hot.add(id_)

    def expect_nobody(self) -> None:
        """The way up is gone: who is to answer will be said again. What is held stays."""
        for id_ in [id_ for id_, pending in self._pending.items() if not pending.folds]:
            del self._pending[id_]
            self._hot.discard(id_)
        for pending in self._pending.values():
            pending.expected, pending.waiting = False, ranks.NONE

    def add(self, id_: int, folds: Sequence[Fold], now: float) -> None:
        """Outcomes came in."""
        if not folds:
            return
        pending = self._pending.setdefault(id_, _Pending())
        for fold in folds:
            who = ranks.unpack(fold.ranks)
            key = (fold.outcome, fold.output)
            if key not in pending.folds:
                pending.folds[key] = ranks.NONE
                more = size(fold)
                pending.bytes += more
                self.held += more
            pending.folds[key] |= who
            pending.waiting &= ~who
        if pending.due is None and pending.folds:
            pending.due = now + FOLD_WINDOW
            if self._due is None or pending.due < self._due:
                self._due = pending.due
        if pending.complete or pending.bytes >= FOLD_BYTES:
            self._hot.add(id_)

    def bound(self) -> int:
        """There is no way up: keep no more than FOLD_KEEP.

        Returns how many commands' outcomes were given up, oldest first; whoever is still there is asked for them again.
        """
        given_up = 0
        for id_ in sorted(self._pending) if self.held > FOLD_KEEP else ():
            if self.held <= FOLD_KEEP:
                break
            self.held -= self._pending.pop(id_).bytes
            self._hot.discard(id_)
            given_up += 1
        return given_up

    def ready(self, now: float) -> Iterator[Outcomes]:
        """The messages that are due, in order of command; what each holds is forgotten when it is taken, and who takes
        no more leaves the rest here."""
        ids: Iterable[int] = self._hot
        by_time = self._due is not None and self._due <= now
        if by_time:
            ids = self._hot.union(
                id_ for id_, pending in self._pending.items() if pending.due is not None and pending.due <= now
            )
        if not ids:
            if by_time:
                self._set_due()
            return
        yield from self._leave(sorted(ids))

    def about(self, who: Ranks) -> Iterator[Outcomes]:
        """What is held of these, due or not, perhaps with others' that are equal: what is sent next must not overtake
        it. As with `ready`, who takes no more leaves the rest here."""
        if self.held:
            yield from self._leave(sorted(id_ for id_, pending in self._pending.items() if pending.folds), who)

    def _leave(self, ids: list[int], about: Ranks | None = None) -> Iterator[Outcomes]:
        for id_ in ids:
            pending = self._pending[id_]
            keys = [key for key, who in pending.folds.items() if about is None or who & about]
            keys.reverse()
            while keys:
                yield self._message(id_, pending, keys)
            if pending.folds:
                continue
            pending.due = None
            self._hot.discard(id_)
            if not pending.waiting:
                del self._pending[id_]
        self._set_due()

    def _set_due(self) -> None:
        self._due = min((p.due for p in self._pending.values() if p.due is not None), default=None)

    def _message(self, id_: int, pending: _Pending, keys: list[tuple[Outcome, Output]]) -> Outcomes:
        """The last of `keys`, as many as are comfortable in one message. They are forgotten here."""
        batch: list[Fold] = []
        count = 0
        while keys and count < FOLD_BYTES:
            outcome, output = keys.pop()
            fold = Fold(ranks.pack(pending.folds.pop((outcome, output))), outcome, output)
            batch.append(fold)
            count += size(fold)
        # What was folded since it came has more ranks than it had, and so a few bytes more.
        count = min(count, pending.bytes) if pending.folds else pending.bytes
        pending.bytes -= count
        self.held -= count
        return Outcomes(id_, tuple(batch))

    def wakeup(self) -> float | None:
        """When `ready` will have something by time alone, at the earliest."""
        return self._due

    def __len__(self) -> int:
        return len(self._pending)
