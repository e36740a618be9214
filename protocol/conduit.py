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
from collections.abc import Iterator, Sequence

from nacl.bindings import (
    crypto_aead_aegis256_ABYTES as TAG,
)
from nacl.bindings import (
    crypto_aead_aegis256_decrypt as _open,
)
from nacl.bindings import (
    crypto_aead_aegis256_encrypt as _seal,
)
from nacl.bindings import (
    crypto_aead_aegis256_NPUBBYTES as _NONCE,
)
from nacl.exceptions import CryptoError

from protocol.limits import CONDUIT_BODY, CONDUIT_TAKEN, MAX_CHUNK
from protocol.stream import Blob

#: Of the sealed part; of the header and of the body in it.
_LENGTH, _LENGTHS = struct.Struct(">I"), struct.Struct(">BH")
#: The longest record's sealed part.
_MOST = _LENGTHS.size + 255 + CONDUIT_BODY + MAX_CHUNK + TAG


class BadRecord(ValueError):
    """What came on a conduit was not sealed by the other end, or not as the next: the conduit is of no use any more."""


class Sealer:
    """What one end sends."""

    def __init__(self, key: bytes) -> None:
        """`key` has 32 random bytes and seals for nobody else."""
        self._key = key
        self._count = 0

    def seal(self, frames: Sequence[Blob]) -> tuple[bytes, bytes]:
        """The next record, in two parts. `frames` are a message's header, its body, and its blob where it has one.

        Raises ValueError where the other end would not take it: that is our mistake.
        """
        header, body = frames[:2]
        if len(header) > 255 or len(body) > CONDUIT_BODY or sum(map(len, frames[2:])) > MAX_CHUNK:
            raise ValueError("a message is too large for a conduit")
        plain = b"".join((_LENGTHS.pack(len(header), len(body)), *frames))
        length = _LENGTH.pack(len(plain) + TAG)
        self._count += 1
        return length, _seal(plain, length, self._count.to_bytes(_NONCE, "little"), self._key)


class Records:
    """What the other end has sent: bytes as they come, to messages."""

    def __init__(self, key: bytes, taken: int = CONDUIT_TAKEN) -> None:
        """So many bytes are `taken` at a time, at most; more where one record has more."""
        self._key = key
        self._count = 0
        self._buffer = bytearray(taken)
        self._filled = 0
        #: How many bytes must come before there is more to open.
        self.missing = _LENGTH.size

    def room(self) -> memoryview:
        """Where the bytes that come next belong: never empty."""
        return memoryview(self._buffer)[self._filled :]

    def came(self, count: int) -> Iterator[list[Blob]]:
        """So many bytes were put into `room`: the frames of each message that is whole, the blob as a part of what was
        opened. Raises BadRecord."""
        self._filled += count
        begin = 0
        while True:
            size = self._size(begin)
            if begin + size > self._filled:
                break
            yield self._open(begin, begin + size)
            begin += size
        left = self._filled - begin
        self.missing = size - left
        if begin or size > len(self._buffer):
            rest = self._buffer[begin : self._filled]
            if size > len(self._buffer):
                self._buffer = bytearray(size)
            self._buffer[:left] = rest
            self._filled = left

    def _size(self, begin: int) -> int:
        """How long the record is that begins here; of its length alone where that is not there yet."""
        if self._filled - begin < _LENGTH.size:
            return _LENGTH.size
        (length,) = _LENGTH.unpack_from(self._buffer, begin)
        if not _LENGTHS.size + TAG <= length <= _MOST:
            raise BadRecord(f"a record of {length} bytes is none of a conduit")
        return _LENGTH.size + int(length)

    def _open(self, begin: int, end: int) -> list[Blob]:
        at = begin + _LENGTH.size
        self._count += 1
        nonce = self._count.to_bytes(_NONCE, "little")
        with memoryview(self._buffer) as view:
            sealed, length = bytes(view[at:end]), bytes(view[begin:at])
        try:
            plain = _open(sealed, length, nonce, self._key)
        except CryptoError:
            raise BadRecord("a record does not open: it was altered, or is not the next") from None
        header, body = _LENGTHS.unpack_from(plain)
        first = _LENGTHS.size + header
        frames: list[Blob] = [plain[_LENGTHS.size : first], plain[first : first + body]]
        if len(plain) > first + body:
            frames.append(memoryview(plain)[first + body :])
        return frames
