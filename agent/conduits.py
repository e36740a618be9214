"""Conduits of this host: TCP connections beside bulk links, for what is sealed by `protocol.conduit`.

A host that wants to send or ask much opens one to a source with which it has a bulk link. Who may: whoever got a ticket
on such a link, once, as long as its key is admitted there.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from agent.keyring import BULK, Keyring
from agent.outflow import Outflow
from agent.traffic import Traffic
from protocol.conduit import BadRecord, Records, Sealer
from protocol.limits import CONDUIT_TAKEN, CONDUIT_TICKET
from protocol.messages import Conduit as Offer
from protocol.stream import Blob

#: A connection that has not shown its ticket after so many seconds shows none: it was made for that.
_SHOW_WITHIN = 3.0
#: A ticket that nobody has shown is worth nothing after so many seconds.
_TICKET_FOR = 10.0
#: What is taken at a time from who only asks, in bytes.
_QUESTIONS = 32 << 10
#: Connections that have shown nothing, at a time.
_UNSHOWN_MOST = 256
#: A host that lost its power acknowledges nothing; its connection ends after so many milliseconds (tcp(7),
#: TCP_USER_TIMEOUT). Those that ask here have asked others long before.
_UNACKNOWLEDGED_MS = 10_000
#: What the other end may send before it is read, in bytes, from the start: whoever wakes up for whole chunks alone
#: leaves more unread than the 64 KiB that a connection begins with, and each chunk would wait for the one before it.
_WINDOW = 256 << 10


class Conduit:
    """One end of an open conduit. `heard(messages)` gets what has come; `lost(why)` is called once, where it ends by
    itself."""

    def __init__(
        self,
        sock: socket.socket,
        mine: bytes,
        theirs: bytes,
        *,
        heard: Callable[[Sequence[Sequence[Blob]]], None],
        lost: Callable[[str], None],
        traffic: Traffic,
        admitted: Callable[[], bool] | None = None,
        taken: int = CONDUIT_TAKEN,
        outflow: Outflow | None = None,
    ) -> None:
        """`mine` seals what is sent, `theirs` opened what comes, of which so many bytes are `taken` at a time at most;
        where `admitted` says no, nothing is heard. Who sends chunks has an `outflow`, which says how fast."""
        self._socket = sock
        self._traffic = traffic
        self._sealer, self._records = Sealer(mine), Records(theirs, taken)
        self._heard, self._lost, self._admitted = heard, lost, admitted
        self._loop = asyncio.get_running_loop()
        self._blocked = False
        self._over = False
        self._lowat = 1
        self._outflow = outflow
        # Linux makes room for as much as is waited for, and leaves it at that (tcp_set_rcvlowat in net/ipv4/tcp.c).
        for lowat in (_WINDOW, self._lowat):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, lowat)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
        self._loop.add_reader(sock, self._read)
        traffic.join(self)

    def send(self, frames: Sequence[Blob]) -> None:
        """Send a message with the next `flush` of the traffic, after all before: several cost little more than one."""
        if not self._over:
            self._sealer.add(frames)
            self._traffic.unsent[self] = None

    def flush(self) -> None:
        """Send what there is room for; the rest goes by itself."""
        if self._blocked:
            return
        if self._outflow is not None and (now := self._loop.time()) >= self._outflow.look_at:
            self._outflow.look(now, free=self._traffic.pressed)
        sealer = self._sealer
        try:
            while data := sealer.ready():
                sealer.sent(self._socket.send(data))
        except BlockingIOError:
            self._blocked = True
            self._loop.add_writer(self._socket, self._has_room)
        except OSError as error:
            # Not within the call: whoever flushes is in the midst of something.
            self._blocked = True
            self._loop.call_soon(self._end, error.strerror or str(error))

    def pause(self) -> None:
        """Read nothing until `go_on`."""
        self._loop.remove_reader(self._socket)

    def go_on(self) -> None:
        """Read again."""
        self._loop.add_reader(self._socket, self._read)

    def _has_room(self) -> None:
        self._blocked = False
        self._loop.remove_writer(self._socket)
        self.flush()

    def _read(self) -> None:
        try:
            count = self._socket.recv_into(self._records.room()[: self._traffic.taken()])
        except BlockingIOError:
            return
        except OSError as error:
            self._end(error.strerror or str(error))
            return
        if not count:
            self._end("connection closed")
            return
        if self._admitted is not None and not self._admitted():
            self._end("its key is admitted no more")
            return
        messages: list[Sequence[Blob]] = []
        broken = ""
        try:
            messages.extend(self._records.came(count))  # up to the bad one, where there is one
        except BadRecord as error:
            broken = str(error)
        if messages:
            self._heard(messages)
        if broken:
            self._end(broken)
        if self._over:
            return
        # Wake up again for what can be opened, and for nothing less (socket(7), SO_RCVLOWAT; tcp_poll heeds it).
        lowat = min(self._records.missing, self._records.free, self._traffic.waited_for())
        if lowat != self._lowat:
            self._lowat = lowat
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, lowat)

    def _end(self, why: str) -> None:
        if not self._over:
            self.close()
            self._lost(why)

    def close(self) -> None:
        """End it, without a word."""
        if not self._over:
            self._over = True
            self._traffic.leave(self)
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()


async def dial(address: str, told: Offer) -> socket.socket:
    """Connect to where a conduit was offered, and show the ticket. Raises OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.sock_connect(sock, (address, told.port)), _SHOW_WITHIN)
        await loop.sock_sendall(sock, told.ticket)
    except BaseException:
        sock.close()
        raise
    return sock


