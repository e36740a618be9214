"""What agents keep no longer: they are told of each outcome that the root has, once it lasts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from controller.members import Members
from controller.state import State
from protocol import ranks
from protocol.commands import Settled
from protocol.limits import SETTLED_EVERY
from protocol.outcomes import Fold
from protocol.ranks import Ranks
from protocol.relay import Relay

#: Commands whose settling hosts out of reach are still to be told; beyond it they keep outcomes until they restart.
_MOST = 10_000


class Forgetting:
    """Which hosts are still to be told that they may forget which commands."""

    def __init__(
        self,
        state: State,
        members: Members,
        relay: Relay,
        *,
        tell: Callable[[Ranks, Settled], None],
        goes_on: Callable[[int], bool],
    ) -> None:
        """`tell` gives hosts word; nobody is told of a command that `goes_on`."""
        self._loop = asyncio.get_running_loop()
        self._state, self._members, self._relay = state, members, relay
        self._tell, self._goes_on = tell, goes_on
        self._open: dict[int, Ranks] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, id_: int, who: Ranks = ranks.NONE) -> None:
        """The root has these hosts' outcomes of a command."""
        self._open[id_] = self._open.get(id_, ranks.NONE) | who

    def have(self, id_: int, folds: Iterable[Fold]) -> None:
        """The root has these outcomes of a command."""
        for fold in folds:
            self.add(id_, ranks.unpack(fold.ranks))

    def soon(self) -> None:
        """Tell agents in a moment, where there is anything to tell."""
        if self._timer is None and self._open:
            self._timer = self._loop.call_later(SETTLED_EVERY, self.tell_all)

    def tell_all(self) -> None:
        """Tell agents now. Those out of reach are told when they are back."""
        self.close()
        done = {id_: who for id_, who in self._open.items() if not self._goes_on(id_)}
        if not done:
            return
        self._state.make_durable()
        reachable, present = self._relay.reachable, ranks.union(self._members.present)
        told = ranks.NONE
        for id_, who in done.items():
            told |= who & reachable
            later = who & present & ~reachable
            if later:
                self._open[id_] = later
            else:
                del self._open[id_]
        while len(self._open) > _MOST:
            del self._open[next(iter(self._open))]
        ids = tuple(sorted(id_ for id_, who in done.items() if who & reachable))
        if ids:
            self._tell(told, Settled(ids=ids))

    def close(self) -> None:
        """Tell nobody any more, until `soon`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
