"""ZeroMQ: the only file that touches it. Connections come in by key and go out as ranks; who is not admitted is not
heard.

The sockets are driven through their file descriptors rather than through zmq.asyncio: measured, that is four times as
many round trips. A descriptor is edge-triggered (zmq_getsockopt, ZMQ_FD): it is drained until EAGAIN, and ZMQ_EVENTS is
looked at again after each send.

Trust: CURVE on every socket; ZAP refuses keys that are not in the allow-list (without a ZAP handler libzmq accepts any
client key, hence ZAP_ENFORCE_DOMAIN); the sender of each message is the key of its connection, from the message's
User-Id, looked up again for each message, so that a key that was revoked is not heard any more.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.auth
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from agent.intake import EVERY, Intake, shut_down
from protocol.limits import MAX_FRAME, MAX_PARTS, PENALTY
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
#: Plain numbers: pyzmq's flags cost 0.4 us each time two of them are put together.
_NOW, _MORE, _READABLE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)
#: Messages taken from one socket before others get their turn.
_TURN = 100
#: And their bytes: pieces of output take a millisecond each until a client has them, and a flood of them must not hold
#: up others' outcomes. Measured, while 16 hosts flooded, on a busy machine: another client's `true` took half as long.
_TURN_BYTES = 256 << 10
#: The same where each may be a chunk, which takes some tenths of a millisecond to verify and to give on. Measured while
#: chunks kept all cores busy: a broadcast took 37 to 52 ms, with eight 56 to 89, and the push no longer.
_BACKGROUND_TURN = 2
#: A tenth of the share of a core that others get where there is not enough for all (sched(7)).
_BACKGROUND_NICE = 10
#: A TCP connection or a CURVE handshake that takes longer than this has failed, in ms: two round trips over the worst
#: of links, and short enough that the next ancestor is tried soon.
_CONNECT_MS = 3_000
_LISTEN_BACKLOG = 1_024
#: Whole messages of one connection that wait to be heard, before libzmq reads no more from it: nothing is lost by that,
#: and a peer that sends faster than it is heard holds 64 messages of ours, not the usual 1,000.
_UNHEARD = 64
_monitors = itertools.count()
#: The two kinds of sockets, by their ZAP domains (ZeroMQ RFC 27).
CONTROL, BULK = "canopy-control", "canopy-bulk"
_ZAP_DOMAINS = (CONTROL, BULK)

_LOST_EVENTS = {
    zmq.Event.DISCONNECTED: "connection closed",
    zmq.Event.CLOSED: "connection refused",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "handshake failed",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "it does not admit this host's key yet",
}


def new_keys() -> tuple[bytes, bytes]:
    """A fresh CURVE key pair: public and secret, 32 raw bytes each."""
    public, secret = zmq.curve_keypair()
    return z85.decode(public), z85.decode(secret)


def to_text(key: bytes) -> str:
    """A raw key as the 40 characters of Z85 (ZeroMQ RFC 32)."""
    text: bytes = z85.encode(key)
    return text.decode("ascii")


def from_text(text: str) -> bytes:
    """The raw key of `to_text`. Raises ValueError."""
    raw: bytes = z85.decode(text.encode("ascii"))
    if len(raw) != 32:
        raise ValueError("a key has 40 characters of Z85")
    return raw


def endpoint(address: str, port: int) -> str:
    """The ZeroMQ endpoint of an IP address and a port."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


class _Reader:
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


class _Rounds:
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


