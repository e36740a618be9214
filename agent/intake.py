"""What comes in over TCP before anybody can tell what it is: connections that say nothing, messages that never end.

libzmq bounds each frame (ZMQ_MAXMSGSIZE) and hands a message over with its last one; how much of an unfinished message
it holds, it tells nobody. But the kernel counts what a connection has received, and what was heard is known here: the
difference is held in memory. Whoever makes it larger than a message can be is hung up on.
"""

from __future__ import annotations

import fcntl
import resource
import socket
import struct
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from protocol.limits import MAX_FRAME, MAX_PARTS

#: How often connections are looked at, in seconds: a 10 Gbit/s link brings 300 MB in that time.
EVERY = 0.25
#: The largest legitimate message, and what libzmq's decoder and the handshake may add.
HELD_MOST = MAX_PARTS * MAX_FRAME + (1 << 20)
#: Whoever connects has something to say: an Attach or an Ask follows the handshake at once, and the handshake has 3 s.
_SPEAK_WITHIN = 10.0
#: Connections that have not spoken yet, beside those of everybody who may: so many that a port scan is felt by nobody,
#: and few beside the descriptors that a process may have.
_UNSPOKEN_MOST = 256
#: A relay may have to take in all orphans of its fleet, each with two connections; the usual limit is 1,024.
_DESCRIPTORS = 65_536
#: tcpi_bytes_received in struct tcp_info (linux/tcp.h, since Linux 4.1): its offset in bytes.
_BYTES_RECEIVED = 128
#: What CURVE and ZMTP add to a frame: command name, nonce, authenticator and flags (RFC 26), then flags and length in
#: one byte or eight (RFC 23).
_SEALED, _SHORT, _SHORT_MOST, _LONG = 33, 2, 255, 9


@contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """The TCP socket behind a descriptor of libzmq's, which stays libzmq's. Raises OSError where it is gone."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def shut_down(fd: int) -> None:
    """End a connection. libzmq has no call for one of many; ended under its hands, it takes note and cleans up."""
    with suppress(OSError), _borrowed(fd) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def received(fd: int) -> int | None:
    """How many bytes libzmq has taken from a connection; None where the kernel doesn't say."""
    with suppress(OSError, struct.error), _borrowed(fd) as sock:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED + 8)
        (total,) = struct.unpack_from("=Q", info, _BYTES_RECEIVED)
        (unread,) = struct.unpack("=i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
        return int(total) - int(unread)
    return None


def on_the_wire(frame: int) -> int:
    """The bytes that a frame of `frame` bytes is on a CURVE connection."""
    sealed = frame + _SEALED
    return sealed + (_SHORT if sealed <= _SHORT_MOST else _LONG)


@dataclass
class _Connection:
    since: float
    heard: int = 0
    spoke: bool = False
    sample: int | None = None


class Intake:
    """The connections of one socket, by descriptor."""

    def __init__(self, known: Callable[[], int]) -> None:
        """`known` tells how many peers may rightly connect."""
        self._known = known
        self._connections: dict[int, _Connection] = {}
        self._unspoken: dict[int, None] = {}
        self._sampled = False

    def __len__(self) -> int:
        return len(self._connections)

    def __contains__(self, fd: int) -> bool:
        return fd in self._connections

    def opened(self, fd: int, now: float) -> None:
        """A connection was made at time `now` (seconds, monotonic)."""
        self._connections[fd] = _Connection(now)
        self._unspoken[fd] = None
        if len(self._unspoken) > _UNSPOKEN_MOST + 2 * self._known():
            # The oldest: whoever means it needs milliseconds for the handshake.
            self._hang_up(next(iter(self._unspoken)))

    def closed(self, fd: int) -> None:
        """A connection has ended."""
        self._connections.pop(fd, None)
        self._unspoken.pop(fd, None)

    def heard(self, fd: int, frames: Iterable[int]) -> None:
        """A whole message came, with frames of these sizes."""
        connection = self._connections.get(fd)
        if connection is not None:
            connection.heard += sum(map(on_the_wire, frames))
            if not connection.spoke:
                connection.spoke = True
                self._unspoken.pop(fd, None)

    def sample(self, now: float) -> None:
        """Note what each connection has received. Whoever has said nothing for too long is hung up on."""
        for fd in [fd for fd in self._unspoken if now >= self._connections[fd].since + _SPEAK_WITHIN]:
            self._hang_up(fd)
        for fd, connection in self._connections.items():
            connection.sample = received(fd)
        self._sampled = True

    def judge(self) -> None:
        """Every whole message that had come by the last sample was heard: the rest belongs to unfinished ones."""
        if not self._sampled:
            return
        self._sampled = False
        for fd, connection in list(self._connections.items()):
            if connection.sample is not None and connection.sample - connection.heard > HELD_MOST:
                self._hang_up(fd)

    def _hang_up(self, fd: int) -> None:
        """End it once; libzmq's word that it is closed comes later."""
        self.closed(fd)
        shut_down(fd)


def allow_descriptors() -> None:
    """Let this process open as many descriptors as it may, up to _DESCRIPTORS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
