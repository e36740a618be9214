"""Links between nodes: connections come in by key and go out as ranks; who is not admitted is not heard.

Trust: CURVE on every socket; the sender of each message is the key of its connection, from the message's User-Id,
looked up again for each message (agent.keyring), so that a key that was revoked is not heard any more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq

from agent.intake import Intake, shut_down
from agent.keyring import Keyring, to_text
from agent.sockets import MORE, NOW, Monitor, Reader
from protocol.limits import MAX_FRAME, MAX_PARTS
from protocol.stream import Blob

#: The events that are asked for, and no others. Asked for HANDSHAKE_FAILED_PROTOCOL, libzmq 4.3.5 tells of it before it
#: looks at errno, finds EAGAIN there, and keeps the connection of a peer that sent a forged or replayed box.
_SERVER_EVENTS = zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED
_CLIENT_EVENTS = (
    zmq.Event.CONNECTED
    | zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)
#: Bytes taken from one socket before others get their turn (and messages: `Keyring.turn`): pieces of output take a
#: millisecond each until a client has them, and a flood of them must not hold up others' outcomes. Measured, while 16
#: hosts flooded, on a busy machine: another client's `true` took half as long.
_TURN_BYTES = 256 << 10
#: A TCP connection or a CURVE handshake that takes longer than this has failed, in ms: two round trips over the worst
#: of links, and short enough that the next ancestor is tried soon.
_CONNECT_MS = 3_000
_LISTEN_BACKLOG = 1_024
#: Whole messages of one connection that wait to be heard, before libzmq reads no more from it: nothing is lost by that,
#: and a peer that sends faster than it is heard holds 64 messages of ours, not the usual 1,000.
_UNHEARD = 64
#: Connections that were cut off and are remembered: each may leave _UNHEARD messages behind, which are read soon.
_CUT_MOST = 1_024

_LOST_EVENTS = {
    zmq.Event.DISCONNECTED: "connection closed",
    zmq.Event.CLOSED: "connection refused",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "handshake failed",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "it does not admit this host's key yet",
}


def endpoint(address: str, port: int) -> str:
    """The ZeroMQ endpoint of an IP address and a port."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


@dataclass(frozen=True)
class _Peer:
    """A connection that spoke: whose key it has, its ROUTER id and its descriptor."""

    rank: int
    route: bytes
    fd: int


