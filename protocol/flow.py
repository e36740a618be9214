"""Flow control of streamed output, from the process's pipe to the client's terminal. Pure. (Input: `protocol.feeding`.)

A host sends what its limit allows, and keeps what the root has not said that it has. It sends that again
whenever it is attached anew, so that no relay need keep anything; the root takes what comes next and leaves out what it
has. Limits grow as the client reads. Each piece says how much its host would have sent if it might, so that few need to
ask; where many want more than there is, they take turns, for a message a turn costs least. Who writes nothing gives
back what it may send: it counts that as if it had sent it, so that no grant that is on its way can be misread, and
neither end ever takes anything back from the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from protocol.limits import (
    STREAM_FIRST,
    STREAM_LEAST,
    STREAM_MOST,
    STREAM_PIECE,
    STREAM_TOTAL,
    STREAM_WINDOW,
)
from protocol.messages import Grant

#: Standard output and standard error, by number.
STREAMS = (1, 2)
#: An empty piece of this one asks for nothing: its offset is how many bytes the host forgoes in all.
_FORGONE = 2
#: What a host reads from a command's pipes ahead of what it may send: the next piece while one is on its way. And what
#: it reads so for all its commands together, beyond the least for each.
_AHEAD, _AHEAD_LEAST, _AHEAD_ALL = 2 * STREAM_PIECE, 64 << 10, 4 << 20
#: What a host that writes without end is granted at the least: one piece, one message and one grant.
_TURN = STREAM_PIECE
#: Less is not worth a message: what may be sent and is kept, some times over.
_WORTH = 4 * STREAM_LEAST


class _Kept:
    """One stream at its host: what the root has not said that it has."""

    def __init__(self) -> None:
        self.data = bytearray()
        #: Offsets: of the first byte of `data`, and of the first that was not sent.
        self.start = 0
        self.sent = 0

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def acknowledge(self, have: int) -> None:
        have = min(have, self.sent)  # nobody can have what was not sent
        if have > self.start:
            del self.data[: have - self.start]
            self.start = have


class Outflow:
    """The output of one command at its host."""

    def __init__(self, first: int = STREAM_FIRST) -> None:
        """`first` is what may be sent before anything is granted."""
        self._out, self._err = _Kept(), _Kept()
        self._streams = dict(zip(STREAMS, (self._out, self._err), strict=True))
        #: What may be sent, in bytes of both streams since the command began, without what was given back.
        self._limit = first
        #: The limit at which more was asked for.
        self._asked: int | None = None
        #: What was given back in all, and whether the root is to be told.
        self._forgone = 0
        self._forgoing = False
        #: What may wait here to be sent, in bytes, before nothing more is read from the command.
        self.ahead = _AHEAD
        #: Nobody reads it: what is written is of no use.
        self.unread = False

    def write(self, stream: int, data: bytes) -> None:
        """The command wrote."""
        if not self.unread:
            self._streams[stream].data += data

    @property
    def waiting(self) -> int:
        """Bytes that were not sent yet."""
        out, err = self._out, self._err
        return out.start + len(out.data) - out.sent + err.start + len(err.data) - err.sent

    @property
    def full(self) -> bool:
        """Whether nothing more is to be read from the command: its pipe fills up, and it waits."""
        return self.waiting >= self.ahead

    @property
    def piece(self) -> int:
        """How many bytes a command that writes without end sends at a time."""
        return min(STREAM_PIECE, self.ahead // 2)

    def share(self, outflows: int) -> None:
        """There are so many of these on this host."""
        self.ahead = max(_AHEAD_LEAST, min(_AHEAD, _AHEAD_ALL // max(1, outflows)))

    @property
    def _allowed(self) -> int:
        """How many bytes may be sent now. Whatever a relay grants, no more than STREAM_MOST is ever kept for the
        root."""
        sent = self._out.sent + self._err.sent
        return min(self._limit - sent, STREAM_MOST - sent + self._out.start + self._err.start)

    @property
    def sendable(self) -> bool:
        """Whether something waits that may be sent, or asked for."""
        return self.waiting > 0 and (self._allowed > 0 or self._would_ask)

    @property
    def _would_ask(self) -> bool:
        return self._asked != self._limit and self._out.sent + self._err.sent >= self._limit

    def take(self, *, fast: bool = False) -> Iterator[tuple[int, int, bytes, int, bool]]:
        """The pieces that may be sent now: stream, offset, bytes, how many bytes of both streams there are, and `fast`;
        and perhaps the question for more, which is an empty piece. Standard error goes first, since it is short and
        says why.

        With `fast` only what fills a piece, or all that may be sent: the command writes faster than that can wait.
        """
        has = self._out.end + self._err.end
        for number in reversed(STREAMS):
            kept = self._streams[number]
            while kept.sent < kept.end and (allowed := self._allowed) > 0:
                size = min(allowed, self.piece if fast else STREAM_PIECE, kept.end - kept.sent)
                if fast and size < min(allowed, self.piece):
                    break
                begin = kept.sent - kept.start
                with memoryview(kept.data) as held:
                    data = bytes(held[begin : begin + size])
                offset, kept.sent = kept.sent, kept.sent + size
                if has > self._limit == self._out.sent + self._err.sent:
                    self._asked = self._limit
                yield number, offset, data, has, fast
        if self._forgoing:
            # Behind all that was sent before: so nobody can have more on its way than the root takes.
            self._forgoing = False
            yield _FORGONE, self._forgone, b"", has, False
        if self.waiting and self._would_ask:
            self._asked = self._limit
            yield STREAMS[0], self._out.sent, b"", has, fast

    @property
    def written(self) -> int:
        """How many bytes of both streams there are so far."""
        return self._out.end + self._err.end

    @property
    def lavish(self) -> bool:
        """Whether more may be sent than is worth keeping, and nothing waits."""
        return not self.waiting and not self.unread and self._limit - self.written >= _WORTH

    def forgo(self) -> None:
        """Nothing was written for a while: others may have what may be sent. `take` tells."""
        if self.lavish:
            spare = self._limit - self.written - STREAM_LEAST
            self._forgone += spare
            self._limit -= spare
            self._asked, self._forgoing = None, True

    def granted(self, grant: Grant) -> None:
        """The root's word."""
        if grant.limit is None:
            self.unread = True
            for kept in self._streams.values():
                kept.start = kept.sent = kept.end
                kept.data.clear()
            return
        self._limit = max(self._limit, grant.limit - self._forgone)
        self._streams[1].acknowledge(grant.out)
        self._streams[2].acknowledge(grant.err)

    def rewind(self) -> None:
        """The way up is a new one: what was on its way may be lost."""
        self._asked, self._forgoing = None, self._forgone > 0
        for kept in self._streams.values():
            kept.sent = kept.start


