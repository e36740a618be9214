"""Who may speak for whom: a child for itself and for those that its relay's plan has below it, and for nobody else.

Plans change while messages are on their way. So what the plan before allowed stays allowed, who still hangs below a
child may be spoken for, and for PLAN_GRACE seconds what a child says beyond that is left out instead of costing it the
link.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from protocol import ranks
from protocol.commands import Below
from protocol.limits import PLAN_GRACE
from protocol.messages import Beat, ClockAsk, Link, Links, Outcomes, Progress, Reports, Streamed, Taken
from protocol.outcomes import Fold
from protocol.ranks import Ranks

#: More than any set of ranks holds: nobody may speak for all.
_EVERYBODY: Ranks = -1


class Rights:
    """What each child of one relay may speak for."""

    def __init__(self, below: tuple[Below, ...]) -> None:
        #: For each rank below, the ranks that are planned to speak through it, itself included.
        self.planned: dict[int, Ranks] = {}
        #: All of them.
        self.below: Ranks = ranks.NONE
        #: The same by this plan or the one before.
        self._allowed: dict[int, Ranks] = {}
        #: By attached child: until when it is forgiven; for whom it spoke without a right by the present plan, who may
        #: be its to speak for by the next; and whose children were not all told.
        self._grace: dict[int, float] = {}
        self._unheard: dict[int, Ranks] = {}
        self._unsaid: dict[int, Ranks] = {}
        self._index(below)

    def replan(self, below: tuple[Below, ...], now: float) -> None:
        """Others are planned below."""
        self._index(below)
        self._grace = dict.fromkeys(self._grace, now + PLAN_GRACE)

    def _index(self, below: tuple[Below, ...]) -> None:
        up = {entry.rank: entry.parent for entry in below}
        members: dict[int, list[int]] = {rank: [] for rank in up}
        for rank in up:
            at: int | None = rank
            for _ in range(len(up)):  # a circle in a signed plan would be our bug; it must not hang a relay
                if at is None or at not in members:
                    break
                members[at].append(rank)
                at = up[at]
        before = self.planned
        self.below = ranks.union(up)
        self.planned = {rank: ranks.union(found) for rank, found in members.items()}
        self._allowed = {rank: found | before.get(rank, ranks.NONE) for rank, found in self.planned.items()}

    def begin(self, child: int, now: float) -> None:
        """A child attaches."""
        self._grace[child] = now + PLAN_GRACE
        self._unheard[child] = self._unsaid[child] = ranks.NONE

    def end(self, child: int) -> None:
        """An attached child is gone."""
        del self._grace[child], self._unheard[child], self._unsaid[child]

    def forgives(self, child: int, now: float) -> bool:
        """Whether the child may still have an older plan in good faith."""
        return now < self._grace[child]

    def foreign(self, child: int, claimed: Ranks, hanging: Ranks) -> Ranks:
        """Those of `claimed` that the child may not speak for, where `hanging` hang below it now."""
        return claimed & ~(self._allowed[child] | hanging)

    def withhold(self, child: int, links: Iterable[Link], foreign: Ranks) -> None:
        """Remember that links of the child that are about `foreign` were not heard."""
        for link in links:
            about = named((link,))
            if about & foreign and about > 0:
                self._unheard[child] |= about & foreign
                self._unsaid[child] |= ranks.only(link.parent) if link.parent is not None else ranks.NONE

    def leave_unsaid(self, child: int, unsaid: Ranks, hanging: Ranks) -> None:
        """The child says that it could not hear of all children of these."""
        self._unsaid[child] |= unsaid & ~self.foreign(child, unsaid, hanging)

    @property
    def unsaid(self) -> Ranks:
        """Whose children may be more than was told here."""
        found = ranks.NONE
        for unsaid in self._unsaid.values():
            found |= unsaid
        return found

    def has_more_to_say(self, child: int, hanging: Ranks) -> bool:
        """Whether something that the child said and was not heard is its to say by now."""
        unheard = self._unheard[child]
        return bool(unheard & ~self.foreign(child, unheard, hanging))


def named(links: Iterable[Link]) -> Ranks:
    """The ranks that these links are about, and those that they name as parents; everybody, where that is the root."""
    found = set()
    for link in links:
        if link.parent is None:
            return _EVERYBODY
        found.add(link.rank)
        found.add(link.parent)
    return ranks.union(found)


def claimed(message: object) -> Ranks | None:
    """The ranks that a child's message speaks for; None where children don't send such."""
    match message:
        case Beat():
            return ranks.NONE
        case Links(links=links):
            return named(links)
        case Outcomes(folds=folds):
            found = ranks.NONE
            for fold in folds:
                found |= ranks.unpack(fold.ranks)
            return found
        case Streamed(rank=rank) | Taken(rank=rank) | ClockAsk(rank=rank):
            return ranks.only(rank)
        case Reports(reports=reports):
            return ranks.union(report.rank for report in reports)
        case Progress(done=done, left=left):
            return ranks.union([rank for rank, _ in done] + [rank for rank, _, _ in left])
        case _:
            return None


def links_without(links: Iterable[Link], foreign: Ranks) -> tuple[Link, ...]:
    """The links that neither are about `foreign` nor name one of them, or the root, as parent."""
    return tuple(link for link in links if link.parent is not None and not named((link,)) & foreign)


def without(message: object, foreign: Ranks) -> object:
    """A child's message without what it says of `foreign`; None where it is all about one of them."""
    match message:
        case Links(links=links):
            return Links(links_without(links, foreign))
        case Outcomes(id=id_, folds=folds):
            return Outcomes(id_, tuple(_folds_without(folds, foreign)))
        case Reports(reports=reports):
            return Reports(tuple(report for report in reports if not ranks.holds(foreign, report.rank)))
        case Progress(id=id_, done=done, left=left):
            return Progress(
                id_,
                tuple(entry for entry in done if not ranks.holds(foreign, entry[0])),
                tuple(entry for entry in left if not ranks.holds(foreign, entry[0])),
            )
        case _:
            return None


def _folds_without(folds: Iterable[Fold], foreign: Ranks) -> Iterable[Fold]:
    for fold in folds:
        left = ranks.unpack(fold.ranks) & ~foreign
        if left:
            yield msgspec.structs.replace(fold, ranks=ranks.pack(left))