@dataclass(frozen=True)
class _Invitation:
    rank: int
    key: str
    told: Offer
    #: The event loop's time from which on it is worth nothing.
    until: float


class Conduits:
    """Where others open conduits to this host."""

    def __init__(
        self,
        keyring: Keyring,
        address: str,
        *,
        heard: Callable[[int, Sequence[Sequence[Blob]]], None],
        lost: Callable[[int, str], None],
        traffic: Traffic,
        relays: bool = True,
    ) -> None:
        """`heard(rank, messages)` gets what has come, `lost(rank, why)` each conduit that ended by itself. Whoever
        `relays` sends on what comes to it; the root has everything from the start."""
        self._traffic, self._relays = traffic, relays
        self._keyring, self._address = keyring, address
        self._heard, self._lost = heard, lost
        self._loop = asyncio.get_running_loop()
        self._listening: socket.socket | None = None
        self._invited: dict[bytes, _Invitation] = {}
        self._conduits: dict[int, Conduit] = {}
        self._unshown: dict[socket.socket, asyncio.TimerHandle] = {}

    def invite(self, rank: int) -> Offer | None:
        """What a host is to be told that wants a conduit, on its bulk link; None where it can't have one."""
        key = self._keyring.key_of(rank, BULK)
        if key is None:
            return None
        try:
            port = self._listen()
        except OSError:
            return None  # no descriptor, no port: its chunks go by the bulk link
        told = Offer(port, os.urandom(CONDUIT_TICKET), os.urandom(32), os.urandom(32))
        self._uninvite(rank)
        self._invited[told.ticket] = _Invitation(rank, key, told, self._loop.time() + _TICKET_FOR)
        return told

    def _uninvite(self, rank: int) -> None:
        """The ticket that it may have is worth nothing: nobody has more than one."""
        self._invited = {ticket: one for ticket, one in self._invited.items() if one.rank != rank}

    def _listen(self) -> int:
        if self._listening is None:
            sock = socket.socket(socket.AF_INET6 if ":" in self._address else socket.AF_INET, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.bind((self._address, 0))
                sock.listen(_UNSHOWN_MOST)
            except OSError:
                sock.close()
                raise
            self._listening = sock
            self._loop.add_reader(sock, self._accept)
        port: int = self._listening.getsockname()[1]
        return port

    def _accept(self) -> None:
        if self._listening is None:
            return
        try:
            sock, _ = self._listening.accept()
        except OSError:
            return  # it has gone again, or there are no descriptors
        sock.setblocking(False)
        if len(self._unshown) >= _UNSHOWN_MOST:
            self._forget(next(iter(self._unshown)))  # the oldest: whoever has a ticket shows it at once
        self._unshown[sock] = self._loop.call_later(_SHOW_WITHIN, self._forget, sock)
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, CONDUIT_TICKET)
        self._loop.add_reader(sock, self._shown, sock)

    def _forget(self, sock: socket.socket) -> None:
        self._release(sock)
        sock.close()

    def _release(self, sock: socket.socket) -> None:
        self._unshown.pop(sock).cancel()
        self._loop.remove_reader(sock)

    def _shown(self, sock: socket.socket) -> None:
        ticket = b""
        with suppress(OSError):
            ticket = sock.recv(CONDUIT_TICKET)
        invitation = self._invited.pop(ticket, None)
        if invitation is None or not self._is_good(invitation):
            self._forget(sock)
            return
        self._release(sock)
        rank, told = invitation.rank, invitation.told
        self.close_one(rank)
        self._conduits[rank] = Conduit(
            sock,
            told.down,
            told.up,
            heard=partial(self._heard, rank),
            lost=lambda why: self._ended(rank, why),
            traffic=self._traffic,
            admitted=lambda: self._is_admitted(invitation),
            taken=_QUESTIONS,
            outflow=Outflow(sock, self._loop.time(), relays=self._relays),
        )

    def _is_good(self, invitation: _Invitation) -> bool:
        return self._loop.time() < invitation.until and self._is_admitted(invitation)

    def _is_admitted(self, invitation: _Invitation) -> bool:
        return self._keyring.rank_of(invitation.key, BULK) == invitation.rank

    def _ended(self, rank: int, why: str) -> None:
        self._conduits.pop(rank, None)
        self._lost(rank, why)

    def send(self, rank: int, frames: Sequence[Blob]) -> bool:
        """Send to a host by its conduit; false where it has none."""
        conduit = self._conduits.get(rank)
        if conduit is None:
            return False
        conduit.send(frames)
        return True

    def close_one(self, rank: int) -> None:
        """End a host's conduit, if it has one, and let it open none with the ticket that it may have."""
        self._uninvite(rank)
        conduit = self._conduits.pop(rank, None)
        if conduit is not None:
            conduit.close()

    def close(self) -> None:
        """End all, and listen no more until the next invitation."""
        for rank in list(self._conduits):
            self.close_one(rank)
        for sock in list(self._unshown):
            self._forget(sock)
        self._invited.clear()
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None