class Keyring:
    """This process's key pair, and the keys that may connect. One ZeroMQ context and one ZAP handler for all its
    sockets."""

    def __init__(self, public: bytes, secret: bytes, *, nice: int = 0, turn: int = _TURN) -> None:
        """`nice` is how much lower than others the priority of its I/O thread is (nice(2)); `turn`, how many messages
        its sockets take before others get theirs."""
        self.turn = turn
        self._keys = public, secret
        self.public = to_text(public).encode()
        self.secret = to_text(secret).encode()
        threads = set(os.listdir("/proc/self/task"))
        self.context: zmq.Context[Any] = zmq.Context()
        self.rounds = _Rounds()
        self._admitted: dict[str, int] = {}
        #: Beside those, for as long as a push lasts, on the bulk socket alone: by push.
        self._order: dict[int, dict[str, int]] = {}
        self._barred: dict[str, float] = {}
        self._auth = zmq.auth.Authenticator(self.context)
        self._auth.start()
        for domain in _ZAP_DOMAINS:
            self._auth.configure_curve_callback(domain, credentials_provider=self)
        if nice:
            # libzmq can give its threads a policy (ZMQ_THREAD_SCHED_POLICY), but SCHED_IDLE starves beside busy VMs.
            for thread in set(os.listdir("/proc/self/task")) - threads:
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)
        self._zap_busy = False
        self._zap = _Reader(self._auth.zap_socket, self._drain_zap)

    def in_background(self) -> Keyring:
        """Another with the same keys for sockets that are to disturb nobody: with a context and an I/O thread of their
        own, at a lower priority, and a few messages at a time."""
        return Keyring(*self._keys, nice=_BACKGROUND_NICE, turn=_BACKGROUND_TURN)

    def admit(self, keys: Mapping[bytes, int]) -> None:
        """From now on these keys may connect, each as its rank, and no others."""
        self._admitted = {to_text(key): rank for key, rank in keys.items()}

    def admit_order(self, id_: int, keys: Mapping[bytes, int]) -> None:
        """These may connect to the bulk socket as well, each as its rank, until `dismiss_order`."""
        self._order[id_] = {to_text(key): rank for key, rank in keys.items()}

    def dismiss_order(self, id_: int) -> None:
        """The push is over."""
        self._order.pop(id_, None)

    def bar(self, rank: int) -> None:
        """Refuse the key of `rank` for a while."""
        until = time.monotonic() + PENALTY
        self._barred = {key: end for key, end in self._barred.items() if end > time.monotonic()}
        for keys in (self._admitted, *self._order.values()):
            self._barred |= {key: until for key, holder in keys.items() if holder == rank}

    def count(self) -> int:
        """How many keys may connect."""
        return len(self._admitted) + sum(map(len, self._order.values()))

    def rank_of(self, key: str, domain: str) -> int | None:
        """The rank whose key this is, if it is admitted to the sockets of this domain."""
        if self._barred.get(key, 0.0) > time.monotonic():
            return None
        rank = self._admitted.get(key)
        if rank is None and domain == BULK:
            rank = next((keys[key] for keys in self._order.values() if key in keys), None)
        return rank

    def callback(self, domain: str, key: bytes) -> bool:
        """pyzmq's credentials provider: whether the holder of this key may connect."""
        return domain in _ZAP_DOMAINS and self.rank_of(key.decode("ascii", "replace"), domain) is not None

    def _drain_zap(self) -> bool:
        if not self._zap_busy:
            self._zap_busy = True
            task = asyncio.get_running_loop().create_task(self._answer_zap())
            task.add_done_callback(lambda done: done.exception())
        return False

    async def _answer_zap(self) -> None:
        try:
            while self._zap.readable():
                await self._auth.handle_zap_message(self._auth.zap_socket.recv_multipart(_NOW))
        finally:
            self._zap_busy = False
        self._zap.look()

    def close(self) -> None:
        """Close the ZAP handler and the context; every socket must be closed before."""
        self.rounds.stop()
        self._zap.close()
        self._auth.stop()
        self.context.destroy(linger=0)


class _Monitor:
    """Connection events of a socket: `told(event, value)` for each."""

    def __init__(self, watched: zmq.Socket[bytes], wanted: int, told: Callable[[zmq.Event, int], None]) -> None:
        self._watched = watched
        self._told = told
        # By default pyzmq names the pair after the socket's descriptor, whose number may be that of one just closed.
        self._pair = watched.get_monitor_socket(wanted, f"inproc://monitor-{next(_monitors)}")
        self._reader = _Reader(self._pair, self.drain)

    def drain(self) -> bool:
        """Take in all events that there are. Called also before a message of an unknown connection is looked at."""
        while not self._pair.closed and self._reader.readable():  # whoever is told may close the link
            event = parse_monitor_message(self._pair.recv_multipart(_NOW))
            self._told(zmq.Event(event["event"]), event["value"])
        return False

    def close(self) -> None:
        self._reader.close()
        self._watched.disable_monitor()
        self._pair.close(0)


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
        self._monitor = _Monitor(self._socket, _SERVER_EVENTS, self._event)
        self._reader = _Reader(self._socket, self._drain)

    def send(self, rank: int, frames: Sequence[Blob]) -> bool:
        """Send to a child; false where there is no connection to it."""
        peer = self._current.get(rank)
        if peer is None:
            return False
        try:
            *first, last = frames
            for frame in (peer.route, *first):
                self._socket.send(frame, _MORE)
            if isinstance(last, memoryview):
                # As it came: libzmq counts who has it, and copies nothing.
                self._socket.send(last.obj, _NOW, copy=False)
            else:
                self._socket.send(last, _NOW)
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
            shut_down(peer.fd)

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
        parts: list[zmq.Frame] = self._socket.recv_multipart(_NOW, copy=False)
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
        if rank is None or len(parts) > MAX_PARTS + 1:
            if rank is not None:
                self._keyring.bar(rank)
            self._monitor.drain()
            if fd in self._intake:  # else it has gone already, and its number may be another's
                shut_down(fd)
            return
        route = parts[0].bytes
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
        self._monitor = _Monitor(self._socket, _CLIENT_EVENTS, self._event)
        self._reader = _Reader(self._socket, self._drain)
        self._socket.connect(endpoint(address, port))

    def send(self, frames: Sequence[Blob]) -> None:
        """Send to the parent. What a broken connection swallows, the protocol asks for again."""
        if not self._over:
            with suppress(zmq.Again):  # the connection has ended, and the news of it is on its way
                *first, last = frames
                for frame in first:
                    self._socket.send(frame, _MORE)
                self._socket.send(last, _NOW)
            self._reader.look()

    def _drain(self) -> bool:
        for _ in range(self._turn):
            if self._over:
                return False
            if not self._reader.readable():
                self._intake.judge()
                return False
            frames: list[Blob] = [self._socket.recv(_NOW)]
            more = self._socket.getsockopt(zmq.RCVMORE)
            while more and len(frames) < MAX_PARTS - 1:
                frames.append(self._socket.recv(_NOW))
                more = self._socket.getsockopt(zmq.RCVMORE)
            if more:
                blob = self._socket.recv(_NOW, copy=False)
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
