"""Who hangs where, made so: hosts are told their parts of the plan, and asked home where they hang elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from controller.homing import may_go_home
from controller.known import Known
from controller.members import Members
from protocol import ranks
from protocol.commands import Plan
from protocol.outcomes import Exited, Fold
from protocol.relay import Relay

#: Changes of the plan wait this long for more of them: hosts come up in crowds.
_PLAN_WINDOW = 0.05
#: How often the root looks for hosts that hang elsewhere than planned, in seconds.
_TIDY_EVERY = 1.0
#: A host that could not go where it was planned is asked again after this, doubled each time up to the second number.
_TIDY_FIRST, _TIDY_MOST = 2.0, 120.0


class Planning:
    """Brings the plan of `members` to hosts."""

    def __init__(
        self,
        members: Members,
        known: Known,
        relay: Relay,
        *,
        new_id: Callable[[], int],
        give: Callable[[int, int, Plan], None],
    ) -> None:
        """`give` sends a host its part as the command of this number."""
        self._loop = asyncio.get_running_loop()
        self._members, self._known, self._relay = members, known, relay
        self._new_id, self._give = new_id, give
        self._timer: asyncio.TimerHandle | None = None
        self._tidy_timer: asyncio.TimerHandle | None = None
        #: When a host may next be asked home, and the pause after that.
        self._tidied: dict[int, tuple[float, float]] = {}
        #: Commands that bring a plan: to whom, and which version.
        self._under_way: dict[int, tuple[int, int]] = {}

    def begin(self) -> None:
        """Parts of the plan may have changed while nobody could be told: tell all of them that come."""
        self._members.stale = dict.fromkeys(self._members.present, self._members.version)
        self._tidy()

    def soon(self) -> None:
        """Send hosts their new parts of the plan, in a moment."""
        if self._timer is None:
            self._timer = self._loop.call_later(_PLAN_WINDOW, self._send_plans)

    def _send_plans(self) -> None:
        self._timer = None
        reachable = self._relay.reachable
        under_way = dict(self._under_way.values())
        # Those above first: they must admit whoever the plans send to them.
        for rank in sorted(self._members.stale, key=lambda rank: (self._members.depth(rank), rank)):
            if not ranks.holds(reachable, rank) or under_way.get(rank, -1) >= self._members.stale[rank]:
                continue
            if rank not in self._members.present:
                del self._members.stale[rank]
                continue
            id_ = self._new_id()
            self._under_way[id_] = (rank, self._members.version)
            self._give(id_, rank, self._members.plan(rank))

    def __contains__(self, id_: int) -> bool:
        """Whether this command is a plan that was sent."""
        return id_ in self._under_way

    def answered(self, id_: int, folds: Iterable[Fold]) -> None:
        """The host has its part, or could not take it."""
        rank, version = self._under_way[id_]
        if all(fold.outcome == Exited(0) for fold in folds) and self._members.stale.get(rank, version + 1) <= version:
            del self._members.stale[rank]
        elif rank in self._members.stale:
            self._loop.call_later(_TIDY_FIRST, self.soon)

    def settled(self, id_: int) -> bool:
        """A command is settled; whether it was a plan."""
        return self._under_way.pop(id_, None) is not None

    def _tidy(self) -> None:
        """Ask hosts that hang elsewhere than planned to go where they were planned, once their parent is there."""
        now, reachable = self._loop.time(), self._relay.reachable
        for rank, host in self._members.present.items():
            link = self._relay.links.get(rank)
            if link is None or not ranks.holds(reachable, rank):
                continue
            if link.parent == host.parent:
                self._tidied.pop(rank, None)
            elif host.parent is None or ranks.holds(reachable, host.parent):
                due, pause = self._tidied.get(rank, (0.0, _TIDY_FIRST))
                linked_at = self._known.linked_at
                if now >= due and (
                    host.parent is None or may_go_home(now, linked_at.get(rank, now), linked_at.get(host.parent, now))
                ):
                    self._tidied[rank] = (now + pause, min(pause * 2, _TIDY_MOST))
                    self._members.renew(rank)
                    self.soon()
        self._tidy_timer = self._loop.call_later(_TIDY_EVERY, self._tidy)

    def close(self) -> None:
        """Send nothing any more."""
        for timer in (self._timer, self._tidy_timer):
            if timer is not None:
                timer.cancel()
