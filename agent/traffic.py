"""All conduits of one node: what they have to send, and how they give way to commands.

Chunks keep the event loop of a host busy where its links are fast. A command would wait for its turn at each of the
steps that it takes: to come, to begin, to end, to be told. So whenever one comes by, what is read from conduits at a
time is less for a while, and where the processor is the limit nothing is read for a moment, in which most commands are
through. (Where it is not, what has come meanwhile would be worked at just when the command has ended.) Measured with 8
hosts on two cores, both busy with chunks: a command that does nothing takes 1 to 1.4 times as long as alone (6 to 8
ms); without this, 40 to 95 ms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from protocol.limits import CONDUIT_TAKEN

#: How long nothing is read when a command comes by, and how long it goes on then whatever comes, in seconds: a push
#: beside commands without end has half of the time. With 0.02 commands took 2.2 to 2.8 times as long as alone (see
#: above), with 0.03 1.5 to 2.5; a push of 512 MB beside commands without end 8.4 to 9.7 s with either and with this.
_PAUSE = 0.05
#: What is read at a time within so many seconds of a command, in bytes: two chunks, half a millisecond's work.
_CONSIDERATE, _TAKEN_THEN = 1.0, 192 << 10
#: So much may lie unread: a chunk of the usual size, so that each costs one wake-up; more on a host that has too much
#: to do anyway. Both are well within what may be on its way (conduits._WINDOW).
_WAITED_FOR, _WAITED_FOR_PRESSED = 128 << 10, 192 << 10


class Member(Protocol):
    """A conduit."""

    def flush(self) -> None:
        """Send what is queued, as far as there is room."""

    def pause(self) -> None:
        """Read nothing."""

    def go_on(self) -> None:
        """Read again."""


class Traffic:
    """What conduits of one node have in common."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` is the event loop's time, in seconds."""
        self._now = now
        self._members: set[Member] = set()
        #: Who has something to send, and is to be flushed.
        self.unsent: dict[Member, None] = {}
        self._considerate_until = 0.0
        self._pause_from = 0.0
        self._paused = False
        #: Whether this host's processor is the limit (agent.pressure).
        self.pressed = False

    def join(self, member: Member) -> None:
        """There is one more."""
        self._members.add(member)
        if self._paused:
            member.pause()

    def leave(self, member: Member) -> None:
        """It was closed."""
        self._members.discard(member)
        self.unsent.pop(member, None)

    def flush(self) -> None:
        """Have all send what they have."""
        while self.unsent:
            self.unsent.popitem()[0].flush()

    def taken(self) -> int:
        """How many bytes one may read at a time now."""
        return _TAKEN_THEN if self._now() < self._considerate_until else CONDUIT_TAKEN

    def waited_for(self) -> int:
        """How many bytes at most a conduit may let the kernel wait for before it is woken up."""
        return _WAITED_FOR_PRESSED if self.pressed else _WAITED_FOR

    def give_way(self) -> None:
        """A command comes by."""
        now = self._now()
        self._considerate_until = now + _CONSIDERATE
        if self.pressed and self._members and now >= self._pause_from:
            self._pause_from = now + 2 * _PAUSE
            self._paused = True
            for member in self._members:
                member.pause()
            asyncio.get_running_loop().call_later(_PAUSE, self._go_on)

    def _go_on(self) -> None:
        self._paused = False
        for member in list(self._members):
            member.go_on()
