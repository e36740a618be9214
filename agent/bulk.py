"""The bulk links of one node: chunks between hosts that a push's order puts next to each other, on sockets of their
own.

Performs what `protocol.transfer` wants done, and tells it what came; decides nothing. Connections to sources are made
when something is asked of them, and closed when no push needs them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from agent.conduits import Conduits
from agent.keyring import BULK, Keyring
from agent.links import Downlink
from agent.pressure import Pressure
from agent.traffic import Traffic
from agent.ways import Way
from protocol import codec
from protocol import transfer_effects as transfer
from protocol.codec import MalformedMessage
from protocol.commands import Hop, Stream
from protocol.limits import CONDUIT_LEAST
from protocol.messages import BULK_DOWNWARDS, BULK_UPWARDS, Ask, Chunk, Hold, Message, NoChunk
from protocol.messages import Conduit as Offer
from protocol.relay import Relay
from protocol.stream import Blob, is_consistent
from protocol.transfer import Role, Transfers
from protocol.transfer_effects import Source

log = logging.getLogger("canopy")


def _named(source: Source) -> str:
    return "the root" if source is None else f"rank {source}"


def _read(
    messages: Iterable[Sequence[Blob]], allowed: frozenset[type[Message]]
) -> tuple[list[tuple[Message, Blob | None]], str]:
    """What was sent, up to the first that must not come; and what is wrong with that."""
    read: list[tuple[Message, Blob | None]] = []
    for frames in messages:
        try:
            message, blob = codec.decode(frames)
        except MalformedMessage as error:
            return read, str(error)
        if type(message) not in allowed:
            return read, f"nobody sends {type(message).__name__} there"
        read.append((message, blob))
    return read, ""


class Store(Protocol):
    """Where this node's bytes are. Each call returns at once; results come back by `was_read` and the like."""

    def read(self, id_: int, index: int) -> None:
        """Read a chunk of a push from this host's copy, and say `was_read`."""

    def store(self, id_: int, chunks: Sequence[tuple[int, Blob]]) -> None:
        """Write chunks of a push, each with its index, and say `was_stored`."""

    def headed(self, id_: int) -> None:
        """The head of a push's stream is stored: look at it, and say `was_headed`."""

    def complete(self, id_: int) -> None:
        """All chunks of a push are there."""

    def broken(self, id_: int, why: str, *, keep: bool) -> None:
        """A push can't go on; with `keep`, what has come stays for one that goes on with it."""


