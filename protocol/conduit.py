"""Conduits: messages between two hosts of a push, sealed one after the other on a plain TCP connection. Pure.

Where links are fast, a push of gigabytes is limited by the processor. CURVE's XSalsa20-Poly1305 costs 1.3 CPU seconds a
GB and hop, and libzmq's thread as much again for copies and wake-ups. So two hosts that have met on a CURVE link agree
there on keys and a ticket (`messages.Conduit`), and the chunks go by a connection of their own, sealed with AEGIS-256
(draft-irtf-cfrg-aegis-aead; libsodium's, through PyNaCl): 0.33 CPU seconds a GB and hop where the processor has AES.

A record is its length in clear, then, sealed with that as associated data, a message: two lengths, header, body, and
the blob where there is one. Each direction has a key of its own, used for this connection alone; the nonce counts the
records. So what is altered, repeated, left out, turned round or sent in another order does not open.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence

from protocol.aegis import NONCE, TAG, open_, seal
from protocol.limits import CONDUIT_BODY, CONDUIT_TAKEN, MAX_CHUNK
from protocol.stream import Blob

#: Of the sealed part; of the header and of the body in it.
_LENGTH, _LENGTHS = struct.Struct(">I"), struct.Struct(">BH")
#: What a record has more than the message in it.
_ADDED = _LENGTH.size + TAG
#: The longest record's sealed part.
_MOST = _LENGTHS.size + 255 + CONDUIT_BODY + MAX_CHUNK + TAG
#: What is sealed and sent at a time, in bytes: two chunks, one system call, and all of it in the processor's cache.
_SEALED = 196 << 10
#: What there is room for at first, in bytes: it grows where more comes at a time.
_FIRST_ROOM = 128 << 10


class BadRecord(ValueError):
    """What came on a conduit was not sealed by the other end, or not as the next: the conduit is of no use any more."""


class Sealer:
    """What one end sends: messages, to bytes as there is room for them."""

    def __init__(self, key: bytes) -> None:
        """`key` has 32 random bytes and seals for nobody else."""
        self._key = key
        self._count = 0
        #: Messages that are not sealed yet, so that little is held twice: how long each is, what comes before the blob,
        #: and the blob.
        self._waiting: deque[tuple[int, bytes, Blob]] = deque()
        self._plain = self._sealed = memoryview(b"")
        self._room = self._begin = self._end = 0

    def add(self, frames: Sequence[Blob]) -> None:
        """Send a message: `frames` are its header, its body, and its blob where it has one.

        Raises ValueError where the other end would not take it: that is our mistake.
        """
        header, body = frames[:2]
        blob = frames[2] if len(frames) > 2 else b""
        headers, bodies, blobs = len(header), len(body), len(blob)
        if headers > 255 or bodies > CONDUIT_BODY or blobs > MAX_CHUNK:
            raise ValueError("a message is too large for a conduit")
        head = b"".join((_LENGTHS.pack(headers, bodies), header, body))
        self._waiting.append((_LENGTHS.size + headers + bodies + blobs, head, blob))

    def ready(self) -> memoryview:
        """The bytes that are to be sent next, none where there are none; good until `ready` or `sent` is called."""
        if self._begin == self._end:
            self._begin = self._end = 0
            waiting = self._waiting
            if waiting and _ADDED + waiting[0][0] > self._room:
                # For all that waits, within bounds: whoever only asks needs little.
                all_ = sum(_ADDED + size for size, _, _ in waiting)
                self._room = max(_ADDED + waiting[0][0], min(all_, _SEALED))
                self._sealed = memoryview(bytearray(self._room))
            while waiting and self._end + _ADDED + waiting[0][0] <= self._room:
                self._seal(*waiting.popleft())
        return self._sealed[self._begin : self._end]

    def sent(self, count: int) -> None:
        """So many of them were."""
        self._begin += count

    def _seal(self, size: int, head: bytes, blob: Blob) -> None:
        plain = _as_it_came(size, head, blob)
        if plain is None:
            if size > len(self._plain):
                self._plain = memoryview(bytearray(size))
            plain, split = self._plain[:size], len(head)
            plain[:split], plain[split:] = head, blob
        self._count += 1
        length = _LENGTH.pack(size + TAG)
        first = self._end + _LENGTH.size
        self._sealed[self._end : first] = length
        seal(plain, length, self._count.to_bytes(NONCE, "little"), self._key, self._sealed[first:])
        self._end = first + size + TAG


def _as_it_came(size: int, head: bytes, blob: Blob) -> memoryview | None:
    """The message in one piece, where the blob is the end of a record's plain text that began with the same `head`: a
    chunk that is given on as it came. It need not be put together again, which would be a copy of it.

    A blob that is a view is all of what it shows, or the end of it: `Records` makes no others."""
    if not isinstance(blob, memoryview):
        return None
    whole = memoryview(blob.obj)
    return whole if whole.nbytes == size and whole[: len(head)] == head else None


class Records:
    """What the other end has sent: bytes as they come, to messages."""

    def __init__(self, key: bytes, taken: int = CONDUIT_TAKEN) -> None:
        """So many bytes are `taken` at a time, at most; more where one record has more."""
        self._key = key
        self._count = 0
        self._taken = taken
        self._buffer = bytearray(min(taken, _FIRST_ROOM))
        self._filled = 0
        #: How many bytes must come before there is more to open, and how many there is room for.
        self.missing, self.free = _LENGTH.size, len(self._buffer)

    def room(self) -> memoryview:
        """Where the bytes that come next belong: never empty."""
        return memoryview(self._buffer)[self._filled :]

    def came(self, count: int) -> Iterator[list[Blob]]:
        """So many bytes were put into `room`: the frames of each message that is whole, the blob as a part of what was
        opened. Raises BadRecord."""
        self._filled = filled = self._filled + count
        room = len(self._buffer)
        if filled == room:
            room = min(2 * room, max(room, self._taken))  # more came than there was room for
        begin, size = 0, _LENGTH.size
        with memoryview(self._buffer) as view:
            while begin + _LENGTH.size <= filled:
                (length,) = _LENGTH.unpack_from(view, begin)
                if not _LENGTHS.size + TAG <= length <= _MOST:
                    raise BadRecord(f"a record of {length} bytes is none of a conduit")
                size = _LENGTH.size + length
                if begin + size > filled:
                    break
                yield self._open(view, begin, begin + size)
                begin, size = begin + size, _LENGTH.size
        left = filled - begin
        self.missing = size - left
        room = max(room, size)
        if begin or room > len(self._buffer):
            rest = self._buffer[begin : self._filled]
            if room > len(self._buffer):
                self._buffer = bytearray(room)
            self._buffer[:left] = rest
            self._filled = left
        self.free = len(self._buffer) - self._filled

    def _open(self, view: memoryview, begin: int, end: int) -> list[Blob]:
        first = begin + _LENGTH.size
        self._count += 1
        nonce = self._count.to_bytes(NONCE, "little")
        plain = open_(view[first:end], bytes(view[begin:first]), nonce, self._key)
        if plain is None:
            raise BadRecord("a record does not open: it was altered, or is not the next")
        header, body = _LENGTHS.unpack_from(plain)
        first = _LENGTHS.size + header
        last = first + body
        frames: list[Blob] = [bytes(plain[_LENGTHS.size : first]), bytes(plain[first:last])]
        if end - begin - _ADDED > last:
            frames.append(plain[last:])
        return frames
