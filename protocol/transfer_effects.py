"""What a host's part in pushes wants done: the effects of `protocol.transfer`."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from protocol.stream import Blob

#: Where chunks are asked for: the rank of a host in the stream's order, None for the root.
Source: TypeAlias = int | None


class AskOf(msgspec.Struct, frozen=True, gc=False):
    """Ask a source for these chunks; for none: only how far it is."""

    source: Source
    id: int
    indices: tuple[int, ...]


class Give(msgspec.Struct, frozen=True, gc=False):
    """Send a chunk to a host that asked for it. `packed` says that `blob` is compressed."""

    peer: int
    id: int
    index: int
    blob: Blob
    packed: bool


class Decline(msgspec.Struct, frozen=True, gc=False):
    """Tell a host that it will not get the chunk here: for good, or not yet."""

    peer: int
    id: int
    index: int
    why: str
    final: bool


class Hold(msgspec.Struct, frozen=True, gc=False):
    """Tell a host that this one is alive and has the first `front` chunks."""

    peer: int
    id: int
    front: int


class Read(msgspec.Struct, frozen=True, gc=False):
    """Read the chunk from this host's own copy, and say `was_read`."""

    id: int
    index: int


class Store(msgspec.Struct, frozen=True, gc=False):
    """Write the chunk, and say `was_stored`."""

    id: int
    index: int
    blob: Blob


class Headed(msgspec.Struct, frozen=True, gc=False):
    """The head of the stream is stored here: say by `was_headed` which of the other chunks this host has."""

    id: int


class Complete(msgspec.Struct, frozen=True, gc=False):
    """All chunks are stored here: put the file in its place."""

    id: int


class Broken(msgspec.Struct, frozen=True, gc=False):
    """This host can't get the stream. With `keep` what has come is worth keeping: the same push may be given again."""

    id: int
    why: str
    keep: bool = False


class Bypassed(msgspec.Struct, frozen=True, gc=False):
    """This host asks another than `source` from now on."""

    id: int
    source: Source
    why: str


class Abuse(msgspec.Struct, frozen=True, gc=False):
    """A host asked for more than its credit, for what the stream does not have, or for what is not for it."""

    peer: int
    why: str


Effect: TypeAlias = AskOf | Give | Decline | Hold | Read | Store | Headed | Complete | Broken | Bypassed | Abuse
