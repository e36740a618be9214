"""A command's streamed output on its way to the root: batched by time and size, and held back where nobody reads. A
command that writes nothing holds nothing back from others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from protocol.flow import Outflow
from protocol.limits import STREAM_DELAY, STREAM_FIRST, STREAM_IDLE
from protocol.messages import Grant


class Outlet:
    """Sends what an Outflow may send. `on_room` is called when there is room again, `on_empty` when all was sent."""

    def __init__(
        self,
        send: Callable[[int, int, bytes, int, bool], None],
        first: int = STREAM_FIRST,
        *,
        outlets: Callable[[], int] = lambda: 1,
    ) -> None:
        """`send(stream, offset, data, has, fast)` sends a piece; `first` bytes may go before anything is granted;
        `outlets` says how many there are on this host."""
        self._flow = Outflow(first)
        self._outlets = outlets
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._over = False
        #: The command has ended: what there is need not wait for more.
        self._ended = False
        self.on_room: Callable[[], None] = lambda: None
        self.on_empty: Callable[[], None] = lambda: None
        self._look_later()

    @property
    def full(self) -> bool:
        """Whether nothing more is to be written for now."""
        return self._flow.full

    @property
    def ahead(self) -> int:
        """How much is to be written at a time, at most."""
        return self._flow.ahead

    @property
    def empty(self) -> bool:
        """Whether all that was written was sent."""
        return not self._flow.waiting

    @property
    def unread(self) -> bool:
        """Whether nobody reads it."""
        return self._flow.unread

    def write(self, stream: int, data: bytes) -> None:
        """The command wrote."""
        if self._over:
            return
        self._flow.share(self._outlets())
        self._flow.write(stream, data)
        # Beyond a piece, not at it: what is left then says that there is more to come.
        if self._flow.waiting > self._flow.piece:
            self._push(fast=not self._ended)
        self._wait()

    def _wait(self) -> None:
        if self._timer is None and self._flow.sendable:
            self._timer = self._loop.call_later(STREAM_DELAY, self.flush)

    def _look_later(self) -> None:
        """Look again, in a while, whether anything was written meanwhile."""
        if self._idle is None and not self._over and not self._ended and self._flow.lavish:
            self._idle = self._loop.call_later(STREAM_IDLE, self._look, self._flow.written)

    def _look(self, written: int) -> None:
        self._idle = None
        if not self._over and not self._ended and self._flow.written == written:
            self._flow.forgo()
            self.flush()
        self._look_later()

    def end(self) -> None:
        """The command has ended: send what may be sent, now and whenever more may."""
        self._ended = True
        self.flush()

    def flush(self) -> None:
        """Send what may be sent, without waiting for more."""
        self._push(fast=False)

    def _push(self, *, fast: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._over:
            return
        was_full = self._flow.full
        for piece in self._flow.take(fast=fast):
            self._send(*piece)
        if was_full and not self._flow.full:
            self.on_room()
        if self.empty:
            self._look_later()
            self.on_empty()

    def granted(self, grant: Grant) -> None:
        """The root's word: go on."""
        was_full = self._flow.full
        self._flow.granted(grant)
        self._push(fast=not self._ended)
        if was_full and not self._flow.full:
            self.on_room()
        self._wait()

    def rewind(self) -> None:
        """The way up is a new one: send again what may be lost."""
        self._flow.rewind()
        self.flush()

    def close(self) -> None:
        """The command is forgotten."""
        self._over = True
        for timer in (self._timer, self._idle):
            if timer is not None:
                timer.cancel()
