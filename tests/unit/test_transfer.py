"""Chunks from parent to child: who asks, who gives, and what happens to a chunk that is not what it should be."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.commands import Stream
from protocol.limits import ASK_WINDOW, CHUNK, CHUNK_CACHE, MAX_CHUNK, MAX_CHUNKS
from protocol.stream import chunk_count, chunk_for, is_consistent, is_right, stream_of
from protocol.transfer import (
    ASK_AGAIN,
    BAD_MOST,
    Abuse,
    AskUp,
    Broken,
    Complete,
    Decline,
    Effect,
    Give,
    Headed,
    Read,
    Role,
    Store,
    Transfers,
)

ID = 7


def push_of(data: bytes, chunk: int) -> Stream:
    return stream_of(lambda index: data[index * chunk : (index + 1) * chunk], len(data), chunk=chunk)


DATA = bytes(range(256)) * 10  # 2,560 bytes: ten chunks of 256
PUSH = push_of(DATA, 256)


def blob(index: int) -> bytes:
    return DATA[index * 256 : (index + 1) * 256]


def target() -> tuple[Transfers, list[Effect]]:
    transfers = Transfers()
    return transfers, transfers.begin(ID, PUSH, Role.TARGET)


# --- the manifest ---------------------------------------------------------------------------------------------


def test_the_chunk_size_is_a_function_of_the_size_and_keeps_the_manifest_within_its_limit() -> None:
    assert chunk_for(0) == chunk_for(CHUNK * MAX_CHUNKS) == CHUNK
    assert chunk_for(CHUNK * MAX_CHUNKS + 1) == 2 * CHUNK
    assert chunk_count(MAX_CHUNK * MAX_CHUNKS, chunk_for(MAX_CHUNK * MAX_CHUNKS)) == MAX_CHUNKS
    with pytest.raises(ValueError, match="above the limit"):
        chunk_for(MAX_CHUNK * MAX_CHUNKS + 1)


def test_a_manifest_whose_digests_do_not_fit_its_size_is_inconsistent() -> None:
    assert is_consistent(PUSH)
    assert not is_consistent(_with(size=2561))
    assert not is_consistent(_with(digests=PUSH.digests[:-32]))
    assert not is_consistent(_with(digests=PUSH.digests[:-1] + b"x"))


def _with(**changes: Any) -> Stream:
    return msgspec.structs.replace(PUSH, **changes)


def test_a_chunk_is_right_by_length_and_digest_alone() -> None:
    assert is_right(PUSH, 3, blob(3))
    assert not is_right(PUSH, 4, blob(3)[:-1] + b"?")
    assert not is_right(PUSH, 3, blob(3)[:-1])
    assert not is_right(PUSH, 3, blob(3) + b"x")


# --- a target ---------------------------------------------------------------------------------------------------


def test_a_target_asks_for_no_more_than_its_credit() -> None:
    _, effects = target()
    assert effects == [AskUp(ID, tuple(range(ASK_WINDOW)))]


def test_each_chunk_that_arrives_is_stored_and_makes_room_for_the_next_ask() -> None:
    transfers, _ = target()
    assert transfers.arrived(ID, 0, blob(0), 0.0) == [Store(ID, 0, blob(0)), AskUp(ID, (ASK_WINDOW,))]


def test_a_file_is_complete_when_the_last_chunk_is_stored_and_not_before() -> None:
    transfers, effects = target()
    asked = deque(index for effect in effects if isinstance(effect, AskUp) for index in effect.indices)
    done: list[Effect] = []
    for _ in range(10):
        index = asked.popleft()
        new = transfers.arrived(ID, index, blob(index), 0.0)
        asked.extend(i for effect in new if isinstance(effect, AskUp) for i in effect.indices)
        assert not any(isinstance(effect, Complete) for effect in new)
        done = transfers.was_stored(ID, index)
    assert done == [Complete(ID)]
    assert transfers.stored_bytes(ID) == len(DATA)


def test_an_empty_file_is_complete_at_once() -> None:
    assert Transfers().begin(ID, push_of(b"", 256), Role.TARGET) == [Complete(ID)]


def test_what_is_on_disk_already_is_not_asked_for() -> None:
    transfers = Transfers()
    assert transfers.begin(ID, PUSH, Role.TARGET, have=0b1111101111) == [AskUp(ID, (4,))]
    assert Transfers().begin(ID, PUSH, Role.TARGET, have=(1 << 10) - 1) == [Complete(ID)]


def test_a_chunk_that_was_not_asked_for_is_not_looked_at() -> None:
    transfers, _ = target()
    assert transfers.arrived(ID, 9, blob(9), 0.0) == []
    assert transfers.arrived(8, 0, blob(0), 0.0) == []


def test_a_wrong_chunk_is_asked_for_again_and_given_up_after_some_times() -> None:
    transfers, _ = target()
    for attempt in range(BAD_MOST - 1):
        assert transfers.arrived(ID, 0, b"?" * 256, float(attempt)) == []
        assert transfers.wakeup() == attempt + ASK_AGAIN
        assert transfers.advance(attempt + ASK_AGAIN) == [AskUp(ID, (0, 1, 2, 3))]
    effects = transfers.arrived(ID, 0, b"?" * 256, 9.0)
    assert effects == [Broken(ID, "chunk 0 does not match its digest")]


def test_a_new_parent_is_asked_for_what_the_old_one_owes() -> None:
    transfers, _ = target()
    transfers.source_changed(5.0)
    assert transfers.advance(5.0) == [AskUp(ID, (0, 1, 2, 3))]


def test_a_parent_that_does_not_know_the_push_yet_is_asked_again_and_one_that_never_will_ends_it() -> None:
    transfers, _ = target()
    assert transfers.declined(ID, 0, "not known here", final=False, now=1.0) == []
    assert transfers.advance(1.0 + ASK_AGAIN) == [AskUp(ID, (0, 1, 2, 3))]
    assert transfers.declined(ID, 0, "the file changed", final=True, now=2.0) == [Broken(ID, "the file changed")]


# --- those below ------------------------------------------------------------------------------------------------


def test_a_child_gets_a_chunk_from_memory_before_the_disk_has_it() -> None:
    transfers, _ = target()
    assert transfers.asked(1, ID, (0,)) == []
    assert transfers.arrived(ID, 0, blob(0), 0.0)[0] == Give(1, ID, 0, blob(0))
    assert transfers.asked(2, ID, (0,)) == [Give(2, ID, 0, blob(0))]


def test_a_chunk_that_memory_has_lost_is_read_from_disk_once_for_all_who_ask() -> None:
    transfers = Transfers()
    transfers.begin(ID, PUSH, Role.SOURCE)
    assert transfers.asked(1, ID, (5,)) == [Read(ID, 5)]
    assert transfers.asked(2, ID, (5,)) == []
    assert transfers.was_read(ID, 5, blob(5)) == [Give(1, ID, 5, blob(5)), Give(2, ID, 5, blob(5))]


def test_a_source_that_changed_under_the_push_says_so() -> None:
    transfers = Transfers()
    transfers.begin(ID, PUSH, Role.SOURCE)
    transfers.asked(1, ID, (5,))
    assert transfers.was_read(ID, 5, b"?" * 256) == [
        Decline(1, ID, 5, "the file changed while it was pushed", final=True)
    ]


def test_a_child_that_asks_beyond_its_credit_or_beyond_the_file_is_an_abuser() -> None:
    transfers = Transfers()
    transfers.begin(ID, PUSH, Role.TARGET)
    transfers.asked(1, ID, tuple(range(ASK_WINDOW)))
    assert isinstance(transfers.asked(1, ID, (9,))[0], Abuse)
    assert isinstance(transfers.asked(2, ID, (10,))[0], Abuse)


def test_a_child_that_asks_again_for_the_same_gets_one_answer_and_no_blame() -> None:
    transfers, _ = target()
    for _ in range(3):
        assert transfers.asked(1, ID, (0, 1, 2, 3)) == []
    assert transfers.arrived(ID, 0, blob(0), 0.0)[0] == Give(1, ID, 0, blob(0))


def test_a_lost_child_gets_nothing_and_its_successor_has_full_credit() -> None:
    transfers, _ = target()
    transfers.asked(1, ID, (0, 1, 2, 3))
    transfers.child_lost(1)
    assert not [effect for effect in transfers.arrived(ID, 0, blob(0), 0.0) if isinstance(effect, Give)]
    assert transfers.asked(1, ID, (1, 2, 3, 4)) == []


def test_an_unknown_push_is_declined_for_now() -> None:
    (declined,) = Transfers().asked(1, ID, (0,))
    assert isinstance(declined, Decline)
    assert not declined.final


def test_a_carrier_asks_only_for_what_is_asked_of_it_and_stores_nothing() -> None:
    transfers = Transfers()
    assert transfers.begin(ID, PUSH, Role.CARRIER) == []
    assert transfers.asked(1, ID, (4,)) == [AskUp(ID, (4,))]
    assert transfers.asked(2, ID, (4,)) == []
    assert transfers.arrived(ID, 4, blob(4), 0.0) == [Give(1, ID, 4, blob(4)), Give(2, ID, 4, blob(4))]


def test_a_carrier_passes_bad_news_on() -> None:
    transfers = Transfers()
    transfers.begin(ID, PUSH, Role.CARRIER)
    transfers.asked(1, ID, (4,))
    assert transfers.declined(ID, 4, "gone", final=True, now=0.0) == [Decline(1, ID, 4, "gone", final=True)]


def test_memory_is_bounded_by_the_cache() -> None:
    big = 1 << 20
    count = 2 * CHUNK_CACHE // big
    data = bytes(big)
    push = push_of(data * count, big)
    transfers = Transfers()
    transfers.begin(ID, push, Role.SOURCE)
    for index in range(count):
        transfers.asked(1, ID, (index,))
        transfers.was_read(ID, index, data)
    read_again = [index for index in range(count) if transfers.asked(2 + index, ID, (index,)) == [Read(ID, index)]]
    assert len(read_again) == count - CHUNK_CACHE // big


# --- a whole tree -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    hosts=st.integers(1, 12),
    size=st.integers(0, 40),
    seed=st.integers(0, 2**32),
    carriers=st.sets(st.integers(0, 11)),
)
def test_every_target_of_a_tree_gets_the_file_whatever_the_order(
    hosts: int, size: int, seed: int, carriers: set[int]
) -> None:
    rng = Random(seed)
    data = rng.randbytes(size * 10)
    push = push_of(data, 16)
    parents = {rank: rng.randrange(-1, rank) for rank in range(hosts)}
    nodes = {rank: Transfers() for rank in range(-1, hosts)}
    files: dict[int, dict[int, bytes]] = {rank: {} for rank in range(hosts)}
    finished = set()
    todo: list[tuple[int, Effect]] = []
    for rank in rng.sample(sorted(nodes), len(nodes)):
        role = Role.SOURCE if rank < 0 else Role.CARRIER if rank in carriers else Role.TARGET
        todo += [(rank, effect) for effect in nodes[rank].begin(ID, push, role)]
    now = 0.0
    for _ in range(100_000):
        if not todo:
            now += 1.0
            todo = [(rank, effect) for rank, node in nodes.items() for effect in node.advance(now)]
            if not todo:
                break
        rank, effect = todo.pop(rng.randrange(len(todo)))
        if rng.random() < 0.02:  # the connection broke: what was under way is lost, and asked for again
            if isinstance(effect, Give):
                nodes[rank].child_lost(effect.child)
                nodes[effect.child].source_changed(now)
                continue
            if isinstance(effect, AskUp):
                nodes[rank].source_changed(now)
                continue
        match effect:
            case AskUp(id_, indices):
                new = nodes[parents[rank]].asked(rank, id_, indices)
                assert not [a for a in new if isinstance(a, Abuse)]
                todo += [(parents[rank], e) for e in new]
            case Give(child, id_, index, chunk):
                todo += [(child, e) for e in nodes[child].arrived(id_, index, chunk, now)]
            case Decline(child, id_, index, why, final):
                todo += [(child, e) for e in nodes[child].declined(id_, index, why, final, now)]
            case Read(id_, index):
                chunk = data[index * 16 : (index + 1) * 16] if rank < 0 else files[rank][index]
                todo += [(rank, e) for e in nodes[rank].was_read(id_, index, chunk)]
            case Store(id_, index, chunk):
                files[rank][index] = chunk
                todo += [(rank, e) for e in nodes[rank].was_stored(id_, index)]
            case Complete():
                assert rank not in finished
                finished.add(rank)
            case _:
                raise AssertionError(f"{rank}: {effect}")
    targets = {rank for rank in range(hosts) if rank not in carriers}
    assert finished == targets
    for rank in targets:
        assert b"".join(files[rank][index] for index in sorted(files[rank])) == data


# --- a head -----------------------------------------------------------------------------------------------------------


def test_nothing_behind_the_head_is_asked_for_before_it_was_looked_at() -> None:
    transfers = Transfers()
    stream = msgspec.structs.replace(PUSH, head=2)
    assert transfers.begin(ID, stream, Role.TARGET) == [AskUp(ID, (0, 1))]
    for index in (0, 1):
        assert transfers.arrived(ID, index, blob(index), 0.0) == [Store(ID, index, blob(index))]
    assert transfers.was_stored(ID, 0) == []
    assert transfers.was_stored(ID, 1) == [Headed(ID)]
    assert transfers.was_headed(ID, 0b0000111100) == [AskUp(ID, (6, 7, 8, 9))]


def test_who_has_all_that_is_behind_the_head_is_complete() -> None:
    transfers = Transfers()
    transfers.begin(ID, msgspec.structs.replace(PUSH, head=1), Role.TARGET)
    transfers.arrived(ID, 0, blob(0), 0.0)
    assert transfers.was_stored(ID, 0) == [Headed(ID)]
    assert transfers.was_headed(ID, (1 << 10) - 2) == [Complete(ID)]


def test_a_stream_that_is_all_head_is_complete_once_that_was_looked_at() -> None:
    transfers = Transfers()
    transfers.begin(ID, msgspec.structs.replace(push_of(b"x", 256), head=1), Role.TARGET)
    transfers.arrived(ID, 0, b"x", 0.0)
    assert transfers.was_stored(ID, 0) == [Headed(ID)]
    assert transfers.was_headed(ID, 0) == [Complete(ID)]
