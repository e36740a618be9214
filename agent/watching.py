"""Descriptors that are waited for, many for a moment each: three for every command.

asyncio's add_reader and remove_reader take some 15 us each, a seventh of all that a short command costs its agent. An
epoll of our own takes one, and the event loop waits for it alone (epoll(7): an epoll descriptor can be waited for).
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

#: Calls in one turn of the event loop, before others get theirs.
_TURN = 64


class Watching:
    """Calls back when descriptors can be read, for as long as they can."""

    def __init__(self) -> None:
        """Belongs to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}
        self._loop.add_reader(self._epoll.fileno(), self._run)

    def add(self, fd: int, call: Callable[[], None]) -> None:
        """Call when `fd` can be read, or its other end is closed. It must be removed before it is closed."""
        self._epoll.register(fd, select.EPOLLIN)
        self._calls[fd] = call

    def remove(self, fd: int) -> None:
        """Call no more."""
        del self._calls[fd]
        self._epoll.unregister(fd)

    def _run(self) -> None:
        ready = [(fd, self._calls[fd]) for fd, _ in self._epoll.poll(0, _TURN)]
        for fd, call in ready:
            if self._calls.get(fd) is call:  # else one before it has ended it, and the number may be another's by now
                call()

    def close(self) -> None:
        """Wait for nothing any more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._calls.clear()
