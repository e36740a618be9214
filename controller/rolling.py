"""Rolling work: a command that some hosts run at a time, and that no more begin once too many failed.

Which hosts have begun is what the commands on record say, and nothing else: so a service that comes back in the middle
goes on where it was, and nobody runs the command twice.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from controller.hosts import counted
from controller.jobs import Job
from protocol import ranks
from protocol.commands import Run
from protocol.outcomes import Fold, succeeded
from protocol.ranks import Ranks


class Roll(msgspec.Struct, frozen=True, kw_only=True):
    """Rolling work as it is kept: what is to be done by whom, `size` hosts at a time, and how many may fail.

    Of work that was stopped no more hosts begin. `job` is its number; it is no command's.
    """

    job: int
    uid: int
    what: str
    body: Run
    targets: bytes
    size: int
    may_fail: int
    timeout_ms: int | None = None
    stopped: bool = False


class Rolling:
    """One piece of rolling work while it goes on."""

    def __init__(
        self,
        job: Job,
        roll: Roll,
        *,
        begun: Ranks,
        failed: Ranks,
        name: Callable[[int], str],
        give: Callable[[Ranks], None],
        withhold: Callable[[Ranks], None],
        done: Callable[[], None],
    ) -> None:
        """`begun` and `failed` are what is on record; hosts begin in the order of their names. `give` has hosts run the
        command as a part of the job, `withhold` settles those that never will, and `done` forgets the work."""
        self._job, self._roll = job, roll
        self._left = ranks.unpack(roll.targets) & ~begun
        self._failed = failed
        self._name, self._give, self._withhold, self._done = name, give, withhold, done
        job.stopped = roll.stopped
        job.also(self._heard)
        job.more = self._more

    def begin(self) -> None:
        """Have the first hosts run it, unless some do."""
        if not self._job.open:
            self._more()
        self._job.seal()

    def _heard(self, fold: Fold) -> None:
        if not succeeded(fold.outcome):
            self._failed |= ranks.unpack(fold.ranks)

    def _more(self) -> bool:
        """All that began is over: have the next ones begin. Whether there were any."""
        left, self._left = self._left, ranks.NONE
        if left and not self._job.stopped and ranks.count(self._failed) <= self._roll.may_fail:
            in_order = sorted(ranks.each(left), key=lambda rank: counted(self._name(rank)))
            batch = ranks.union(in_order[: self._roll.size])
            self._left = left & ~batch
            self._give(batch)
            return True
        if left:
            self._withhold(left)
        self._done()
        return False
