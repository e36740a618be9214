"""A command's standard input as it comes from the root: kept in order, written as fast as the command reads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from protocol.limits import INPUT_CREDIT, INPUT_PIECE


class Inlet:
    """One pipe to a command. `took(taken, open, anew)` tells how much of the input the pipe has taken."""

    def __init__(self, fd: int, took: Callable[[int, bool, bool], None]) -> None:
        """Takes the descriptor over."""
        self._fd = fd
        self._took = took
        self._loop = asyncio.get_running_loop()
        self._data = bytearray()
        #: Offsets: of the next byte that goes into the pipe, and what was last told.
        self._taken = 0
        self._told = 0
        self._last = False
        self._closed = False
        self._writing = False
        os.set_blocking(fd, False)

    def announce(self) -> None:
        """Say where to go on from: at the beginning, and whenever the way up is a new one."""
        if not self._closed:
            self._data.clear()  # it comes again
            self._last = False
            self._told = self._taken
            self._took(self._taken, True, True)

    def feed(self, offset: int, data: bytes, *, last: bool) -> None:
        """A piece. One that is not the next has been here before, or comes again with what was lost before it."""
        due = self._taken + len(self._data)
        if self._closed or not offset <= due <= offset + len(data):
            return
        self._data += data[due - offset :]
        if len(self._data) > 2 * INPUT_CREDIT:
            del self._data[INPUT_CREDIT:]  # more than is ever asked for: what is left out will be missed
            return
        self._last |= last
        self._write()

    def _write(self) -> None:
        while self._data:
            try:
                count = os.write(self._fd, self._data)
            except BlockingIOError:
                break
            except OSError:  # the command closed it
                self.close()
                return
            del self._data[:count]
            self._taken += count
        if not self._data and self._last:
            self.close()
            return
        waits = bool(self._data)
        if waits != self._writing:
            self._writing = waits
            if waits:
                self._loop.add_writer(self._fd, self._write)
            else:
                self._loop.remove_writer(self._fd)
        if self._taken - self._told >= INPUT_PIECE or (not waits and self._taken > self._told):
            self._told = self._taken
            self._took(self._taken, True, False)

    def close(self) -> None:
        """Nothing more goes in."""
        if self._closed:
            return
        self._closed = True
        if self._writing:
            self._loop.remove_writer(self._fd)
        os.close(self._fd)
        self._data.clear()
        self._took(self._taken, False, False)
