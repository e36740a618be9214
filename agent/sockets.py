"""ZeroMQ's sockets on asyncio's event loop.

They are driven through their file descriptors rather than through zmq.asyncio: measured, that is four times as many
round trips. A descriptor is edge-triggered (zmq_getsockopt, ZMQ_FD): it is drained until EAGAIN, and ZMQ_EVENTS is
looked at again after each send.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from agent.intake import EVERY

#: Plain numbers: pyzmq's flags cost 0.4 us each time two of them are put together.
NOW, MORE, _READABLE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)
_monitors = itertools.count()


class Reader:
    """Calls `drain` on the event loop while the socket has something to read. `drain` takes what there is until it is
    no longer `readable`, or returns that there may be more."""

    def __init__(self, sock: zmq.Socket[bytes], drain: Callable[[], bool]) -> None:
        self._socket = sock
        self._drain = drain
        self._loop = asyncio.get_running_loop()
        self._fd = int(sock.getsockopt(zmq.FD))
        self._scheduled = False
        self._closed = False
        self._loop.add_reader(self._fd, self._woken)
        self.look()

    def _woken(self) -> None:
        if not self._scheduled:
            self.read()

    def readable(self) -> bool:
        """Whether there is something to read; said no, the descriptor tells of the next. To ask is a third of what it
        costs to try in vain."""
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & _READABLE)

    def look(self) -> None:
        """Read on the next turn of the loop, if there is anything."""
        if not self._scheduled and not self._closed and self.readable():
            self.schedule()

    def schedule(self) -> None:
        """Read on the next turn of the loop."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.read)

    def read(self) -> None:
        """Read now, and go on later where there is more."""
        self._scheduled = False
        if not self._closed and self._drain():
            self.schedule()

    def close(self) -> None:
        """Stop calling."""
        self._closed = True
        self._loop.remove_reader(self._fd)


class Rounds:
    """Calls everybody who is in it every intake.EVERY seconds: one timer for all, since each wakes the process up."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._who: dict[Callable[[], None], None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def join(self, who: Callable[[], None]) -> None:
        """Call `who` from now on."""
        self._who[who] = None
        if self._timer is None:
            self._timer = self._loop.call_later(EVERY, self._run)

    def leave(self, who: Callable[[], None]) -> None:
        """Call `who` no more."""
        self._who.pop(who, None)

    def _run(self) -> None:
        self._timer = self._loop.call_later(EVERY, self._run) if self._who else None
        for who in list(self._who):
            who()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Monitor:
    """Connection events of a socket: `told(event, value)` for each."""

    def __init__(self, watched: zmq.Socket[bytes], wanted: int, told: Callable[[zmq.Event, int], None]) -> None:
        self._watched = watched
        self._told = told
        # By default pyzmq names the pair after the socket's descriptor, whose number may be that of one just closed.
        self._pair = watched.get_monitor_socket(wanted, f"inproc://monitor-{next(_monitors)}")
        self._reader = Reader(self._pair, self.drain)

    def drain(self) -> bool:
        """Take in all events that there are. Called also before a message of an unknown connection is looked at."""
        while not self._pair.closed and self._reader.readable():  # whoever is told may close the link
            event = parse_monitor_message(self._pair.recv_multipart(NOW))
            self._told(zmq.Event(event["event"]), event["value"])
        return False

    def close(self) -> None:
        self._reader.close()
        self._watched.disable_monitor()
        self._pair.close(0)