class Downlink:
    """A ROUTER that children connect to.

    `heard(rank, frames)` gets each message, `lost(rank, why)` each connection that ended.
    """

    def __init__(
        self,
        keyring: Keyring,
        domain: str,
        address: str,
        port: int,
        *,
        heard: Callable[[int, list[bytes]], None],
        lost: Callable[[int, str], None],
        renewed: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Listens at `address`:`port`. `renewed(rank)` is told of a connection that takes the place of another.

        Raises OSError where it can't.
        """
        self._keyring = keyring
        self._domain = domain
        self._heard, self._lost, self._renewed = heard, lost, renewed
        #: Who is at the other end of each connection, and which connection is the one of each rank: its latest.
        self._peers: dict[bytes, _Peer] = {}
        self._current: dict[int, _Peer] = {}
        #: Connections that were cut off, the oldest first: what they had sent is still to be read when their
        #: descriptor's number is another's.
        self._cut: dict[bytes, None] = {}
        self._intake = Intake(keyring.count)
        #: Messages that were read and not heard yet.
        self._ahead: deque[list[zmq.Frame]] = deque()
        self._socket: zmq.Socket[bytes] = keyring.context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.curve_server = True
        self._socket.curve_secretkey = keyring.secret
        self._socket.curve_publickey = keyring.public
        self._socket.zap_domain = domain.encode()
        for option, value in (
            (zmq.ZAP_ENFORCE_DOMAIN, 1),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 0),
            (zmq.MAXMSGSIZE, MAX_FRAME),
            (zmq.RCVHWM, _UNHEARD),
            (zmq.SNDHWM, 0),  # nothing is dropped here: credit and the size of outcomes bound what is queued
            (zmq.HANDSHAKE_IVL, _CONNECT_MS),
            (zmq.BACKLOG, _LISTEN_BACKLOG),
            (zmq.IPV6, 1 if ":" in address else 0),
        ):
            self._socket.setsockopt(option, value)
        try:
            self._socket.bind(endpoint(address, port))
        except zmq.ZMQError as error:
            self._socket.close()
            raise OSError(error.errno, f"can't listen at {endpoint(address, port)}: {error.strerror}") from error
        self._monitor = Monitor(self._socket, _SERVER_EVENTS, self._event)
        self._reader = Reader(self._socket, self._drain)

    def send(self, rank: int, frames: Sequence[Blob]) -> bool:
        """Send to a child; false where there is no connection to it."""
        peer = self._current.get(rank)
        if peer is None:
            return False
        try:
            *first, last = frames
            for frame in (peer.route, *first):
                self._socket.send(frame, MORE)
            if isinstance(last, memoryview) and len(last) == memoryview(last.obj).nbytes:
                # As it came: libzmq counts who has it, and copies nothing.
                self._socket.send(last.obj, NOW, copy=False)
            else:
                self._socket.send(last, NOW)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget(peer)
            return False
        self._reader.look()
        return True

    def drop(self, rank: int, *, penalty: bool) -> None:
        """Cut a child's connection; with `penalty`, refuse its key for a while as well."""
        if penalty:
            self._keyring.bar(rank)
        peer = self._current.get(rank)
        if peer is not None:
            self._forget(peer)
            self._cut_off(peer.route, peer.fd)

    def _cut_off(self, route: bytes, fd: int) -> None:
        shut_down(fd)
        # One that begins so was given by libzmq, and no other connection gets it (zmq_setsockopt, ZMQ_ROUTING_ID).
        if route.startswith(b"\0"):
            self._cut[route] = None
        if len(self._cut) > _CUT_MOST:
            del self._cut[next(iter(self._cut))]

    def _drain(self) -> bool:
        taken = 0
        for _ in range(self._keyring.turn):
            parts = self._next()
            if parts is None:
                self._intake.judge()
                return False
            taken += sum(map(len, parts))
            self._take(parts)
            if taken > _TURN_BYTES:
                break
        return True

    def _next(self) -> list[zmq.Frame] | None:
        if self._ahead:
            return self._ahead.popleft()
        if not self._reader.readable():
            return None
        parts: list[zmq.Frame] = self._socket.recv_multipart(NOW, copy=False)
        return parts

    def _hear_out(self, ended: set[bytes]) -> None:
        """Hear what these connections sent before they ended, though the news of their end overtook it.

        Heard after it, an outcome would be thrown away, and a dead connection be taken for its host's latest.
        """
        others: list[list[zmq.Frame]] = []
        for _ in range(_UNHEARD * (len(self._peers) + 1)):  # libzmq holds no more of each
            parts = self._next()
            if parts is None:
                break
            if parts[0].bytes in ended:
                self._take(parts)
            else:
                others.append(parts)
        self._ahead.extendleft(reversed(others))
        if self._ahead:
            self._reader.schedule()

    def _take(self, parts: list[zmq.Frame]) -> None:
        if len(parts) < 2:  # a connection's id and at least one frame
            return
        fd = parts[1].get(zmq.SRCFD)
        user: Any = parts[1].get("User-Id")
        rank = self._keyring.rank_of(user, self._domain)
        route = parts[0].bytes
        if route in self._cut:
            return
        if rank is None or len(parts) > MAX_PARTS + 1:
            if rank is not None:
                self._keyring.bar(rank)
            self._monitor.drain()
            if fd in self._intake:  # else it has gone already, and its number may be another's
                self._cut_off(route, fd)
            return
        peer = self._peers.get(route)
        if peer is None or (peer.rank, peer.fd) != (rank, fd):
            peer = self._meet(rank, route, fd)
        self._intake.heard(fd, [len(part) for part in parts[1:]])
        if self._current.get(rank) is peer:  # else it has connected anew since, and this is what it said before
            self._heard(rank, [part.bytes for part in parts[1:]])

    def _meet(self, rank: int, route: bytes, fd: int) -> _Peer:
        """The first message of a connection."""
        # A descriptor's number is used again: hear of the old connection's end before the new one's first message.
        self._monitor.drain()
        previous = self._current.get(rank)
        if previous is not None and previous.fd != fd:
            # Perhaps its host lost power, and TCP would hold the old connection for ever.
            shut_down(previous.fd)
            self._renewed(rank)
        peer = _Peer(rank, route, fd)
        self._peers[route] = self._current[rank] = peer
        return peer

    def _event(self, event: zmq.Event, value: int) -> None:
        if event == zmq.Event.ACCEPTED:
            self._intake.opened(value, time.monotonic())
            self._keyring.rounds.join(self._inspect)
        elif event == zmq.Event.DISCONNECTED:
            self._intake.closed(value)
            ended = [peer for peer in self._peers.values() if peer.fd == value]
            if ended:
                self._hear_out({peer.route for peer in ended})
            for peer in ended:
                if self._forget(peer):
                    self._lost(peer.rank, _LOST_EVENTS[event])

    def _forget(self, peer: _Peer) -> bool:
        """Forget a connection; whether its rank has none now."""
        if self._peers.get(peer.route) is peer:
            del self._peers[peer.route]
        if self._current.get(peer.rank) is not peer:
            return False
        del self._current[peer.rank]
        return True

    def _inspect(self) -> None:
        # Before a descriptor is closed, its end is told: none of those that are left is another's.
        self._monitor.drain()
        self._intake.sample(time.monotonic())
        self._reader.read()
        if not self._intake:
            self._keyring.rounds.leave(self._inspect)

    def close(self) -> None:
        self._keyring.rounds.leave(self._inspect)
        self._reader.close()
        self._monitor.close()
        self._socket.close()


class Uplink:
    """A DEALER to one parent, for one attachment: whoever changes parents makes a new one."""

    def __init__(
        self,
        keyring: Keyring,
        address: str,
        port: int,
        key: bytes,
        *,
        heard: Callable[[list[Blob]], None],
        lost: Callable[[str], None],
    ) -> None:
        """Begins to connect. `heard` gets each message, its blob as it came; `lost(why)` is called once, when the
        connection fails or ends.
        """
        self._heard, self._lost = heard, lost
        self._over = False
        self._rounds = keyring.rounds
        self._turn = keyring.turn
        self._fd: int | None = None
        self._intake = Intake(lambda: 1)
        self._socket: zmq.Socket[bytes] = keyring.context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.curve_serverkey = to_text(key).encode()
        self._socket.curve_publickey = keyring.public
        self._socket.curve_secretkey = keyring.secret
        for option, value in (
            (zmq.MAXMSGSIZE, MAX_FRAME),
            (zmq.RCVHWM, _UNHEARD),
            (zmq.SNDHWM, 0),
            (zmq.RECONNECT_IVL, -1),  # what was queued for a broken connection is lost: begin anew instead
            (zmq.CONNECT_TIMEOUT, _CONNECT_MS),
            (zmq.HANDSHAKE_IVL, _CONNECT_MS),
            (zmq.IPV6, 1 if ":" in address else 0),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = Monitor(self._socket, _CLIENT_EVENTS, self._event)
        self._reader = Reader(self._socket, self._drain)
        self._socket.connect(endpoint(address, port))

    def send(self, frames: Sequence[Blob]) -> None:
        """Send to the parent. What a broken connection swallows, the protocol asks for again."""
        if not self._over:
            with suppress(zmq.Again):  # the connection has ended, and the news of it is on its way
                *first, last = frames
                for frame in first:
                    self._socket.send(frame, MORE)
                self._socket.send(last, NOW)
            self._reader.look()

    def _drain(self) -> bool:
        for _ in range(self._turn):
            if self._over:
                return False
            if not self._reader.readable():
                self._intake.judge()
                return False
            frames: list[Blob] = [self._socket.recv(NOW)]
            more = self._socket.getsockopt(zmq.RCVMORE)
            while more and len(frames) < MAX_PARTS - 1:
                frames.append(self._socket.recv(NOW))
                more = self._socket.getsockopt(zmq.RCVMORE)
            if more:
                blob = self._socket.recv(NOW, copy=False)
                frames.append(blob.buffer)
                more = blob.more
            if self._fd is not None:
                self._intake.heard(self._fd, map(len, frames))
            if more:
                self._end("it sent a message of too many parts")
                return False
            self._heard(frames)
        return True

    def _event(self, event: zmq.Event, value: int) -> None:
        if event == zmq.Event.CONNECTED:
            self._fd = value
            self._intake.opened(value, time.monotonic())
            self._rounds.join(self._inspect)
        elif event in _LOST_EVENTS:
            self._end(_LOST_EVENTS[event])

    def _end(self, why: str) -> None:
        if not self._over:
            self._over = True
            self._rounds.leave(self._inspect)
            self._lost(why)

    def _inspect(self) -> None:
        self._monitor.drain()
        if not self._over:
            self._intake.sample(time.monotonic())
            self._reader.read()

    def close(self, linger_ms: int = 0) -> None:
        """Leave the parent; what is still queued gets `linger_ms` milliseconds to go."""
        self._over = True
        self._rounds.leave(self._inspect)
        self._reader.close()
        self._monitor.close()
        self._socket.close(linger_ms)
