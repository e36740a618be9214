"""Pushes without a service: commands of made-up files, and files that are brought from one directory to another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.incoming import Incoming
from agent.source import Source, gather
from protocol.commands import Push
from protocol.limits import CHUNK
from protocol.listing import Entry, Kind, Listing, pack
from protocol.stream import count_of, is_right, stream_of
from protocol.wishes import Wishes

DEFAULT = Wishes()


def file_push(data: bytes, path: Path, *, chunk: int = CHUNK, mode: int = 0o600, inline: bool = False) -> Push:
    """A push of one file with these bytes; with `inline` they are in the command."""
    stream = stream_of(lambda index: data[index * chunk : (index + 1) * chunk], len(data), chunk=chunk)
    if not inline:
        stream = msgspec.structs.replace(stream, inline=None)
    entry = Entry(path.name.encode(), Kind.FILE, mode, 0, len(data))
    return Push(folder=str(path.parent), stream=stream, listing=pack(Listing((entry,))))


def bring(
    roots: Sequence[tuple[bytes, str | Path]],
    folder: Path,
    notes: Path,
    wishes: Wishes = DEFAULT,
    *,
    dry_run: bool = False,
    **options: Any,
) -> str:
    """Gather files and bring them to `folder`, as service and agent do it; what the agent says of it."""
    paths = [(name, str(path)) for name, path in roots]
    source = gather(paths, wishes, notes.parent, data=not dry_run, digests=dry_run or None)
    incoming = Incoming(str(folder), source.stream, source.inline_listing, notes, dry_run=dry_run, **options)
    try:
        feed(incoming, source)
        return incoming.said()
    finally:
        incoming.close()
        source.close()


def feed(incoming: Incoming, source: Source, *, most: int | None = None) -> list[int]:
    """Bring all chunks that are missing, or the first `most` of them, and with all put things in place. Which were
    brought."""
    stream, have, brought = source.stream, incoming.have, []
    for index in range(stream.head):
        if not have >> index & 1:
            incoming.write([(index, source.read(index))])
            brought.append(index)
    if stream.head:
        have |= incoming.headed()
    for index in range(stream.head, count_of(stream)):
        if not have >> index & 1:
            if most is not None and len(brought) >= most:
                return brought
            blob = source.read(index)
            assert is_right(stream, index, blob)
            incoming.write([(index, blob)])
            brought.append(index)
    incoming.finish()
    return brought
