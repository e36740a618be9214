"""A stream's chunks: how large they are, how many, and whether one is right. Pure functions of `commands.Stream`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from protocol.commands import Stream
from protocol.digest import SIZE, content_digest
from protocol.limits import CHUNK, CHUNK_LARGE, CHUNKS_LEAST, MAX_CHUNK, MAX_CHUNKS, MAX_INLINE

#: A chunk's bytes: also those of a message as it came, which need not be copied to be given on.
Blob: TypeAlias = "bytes | memoryview"


def chunk_for(size: int) -> int:
    """The chunk size for a stream of `size` bytes. By the size alone, so that equal files have equal digests.

    CHUNK, or CHUNK_LARGE where that makes CHUNKS_LEAST or more, and above where the digests would be too many.
    Raises ValueError where `size` is too large.
    """
    chunk = CHUNK_LARGE if chunk_count(size, CHUNK_LARGE) >= CHUNKS_LEAST else CHUNK
    while chunk_count(size, chunk) > MAX_CHUNKS:
        chunk *= 2
    if chunk > MAX_CHUNK:
        raise ValueError(f"a push of {size} bytes is above the limit of {MAX_CHUNK * MAX_CHUNKS}")
    return chunk


def chunk_count(size: int, chunk: int) -> int:
    """How many chunks of `chunk` bytes a stream of `size` bytes has."""
    return -(-size // chunk)


def count_of(stream: Stream) -> int:
    """How many chunks a stream has."""
    return chunk_count(stream.size, stream.chunk)


def chunk_size(stream: Stream, index: int) -> int:
    """The length of chunk `index` in bytes."""
    return min(stream.chunk, stream.size - index * stream.chunk)


def is_right(stream: Stream, index: int, blob: Blob) -> bool:
    """Whether `blob` is chunk `index`, by its digest."""
    if len(blob) != min(stream.chunk, stream.size - index * stream.chunk):
        return False
    return content_digest(blob) == stream.digests[index * SIZE : (index + 1) * SIZE]


def is_consistent(stream: Stream) -> bool:
    """Whether sizes and digests agree with each other, and the order names each host once."""
    count = count_of(stream)
    return (
        len(stream.digests) == count * SIZE
        and stream.head <= count
        and len({hop.rank for hop in stream.order}) == len({hop.key for hop in stream.order}) == len(stream.order)
        and content_digest(stream.digests).hex() == stream.digest
    )


def digest_chunks(read: Callable[[int], bytes], size: int, chunk: int) -> tuple[bytes, str]:
    """The digests of a stream's chunks and the digest over them; `read(index)` gives a chunk's bytes."""
    digests = b"".join(content_digest(read(index)) for index in range(chunk_count(size, chunk)))
    return digests, content_digest(digests).hex()


def stream_of(
    read: Callable[[int], bytes], size: int, *, head_bytes: int = 0, chunk: int | None = None, compress: bool = True
) -> Stream:
    """The stream of `size` bytes whose chunk `index`, of `chunk` bytes (by default chunk_for(size)), is `read(index)`.

    Its first `head_bytes` bytes are its head. Raises ValueError where it is too large, and what `read` raises.
    """
    chunk = chunk_for(size) if chunk is None else chunk
    digests, digest = digest_chunks(read, size, chunk)
    count = chunk_count(size, chunk)
    inline = b"".join(read(index) for index in range(count)) if size <= MAX_INLINE else None
    head = chunk_count(head_bytes, chunk)
    return Stream(size=size, chunk=chunk, digests=digests, digest=digest, head=head, inline=inline, compress=compress)
