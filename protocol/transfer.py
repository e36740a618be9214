"""Chunks of pushed streams, passed from host to host in the push's order: a pure state machine beside the relay.

Every host asks the one before it in the order for the chunks that it lacks, and answers those behind it from memory,
from its own disk, or as soon as the chunk comes. So each sends about as many bytes as it receives. Asking again is
harmless, so whoever leaves a source (`protocol.asking` says when) asks the next one for what is still missing. Each
chunk is checked against the digest in the signed command before it is stored or given on.

    root: reads chunks from the file      target: asks, stores, gives on      carrier: asks for what is asked of it
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from protocol.asking import Asking, window_of
from protocol.commands import Stream
from protocol.giving import Giving
from protocol.limits import CACHED_MOST, CHUNK_CACHE, HOLD_EVERY, UNSTORED_MOST
from protocol.stream import Blob, chunk_size, count_of, is_right
from protocol.transfer_effects import (
    Abuse,
    Broken,
    Complete,
    Decline,
    Effect,
    Give,
    Headed,
    Hold,
    Read,
    Source,
    Store,
)


class Role(Enum):
    """What a host is to a push."""

    #: It has the command and is not ready: those who ask wait.
    JOINING = "joining"
    SOURCE = "source"
    TARGET = "target"
    #: A target that can't keep the stream: it gives on what is asked of it.
    CARRIER = "carrier"


#: What this host has of a chunk. DUE: nothing, and it was asked for. HELD: it is in memory, on its way to disk.
_MISSING, _DUE, _HELD, _STORED = range(4)


@dataclass
class _Transfer:
    id: int
    stream: Stream
    #: The hosts that may ask here: those behind this one in the order.
    behind: frozenset[int]
    asking: Asking
    giving: Giving
    count: int
    role: Role = Role.JOINING
    #: One of the four above for each chunk.
    chunks: bytearray = field(default_factory=bytearray)
    #: All chunks below it are here, as far as it was looked at; the first that was never asked for.
    front: int = 0
    next: int = 0
    stored: int = 0
    unstored: int = 0
    reading: set[int] = field(default_factory=set)
    #: Chunks as they travel, and whether compressed.
    cache: OrderedDict[int, tuple[Blob, bool]] = field(default_factory=OrderedDict)
    cached: int = 0
    #: Whether the head was told of, and whether it was looked at: until then no more than the head is asked for.
    told_head: bool = False
    headed: bool = False
    completed: bool = False
    hold_at: float = inf

    def keep(self, index: int, blob: Blob, packed: bool) -> None:
        """Remember a chunk, until `shrink`."""
        if index not in self.cache:
            self.cache[index] = blob, packed
            self.cached += len(blob)

    def shrink(self, parts: int) -> None:
        """Forget the oldest chunks of what is above this push's part of the memory, which is one of `parts`."""
        while self.cached > CHUNK_CACHE // parts or len(self.cache) > CACHED_MOST // parts:
            _, (old, _) = self.cache.popitem(last=False)
            self.cached -= len(old)

    def has(self, have: int) -> None:
        """The chunks in `have` (bit i: chunk i) can be read from this host's own copy."""
        for index in range(self.count):
            if have >> index & 1 and self.chunks[index] == _MISSING:
                self.chunks[index] = _STORED
                self.stored += 1

    def here(self) -> int:
        """How many chunks are here without a gap: how far this host is, as others are told."""
        while self.front < self.count and self.chunks[self.front] >= _HELD:
            self.front += 1
        return self.front

    @property
    def asks(self) -> bool:
        """Whether this host still asks for chunks."""
        if self.role is Role.CARRIER:
            return True
        return self.role is Role.TARGET and not self.completed


