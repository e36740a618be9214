"""The part of the client socket's interface that running a command takes, and how every message of it travels.

Apart from `api`, which has all of it: ctl reads this file alone for a broadcast, and the other takes longer to
read than a command on a hundred hosts to run. Each object is MessagePack behind its length (4 bytes, big-endian).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import msgspec

from protocol.outcomes import Fold

if TYPE_CHECKING:
    from controller.api import Reply, Request

#: A request or reply is at most this long: a deployment of 10,240 VMs is about 5 MB.
MAX_LENGTH = 64 << 20
LENGTH_BYTES = 4


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


# --- requests ---------------------------------------------------------------------------------------------------------


class RunOn(_Struct, frozen=True, kw_only=True, tag="run"):
    """Run an argument vector on `hosts` (None: all). Answered by Accepted, Folded and Streamed ones, Settled.

    `batch` and `max_fail` are a number of hosts or a percentage: how many run it at a time, and how many may fail
    before no more begin. Those that then never do are told as cancelled before they began.

    From `script` on the fields are those of `protocol.commands.Run`. With `feed` the client sends InputData, as far as
    InputRoom lets it.
    """

    hosts: tuple[str, ...] | None
    argv: tuple[str, ...]
    timeout_ms: int | None = None
    output_limit: int
    stream: bool = False
    detach: bool = False
    batch: str = ""
    max_fail: str = ""
    script: bytes | None = None
    cwd: str | None = None
    env: dict[str, str] = {}
    user: str = ""
    nice: int = 0
    limits: dict[str, int] = {}
    kill_after: float | None = None
    input: bytes | None = None
    feed: bool = False


class InputData(_Struct, frozen=True, kw_only=True, tag="input"):
    """On the connection of a running command with `feed`: more of its standard input, with `last` the end of it."""

    data: bytes
    last: bool = False


class Cancel(_Struct, frozen=True, kw_only=True, tag="cancel"):
    """On the connection of a running command: stop it everywhere. Its outcomes and Settled still come."""


# --- replies ----------------------------------------------------------------------------------------------------------


class Accepted(_Struct, frozen=True, kw_only=True, tag="accepted"):
    """The command's id, and its targets: rank to name. `what` it was, in JSON, is told of one that is asked for
    again."""

    id: int
    hosts: dict[int, str]
    what: str = ""


class Folded(_Struct, frozen=True, kw_only=True, tag="folded"):
    """Outcomes that are final."""

    folds: tuple[Fold, ...]


class Late(_Struct, frozen=True, kw_only=True, tag="late"):
    """What hosts answered whose outcome is `lost`, and stays so."""

    folds: tuple[Fold, ...]


class Streamed(_Struct, frozen=True, kw_only=True, tag="streamed"):
    """A piece of a host's standard output (1) or error (2), from byte `offset` on."""

    rank: int
    stream: int
    offset: int
    data: bytes


class InputRoom(_Struct, frozen=True, kw_only=True, tag="input room"):
    """To the client of a command with `feed`: send input up to this offset from its beginning."""

    upto: int


class Settled(_Struct, frozen=True, kw_only=True, tag="settled"):
    """Every target has its outcome. Nothing comes after it."""


class OnRecord(_Struct, frozen=True, kw_only=True, tag="on record"):
    """That is all so far, and the job goes on. Nothing comes after it."""


class Failed(_Struct, frozen=True, kw_only=True, tag="failed"):
    """It was not done: one sentence. `status` is the exit code that `ctl` should end with."""

    why: str
    status: int


#: What comes of a command that was asked for with RunOn.
RunReply: TypeAlias = Accepted | Folded | Late | Streamed | InputRoom | Settled | OnRecord | Failed

# --- how they travel --------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
_reply_decoder = msgspec.msgpack.Decoder(RunReply)


class BadFrame(ValueError):
    """The other end of the client socket sent something else than this interface has."""


def pack(message: Request | Reply) -> bytearray:
    """A request or reply as it travels. Raises ValueError above MAX_LENGTH."""
    framed = bytearray(LENGTH_BYTES)
    _encoder.encode_into(message, framed, LENGTH_BYTES)
    length = len(framed) - LENGTH_BYTES
    if length > MAX_LENGTH:
        raise ValueError(f"a {type(message).__name__} of {length} bytes is above the limit of {MAX_LENGTH}")
    framed[:LENGTH_BYTES] = length.to_bytes(LENGTH_BYTES, "big")
    return framed


def length_of(prefix: bytes | bytearray | memoryview) -> int:
    """The length that follows. Raises BadFrame above MAX_LENGTH."""
    length = int.from_bytes(prefix, "big")
    if length > MAX_LENGTH:
        raise BadFrame(f"{length} bytes are above the limit of {MAX_LENGTH}")
    return length


def unpack_run_reply(body: bytes | bytearray | memoryview) -> RunReply:
    """The reply to a RunOn in `body`. Raises BadFrame."""
    try:
        reply: RunReply = _reply_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadFrame(str(error)) from error
    return reply
