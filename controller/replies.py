"""What one client of the service is still to be sent, in order and without bound, and yet in little memory: outcomes
that wait for long are read from the record again when their turn comes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from controller import api

#: Bytes of outcomes that wait in memory for one client: one of the usual budget, so that who reads pays for no second
#: reading, and a hundred clients that do not read cost no more than 25 MB.
HELD_MOST = 256 << 10

_Again = Callable[[], Iterable[api.Reply]]


class Replies:
    """A queue of replies; None ends it."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[Iterable[api.Reply | None] | _Again, int]] = asyncio.Queue()
        self._next: deque[api.Reply | None] = deque()
        #: Bytes of outcomes that wait in memory.
        self.held = 0
        #: How far a push or a pull is, where that waits.
        self._progress: api.Advanced | api.Fetched | None = None

    def put(self, reply: api.Reply | None) -> None:
        """A reply that is small, or is bounded otherwise. How far something is, is said once, as it is by then."""
        if not isinstance(reply, api.Advanced | api.Fetched):
            self._queue.put_nowait(((reply,), 0))
            return
        waits, self._progress = self._progress, _later(self._progress, reply)
        if waits is None:
            self._queue.put_nowait((self._take_progress, 0))

    def _take_progress(self) -> Iterable[api.Reply]:
        taken, self._progress = self._progress, None
        return () if taken is None else (taken,)

    def put_outcome(self, replies: tuple[api.Reply, ...], size: int, again: _Again | None) -> None:
        """What came of an outcome with `size` bytes of output; `again` makes it anew from the record."""
        if again is not None and self.held and self.held + size > HELD_MOST:
            self._queue.put_nowait((again, 0))
            return
        self.held += size
        self._queue.put_nowait((replies, size))

    def put_recorded(self, again: _Again) -> None:
        """An outcome that is on record."""
        self._queue.put_nowait((again, 0))

    async def get(self) -> api.Reply | None:
        """The next reply. Waits for it. Raises CtlError where it is on record no more."""
        while not self._next:
            self._take(*await self._queue.get())
        return self._next.popleft()

    def more(self) -> bool:
        """Whether `get` has a reply without waiting. Raises CtlError as it does."""
        while not self._next and not self._queue.empty():
            self._take(*self._queue.get_nowait())
        return bool(self._next)

    def _take(self, found: Iterable[api.Reply | None] | _Again, size: int) -> None:
        self.held -= size
        self._next.extend(found() if callable(found) else found)


def _later(before: api.Advanced | api.Fetched | None, after: api.Advanced | api.Fetched) -> api.Advanced | api.Fetched:
    """What both say together."""
    if before is None:
        return after
    done = before.done | after.done
    if isinstance(before, api.Advanced) and isinstance(after, api.Advanced):
        return replace(after, done=done, left=tuple(dict.fromkeys((*before.left, *after.left))))
    return replace(after, done=done)
