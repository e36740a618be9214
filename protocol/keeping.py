"""Outcomes that the root has not acknowledged: in memory within KEEP_MEMORY, on disk within KEEP_DISK, and of what fits
into neither the outcome without its output, which says how much there was.

in memory --KEEP_AFTER, or memory is full--> being written --Kept--> on disk, and in memory while there is room
                                                  +--------> could not be written: in memory while there is room

Those that were found on disk when this agent began are its predecessor's. They are read when they are asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from msgspec.structs import replace

from protocol.events import Effect, Keep, Kept, Load, Loaded, Warn
from protocol.limits import KEEP_AFTER, KEEP_DISK, KEEP_MEMORY
from protocol.outcomes import NO_OUTPUT, UNREADABLE, Lost, Outcome, Output

Answer: TypeAlias = tuple[Outcome, Output]

#: What an outcome takes on disk beside its output: a block of the usual file systems.
_OVERHEAD = 4_096


class _On(Enum):
    """How far an outcome is on its way to disk."""

    MEMORY = "memory"
    WAY = "way"
    DISK = "disk"
    NO_DISK = "no disk"


@dataclass
class _Held:
    """An outcome of this life. `output` is what of it is in memory; `signature` None is for what is not written."""

    signature: bytes | None
    outcome: Outcome
    output: Output
    on: _On = _On.MEMORY
    whole: bool = True

    @property
    def bytes(self) -> int:
        """Its output's in memory."""
        return len(self.output.out) + len(self.output.err)


class Keeping:
    """What an agent keeps of its outcomes, by command."""

    def __init__(self, found: Mapping[int, int]) -> None:
        """`found` is what was on disk when the agent began: commands, and the bytes of each."""
        self._held: dict[int, _Held] = {}
        self._found = dict(found)
        self._loading: set[int] = set()
        #: Since when those that are not written yet are due to be, in that order.
        self._due: deque[tuple[float, int]] = deque()
        self._sizes = {id_: size + _OVERHEAD for id_, size in self._found.items()}
        #: Bytes of output in memory, and of files on disk or on their way there.
        self.memory = 0
        self.disk = sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._held) + len(self._found)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._held or id_ in self._found

    def add(self, id_: int, signature: bytes | None, outcome: Outcome, output: Output, now: float) -> list[Effect]:
        """A command has its outcome at local time `now`. With `signature` None it is not written to disk."""
        held = self._held[id_] = _Held(signature, outcome, output)
        self.memory += held.bytes
        if signature is None:
            held.on = _On.NO_DISK
        else:
            self._due.append((now + KEEP_AFTER, id_))
        return self._bound()

    def answer(self, id_: int) -> Answer | None:
        """The outcome of a command that is in here; None where it has to be read."""
        held = self._held.get(id_)
        if held is None or (not held.whole and held.on is _On.DISK):
            return None
        return held.outcome, held.output

    def load(self, id_: int, signature: bytes) -> list[Effect]:
        """Read the outcome of a command that is in here, and was asked for under this signature."""
        if id_ in self._loading or id_ not in self:
            return []
        self._loading.add(id_)
        held = self._held.get(id_)
        return [Load(id_, signature if held is None or held.signature is None else held.signature)]

    def loaded(self, event: Loaded) -> Answer | None:
        """It was read. Returns the answer, None where it is no longer wanted."""
        self._loading.discard(event.id)
        held = self._held.get(event.id)
        if held is not None:
            return event.found or (held.outcome, held.output)
        if event.id not in self._found:
            return None
        if event.found is None:
            del self._found[event.id]
            self.disk -= self._sizes.pop(event.id)
            self._held[event.id] = _Held(None, Lost(UNREADABLE), NO_OUTPUT, on=_On.NO_DISK)
            return Lost(UNREADABLE), NO_OUTPUT
        return event.found

    def kept(self, event: Kept) -> list[Effect]:
        """It was written, or could not be."""
        held = self._held.get(event.id)
        if held is None or held.on is not _On.WAY:
            return []
        held.on = _On.DISK if event.well else _On.NO_DISK
        if not event.well:
            self.disk -= self._sizes.pop(event.id)
        return self._bound()

    def forget(self, id_: int) -> None:
        """The root has it."""
        held = self._held.pop(id_, None)
        if held is not None:
            self.memory -= held.bytes
        self._found.pop(id_, None)
        self.disk -= self._sizes.pop(id_, 0)

    def write_all(self) -> list[Effect]:
        """The agent ends: what is not on disk goes there."""
        return [effect for id_, held in self._held.items() for effect in self._write(id_, held)]

    def advance(self, now: float) -> list[Effect]:
        """Write what was not acknowledged in time."""
        effects: list[Effect] = []
        while self._due and self._due[0][0] <= now:
            _, id_ = self._due.popleft()
            held = self._held.get(id_)
            if held is not None:
                effects += self._write(id_, held)
        return effects

    def wakeup(self) -> float | None:
        """When `advance` will have something to do."""
        while self._due and self._due[0][1] not in self._held:
            self._due.popleft()
        return self._due[0][0] if self._due else None

    def _write(self, id_: int, held: _Held) -> list[Effect]:
        if held.on is not _On.MEMORY:
            return []
        size = held.bytes + _OVERHEAD
        if held.signature is None or self.disk + size > KEEP_DISK:
            held.on = _On.NO_DISK
            return []
        held.on = _On.WAY
        self._sizes[id_] = size
        self.disk += size
        return [Keep(id_, held.signature, held.outcome, held.output)]

    def _bound(self) -> list[Effect]:
        """Let memory hold no more than KEEP_MEMORY, the oldest first: what is on disk may go."""
        effects: list[Effect] = []
        for id_, held in list(self._held.items()) if self.memory > KEEP_MEMORY else ():
            if self.memory <= KEEP_MEMORY:
                break
            if not held.bytes:
                continue
            effects += self._write(id_, held)
            if held.on is _On.WAY:
                continue
            if held.on is _On.NO_DISK:
                effects.append(Warn(f"command {id_}: neither memory nor disk has room to keep its output"))
            self.memory -= held.bytes
            # How much there was stays, and tells whoever reads it that this is not all.
            held.output, held.whole = replace(held.output, out=b"", err=b""), False
        return effects
