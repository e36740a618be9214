"""Chunks in one message: what is joined, and what a receiver makes of a run that is not what it says."""

from __future__ import annotations

import pytest

from protocol.commands import Stream
from protocol.limits import RUN
from protocol.runs import in_runs, parts, run_most
from protocol.stream import stream_of
from protocol.transfer import Role, Transfers
from protocol.transfer_effects import Effect, Give, GiveRun, Store
from tests.sim.chain import pushed

ID, CHUNK = 7, 1 << 16
DATA = bytes(range(256)) * (10 * CHUNK // 256) + b"end"
MOST = RUN // CHUNK


def give(index: int, peer: int = 1, packed: bool = False) -> Give:
    return Give(peer, ID, index, b"%d" % index, packed)


def run(index: int, count: int, peer: int = 1) -> GiveRun:
    return GiveRun(peer, ID, index, tuple(b"%d" % (index + i) for i in range(count)))


def stream() -> Stream:
    return stream_of(lambda index: DATA[index * CHUNK :][:CHUNK], len(DATA), chunk=CHUNK)


@pytest.mark.parametrize(
    ("effects", "joined"),
    [
        ([give(0), give(1)], [run(0, 2)]),
        ([give(i) for i in range(5)], [run(0, 4), give(4)]),
        ([give(0), give(2)], [give(0), give(2)]),
        ([give(1), give(0)], [give(1), give(0)]),
        ([give(0), Store(ID, 0, b""), give(1)], [run(0, 2), Store(ID, 0, b"")]),
        ([give(0), give(0, 2), give(1), give(1, 2)], [run(0, 2), run(0, 2, 2)]),
        ([give(0), give(1, packed=True), give(2)], [give(0), give(1, packed=True), give(2)]),
    ],
)
def test_what_follows_each_other_goes_to_a_host_in_one_message(effects: list[Effect], joined: list[Effect]) -> None:
    assert in_runs(effects, 4) == joined


def test_a_run_of_large_chunks_is_one_chunk() -> None:
    assert run_most(stream_of(lambda _: bytes(1 << 20), 1 << 20, chunk=1 << 20)) == 1


def test_a_run_is_cut_into_its_chunks_the_last_of_which_may_be_short() -> None:
    assert [(i, bytes(part)) for i, part in parts(stream(), 8, 3, DATA[8 * CHUNK :])] == [
        (8, DATA[8 * CHUNK : 9 * CHUNK]),
        (9, DATA[9 * CHUNK : 10 * CHUNK]),
        (10, b"end"),
    ]


@pytest.mark.parametrize(
    ("index", "count", "length"),
    [
        (0, 2, 2 * CHUNK - 1),
        (0, 2, 2 * CHUNK + 1),
        (0, 2, 0),
        (0, MOST + 1, (MOST + 1) * CHUNK),
        (10, 2, CHUNK + 3),
        (8, 3, 3 * CHUNK),
    ],
)
def test_a_run_that_is_not_what_it_says_has_no_chunks_and_counts_as_a_wrong_one(
    index: int, count: int, length: int
) -> None:
    blob = DATA[index * CHUNK :][:length].ljust(length, b"x")
    assert parts(stream(), index, count, blob) == []
    transfers = Transfers(1)
    push = pushed(DATA, CHUNK, 3)
    transfers.begin(ID, push, Role.TARGET, 0, 0.0)
    assert not [e for e in transfers.arrived(0, ID, index, blob, 0.0, count=count) if isinstance(e, Store)]


def test_of_a_run_only_what_was_asked_for_is_looked_at() -> None:
    transfers = Transfers(1)
    transfers.begin(ID, pushed(DATA, CHUNK, 3), Role.TARGET, 0b0110, 0.0)
    effects = transfers.arrived(0, ID, 0, DATA[: 4 * CHUNK], 0.0, count=4)
    assert [e.index for e in effects if isinstance(e, Store)] == [0, 3]
    assert transfers.arrived(0, ID, 0, DATA[: 4 * CHUNK], 0.0, count=4) == []


def test_who_is_not_pressed_gives_a_run_on_chunk_by_chunk() -> None:
    for pressed, kinds in ((False, [Give] * 4), (True, [GiveRun])):
        transfers = Transfers(1)
        transfers.pressed = pressed
        transfers.begin(ID, pushed(DATA, CHUNK, 3), Role.TARGET, 0, 0.0)
        transfers.asked(2, ID, (0, 1, 2, 3), 0.0)
        effects = transfers.arrived(0, ID, 0, DATA[: 4 * CHUNK], 0.0, count=4)
        assert [type(e) for e in effects if isinstance(e, Give | GiveRun)] == kinds
