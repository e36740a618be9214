"""A stream's chunks: sizes, digests, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.commands import Hop, Stream
from protocol.limits import CHUNK, CHUNK_LARGE, CHUNKS_LEAST, MAX_CHUNK, MAX_CHUNKS, MAX_INLINE
from protocol.stream import chunk_count, chunk_for, is_consistent, is_right, stream_of

DATA = bytes(range(256)) * 10  # 2,560 bytes: ten chunks of 256
STREAM = stream_of(lambda index: DATA[index * 256 :][:256], len(DATA), chunk=256)


def blob(index: int) -> bytes:
    return DATA[index * 256 : (index + 1) * 256]


def test_a_small_stream_rides_in_the_command_and_a_larger_one_does_not() -> None:
    assert STREAM.inline == DATA
    assert stream_of(lambda _: b"x", MAX_INLINE + 1, chunk=MAX_INLINE + 1).inline is None


def test_a_head_is_counted_in_chunks() -> None:
    heads = [stream_of(blob, len(DATA), chunk=256, head_bytes=size).head for size in (0, 1, 256, 257, 2_560)]
    assert heads == [0, 1, 1, 2, 10]


def test_an_order_that_names_a_host_or_a_key_twice_is_inconsistent() -> None:
    one, two = (Hop(rank, "127.0.0.1", 1, bytes([rank]) * 32) for rank in (1, 2))
    assert is_consistent(_with(order=(one, two)))
    assert not is_consistent(_with(order=(one, one)))
    assert not is_consistent(_with(order=(one, msgspec.structs.replace(two, key=one.key))))


def test_the_chunk_size_is_a_function_of_the_size_and_keeps_the_manifest_within_its_limit() -> None:
    assert chunk_for(0) == chunk_for(CHUNK_LARGE * (CHUNKS_LEAST - 1)) == CHUNK
    assert chunk_for(CHUNK_LARGE * (CHUNKS_LEAST - 1) + 1) == CHUNK_LARGE
    assert chunk_for(CHUNK_LARGE * CHUNKS_LEAST) == chunk_for(CHUNK_LARGE * MAX_CHUNKS) == CHUNK_LARGE
    assert chunk_for(CHUNK_LARGE * MAX_CHUNKS + 1) == 2 * CHUNK_LARGE
    assert chunk_count(MAX_CHUNK * MAX_CHUNKS, chunk_for(MAX_CHUNK * MAX_CHUNKS)) == MAX_CHUNKS
    with pytest.raises(ValueError, match="above the limit"):
        chunk_for(MAX_CHUNK * MAX_CHUNKS + 1)


def test_a_manifest_whose_digests_do_not_fit_its_size_is_inconsistent() -> None:
    assert is_consistent(STREAM)
    assert not is_consistent(_with(size=2561))
    assert not is_consistent(_with(digests=STREAM.digests[:-32]))
    assert not is_consistent(_with(digests=STREAM.digests[:-1] + b"x"))


def _with(**changes: Any) -> Stream:
    return msgspec.structs.replace(STREAM, **changes)


def test_a_chunk_is_right_by_length_and_digest_alone() -> None:
    assert is_right(STREAM, 3, blob(3))
    assert not is_right(STREAM, 4, blob(3)[:-1] + b"?")
    assert not is_right(STREAM, 3, blob(3)[:-1])
    assert not is_right(STREAM, 3, blob(3) + b"x")
