"""What a host's part in pushes wants done: the effects of `protocol.transfer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from protocol.stream import Blob

#: Where chunks are asked for: the rank of a host in the stream's order, None for the root.
Source: TypeAlias = int | None


@dataclass(frozen=True, slots=True)
class AskOf:
    """Ask a source for these chunks; for none: only how far it is."""

    source: Source
    id: int
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Give:
    """Send a chunk to a host that asked for it. `packed` says that `blob` is compressed."""

    peer: int
    id: int
    index: int
    blob: Blob
    packed: bool


@dataclass(frozen=True, slots=True)
class Decline:
    """Tell a host that it will not get the chunk here: for good, or not yet."""

    peer: int
    id: int
    index: int
    why: str
    final: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """Tell a host that this one is alive and has the first `front` chunks."""

    peer: int
    id: int
    front: int


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
    blob: Blob


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
    """This host can't get the stream. With `keep` what has come is worth keeping: the same push may be given again."""

    id: int
    why: str
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Bypassed:
    """This host asks another than `source` from now on."""

    id: int
    source: Source
    why: str


@dataclass(frozen=True, slots=True)
class Abuse:
    """A host asked for more than its credit, for what the stream does not have, or for what is not for it."""

    peer: int
    why: str


Effect: TypeAlias = AskOf | Give | Decline | Hold | Read | Store | Headed | Complete | Broken | Bypassed | Abuse
