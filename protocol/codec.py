"""Messages to frames and back, with every limit checked before anything is decoded.

Frames: a header `[version, kind]`, the body, and for chunks a blob. All but the blob are MessagePack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar, overload

import msgspec

from protocol.limits import MAX_BODY, MAX_CHUNK, MAX_HEADER, MAX_PARTS, VERSION_MAX, VERSION_MIN
from protocol.messages import KINDS, TYPES, Kind, Message
from protocol.stream import Blob


class MalformedMessage(ValueError):
    """The peer sent something that is no message of this protocol; the text says what is wrong with it."""


_Frame = TypeVar("_Frame", bytes, Blob)


class _Header(msgspec.Struct, frozen=True, array_like=True):
    version: int
    kind: int


#: How two ends find out which versions they share: these keep their form in every version, and none is asked of them.
_TIMELESS = frozenset({Kind.ATTACH, Kind.ATTACHED, Kind.REJECTED})

_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(_Header)
_decoders = {kind: msgspec.msgpack.Decoder(type_) for kind, type_ in TYPES.items()}
_headers = {
    (version, kind): _encoder.encode(_Header(version, int(kind)))
    for version in range(VERSION_MIN, VERSION_MAX + 1)
    for kind in Kind
}
#: The kinds that have a blob.
_WITH_BLOB = frozenset({Kind.CHUNK, Kind.CARRY})
#: What a header is worth: the decoder of the body, and how many frames there are. One as this side writes it needs no
#: decoding.
_Meaning: TypeAlias = "tuple[msgspec.msgpack.Decoder[Message], int]"
_meanings: dict[int, _Meaning] = {
    kind: (decoder, MAX_PARTS if kind in _WITH_BLOB else MAX_PARTS - 1) for kind, decoder in _decoders.items()
}
_known = {header: _meanings[kind] for (_, kind), header in _headers.items()}


@overload
def encode(message: Message, blob: bytes | None = None, *, version: int = VERSION_MAX) -> list[bytes]: ...
@overload
def encode(message: Message, blob: Blob, *, version: int = VERSION_MAX) -> list[Blob]: ...
def encode(message: Message, blob: Blob | None = None, *, version: int = VERSION_MAX) -> list[bytes] | list[Blob]:
    """The frames of a message, in the version that its link agreed on. Only Chunk and Carry have a blob, and must.

    Raises ValueError where the message is larger than a receiver would take: that is our mistake, never the peer's.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_BODY:
        raise ValueError(f"a {type(message).__name__} of {len(body)} bytes is above the limit of {MAX_BODY}")
    kind = KINDS[type(message)]
    if (kind in _WITH_BLOB) != (blob is not None):
        raise ValueError("a blob goes with a Chunk or a Carry, and with nothing else")
    header = _headers[version, kind]
    return [header, body] if blob is None else [header, body, blob]


def _meaning(frame: Blob) -> _Meaning:
    """What a header says that is written in another way. Raises MalformedMessage, msgspec.DecodeError."""
    if len(frame) > MAX_HEADER:
        raise MalformedMessage(f"a header of {len(frame)} bytes is above the limit of {MAX_HEADER}")
    header = _header_decoder.decode(frame)
    if header.kind not in _TIMELESS and not VERSION_MIN <= header.version <= VERSION_MAX:
        raise MalformedMessage(f"protocol version {header.version} is not one of {VERSION_MIN} to {VERSION_MAX}")
    meaning = _meanings.get(header.kind)
    if meaning is None:
        raise MalformedMessage(f"no kind of message has the number {header.kind}")
    return meaning


def decode(frames: Sequence[_Frame]) -> tuple[Message, _Frame | None]:
    """The message of these frames, and the blob of a Chunk or a Carry. Raises MalformedMessage."""
    count = len(frames)
    if not 2 <= count <= MAX_PARTS:
        raise MalformedMessage(f"a message has 2 or {MAX_PARTS} frames, not {count}")
    body = frames[1]
    if len(body) > MAX_BODY:
        raise MalformedMessage(f"a body of {len(body)} bytes is above the limit of {MAX_BODY}")
    try:
        # bytes: a control message's frames may be views, which have no hash where they can be written to
        decoder, expected = _known.get(bytes(frames[0])) or _meaning(frames[0])
        message: Message = decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(str(error)) from error
    if count != expected:
        raise MalformedMessage("a blob goes with a Chunk or a Carry, and with nothing else")
    if count < MAX_PARTS:
        return message, None
    if len(frames[2]) > MAX_CHUNK:
        raise MalformedMessage(f"a chunk of {len(frames[2])} bytes is above the limit of {MAX_CHUNK}")
    return message, frames[2]
