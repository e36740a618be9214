"""Chunks of pushed files, pulled from parent to child: a pure state machine beside the relay.

Every host asks the one above it for the chunks that it lacks, at most ASK_WINDOW at a time, and answers those below
from memory, from its own disk, or as soon as the chunk comes. Asking again is harmless, so whoever gets a new parent
asks there for what is still missing, and a slow host slows nobody but those below it. Each chunk is checked against the
digest in the signed command before it is stored or given on.

    root: reads chunks from the file      target: asks, stores, gives on      carrier: asks for what is asked of it
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from protocol.commands import Stream
from protocol.limits import ASK_WINDOW, CHUNK_CACHE
from protocol.stream import count_of, is_right

#: Chunks that may wait for the disk before a host stops asking for more: bounds memory where a disk is slow.
UNSTORED_MOST = 16
#: A chunk that fails its digest this often is given up: the file changed under the push, or somebody alters it.
BAD_MOST = 3
#: A parent that does not know the push yet will in a moment: its command travels by the other socket.
ASK_AGAIN = 0.2


class Role(Enum):
    """What a host is to a push."""

    SOURCE = "source"
    TARGET = "target"
    CARRIER = "carrier"


@dataclass(frozen=True, slots=True)
class AskUp:
    """Ask the parent for these chunks."""

    id: int
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Give:
    """Send a chunk to a child."""

    child: int
    id: int
    index: int
    blob: bytes


@dataclass(frozen=True, slots=True)
class Decline:
    """Tell a child that it will not get the chunk here."""

    child: int
    id: int
    index: int
    why: str
    final: bool


@dataclass(frozen=True, slots=True)
class Read:
    """Read the chunk from this host's own copy, and say `was_read`."""

    id: int
    index: int


@dataclass(frozen=True, slots=True)
class Store:
    """Write the chunk, and say `was_stored`."""

    id: int
    index: int
    blob: bytes


@dataclass(frozen=True, slots=True)
class Headed:
    """The head of the stream is stored here: say by `was_headed` which of the other chunks this host has."""

    id: int


@dataclass(frozen=True, slots=True)
class Complete:
    """All chunks are stored here: put the file in its place."""

    id: int


@dataclass(frozen=True, slots=True)
class Broken:
    """This host can't get the file."""

    id: int
    why: str


@dataclass(frozen=True, slots=True)
class Abuse:
    """A child asked for more than its credit, or for chunks that the file does not have."""

    child: int
    why: str


Effect: TypeAlias = AskUp | Give | Decline | Read | Store | Headed | Complete | Broken | Abuse


@dataclass
class _Transfer:
    stream: Stream
    role: Role
    #: Bit i: chunk i can be read from this host's own copy.
    have: int
    count: int
    next: int = 0
    asked: set[int] = field(default_factory=set)
    unstored: set[int] = field(default_factory=set)
    reading: set[int] = field(default_factory=set)
    waiting: dict[int, list[int]] = field(default_factory=dict)
    bad: dict[int, int] = field(default_factory=dict)
    cache: OrderedDict[int, bytes] = field(default_factory=OrderedDict)
    retry_at: float | None = None
    #: Whether the head was told of, and whether it was looked at: until then no more than the head is asked for.
    told_head: bool = False
    headed: bool = False
    completed: bool = False

    def keep(self, index: int, blob: bytes) -> None:
        self.cache[index] = blob
        while len(self.cache) * self.stream.chunk > CHUNK_CACHE:
            self.cache.popitem(last=False)