class Bulk:
    """One node's part in all pushes."""

    def __init__(
        self,
        keyring: Keyring,
        relay: Relay,
        address: str,
        port: int,
        *,
        store: Callable[[], Store],
        expel: Callable[[int, str], None],
        left: Callable[[int, int, str], None],
    ) -> None:
        """Listens at once. Raises OSError where it can't.

        `expel(rank, why)` cuts off a host that broke the rules; `left(id_, rank, why)` is told of each source that was
        left.
        """
        self._keyring = keyring
        self._relay = relay
        self._store = store
        self._expel = expel
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._transfers = Transfers(relay.rank)
        self._pressed = Pressure(self._loop.time()).look
        self._timer: asyncio.TimerHandle | None = None
        self._streams: dict[int, Stream] = {}
        #: Where the hosts of the orders are, by rank, and how many pushes name each.
        self._hops: dict[int, Hop] = {}
        self._ways: dict[Source, Way] = {}
        #: Who wants a conduit of this host, which has no push yet.
        self._waiting: set[int] = set()
        self._traffic = Traffic(self._loop.time)
        #: To be called when a command comes by.
        self.give_way = self._traffic.give_way
        self._down = Downlink(
            keyring,
            BULK,
            address,
            port,
            heard=lambda rank, frames: self._asked(rank, (frames,)),
            lost=self._peer_lost,
            renewed=self._renewed,
        )
        self._given = Conduits(
            keyring,
            address,
            heard=self._asked,
            lost=self._peer_lost,
            traffic=self._traffic,
            relays=relay.rank is not None,
        )

    # --- pushes -------------------------------------------------------------------------------------------------------

    def join(self, id_: int, stream: Stream) -> None:
        """This node will have a part in a push: those behind it may ask, and wait until `begin`."""
        if id_ in self._streams or not is_consistent(stream):
            return
        self._streams[id_] = stream
        self._hops |= {hop.rank: hop for hop in stream.order}
        self._keyring.admit_order(id_, {hop.key: hop.rank for hop in stream.order})
        self._transfers.join(id_, stream, self._loop.time())
        if stream.size >= CONDUIT_LEAST:
            for way in self._ways.values():
                way.want()
            if any(hop.rank == self._relay.rank for hop in stream.order):
                # A connection and its conduit take some seven round trips, which are short as long as no chunks flow.
                self._way(self._transfers.source(id_))
        while self._waiting:
            self._offer(self._waiting.pop())

    def begin(self, id_: int, stream: Stream, role: Role, have: int) -> None:
        """Take part in a push."""
        self.join(id_, stream)
        self._transfers.pressed = self._traffic.pressed = self._pressed(self._loop.time())
        self._perform(self._transfers.begin(id_, stream, role, have, self._loop.time()))

    def end(self, id_: int) -> None:
        """The push is over."""
        if self._streams.pop(id_, None) is not None:
            self._keyring.dismiss_order(id_)
            self._transfers.end(id_)
            self._hops = {hop.rank: hop for stream in self._streams.values() for hop in stream.order}
            self._close_unused()

    def demote(self, id_: int) -> None:
        """This host can't keep what is pushed, and gives it on all the same."""
        self._perform(self._transfers.demote(id_, self._loop.time()))

    def was_read(self, id_: int, read: Sequence[tuple[int, bytes | None, bytes | None]]) -> None:
        """Chunks were read: the index, the chunk, None where it could not be, and the frame that it is to travel as,
        None where it travels as it is."""
        self._perform(self._transfers.was_read(id_, read, self._loop.time()))

    def was_headed(self, id_: int, have: int) -> None:
        """The stream's head was looked at: the chunks in `have` (bit i: chunk i) are here already."""
        self._perform(self._transfers.was_headed(id_, have, self._loop.time()))

    def was_stored(self, id_: int, indices: list[int]) -> int | None:
        """Chunks were stored; how many bytes are on disk now, None where the push is over here."""
        if not self._transfers.knows(id_):
            return None
        effects = self._transfers.was_stored(id_, indices, self._loop.time())
        done = self._transfers.stored_bytes(id_)
        self._perform(effects)
        return done

    # --- those behind -------------------------------------------------------------------------------------------------

    def _asked(self, rank: int, messages: Iterable[Sequence[Blob]]) -> None:
        effects: list[transfer.Effect] = []
        read, malformed = _read(messages, BULK_UPWARDS)
        for message, _ in read:
            if isinstance(message, Ask):
                effects += self._transfers.asked(rank, message.id, message.indices, self._loop.time())
            elif self._streams:
                self._offer(rank)
            else:
                self._waiting.add(rank)  # it has the command already, and this host will
        self._perform(effects)
        if malformed:
            self._expel(rank, f"it sent a malformed message: {malformed}")

    def _offer(self, rank: int) -> None:
        offer = self._given.invite(rank)
        if offer is not None:
            self._down.send(rank, codec.encode(offer))

    def _answer(self, rank: int, frames: Sequence[Blob]) -> None:
        if not self._given.send(rank, frames):
            self._down.send(rank, frames)

    def _renewed(self, rank: int) -> None:
        self._waiting.discard(rank)
        self._given.close_one(rank)
        self._transfers.peer_lost(rank)

    def _peer_lost(self, rank: int, why: str) -> None:
        log.info("bulk link of rank %d: %s", rank, why)
        self._renewed(rank)

    def drop(self, rank: int) -> None:
        """Cut a host off."""
        self._down.drop(rank, penalty=True)
        self._renewed(rank)

    # --- those before -------------------------------------------------------------------------------------------------

    def _ask(self, source: Source, message: Ask) -> None:
        self._way(source).send(codec.encode(message))

    def _way(self, source: Source) -> Way:
        way = self._ways.get(source)
        if way is None:
            way = self._ways[source] = Way(
                self._keyring,
                self._relay.root if source is None else self._hops[source],
                much=any(stream.size >= CONDUIT_LEAST for stream in self._streams.values()),
                heard=partial(self._heard, source),
                lost=lambda why: self._lost(source, why),
                traffic=self._traffic,
            )
        return way

    def _heard(self, source: Source, messages: Iterable[Sequence[Blob]]) -> None:
        effects: list[transfer.Effect] = []
        read, malformed = _read(messages, BULK_DOWNWARDS)
        now = self._loop.time()
        chunks = True
        for message, blob in read:
            if blob is None:
                effects += self._told(source, message, now)
                chunks = False
            elif isinstance(message, Chunk):  # no other that is allowed has a blob
                effects += self._arrived(source, message, blob, now)
        effects += self._transfers.go_on(now)
        self._perform(effects, chunks=chunks)
        if malformed:
            self._lost(source, f"it sent a malformed message: {malformed}")

    def _arrived(self, source: Source, chunk: Chunk, blob: Blob, now: float) -> list[transfer.Effect]:
        id_, index = chunk.id, chunk.index
        if not chunk.packed:
            return self._transfers.arrived(source, id_, index, blob, now, later=True)
        plain, why = self._unpacked(id_, index, blob)
        return self._transfers.arrived(source, id_, index, plain, now, packed=blob, why=why, later=True)

    def _told(self, source: Source, message: Message, now: float) -> list[transfer.Effect]:
        match message:
            case NoChunk(id=id_, index=index, why=why, final=final):
                return self._transfers.declined(source, id_, index, why, now, final=final)
            case Hold(id=id_, front=front):
                return self._transfers.held(source, id_, front, now)
            case Offer() if source in self._ways:
                self._ways[source].offered(message)
        return []

    def _unpacked(self, id_: int, index: int, frame: Blob) -> tuple[bytes | None, str]:
        """The chunk in a frame: none of its bytes where the frame is bad, None (and why) where nobody here can tell."""
        size = self._transfers.packed_size(id_, index)
        if size is None:
            return b"", ""
        from agent.packing import BadFrame, Unavailable, unpack

        try:
            return unpack(frame, size), ""
        except BadFrame as error:
            log.info("chunk %d of push %d: %s", index, id_, error)
            return b"", ""
        except Unavailable as error:
            return None, str(error)

    def _lost(self, source: Source, why: str) -> None:
        way = self._ways.pop(source, None)
        if way is not None:
            way.close()
            log.info("bulk link to %s: %s", _named(source), why)
            self._perform(self._transfers.source_lost(source, why, self._loop.time()))

    def _close_unused(self) -> None:
        for source in self._ways.keys() - self._transfers.sources():
            self._ways.pop(source).close()
            self._transfers.source_closed(source)
        if not self._streams:
            self._given.close()

    # --- what is to be done -------------------------------------------------------------------------------------------

    def _perform(self, effects: list[transfer.Effect], *, chunks: bool = False) -> None:
        """Do it. Where nothing but `chunks` came nothing is due earlier than before: the timer that runs is right."""
        # What others wait for goes out before anything goes to the disk.
        stores: dict[int, list[tuple[int, Blob]]] = {}
        for effect in effects:
            match effect:  # the most frequent ones first
                case transfer.Store(id_, index, blob):
                    stores.setdefault(id_, []).append((index, blob))
                case transfer.Give(peer, id_, index, blob, packed):
                    self._answer(peer, codec.encode(Chunk(id_, index, packed), blob))
                case transfer.AskOf(source, id_, indices):
                    self._ask(source, Ask(id_, indices))
                case transfer.Decline(peer, id_, index, why, final):
                    self._answer(peer, codec.encode(NoChunk(id_, index, why, final)))
                case transfer.Hold(peer, id_, front):
                    self._answer(peer, codec.encode(Hold(id_, front)))
                case transfer.Read(id_, index):
                    self._store().read(id_, index)
                case transfer.Headed(id_):
                    self._store().headed(id_)
                case transfer.Complete(id_):
                    self._store().complete(id_)
                    self._loop.call_soon(self._close_unused)
                case transfer.Broken(id_, why, keep):
                    self._store().broken(id_, why, keep=keep)
                case transfer.Bypassed(id_, source, why):
                    log.warning("push %d is had from another than %s: %s", id_, _named(source), why)
                    if source is not None:
                        self._left(id_, source, why)
                    self._loop.call_soon(self._close_unused)
                case transfer.Abuse(peer, why):
                    self._expel(peer, why)
        self._traffic.flush()
        for id_, stored in stores.items():
            self._store().store(id_, stored)
        if self._timer is None or not chunks:
            self._set_timer()

    def _set_timer(self) -> None:
        due = self._transfers.wakeup()
        if due is None:
            return
        if self._timer is not None:
            if not self._timer.cancelled() and self._loop.time() < self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._advance)

    def _advance(self) -> None:
        self._timer = None
        self._transfers.pressed = self._traffic.pressed = self._pressed(self._loop.time())
        self._perform(self._transfers.advance(self._loop.time()))
        self._close_unused()

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all sockets."""
        if self._timer is not None:
            self._timer.cancel()
        for way in self._ways.values():
            way.close()
        self._ways.clear()
        self._given.close()
        self._down.close()
