"""Roll calls: which agents answer now, rather than were there when last heard of. What the root knows of a host below a
relay that has just frozen is as old as SILENT_AFTER."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from protocol import ranks
from protocol.commands import Body, Run
from protocol.outcomes import Exited, Fold
from protocol.ranks import Ranks

#: What each is asked to do. It has no output, and is no job of anybody's.
_CALL = Run(argv=("true",), output_limit=0)


@dataclass
class _Call:
    """`left` have neither answered nor been given up."""

    left: Ranks
    answered: Ranks = ranks.NONE


class RollCalls:
    """The roll calls under way, by the numbers of their commands."""

    def __init__(
        self,
        new_id: Callable[[], int],
        submit: Callable[[int, Ranks, Body, int], None],
        wait_until: Callable[[Callable[[], bool], float], Awaitable[bool]],
    ) -> None:
        """`submit(id, who, body, ttl_ms)` gives a command; `wait_until(condition, seconds)` looks at the condition
        again whenever somebody was heard."""
        self._new_id = new_id
        self._submit = submit
        self._wait_until = wait_until
        self._calls: dict[int, _Call] = {}

    def __contains__(self, id_: int) -> bool:
        return id_ in self._calls

    async def call(self, who: Ranks, within: float) -> Ranks:
        """Who of these answers within so many seconds."""
        if not who:
            return ranks.NONE
        id_ = self._new_id()
        call = self._calls[id_] = _Call(who)
        self._submit(id_, who, _CALL, round(within * 1000))
        await self._wait_until(lambda: not call.left, within)
        return call.answered

    def heard(self, id_: int, folds: Iterable[Fold]) -> None:
        """Outcomes of a call came."""
        call = self._calls[id_]
        for fold in folds:
            who = ranks.unpack(fold.ranks)
            call.left &= ~who
            if isinstance(fold.outcome, Exited):
                call.answered |= who

    def settled(self, id_: int) -> bool:
        """A command is settled; whether it was a call, which is over then."""
        return self._calls.pop(id_, None) is not None
