"""Frames: what goes in comes out, and whatever else comes is a MalformedMessage and nothing worse."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import messages
from protocol.codec import MalformedMessage, decode, encode
from protocol.commands import Stream
from protocol.limits import (
    ASK_WINDOW,
    CONDUIT_TICKET,
    MAX_BITMAP,
    MAX_BODY,
    MAX_CHUNK,
    MAX_CHUNKS,
    MAX_HEADER,
    MAX_OUTPUT,
    MAX_PAYLOAD,
    MAX_RANK,
    MAX_TEXT,
    STREAM_PIECE,
    VERSION_MAX,
)
from protocol.messages import (
    KINDS,
    TYPES,
    Ask,
    Attach,
    Attached,
    Beat,
    Carry,
    Chunk,
    ClockAsk,
    ClockTell,
    Conduit,
    ConduitWanted,
    Credit,
    Deliver,
    Gone,
    Grant,
    Have,
    Heard,
    Hold,
    HostHealth,
    Kind,
    LeadsTo,
    Link,
    Links,
    Manner,
    Message,
    NoChunk,
    Open,
    Outcomes,
    Progress,
    Rejected,
    Report,
    Reports,
    Room,
    Shut,
    Streamed,
    Taken,
)
from protocol.outcomes import Cancelled, Exited, FailedToStart, Fold, Killed, Lost, Output, Refused, TimedOut
from protocol.vms import VmPower, VmState

_LINK = Link(3, None, 1, 2, True, "why not")
_HEALTH = HostHealth(
    load1=0.5,
    load5=0.25,
    cpus=8,
    memory_mib=1,
    memory_free_mib=1,
    disk_mib=1,
    disk_free_mib=1,
    agent_rss_mib=30.5,
    uptime_s=9,
    version="1",
)
_FOLDS = tuple(
    Fold(b"\x01", outcome, Output(out=b"o", err=b"e", out_total=1, err_total=1, spool="/s"))
    for outcome in (
        Exited(3),
        Killed(9),
        TimedOut(),
        Cancelled(ran=True),
        Refused("r", trust=True),
        FailedToStart("f"),
        Lost("l"),
    )
)
#: One of each kind, with every field in use.
EACH: list[tuple[Message, bytes | None]] = [
    (Attach(1, 1, (_LINK,)), None),
    (Attached(1, 7), None),
    (Rejected("no"), None),
    (Beat(), None),
    (Links((_LINK, _LINK)), None),
    (Deliver(5, b"\x01", 1_000, Manner.BULK, b"payload", b"s" * 64), None),
    (Deliver(5, b"\x01", None, Manner.QUIET, b"payload", b"s" * 64), None),
    (Outcomes(5, _FOLDS), None),
    (Streamed(5, 1, 2, 10, b"text", 0, False), None),
    (Reports((Report(1, _HEALTH, (VmState(name="v", deployment="d", power=VmPower.RUNNING),), True),)), None),
    (ClockAsk(1, b"n" * 16), None),
    (ClockTell(1, b"n" * 16, 1_700_000_000_000, b"s" * 64), None),
    (Progress(5, ((1, 100), (2, 200))), None),
    (Ask(5, (0, 1)), None),
    (Ask(5, ()), None),
    (Chunk(5, 0), b"blob"),
    (Chunk(5, 0, True), b"packed"),
    (Hold(5, 3), None),
    (Have(5, Stream(size=3, chunk=1, digests=b"d" * 96, digest="0" * 64), b"l"), None),
    (NoChunk(5, 0, "why", True), None),
    (Credit(5, (Grant(1, 100, 10, 20), Grant(2, None, 0, 0))), None),
    (Taken(5, 1, 100, True, False), None),
    (Open(5, 0, LeadsTo.SEED), None),
    (Carry(5, 63), b"bytes"),
    (Room(5, 0, 100), None),
    (Shut(5, 0, True), None),
    (Gone(5), None),
    (ConduitWanted(), None),
    (Conduit(4711, bytes(CONDUIT_TICKET), bytes(32), b"k" * 32), None),
    (Heard(2**40), None),
]


def _frames(kind: int, body: object, version: int = VERSION_MAX) -> list[bytes]:
    """Frames as another implementation would pack them."""
    return [msgpack.packb([version, kind]), msgpack.packb(body)]


def _plain(message: Message) -> Any:
    return msgspec.to_builtins(message, builtin_types=(bytes,))


@pytest.mark.parametrize(("message", "blob"), EACH, ids=lambda value: type(value).__name__)
def test_each_kind_comes_out_as_it_went_in(message: Message, blob: bytes | None) -> None:
    assert decode(encode(message, blob)) == (message, blob)


def test_each_kind_is_tried_above() -> None:
    assert {type(message) for message, _ in EACH} == set(KINDS)
    assert len(TYPES) == len(KINDS) == len(Kind)


@pytest.mark.parametrize(("message", "blob"), EACH, ids=lambda value: type(value).__name__)
def test_another_messagepack_library_reads_and_writes_the_same_frames(message: Message, blob: bytes | None) -> None:
    frames = encode(message, blob)
    assert msgpack.unpackb(frames[0]) == [VERSION_MAX, int(KINDS[type(message)])]
    body = msgpack.unpackb(frames[1], use_list=False)
    theirs = [msgpack.packb([VERSION_MAX, int(KINDS[type(message)])]), msgpack.packb(body), *frames[2:]]
    assert decode(theirs) == (message, blob)


def test_each_kind_goes_one_way_or_both_and_none_goes_nowhere() -> None:
    control = messages.UPWARDS | messages.DOWNWARDS
    bulk = messages.BULK_UPWARDS | messages.BULK_DOWNWARDS
    pull = messages.PULL_UPWARDS | messages.PULL_DOWNWARDS
    move = messages.MOVE_UPWARDS | messages.MOVE_DOWNWARDS
    assert control | bulk | pull | move == set(KINDS)
    assert not control & (bulk | pull | move)
    assert not move & (bulk | pull)
    assert {Beat} == messages.UPWARDS & messages.DOWNWARDS
    assert not messages.BULK_UPWARDS & messages.BULK_DOWNWARDS


@pytest.mark.parametrize("count", [0, 1, 4, 100])
def test_a_wrong_number_of_frames_is_refused(count: int) -> None:
    with pytest.raises(MalformedMessage, match="frames"):
        decode((encode(Beat()) * 50)[:count])


def test_a_blob_goes_with_a_chunk_and_with_nothing_else() -> None:
    with pytest.raises(MalformedMessage, match="blob"):
        decode([*encode(Beat()), b"blob"])
    with pytest.raises(MalformedMessage, match="blob"):
        decode(encode(Chunk(1, 0), b"blob")[:2])
    with pytest.raises(ValueError, match="blob"):
        encode(Beat(), b"blob")
    with pytest.raises(ValueError, match="blob"):
        encode(Chunk(1, 0))


def test_sizes_are_looked_at_before_anything_is_decoded() -> None:
    header, body = encode(Beat())
    with pytest.raises(MalformedMessage, match="header of"):
        decode([b"\xc1" * (MAX_HEADER + 1), body])
    with pytest.raises(MalformedMessage, match="body of"):
        decode([header, b"\xc1" * (MAX_BODY + 1)])
    chunk = encode(Chunk(1, 0), b"")
    with pytest.raises(MalformedMessage, match="chunk of"):
        decode([*chunk[:2], b"x" * (MAX_CHUNK + 1)])


def test_what_a_receiver_would_refuse_for_its_size_is_not_sent() -> None:
    fold = Fold(b"\x01", Exited(0), Output(out=b"x" * MAX_OUTPUT))
    with pytest.raises(ValueError, match="above the limit"):
        encode(Outcomes(1, (fold,) * 5))


@pytest.mark.parametrize("kind", [0, 28, 99, -1, 2**40])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    with pytest.raises(MalformedMessage, match="no kind"):
        decode(_frames(kind, []))


@pytest.mark.parametrize("version", [0, VERSION_MAX + 1])
def test_another_version_is_refused_but_for_the_messages_that_agree_on_one(version: int) -> None:
    with pytest.raises(MalformedMessage, match="protocol version"):
        decode(_frames(Kind.BEAT, [], version))
    for message in (Attach(version, version, (_LINK,)), Attached(1, 1), Rejected("no")):
        frames = _frames(KINDS[type(message)], _plain(message), version)
        assert decode(frames) == (message, None)


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (Rejected("x" * (MAX_TEXT + 1)), "a long sentence"),
        (Links(()), "no links"),
        (Links((Link(MAX_RANK + 1, None, 1, 1, True),)), "a high rank"),
        (Links((Link(-1, None, 1, 1, True),)), "a negative rank"),
        (ClockAsk(1, b"n" * 15), "a short nonce"),
        (ClockTell(1, b"n" * 16, 1, b"s" * 65), "a long signature"),
        (Deliver(1, b"x" * (MAX_BITMAP + 1), None, Manner.WORK, b"", b"s" * 64), "a large set"),
        (Deliver(1, b"x", None, Manner.WORK, b"x" * (MAX_PAYLOAD + 1), b"s" * 64), "a large payload"),
        (Deliver(1, b"x", -1, Manner.WORK, b"", b"s" * 64), "a negative time"),
        (Outcomes(1, ()), "no folds"),
        (Outcomes(1, (Fold(b"x" * (MAX_BITMAP + 1), Exited(0)),)), "a large set of ranks"),
        (Outcomes(1, (Fold(b"x", Exited(256)),)), "no exit code"),
        (Outcomes(1, (Fold(b"x", Killed(0)),)), "no signal"),
        (Outcomes(1, (Fold(b"x", Lost("x" * (MAX_TEXT + 1))),)), "a long reason"),
        (Outcomes(1, (Fold(b"x", Exited(0), Output(out=b"x" * (MAX_OUTPUT + 1))),)), "a long output"),
        (Streamed(1, 1, 3, 0, b"", 0, False), "a third stream"),
        (Streamed(1, 1, 1, 0, b"x" * (STREAM_PIECE + 1), 0, False), "a long piece"),
        (Credit(1, ()), "no grants"),
        (Credit(1, (Grant(1, -1, 0, 0),)), "a negative limit"),
        (Taken(1, 1, -1, True, True), "a negative count"),
        (Ask(1, tuple(range(ASK_WINDOW + 1))), "more than the window"),
        (Hold(1, MAX_CHUNKS + 1), "more chunks than there can be"),
        (Ask(1, (-1,)), "a negative index"),
        (Reports(()), "no reports"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_field_has_its_bounds(message: Message, what: str) -> None:
    with pytest.raises(MalformedMessage):
        decode(encode(message))
    assert what


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"versions": [1, 1]},
        None,
        1,
        "x",
        [1],
        [1, 1],
        [1, 1, [[3, None, 1, 2, True, "why", "more"]]],
        [1, 1, [], 4],
        [1, 1, [["3", None, 1, 2, True]]],
        [1, 1, [[3, None, 1.5, 2, True]]],
    ],
)
def test_a_body_of_another_shape_is_refused(body: object) -> None:
    with pytest.raises(MalformedMessage):
        decode(_frames(Kind.ATTACH, body))


def test_an_unknown_manner_is_refused() -> None:
    with pytest.raises(MalformedMessage):
        decode(_frames(Kind.DELIVER, [1, b"", None, 4, b"", b"s" * 64]))


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("opening", [b"\x91", b"\x81", b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\x81\xa1x"])
def test_deep_nesting_and_false_lengths_are_malformed_and_no_crash(kind: Kind, opening: bytes) -> None:
    header = msgpack.packb([VERSION_MAX, int(kind)])
    blob = [b""] if kind in (Kind.CHUNK, Kind.CARRY) else []
    with pytest.raises(MalformedMessage):
        decode([header, opening * 100_000, *blob])
    with pytest.raises(MalformedMessage):
        decode([opening * 1_000, header, *blob])


def test_a_text_that_is_no_utf8_is_malformed() -> None:
    with pytest.raises(MalformedMessage):
        decode([msgpack.packb([VERSION_MAX, 3]), b"\x91\xa2\xff\xfe"])


def test_trailing_bytes_are_malformed() -> None:
    header, body = encode(Attached(1, 1))
    with pytest.raises(MalformedMessage):
        decode([header, body + b"\0"])
    with pytest.raises(MalformedMessage):
        decode([header + b"\0", body])


@given(st.lists(st.binary(max_size=200), max_size=5))
@example([b"\x92\x01\x04", b"\x90"])
def test_garbage_is_malformed_or_a_message_and_never_anything_else(frames: list[bytes]) -> None:
    try:
        message, _ = decode(frames)
    except MalformedMessage:
        return
    assert type(message) in KINDS


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=70),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(st.sampled_from(list(Kind)), st.lists(_values, max_size=7), st.booleans())
@settings(max_examples=500)
def test_well_packed_nonsense_is_malformed_or_a_message(kind: Kind, body: list[object], with_blob: bool) -> None:
    try:
        message, _ = decode([*_frames(kind, body), *([b"blob"] if with_blob else [])])
    except MalformedMessage:
        return
    assert KINDS[type(message)] is kind


@given(st.sampled_from(EACH), st.data())
@settings(max_examples=500)
def test_an_altered_byte_is_malformed_or_another_message(
    one: tuple[Message, bytes | None], data: st.DataObject
) -> None:
    frames = encode(*one)
    index = data.draw(st.integers(0, 1))
    at = data.draw(st.integers(0, len(frames[index]) - 1))
    frames[index] = frames[index][:at] + bytes([data.draw(st.integers(0, 255))]) + frames[index][at + 1 :]
    with contextlib.suppress(MalformedMessage):
        decode(frames)


@given(st.sampled_from(EACH), st.data())
def test_a_truncated_body_is_malformed(one: tuple[Message, bytes | None], data: st.DataObject) -> None:
    header, body, *blob = encode(*one)
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(MalformedMessage):
        decode([header, body[:cut], *blob])