class Transfers:
    """All pushes that this host has a part in."""

    def __init__(self) -> None:
        self._transfers: dict[int, _Transfer] = {}
        self._credit: dict[tuple[int, int], int] = {}

    def begin(self, id_: int, stream: Stream, role: Role, have: int = 0) -> list[Effect]:
        """Take part in a push. `have` are the chunks that are on disk here already (bit i: chunk i).

        A carrier that turns out to be a target as well becomes one.
        """
        known = self._transfers.get(id_)
        count = count_of(stream)
        if known is not None and (known.role is not Role.CARRIER or role is Role.CARRIER):
            return []
        transfer = _Transfer(stream, role, have, count, headed=not stream.head)
        if role is Role.SOURCE:
            transfer.have = (1 << count) - 1
        if known is not None:
            transfer.waiting, transfer.asked, transfer.cache = known.waiting, known.asked, known.cache
        self._transfers[id_] = transfer
        return self._serve_waiting(id_, transfer) + self._pull(id_, transfer)

    def end(self, id_: int) -> None:
        """The push is over, or is given up here."""
        self._transfers.pop(id_, None)
        for key in [key for key in self._credit if key[1] == id_]:
            del self._credit[key]

    def demote(self, id_: int) -> list[Effect]:
        """This target can't keep the file after all. Those below get it through here all the same."""
        transfer = self._transfers.get(id_)
        if transfer is None or transfer.role is not Role.TARGET:
            return []
        transfer.role, transfer.have = Role.CARRIER, 0
        transfer.unstored.clear()
        transfer.reading.clear()
        return self._serve_waiting(id_, transfer) + self._pull(id_, transfer)

    def asked(self, child: int, id_: int, indices: tuple[int, ...]) -> list[Effect]:
        """A child asks for chunks."""
        transfer = self._transfers.get(id_)
        if transfer is None:
            return [Decline(child, id_, index, "this push is not known here", final=False) for index in indices]
        effects: list[Effect] = []
        for index in indices:
            if index >= transfer.count:
                return [Abuse(child, f"it asked for chunk {index} of a file that has {transfer.count}")]
            if child in transfer.waiting.get(index, ()):
                continue  # asked again after its link broke: one answer will do
            credit = self._credit.get((child, id_), 0)
            if credit >= ASK_WINDOW:
                return [*effects, Abuse(child, f"it asked for more than {ASK_WINDOW} chunks at a time")]
            self._credit[child, id_] = credit + 1
            transfer.waiting.setdefault(index, []).append(child)
            effects += self._find(id_, transfer, index)
        return effects

    def _find(self, id_: int, transfer: _Transfer, index: int) -> list[Effect]:
        """Get a chunk that somebody below waits for."""
        blob = transfer.cache.get(index)
        if blob is not None:
            return self._give(id_, transfer, index, blob)
        if transfer.have >> index & 1:
            if index in transfer.reading:
                return []
            transfer.reading.add(index)
            return [Read(id_, index)]
        if transfer.role is Role.CARRIER and index not in transfer.asked and len(transfer.asked) < ASK_WINDOW:
            transfer.asked.add(index)
            return [AskUp(id_, (index,))]
        return []  # a target has asked for it or will; a carrier asks when its credit allows

    def _give(self, id_: int, transfer: _Transfer, index: int, blob: bytes) -> list[Effect]:
        children = transfer.waiting.pop(index, [])
        for child in children:
            self._credit[child, id_] = self._credit.get((child, id_), 1) - 1
        return [Give(child, id_, index, blob) for child in children]

    def _serve_waiting(self, id_: int, transfer: _Transfer) -> list[Effect]:
        effects: list[Effect] = []
        for index in sorted(transfer.waiting):
            effects += self._find(id_, transfer, index)
        return effects

    def was_read(self, id_: int, index: int, blob: bytes | None) -> list[Effect]:
        """A Read has ended; None where the copy could not be read or is not what it was."""
        transfer = self._transfers.get(id_)
        if transfer is None or index not in transfer.reading:
            return []
        transfer.reading.discard(index)
        if blob is not None and is_right(transfer.stream, index, blob):
            transfer.keep(index, blob)
            return self._give(id_, transfer, index, blob)
        return self._decline_all(id_, transfer, index, "the file changed while it was pushed")

    def _decline_all(self, id_: int, transfer: _Transfer, index: int, why: str) -> list[Effect]:
        children = transfer.waiting.pop(index, [])
        for child in children:
            self._credit[child, id_] = self._credit.get((child, id_), 1) - 1
        return [Decline(child, id_, index, why, final=True) for child in children]

    def arrived(self, id_: int, index: int, blob: bytes, now: float) -> list[Effect]:
        """A chunk came from above. One that was not asked for is not looked at."""
        transfer = self._transfers.get(id_)
        if transfer is None or index not in transfer.asked:
            return []
        if not is_right(transfer.stream, index, blob):
            transfer.bad[index] = transfer.bad.get(index, 0) + 1
            if transfer.bad[index] >= BAD_MOST:
                return self._break(id_, transfer, index, f"chunk {index} does not match its digest")
            transfer.retry_at = now + ASK_AGAIN
            return []
        transfer.asked.discard(index)
        transfer.keep(index, blob)
        effects = self._give(id_, transfer, index, blob)
        if transfer.role is Role.TARGET:
            transfer.unstored.add(index)
            effects.append(Store(id_, index, blob))
        return effects + self._pull(id_, transfer)

    def was_stored(self, id_: int, index: int) -> list[Effect]:
        """A Store has ended well."""
        transfer = self._transfers.get(id_)
        if transfer is None:
            return []
        transfer.unstored.discard(index)
        transfer.have |= 1 << index
        return self._pull(id_, transfer)

    def was_headed(self, id_: int, have: int) -> list[Effect]:
        """The head was looked at: the chunks in `have` (bit i: chunk i) are here already, beside those of the head."""
        transfer = self._transfers.get(id_)
        if transfer is None or not transfer.told_head:
            return []
        transfer.have |= have
        transfer.headed = True
        return self._serve_waiting(id_, transfer) + self._pull(id_, transfer)

    def declined(self, id_: int, index: int, why: str, final: bool, now: float) -> list[Effect]:
        """The parent will not give a chunk: for good, or not yet."""
        transfer = self._transfers.get(id_)
        if transfer is None or index not in transfer.asked:
            return []
        if final:
            return self._break(id_, transfer, index, why)
        transfer.retry_at = now + ASK_AGAIN
        return []

    def _break(self, id_: int, transfer: _Transfer, index: int, why: str) -> list[Effect]:
        transfer.asked.discard(index)
        effects = self._decline_all(id_, transfer, index, why)
        return [*effects, Broken(id_, why)] if transfer.role is Role.TARGET else effects

    def source_changed(self, now: float) -> None:
        """There is another parent: everything that was asked for is asked for again, once it is there."""
        for transfer in self._transfers.values():
            if transfer.asked:
                transfer.retry_at = now

    def child_lost(self, child: int) -> None:
        """A child is gone: nobody waits in its name."""
        for id_, transfer in self._transfers.items():
            self._credit.pop((child, id_), None)
            for index, children in list(transfer.waiting.items()):
                if child in children:
                    children.remove(child)
                    if not children:
                        del transfer.waiting[index]

    def advance(self, now: float) -> list[Effect]:
        """What time alone brings: asking again."""
        effects: list[Effect] = []
        for id_, transfer in self._transfers.items():
            if transfer.retry_at is not None and now >= transfer.retry_at:
                transfer.retry_at = None
                again = sorted(transfer.asked)[:ASK_WINDOW]
                if again:
                    effects.append(AskUp(id_, tuple(again)))
        return effects

    def wakeup(self) -> float | None:
        """When `advance` will have something to do."""
        return min((t.retry_at for t in self._transfers.values() if t.retry_at is not None), default=None)

    def knows(self, id_: int) -> bool:
        """Whether this host has a part in the push."""
        return id_ in self._transfers

    def stored_bytes(self, id_: int) -> int:
        """How many bytes of the file are on this host's disk, for the progress that people watch."""
        transfer = self._transfers[id_]
        whole = transfer.have.bit_count() * transfer.stream.chunk
        last_is_here = transfer.count and transfer.have >> (transfer.count - 1) & 1
        return whole - (transfer.count * transfer.stream.chunk - transfer.stream.size if last_is_here else 0)

    def _pull(self, id_: int, transfer: _Transfer) -> list[Effect]:
        """Ask for what is next, as far as the credit goes."""
        if transfer.role is Role.SOURCE:
            return []
        if transfer.role is Role.CARRIER:
            queued = sorted(index for index in transfer.waiting if index not in transfer.asked)
            new = queued[: max(0, ASK_WINDOW - len(transfer.asked))]
            transfer.asked.update(new)
            return [AskUp(id_, tuple(new))] if new else []
        new = []
        most = transfer.count if transfer.headed else transfer.stream.head
        while len(transfer.asked) < ASK_WINDOW and len(transfer.asked) + len(transfer.unstored) < UNSTORED_MOST:
            while transfer.next < most and self._is_here(transfer, transfer.next):
                transfer.next += 1
            if transfer.next >= most:
                break
            transfer.asked.add(transfer.next)
            new.append(transfer.next)
            transfer.next += 1
        effects: list[Effect] = [AskUp(id_, tuple(new))] if new else []
        head = (1 << transfer.stream.head) - 1
        if transfer.stream.head and transfer.have & head == head and not transfer.told_head:
            transfer.told_head = True
            effects.append(Headed(id_))
        if transfer.headed and transfer.have == (1 << transfer.count) - 1 and not transfer.completed:
            transfer.completed = True
            effects.append(Complete(id_))
        return effects

    @staticmethod
    def _is_here(transfer: _Transfer, index: int) -> bool:
        return bool(transfer.have >> index & 1) or index in transfer.asked or index in transfer.unstored

    def __len__(self) -> int:
        return len(self._transfers)
