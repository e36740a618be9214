"""A conduit's records: what one end sealed opens at the other once, in order and unaltered, and nothing else does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import decode, encode
from protocol.conduit import BadRecord, Records, Sealer
from protocol.limits import CONDUIT_BODY, CONDUIT_TAKEN, MAX_CHUNK, MAX_TEXT
from protocol.messages import Ask, Chunk, Hold, NoChunk
from protocol.stream import Blob

KEY, OTHER = b"k" * 32, b"o" * 32
CHUNK_OF = Chunk(7, 3)
LARGEST = bytes(range(256)) * (MAX_CHUNK // 256)


def sealed_by(sealer: Sealer, frames: Sequence[Blob]) -> bytes:
    """All that is to be sent once a message was added."""
    sealer.add(frames)
    data = b""
    while part := bytes(sealer.ready()):
        data += part
        sealer.sent(len(part))
    return data


def sealed(*frames: list[Blob] | list[bytes], key: bytes = KEY) -> list[bytes]:
    """The records of these messages, of which the first is the first that was ever sealed with the key."""
    sealer = Sealer(key)
    return [sealed_by(sealer, each) for each in frames]


def opened(records: Records, data: bytes, *, at_a_time: int = CONDUIT_TAKEN) -> list[list[bytes]]:
    """The frames of what comes when these bytes do."""
    found = []
    while data:
        room = records.room()
        part = data[: min(at_a_time, len(room))]
        room[: len(part)] = part
        found += [[bytes(frame) for frame in frames] for frames in records.came(len(part))]
        data = data[len(part) :]
    return found


def chunk(index: int, blob: bytes) -> list[bytes]:
    return encode(Chunk(7, index), blob)


MESSAGES = st.one_of(
    st.builds(chunk, st.integers(0, 9), st.binary(min_size=1, max_size=300)),
    st.builds(lambda front: encode(Hold(7, front)), st.integers(0, 9)),
    st.builds(lambda indices: encode(Ask(7, tuple(indices))), st.lists(st.integers(0, 9), max_size=9)),
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(messages=st.lists(MESSAGES, max_size=8), at_a_time=st.integers(1, 400))
def test_what_is_sealed_opens_however_the_bytes_come(messages: list[list[bytes]], at_a_time: int) -> None:
    assert opened(Records(KEY), b"".join(sealed(*messages)), at_a_time=at_a_time) == messages


def came(*messages: list[bytes]) -> list[list[Blob]]:
    """The frames of these messages as a host gets them: each blob is a part of a record."""
    records = Records(KEY, CONDUIT_TAKEN)
    data = b"".join(sealed(*messages))
    records.room()[: len(data)] = data
    return list(records.came(len(data)))


def test_what_came_is_given_on_as_it_came_whatever_is_sealed_before_and_after() -> None:
    messages = [chunk(3, b"three"), encode(Ask(7, (1, 2))), chunk(4, b"4" * 5_000)]
    got = came(*messages)
    assert isinstance(got[0][2], memoryview)
    assert opened(Records(OTHER), b"".join(sealed(*got, key=OTHER))) == messages


@pytest.mark.parametrize(
    "frames",
    [
        lambda blob: encode(Chunk(7, 5), blob),
        lambda blob: encode(Chunk(7, 3, True), blob),
        lambda blob: encode(Chunk(300, 3), blob),
        lambda blob: encode(Chunk(7, 3), blob[:50]),
        lambda blob: encode(Chunk(7, 3), memoryview(bytes(blob))),
        lambda blob: encode(Chunk(7, 3), memoryview(bytearray(blob))),
        lambda blob: encode(Chunk(7, 3), bytes(blob)),
    ],
    ids=["another number", "packed", "longer head", "less of it", "a view of all", "one to write to", "no view"],
)
def test_a_part_of_a_record_under_another_head_or_of_no_record_is_sealed_with_its_own(
    frames: Callable[[Blob], list[Blob]],
) -> None:
    ((_, _, blob),) = came(chunk(3, b"what came" * 100))
    (got,) = opened(Records(OTHER), b"".join(sealed(frames(blob), key=OTHER)))
    assert got == [bytes(frame) for frame in frames(blob)]


def test_the_largest_chunk_passes_and_small_ones_after_it() -> None:
    messages = [chunk(0, b"first"), chunk(1, LARGEST), encode(Hold(7, 2)), chunk(2, b"last")]
    assert opened(Records(KEY), b"".join(sealed(*messages))) == messages


def test_the_longest_sentence_passes() -> None:
    declined = encode(NoChunk(7, 1, "\N{PILE OF POO}" * MAX_TEXT, True))
    assert len(declined[1]) < CONDUIT_BODY
    assert opened(Records(KEY), sealed(declined)[0]) == [declined]


def test_what_a_message_holds_is_not_in_clear() -> None:
    secret = b"the master's voice " * 9
    record = sealed(chunk(0, secret))[0]
    assert secret[:16] not in record
    assert chunk(0, b"")[1] not in record


def test_how_much_must_come_is_told() -> None:
    (record,) = sealed(chunk(0, bytes(5_000)))
    records = Records(KEY)
    assert opened(records, record[: records.missing]) == []
    assert records.missing == len(record) - 4
    assert opened(records, record[4:1_000]) == []
    assert records.missing == len(record) - 1_000


FIRST, SECOND, THIRD = chunk(0, b"a" * 900), chunk(1, b"b" * 900), encode(Hold(7, 2))


def _altered(record: bytes, at: int) -> bytes:
    return record[:at] + bytes((record[at] ^ 1,)) + record[at + 1 :]


@pytest.mark.parametrize("at", [3, 4, 5, 6, 40, 500, -33, -32, -1])
def test_an_altered_record_does_not_open(at: int) -> None:
    first, second = sealed(FIRST, SECOND)
    records = Records(KEY)
    assert opened(records, first) == [FIRST]
    found: list[list[bytes]] = []
    with contextlib.suppress(BadRecord):
        found = opened(records, _altered(second, at % len(second)) + second)
    assert found == []


HOSTILE = {
    "replayed": lambda a, b, c: a + a,
    "left out": lambda a, b, c: b,
    "out of order": lambda a, b, c: b + a + c,
    "one in the midst left out": lambda a, b, c: a + c,
    "cut short": lambda a, b, c: a + b[:-1] + c,
    "with a byte more": lambda a, b, c: a + b + b"\0" + c,
    "its length shortened": lambda a, b, c: a + (len(b) - 5).to_bytes(4, "big") + b[4:-1],
}


@pytest.mark.parametrize("how", HOSTILE)
def test_what_is_not_the_next_record_does_not_open(how: str) -> None:
    records, found = Records(KEY), []
    # Enough behind it that whatever length is claimed has come.
    data = HOSTILE[how](*sealed(FIRST, SECOND, THIRD)) + bytes(2_000)
    broken = False
    for at in range(0, len(data), 64):
        try:
            found += opened(records, data[at : at + 64])
        except BadRecord:
            broken = True
            break
    assert broken
    assert found in ([], [FIRST], [FIRST, SECOND])


def test_what_one_end_sent_does_not_open_as_the_others() -> None:
    with pytest.raises(BadRecord):
        opened(Records(OTHER), sealed(FIRST)[0])


@pytest.mark.parametrize("length", [0, 34, MAX_CHUNK + CONDUIT_BODY + 500, 2**32 - 1])
def test_a_record_of_an_impossible_length_is_refused_before_its_bytes_come(length: int) -> None:
    records = Records(KEY)
    with pytest.raises(BadRecord):
        opened(records, length.to_bytes(4, "big"))
    assert len(records.room()) <= CONDUIT_TAKEN


def test_a_length_alone_makes_no_larger_buffer_than_the_largest_chunk_needs() -> None:
    records = Records(KEY)
    opened(records, (MAX_CHUNK + 1_000).to_bytes(4, "big"))
    assert len(records.room()) <= MAX_CHUNK + 2_000


@settings(derandomize=True, deadline=None, max_examples=200)
@given(noise=st.binary(max_size=600))
def test_noise_opens_nothing(noise: bytes) -> None:
    found: list[list[bytes]] = []
    with contextlib.suppress(BadRecord):
        found = opened(Records(KEY), noise)
    assert found == []


@pytest.mark.parametrize(
    "frames", [[b"h" * 256, b""], [b"h", bytes(CONDUIT_BODY + 1)], [b"h", b"", bytes(MAX_CHUNK + 1)]]
)
def test_what_the_other_end_would_not_take_is_not_sealed(frames: list[bytes]) -> None:
    with pytest.raises(ValueError, match="too large"):
        Sealer(KEY).add(frames)


def test_what_has_come_is_a_message_of_the_protocol() -> None:
    ((header, body, blob),) = opened(Records(KEY), sealed(encode(CHUNK_OF, b"bytes"))[0])
    assert decode([header, body, blob]) == (CHUNK_OF, b"bytes")