class Window:
    """What all streamed commands together may have on their way to one service, beyond what each needs to go on."""

    def __init__(self, total: int = STREAM_TOTAL) -> None:
        self._total = total
        #: Bytes that hosts may send or have sent and no client has read, and those of them that have come.
        self.ahead = 0
        self.held = 0

    @property
    def free(self) -> int:
        """How much more may be granted."""
        return max(0, self._total - self.ahead)

    def first(self, hosts: int) -> int:
        """What each host of a new command may send before it is granted more: a share of half of what is free."""
        return min(STREAM_FIRST, self.free // (2 * max(1, hosts)))


class _Host:
    """One host's output as the root knows it."""

    def __init__(self, first: int) -> None:
        self.have = dict.fromkeys(STREAMS, 0)
        #: What it may send, without what it gave back; and that.
        self.limit = first
        self.forgone = 0
        #: Bytes that the client has read.
        self.read = 0
        #: How many bytes there are, sent or not, and whether more follow at once.
        self.has = 0
        self.fast = False
        #: What the outcome says that there is in all.
        self.totals: dict[int, int] | None = None
        #: Nothing more is taken from it.
        self.over = False

    @property
    def arrived(self) -> int:
        return self.have[1] + self.have[2]

    @property
    def ahead(self) -> int:
        return self.limit - self.read

    @property
    def hungry(self) -> bool:
        """Whether it would send more than it may, or will."""
        return self.fast or self.has > self.limit

    @property
    def complete(self) -> bool:
        return self.totals is not None and all(self.have[number] >= total for number, total in self.totals.items())


class Inflow:
    """The output of one command at the root: what came, and who may send how much more."""

    def __init__(self, hosts: Iterable[int], first: int = STREAM_FIRST, window: Window | None = None) -> None:
        """`first` is what each host may send unasked; `window` is shared with other commands."""
        self._window = window or Window()
        self._hosts = {rank: _Host(first) for rank in hosts}
        self._most = STREAM_WINDOW + STREAM_FIRST * len(self._hosts)
        #: Hosts that are to be told of their limits; and those that want more than they may send, kept since to count
        #: them at each piece would make the root's work grow with the square of the hosts.
        self._due: set[int] = set()
        self._busy: set[int] = set()
        #: Whose turn it is to be given more, in this order; and who was given what there was no room for, up to which
        #: limit.
        self._wants: dict[int, None] = {}
        self._helped: tuple[int, int] | None = None
        self._ahead = self.held = 0
        self._move(first * len(self._hosts))

    def _move(self, ahead: int, held: int = 0) -> None:
        self._ahead += ahead
        self.held += held
        self._window.ahead += ahead
        self._window.held += held

    def arrived(self, rank: int, stream: int, offset: int, data: bytes, has: int = 0, *, fast: bool = False) -> bytes:
        """A piece came; what of it is new and next. What no host may send is thrown away. `has` and `fast` are
        Streamed's."""
        host = self._hosts.get(rank)
        if host is None or host.over:
            return b""
        host.has, host.fast = max(host.has, has), fast
        self._count(rank, host)
        if not data and stream == _FORGONE:
            self._forgo(rank, host, offset - host.forgone)
            return b""
        have = host.have[stream]
        if not data or offset < have:
            # It asks, or sends again what it sent: it may have missed what it was told.
            self._due.add(rank)
        fresh = data[have - offset :] if offset <= have < offset + len(data) else b""
        # For each stream alone: sent again, the limit may be shared out otherwise than the first time.
        if have + len(fresh) > host.limit:
            return b""
        host.have[stream] += len(fresh)
        self._move(0, len(fresh))
        if self._uses_up(host):
            self._wants[rank] = None
            if not self.held:  # else the client is behind, and it is served when that has read
                self._serve()
        return fresh

    def _forgo(self, rank: int, host: _Host, spare: int) -> None:
        """It gives back so much more of what it may send."""
        if not 0 < spare <= host.limit - host.arrived:
            return  # it said that before, or has no such thing
        host.forgone += spare
        host.limit -= spare
        self._count(rank, host)
        self._move(-spare)
        if self._uses_up(host):
            self._wants[rank] = None
        if not self.held:
            self._serve()

    def read(self, rank: int, count: int) -> None:
        """The client has read so many bytes of this host's."""
        host = self._hosts.get(rank)
        if host is None:
            return
        host.read += count
        self._move(-count, -count)
        if host.over:
            if host.read >= host.arrived:
                del self._hosts[rank]
        elif self._uses_up(host):
            self._wants[rank] = None
        if self._wants or self._helped is not None:
            self._serve()

    @property
    def _room(self) -> int:
        return min(self._most - self._ahead, self._window.free)

    def _raise(self, rank: int, host: _Host, more: int) -> None:
        del self._wants[rank]
        host.limit += more
        self._count(rank, host)
        self._move(more)
        self._due.add(rank)

    def _count(self, rank: int, host: _Host) -> None:
        if host.hungry:
            self._busy.add(rank)
        else:
            self._busy.discard(rank)

    @property
    def _share(self) -> int:
        """What a host may have ahead of the client: an equal share, but not less than a message is worth."""
        return max(_TURN, min(STREAM_MOST, STREAM_WINDOW // max(1, len(self._busy))))

    def _uses_up(self, host: _Host) -> bool:
        """Whether it is to be given more: it wants it, and half of its share or less is left of what it was given."""
        return host.hungry and host.ahead <= self._share // 2

    def _serve(self) -> None:
        """Give those whose turn it is what there is room for, one after the other. Where there is none, a little of
        what they have, one at a time, once the client has read all that came: so no command waits for another's
        client."""
        if self._helped is not None:
            rank, limit = self._helped
            if rank not in self._hosts or self._hosts[rank].arrived >= min(limit, self._hosts[rank].limit):
                self._helped = None
        while self._wants:
            rank = next(iter(self._wants))
            host = self._hosts.get(rank)
            if host is None or not self._uses_up(host):
                del self._wants[rank]
                continue
            room = self._room
            more = self._share - host.ahead if host.fast else max(host.has - host.limit, STREAM_FIRST)
            if room < min(more, _TURN):
                if not self.held:
                    self._help(room)
                return
            self._raise(rank, host, min(more, self._share - host.ahead, room))

    def _help(self, room: int) -> None:
        """Those who have what there is may never use it: whoever has something now is given as much as that."""
        if self._helped is None:
            for rank in self._wants:
                host = self._hosts.get(rank)
                if host is not None and host.has > host.limit:
                    more = min(host.has - host.limit, max(STREAM_FIRST, room))
                    self._raise(rank, host, more)
                    self._helped = rank, host.limit
                    return

    def ended(self, rank: int, out: int, err: int) -> None:
        """The host's outcome came, and says how much it wrote."""
        host = self._hosts.get(rank)
        if host is not None:
            host.totals = {1: out, 2: err}
            host.has, host.fast = out + err, False
            self._count(rank, host)

    def complete(self, rank: int) -> bool:
        """Whether all that the host wrote has come."""
        host = self._hosts.get(rank)
        return host is None or host.over or host.complete

    def waits(self, rank: int) -> bool:
        """Whether it is the client, and not the host, that keeps more of this host's output from coming."""
        return self.held > 0 or rank in self._wants

    def progress(self, rank: int) -> int:
        """A number that grows as more of a host's output comes or is allowed."""
        host = self._hosts.get(rank)
        return 0 if host is None else host.arrived + host.limit

    def over(self, rank: int) -> None:
        """Nothing more is taken from this host."""
        host = self._hosts.get(rank)
        if host is None or host.over:
            return
        host.over = True
        self._due.discard(rank)
        self._busy.discard(rank)
        self._wants.pop(rank, None)
        self._move(host.arrived - host.limit)
        host.limit = host.arrived
        if host.read >= host.arrived:
            del self._hosts[rank]
        if not self.held:
            self._serve()

    def close(self) -> None:
        """Nobody reads any more, and what was held is gone."""
        self._move(-self._ahead, -self.held)
        self._hosts.clear()
        self._wants.clear()
        self._busy.clear()

    def grants(self) -> tuple[Grant, ...]:
        """What hosts are to be told since the last call."""
        due, self._due = sorted(self._due), set()
        return tuple(
            Grant(rank, host.limit + host.forgone, host.have[1], host.have[2])
            for rank in due
            if (host := self._hosts.get(rank)) and not host.over
        )


def nobody_reads(ranks: Iterable[int]) -> tuple[Grant, ...]:
    """To these hosts: there is no client any more."""
    return tuple(Grant(rank, None, 0, 0) for rank in ranks)