class Transfers:
    """All pushes that this host has a part in."""

    def __init__(self, me: int | None) -> None:
        """`me` is this host's rank, None for the root."""
        self._me = me
        self._transfers: dict[int, _Transfer] = {}
        #: Whether this host's processor is the limit (see Asking).
        self.pressed = False
        #: The pushes that `go_on` goes on with.
        self._later: set[int] = set()

    # --- beginning and end --------------------------------------------------------------------------------------------

    def join(self, id_: int, stream: Stream, now: float) -> None:
        """There is a push that this host will have a part in: those behind it may ask from now on."""
        if id_ in self._transfers:
            return
        order = [hop.rank for hop in stream.order]
        at = order.index(self._me) if self._me in order else -1 if self._me is None else len(order)
        candidates: tuple[Source, ...] = (*reversed(order[: max(at, 0)]), None) if self._me in order else (None,)
        count = count_of(stream)
        self._transfers[id_] = _Transfer(
            id=id_,
            stream=stream,
            behind=frozenset(order[at + 1 :]),
            asking=Asking(id_, candidates, stream.chunk, now),
            giving=Giving(window_of(stream.chunk)),
            count=count,
            chunks=bytearray(count),
        )
        for other in self._transfers.values():
            other.shrink(len(self._transfers))

    def begin(self, id_: int, stream: Stream, role: Role, have: int, now: float) -> list[Effect]:
        """Take part in a push. `have` are the chunks that are on disk here already (bit i: chunk i)."""
        self.join(id_, stream, now)
        transfer = self._transfers[id_]
        if transfer.role is not Role.JOINING:
            return []
        transfer.role = role
        transfer.headed = not stream.head or role is not Role.TARGET
        if role is Role.SOURCE:
            transfer.chunks = bytearray([_STORED]) * transfer.count
            transfer.stored = transfer.count
        elif role is Role.TARGET:
            transfer.has(have)
        return self._serve(transfer, now) + self._go_on(transfer, now)

    def end(self, id_: int) -> None:
        """The push is over."""
        self._transfers.pop(id_, None)

    def demote(self, id_: int, now: float) -> list[Effect]:
        """This target can't keep the stream after all. Those behind it get it through here all the same."""
        transfer = self._transfers.get(id_)
        if transfer is None or transfer.role not in (Role.TARGET, Role.JOINING):
            return []
        transfer.role, transfer.headed = Role.CARRIER, True
        transfer.unstored = transfer.stored = 0
        transfer.reading.clear()
        for index in range(transfer.count):
            if transfer.chunks[index] != _DUE:
                transfer.chunks[index] = _MISSING
        return self._serve(transfer, now) + self._go_on(transfer, now)

    # --- those behind -------------------------------------------------------------------------------------------------

    def asked(self, peer: int, id_: int, indices: tuple[int, ...], now: float) -> list[Effect]:
        """A host asks for chunks; for none: only how far this one is."""
        transfer = self._transfers.get(id_)
        if transfer is None:
            return [Decline(peer, id_, index, "this push is not known here", final=False) for index in indices]
        if peer not in transfer.behind:
            return [Abuse(peer, f"it asked for push {id_}, in which it does not come after this host")]
        if not indices:
            return [Hold(peer, id_, self._how_far(transfer))]
        if not transfer.giving:
            transfer.hold_at = now + HOLD_EVERY
        effects: list[Effect] = []
        for index in indices:
            if index >= transfer.count:
                return [*effects, Abuse(peer, f"it asked for chunk {index} of a push that has {transfer.count}")]
            if not transfer.giving.add(peer, index):
                return [*effects, Abuse(peer, "it asked for more chunks at a time than it may")]
            effects += self._find(transfer, index)
        if transfer.role is Role.CARRIER:
            effects += self._go_on(transfer, now)
        return effects

    @staticmethod
    def _how_far(transfer: _Transfer) -> int:
        # What a carrier gave on is gone; it gets as far as it is asked.
        return transfer.next if transfer.role is Role.CARRIER else transfer.here()

    def _find(self, transfer: _Transfer, index: int) -> list[Effect]:
        """A chunk that somebody waits for, where it is here."""
        cached = transfer.cache.get(index)
        if cached is not None:
            return self._give(transfer, index, *cached)
        if transfer.chunks[index] == _STORED and index not in transfer.reading:
            transfer.reading.add(index)
            return [Read(transfer.id, index)]
        return []

    @staticmethod
    def _give(transfer: _Transfer, index: int, blob: Blob, packed: bool) -> list[Effect]:
        return [Give(peer, transfer.id, index, blob, packed) for peer in transfer.giving.take(index)]

    def _serve(self, transfer: _Transfer, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for index in transfer.giving.wanted():
            effects += self._find(transfer, index)
        return effects

    def was_read(self, id_: int, read: Sequence[tuple[int, Blob | None, Blob | None]], now: float) -> list[Effect]:
        """Reads have ended: the index, the chunk, None where the copy could not be read, and the frame that it is to
        travel as, None where it travels as it is."""
        transfer = self._transfers.get(id_)
        if transfer is None:
            return []
        effects: list[Effect] = []
        for index, blob, packed in read:
            if index in transfer.reading:
                effects += self._was_read(transfer, index, blob, packed, now)
        return effects

    def _was_read(
        self, transfer: _Transfer, index: int, blob: Blob | None, packed: Blob | None, now: float
    ) -> list[Effect]:
        transfer.reading.discard(index)
        if blob is not None and is_right(transfer.stream, index, blob):
            wire = blob if packed is None else packed
            transfer.keep(index, wire, packed is not None)
            transfer.shrink(len(self._transfers))
            return self._give(transfer, index, wire, packed is not None)
        if transfer.role is Role.SOURCE:
            why = "the file changed while it was pushed"
            return [Decline(peer, transfer.id, index, why, final=True) for peer in transfer.giving.take(index)]
        # Somebody wrote to this host's copy, or its disk fails: those behind get the chunk from before.
        if transfer.completed:
            transfer.role = Role.CARRIER
        transfer.chunks[index] = _MISSING
        transfer.stored -= 1
        transfer.front = min(transfer.front, index)
        transfer.asking.again.add(index)
        return self._go_on(transfer, now)

    def peer_lost(self, peer: int) -> None:
        """A host's connection is gone."""
        for transfer in self._transfers.values():
            transfer.giving.lost(peer)

    # --- those before -------------------------------------------------------------------------------------------------

    def packed_size(self, id_: int, index: int) -> int | None:
        """How long a chunk is that came compressed; None where it was not asked for, or may not come so."""
        transfer = self._transfers.get(id_)
        if transfer is None or not transfer.stream.compress or not transfer.asking.awaits(index):
            return None
        return chunk_size(transfer.stream, index)

    def arrived(
        self,
        source: Source,
        id_: int,
        index: int,
        blob: Blob | None,
        now: float,
        *,
        packed: Blob | None = None,
        why: str = "",
        later: bool = False,
    ) -> list[Effect]:
        """A chunk came, compressed as `packed`. One that was not asked for is not looked at.

        `blob` is None where this host can't unpack any, for the reason `why`: that is no fault of the source's. Whoever
        has several says `later` for each, and then `go_on`: what is to be asked for next is found out once.
        """
        transfer = self._transfers.get(id_)
        if transfer is None or not transfer.asking.arrived(source, index, now):
            return []
        asking = transfer.asking
        if blob is None:
            return asking.took(source, index, now) + self._break(transfer, index, why)
        if not is_right(transfer.stream, index, blob):
            transfer.chunks[index] = _MISSING
            effects, failed = asking.was_wrong(source, index, now)
            if failed:
                return self._break(transfer, index, f"chunk {index} does not match its digest")
            return effects + self._go_on(transfer, now)
        effects = asking.took(source, index, now)
        wire = blob if packed is None else packed
        transfer.keep(index, wire, packed is not None)
        effects += self._give(transfer, index, wire, packed is not None)
        if transfer.role is Role.TARGET:
            transfer.chunks[index] = _HELD
            transfer.unstored += 1
            effects.append(Store(id_, index, blob))
        else:
            transfer.chunks[index] = _MISSING
            transfer.next = max(transfer.next, index + 1)
        if later:
            self._later.add(id_)
            return effects
        return effects + self._go_on(transfer, now)

    def go_on(self, now: float) -> list[Effect]:
        """Go on where chunks came that were to be seen to `later`."""
        effects: list[Effect] = []
        while self._later:
            transfer = self._transfers.get(self._later.pop())
            if transfer is not None:
                effects += self._go_on(transfer, now)
        return effects

    def was_stored(self, id_: int, indices: Sequence[int], now: float) -> list[Effect]:
        """Stores have ended well."""
        transfer = self._transfers.get(id_)
        if transfer is None:
            return []
        effects: list[Effect] = []
        for index in indices:
            if index < transfer.count and transfer.chunks[index] == _HELD:
                transfer.chunks[index] = _STORED
                transfer.unstored -= 1
                transfer.stored += 1
        for index in transfer.giving.among(indices):
            effects += self._find(transfer, index)
        return effects + self._go_on(transfer, now)

    def was_headed(self, id_: int, have: int, now: float) -> list[Effect]:
        """The head was looked at: the chunks in `have` (bit i: chunk i) are here already, beside those of the head."""
        transfer = self._transfers.get(id_)
        if transfer is None or not transfer.told_head or transfer.headed:
            return []
        transfer.has(have)
        transfer.headed = True
        return self._serve(transfer, now) + self._go_on(transfer, now)

    def declined(self, source: Source, id_: int, index: int, why: str, now: float, *, final: bool) -> list[Effect]:
        """A source will not give a chunk: for good, or not yet."""
        transfer = self._transfers.get(id_)
        if transfer is None or not transfer.asking.arrived(source, index, now):
            return []
        effects, failed = transfer.asking.declined(source, index, why, final, now)
        if failed:
            if final:
                return self._break(transfer, index, why)
            return self._break(transfer, index, "the service has ended this push: push again to go on", keep=True)
        return effects + self._go_on(transfer, now)

    def held(self, source: Source, id_: int, front: int, now: float) -> list[Effect]:
        """A source is alive, and has the first `front` chunks."""
        transfer = self._transfers.get(id_)
        if transfer is None or not transfer.asks:
            return []
        whole = front >= transfer.count
        trial = transfer.asking.held(source, front, self._how_far(transfer), now, whole=whole)
        # Where this host's own processor is the limit, a trial would tell nothing of its source.
        if trial and transfer.role is Role.TARGET and not self.pressed:
            transfer.asking.begin_trial(now)
        return self._go_on(transfer, now)

    def source_lost(self, source: Source, why: str, now: float) -> list[Effect]:
        """The connection to a source has ended."""
        effects: list[Effect] = []
        for transfer in list(self._transfers.values()):
            if transfer.asks:
                effects += transfer.asking.lost(source, why, now)
                effects += self._go_on(transfer, now)
        return effects

    def source_closed(self, source: Source) -> None:
        """This host closed the connection to a source, which is in nobody's use (see `sources`)."""
        for transfer in self._transfers.values():
            transfer.asking.closed(source)

    def source(self, id_: int) -> Source:
        """Whom this host asks for chunks of a push now, or will."""
        return self._transfers[id_].asking.source

    def sources(self) -> set[Source]:
        """The sources whose connections are needed."""
        needed: set[Source] = set()
        for transfer in self._transfers.values():
            if transfer.asks:
                needed |= transfer.asking.in_use()
        return needed

    def _break(self, transfer: _Transfer, index: int, why: str, *, keep: bool = False) -> list[Effect]:
        transfer.chunks[index] = _MISSING
        effects: list[Effect] = [
            Decline(peer, transfer.id, index, why, final=True) for peer in transfer.giving.take(index)
        ]
        return [*effects, Broken(transfer.id, why, keep)] if transfer.role is Role.TARGET else effects

    # --- going on -----------------------------------------------------------------------------------------------------

    def _go_on(self, transfer: _Transfer, now: float) -> list[Effect]:
        """Ask for what is next, as far as the credit goes; say what is finished."""
        transfer.shrink(len(self._transfers))
        if not transfer.asks:
            return []
        for index in transfer.asking.again:
            if transfer.chunks[index] == _DUE:
                transfer.chunks[index] = _MISSING
        room = transfer.asking.room(now, pressed=self.pressed)
        if transfer.role is Role.CARRIER:
            wanted = [i for i in transfer.giving.wanted() if transfer.chunks[i] == _MISSING and i not in transfer.cache]
            transfer.asking.again.clear()
            if not wanted or not room:
                return []
            return self._ask(transfer, wanted[:room], now)
        effects: list[Effect] = []
        tried = transfer.asking.trial_room(now)
        if tried:
            effects += self._ask_next(transfer, tried, now, trial=True)
        if room:
            disk_room = self._disk_room(transfer)
            if disk_room < room:
                transfer.asking.own_fault(now)
            effects += self._ask_next(transfer, min(room, disk_room), now)
        head = transfer.stream.head
        if head and not transfer.told_head and transfer.chunks.count(_STORED, 0, head) == head:
            transfer.told_head = True
            effects.append(Headed(transfer.id))
        if transfer.headed and transfer.stored == transfer.count:
            transfer.completed = True
            effects.append(Complete(transfer.id))
        return effects

    def _disk_room(self, transfer: _Transfer) -> int:
        most = max(2, UNSTORED_MOST // len(self._transfers) // transfer.stream.chunk)
        return max(0, most - transfer.unstored)

    def _ask_next(self, transfer: _Transfer, most: int, now: float, *, trial: bool = False) -> list[Effect]:
        """Ask for up to so many of the chunks that are missing, in order: of the source, or in a trial."""
        again = transfer.asking.again
        chosen = sorted(index for index in again if transfer.chunks[index] == _MISSING)[:most]
        again.difference_update(chosen)
        end = transfer.count if transfer.headed else transfer.stream.head
        while len(chosen) < most and transfer.next < end:
            if transfer.chunks[transfer.next] == _MISSING and transfer.next not in again:
                chosen.append(transfer.next)
            transfer.next += 1
        if trial:
            effects = transfer.asking.ask_in_trial(chosen, now)
            asked = [index for index in chosen if transfer.asking.is_due(index)]
            again.update(set(chosen) - set(asked))
        elif chosen:
            return self._ask(transfer, chosen, now)
        else:
            return []
        for index in asked:
            transfer.chunks[index] = _DUE
        return effects

    @staticmethod
    def _ask(transfer: _Transfer, indices: list[int], now: float) -> list[Effect]:
        for index in indices:
            transfer.chunks[index] = _DUE
        return transfer.asking.ask(indices, now)

    # --- time ---------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> list[Effect]:
        """What time alone brings."""
        effects: list[Effect] = []
        for transfer in self._transfers.values():
            if transfer.giving and now >= transfer.hold_at:
                transfer.hold_at = now + HOLD_EVERY
                front = self._how_far(transfer)
                effects += [Hold(peer, transfer.id, front) for peer in transfer.giving.quiet()]
            if self._is_waiting(transfer):
                effects += transfer.asking.advance(now, pressed=self.pressed)
                effects += self._go_on(transfer, now)
        return effects

    @staticmethod
    def _is_waiting(transfer: _Transfer) -> bool:
        if transfer.role is Role.CARRIER:
            return bool(transfer.giving)
        return transfer.asks

    def wakeup(self) -> float | None:
        """When `advance` will have something to do."""
        due = inf
        for transfer in self._transfers.values():
            if transfer.giving:
                due = min(due, transfer.hold_at)
            if self._is_waiting(transfer):
                due = min(due, transfer.asking.wakeup())
        return None if due == inf else due

    # --- what can be known of it --------------------------------------------------------------------------------------

    def knows(self, id_: int) -> bool:
        """Whether this host has a part in the push."""
        return id_ in self._transfers

    def stored_bytes(self, id_: int) -> int:
        """How many bytes of the stream are on this host's disk, for the progress that people watch."""
        transfer = self._transfers[id_]
        if not transfer.count:
            return 0
        last = transfer.count - 1
        short = transfer.stream.chunk - chunk_size(transfer.stream, last) if transfer.chunks[last] == _STORED else 0
        return transfer.stored * transfer.stream.chunk - short

    def held_bytes(self) -> int:
        """How many bytes of chunks are in memory here."""
        return sum(t.cached + t.unstored * t.stream.chunk for t in self._transfers.values())

    def __len__(self) -> int:
        return len(self._transfers)
