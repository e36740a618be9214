"""Chunks from host to host in the push's order: who asks whom, who gives, and what becomes of a wrong one."""

from __future__ import annotations

from collections import deque

import msgspec
import pytest

from protocol.asking import BACK_AFTER, BAD_MOST, UNKNOWN_MOST, window_of
from protocol.commands import Hop, Stream
from protocol.limits import ASK_AGAIN, ASK_WINDOW, BULK_SILENT, CACHED_MOST, CHUNK_CACHE, HOLD_EVERY, UNSTORED_MOST
from protocol.stream import stream_of
from protocol.transfer import Role, Transfers
from protocol.transfer_effects import (
    Abuse,
    AskOf,
    Broken,
    Bypassed,
    Complete,
    Decline,
    Effect,
    Give,
    Headed,
    Hold,
    Read,
    Store,
)

ID = 7
CHUNKS = 40
DATA = bytes(range(256)) * CHUNKS
ORDER = tuple(Hop(rank, "127.0.0.1", 1, bytes([rank + 1]) * 32) for rank in range(4))
#: What a source is asked for at first.
FIRST = ASK_WINDOW // 8


def push_of(data: bytes, chunk: int) -> Stream:
    stream = stream_of(lambda index: data[index * chunk : (index + 1) * chunk], len(data), chunk=chunk)
    return msgspec.structs.replace(stream, order=ORDER, inline=None)


PUSH = push_of(DATA, 256)


def blob(index: int) -> bytes:
    return DATA[index * 256 : (index + 1) * 256]


def begun(rank: int | None, role: Role = Role.TARGET, stream: Stream = PUSH, have: int = 0) -> Transfers:
    transfers = Transfers(rank)
    transfers.begin(ID, stream, role, have, 0.0)
    return transfers


def asks(effects: list[Effect]) -> list[tuple[int | None, tuple[int, ...]]]:
    return [(effect.source, effect.indices) for effect in effects if isinstance(effect, AskOf) and effect.indices]


def only(effects: list[Effect], kind: type[Effect]) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


# --- whom one asks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "source"), [(0, None), (1, 0), (3, 2)])
def test_each_asks_the_one_before_it_and_the_first_the_root(rank: int, source: int | None) -> None:
    ((asked, indices),) = asks(Transfers(rank).begin(ID, PUSH, Role.TARGET, 0, 0.0))
    assert asked == source
    assert indices == tuple(range(FIRST))


def test_a_source_that_is_lost_is_bypassed_at_once_for_the_one_before_it() -> None:
    transfers = begun(3)
    lost = transfers.source_lost(2, "connection closed", 1.0)
    assert lost[0] == Bypassed(ID, 2, "connection closed")
    assert asks(lost) == [(1, tuple(range(FIRST)))]
    lost = transfers.source_lost(1, "connection closed", 1.0)
    assert asks(lost) == [(0, tuple(range(FIRST)))]
    lost = transfers.source_lost(0, "connection closed", 1.0)
    assert asks(lost) == [(None, tuple(range(FIRST)))]


def test_where_even_the_root_is_lost_all_are_tried_anew() -> None:
    transfers = begun(1)
    transfers.source_lost(0, "connection closed", 1.0)
    assert asks(transfers.source_lost(None, "connection closed", 1.0)) == []
    due = transfers.wakeup()
    assert due is not None
    assert asks(transfers.advance(2.0))[0][0] == 0


def test_a_silent_source_is_bypassed_and_one_that_says_that_it_waits_is_not() -> None:
    transfers = begun(2)
    now = 0.0
    while now < 3 * BULK_SILENT:
        now += HOLD_EVERY / 2
        assert not only(transfers.advance(now), Bypassed)
        transfers.held(1, ID, 0, now)
    began = now
    effects: list[Effect] = []
    while not only(effects, Bypassed):
        assert now < began + BULK_SILENT + 1
        now += HOLD_EVERY / 2
        effects = transfers.advance(now)
    assert now > began + BULK_SILENT
    assert asks(effects) == [(0, tuple(range(FIRST)))]


def test_who_was_not_run_itself_blames_nobody() -> None:
    transfers = begun(2)
    transfers.advance(0.25)
    assert not only(transfers.advance(60.0), Bypassed)


def test_a_source_that_does_not_know_the_push_yet_is_asked_again_and_left_if_it_never_does() -> None:
    transfers = begun(2)
    for index in range(FIRST):
        assert not asks(transfers.declined(1, ID, index, "not known", 0.0, final=False))
    assert transfers.wakeup() == ASK_AGAIN
    assert asks(transfers.advance(ASK_AGAIN)) == [(1, tuple(range(FIRST)))]
    effects = transfers.declined(1, ID, 0, "not known", UNKNOWN_MOST + 0.1, final=False)
    assert only(effects, Bypassed) == [Bypassed(ID, 1, "it does not know the push")]


def test_a_push_that_the_root_no_longer_knows_is_over_and_what_has_come_is_kept() -> None:
    transfers = begun(0)
    assert not transfers.declined(None, ID, 0, "not known", 0.0, final=False)
    assert not only(transfers.declined(None, ID, 1, "not known", UNKNOWN_MOST - 0.1, final=False), Broken)
    (broken,) = only(transfers.declined(None, ID, 2, "not known", UNKNOWN_MOST, final=False), Broken)
    assert isinstance(broken, Broken)
    assert broken.keep


def test_a_root_that_began_anew_may_take_its_time() -> None:
    transfers = begun(0)
    transfers.declined(None, ID, 0, "not known", 0.0, final=False)
    transfers.arrived(None, ID, 1, blob(1), 1.0)
    assert not only(transfers.declined(None, ID, 2, "not known", UNKNOWN_MOST, final=False), Broken)


def test_a_source_that_lost_its_own_copy_is_bypassed_and_only_the_root_ends_the_push() -> None:
    transfers = begun(1)
    effects = transfers.declined(0, ID, 0, "its disk fails", 0.0, final=True)
    assert only(effects, Bypassed) == [Bypassed(ID, 0, "its disk fails")]
    assert not only(effects, Broken)
    assert transfers.declined(None, ID, 0, "the file changed", 0.0, final=True) == [Broken(ID, "the file changed")]


def test_a_source_that_alters_chunks_is_bypassed_and_where_it_is_the_root_the_push_has_failed() -> None:
    transfers = begun(1)
    effects: list[Effect] = []
    for _ in range(BAD_MOST):
        effects = transfers.arrived(0, ID, 0, b"?" * 256, 0.0)
    assert only(effects, Bypassed)
    assert not only(effects, Store)
    for _ in range(BAD_MOST):
        effects = transfers.arrived(None, ID, 0, b"?" * 256, 0.0)
    assert only(effects, Broken) == [Broken(ID, "chunk 0 does not match its digest")]


def test_one_that_comes_back_and_is_ahead_is_asked_again() -> None:
    transfers = begun(2)
    transfers.source_lost(1, "connection closed", 0.0)
    now = 0.0
    while not any(isinstance(e, AskOf) and e.source == 1 for e in transfers.advance(now)):
        assert now < 2 * BACK_AFTER
        transfers.held(0, ID, 0, now)
        now += 0.25
    assert asks(transfers.held(1, ID, 30, now))[0][0] == 1


# --- a trial ----------------------------------------------------------------------------------------------------------


def _trial(seconds: float) -> list[Effect]:
    """h2 gets two chunks in each quarter of a second, and is told that h0 has all; what h0 was asked for comes after so
    many seconds more."""
    stream = push_of(bytes(CHUNKS << 16), 1 << 16)
    transfers = begun(2, stream=stream)
    for quarter in range(3):
        for index in (2 * quarter, 2 * quarter + 1):
            transfers.arrived(1, ID, index, bytes(1 << 16), 0.25 * quarter + 0.2)
        assert AskOf(0, ID, ()) in transfers.advance(0.25 * quarter + 0.25)
        if not quarter:
            assert not asks(transfers.held(0, ID, CHUNKS, 0.26)), "h1 has only just begun"
    asked = asks(transfers.held(0, ID, CHUNKS, 0.76))
    assert asked
    effects: list[Effect] = []
    while asked and not only(effects, Bypassed):
        tried, indices = asked.pop()
        assert tried == 0
        for index in indices:
            came = transfers.arrived(0, ID, index, bytes(1 << 16), 0.76 + seconds)
            asked += [one for one in asks(came) if one[0] == 0]
            effects += came
    return effects


def test_a_source_is_slow_where_the_one_before_it_gives_chunks_in_less_than_a_third_of_the_time() -> None:
    assert Bypassed(ID, 1, "it is slow") in _trial(0.05)


def test_nobody_is_tried_while_this_host_s_processor_is_the_limit() -> None:
    transfers = begun(2, stream=push_of(bytes(CHUNKS << 16), 1 << 16))
    transfers.pressed = True
    for index in range(2):
        transfers.arrived(1, ID, index, bytes(1 << 16), 0.2)
    transfers.advance(0.25)
    assert asks(transfers.held(0, ID, CHUNKS, 0.26)) == []


def test_a_source_that_keeps_pace_is_not_tried_however_far_behind_it_is() -> None:
    transfers = begun(2, stream=push_of(bytes(CHUNKS << 16), 1 << 16))
    for quarter in range(4):
        transfers.arrived(1, ID, quarter, bytes(1 << 16), 0.25 * quarter + 0.2)
        transfers.advance(0.25 * quarter + 0.25)
        assert not asks(transfers.held(0, ID, quarter + 20, 0.25 * quarter + 0.26))


def test_that_the_root_is_faster_is_believed_the_second_time() -> None:
    transfers = begun(1, stream=push_of(bytes(200 << 16), 1 << 16))
    now = 0.0
    left: list[Effect] = []
    tried = 0
    for index in range(200):
        now += 0.25
        transfers.arrived(0, ID, index, bytes(1 << 16), now - 0.05)
        transfers.advance(now)
        asked = asks(transfers.held(None, ID, 200, now))
        tried += bool(asked)
        while asked:
            _, indices = asked.pop()
            for one in indices:
                effects = transfers.arrived(None, ID, one, bytes(1 << 16), now + 0.01)
                left += only(effects, Bypassed)
                asked += [(source, more) for source, more in asks(effects) if source is None and not left]
        if left:
            break
    assert (left, tried) == ([Bypassed(ID, 0, "it is slow")], 2)


def test_a_trial_that_has_taken_too_long_asks_for_no_more() -> None:
    transfers = begun(1, stream=push_of(bytes(200 << 16), 1 << 16))
    now = 0.0
    asked: list[tuple[int | None, tuple[int, ...]]] = []
    while not asked:
        now += 0.25
        transfers.arrived(0, ID, int(now * 4) - 1, bytes(1 << 16), now - 0.05)
        transfers.advance(now)
        asked = asks(transfers.held(None, ID, 200, now))
    ((_, first),) = asked
    for late, index in enumerate(first, 1):
        # The source gives four chunks a second: a third of the time that it takes for all of the trial is over soon.
        effects = transfers.arrived(None, ID, index, bytes(1 << 16), now + late)
        assert not [indices for source, indices in asks(effects) if source is None]
        assert not only(effects, Bypassed)


def test_nobody_moves_where_that_gains_little() -> None:
    assert not only(_trial(0.4), Bypassed)


def test_nothing_is_tried_where_the_one_before_is_hardly_further() -> None:
    stream = push_of(bytes(CHUNKS << 16), 1 << 16)
    transfers = begun(2, stream=stream)
    transfers.advance(0.25)
    assert asks(transfers.held(0, ID, 10, 0.26)) == []


# --- a target ---------------------------------------------------------------------------------------------------------


def test_a_chunk_that_arrives_is_given_on_before_it_is_stored() -> None:
    transfers = begun(1)
    assert transfers.asked(2, ID, (0,), 0.0) == []
    assert transfers.arrived(0, ID, 0, blob(0), 0.0)[:2] == [Give(2, ID, 0, blob(0), False), Store(ID, 0, blob(0))]
    assert transfers.asked(3, ID, (0,), 0.0) == [Give(3, ID, 0, blob(0), False)]


def test_chunks_that_come_together_are_gone_on_with_once_and_each_is_given_on_and_stored_as_it_comes() -> None:
    together, each = begun(1), begun(1)
    for transfers in (together, each):
        transfers.asked(2, ID, (0, 1), 0.0)
    effects, single = [], []
    for index in range(FIRST):
        effects += together.arrived(0, ID, index, blob(index), 0.0, later=True)
        single += each.arrived(0, ID, index, blob(index), 0.0)
    assert not asks(effects)
    after = together.go_on(0.0)
    asked = [index for _, indices in asks(single) for index in indices]
    assert asked
    assert asks(after) == [(0, tuple(asked))]
    assert effects == [effect for effect in single if not isinstance(effect, AskOf)]
    assert together.go_on(0.0) == []


def test_a_push_that_ended_between_its_chunks_is_not_gone_on_with() -> None:
    transfers = begun(1)
    transfers.arrived(0, ID, 0, blob(0), 0.0, later=True)
    transfers.end(ID)
    assert transfers.go_on(0.0) == []


def test_the_last_chunk_of_several_does_not_complete_what_is_not_stored() -> None:
    transfers = begun(1, have=(1 << CHUNKS - 1) - 1)
    assert only(transfers.arrived(0, ID, CHUNKS - 1, blob(CHUNKS - 1), 0.0, later=True), Store)
    assert not transfers.go_on(0.0)
    assert only(transfers.was_stored(ID, [CHUNKS - 1], 0.0), Complete)


def test_a_compressed_chunk_is_stored_plain_and_given_on_as_it_came() -> None:
    transfers = begun(1)
    transfers.asked(2, ID, (0,), 0.0)
    effects = transfers.arrived(0, ID, 0, blob(0), 0.0, packed=b"zstd")
    assert effects[:2] == [Give(2, ID, 0, b"zstd", True), Store(ID, 0, blob(0))]


def test_what_may_come_compressed_is_what_was_asked_for_of_a_push_that_says_so() -> None:
    transfers = begun(1)
    assert transfers.packed_size(ID, 0) == 256
    assert transfers.packed_size(ID, CHUNKS - 1) is None
    assert transfers.packed_size(8, 0) is None
    transfers.arrived(0, ID, 0, blob(0), 0.0, packed=b"zstd")
    assert transfers.packed_size(ID, 0) is None
    plain = begun(1, stream=msgspec.structs.replace(PUSH, compress=False))
    assert plain.packed_size(ID, 0) is None


def test_a_host_that_cannot_unpack_ends_its_part_and_leaves_nobody() -> None:
    transfers = begun(1)
    transfers.asked(2, ID, (0,), 0.0)
    effects = transfers.arrived(0, ID, 0, None, 0.0, packed=b"zstd", why="no library")
    assert effects == [Decline(2, ID, 0, "no library", final=True), Broken(ID, "no library")]


def test_many_small_frames_are_not_all_kept() -> None:
    count = CACHED_MOST + 100
    transfers = begun(None, Role.SOURCE, push_of(bytes(256 * count), 256))
    for index in range(count):
        transfers.asked(1, ID, (index,), 0.0)
        transfers.was_read(ID, [(index, bytes(256), b"z")], 0.0)
    assert transfers.held_bytes() == CACHED_MOST
    assert only(transfers.asked(2, ID, (0,), 0.0), Read) == [Read(ID, 0)]
    assert transfers.asked(2, ID, (count - 1,), 0.0) == [Give(2, ID, count - 1, b"z", True)]


def test_a_stream_is_complete_when_the_last_chunk_is_stored_and_not_before() -> None:
    transfers = Transfers(1)
    asked = deque(i for _, indices in asks(transfers.begin(ID, PUSH, Role.TARGET, 0, 0.0)) for i in indices)
    done: list[Effect] = []
    for _ in range(CHUNKS):
        assert not only(done, Complete)
        index = asked.popleft()
        new = transfers.arrived(0, ID, index, blob(index), 0.0)
        done = transfers.was_stored(ID, [index], 0.0)
        asked.extend(i for _, indices in asks(new + done) for i in indices)
    assert only(done, Complete) == [Complete(ID)]
    assert transfers.stored_bytes(ID) == len(DATA)
    assert transfers.sources() == set()
    assert transfers.wakeup() is None


def test_an_empty_stream_is_complete_at_once() -> None:
    assert Transfers(0).begin(ID, push_of(b"", 256), Role.TARGET, 0, 0.0) == [Complete(ID)]


def test_what_is_on_disk_already_is_not_asked_for() -> None:
    ((_, indices),) = asks(Transfers(1).begin(ID, PUSH, Role.TARGET, (1 << CHUNKS) - 1 ^ 0b10100, 0.0))
    assert indices == (2, 4)


def test_a_slow_disk_keeps_a_host_from_asking_and_not_from_giving() -> None:
    chunk = 1 << 18
    most = UNSTORED_MOST // chunk
    count = 2 * most
    transfers = Transfers(1)
    stream = push_of(bytes(count * chunk), chunk)
    asked = deque(i for _, indices in asks(transfers.begin(ID, stream, Role.TARGET, 0, 0.0)) for i in indices)
    for peer in range(most):
        transfers.asked(2, ID, (peer,), 0.0)
        effects = transfers.arrived(0, ID, asked.popleft(), bytes(chunk), 0.0)
        assert only(effects, Give)
        asked.extend(i for _, indices in asks(effects) for i in indices)
        if not asked:
            break
    assert len(asked) <= window_of(chunk)
    assert transfers.held_bytes() <= CHUNK_CACHE + 2 * UNSTORED_MOST


def test_a_chunk_that_was_not_asked_for_is_not_looked_at() -> None:
    transfers = begun(1)
    assert transfers.arrived(0, ID, CHUNKS - 1, blob(CHUNKS - 1), 0.0) == []
    assert transfers.arrived(0, 8, 0, blob(0), 0.0) == []


def test_a_target_that_cannot_keep_it_gives_it_on_all_the_same() -> None:
    transfers = begun(1)
    transfers.arrived(0, ID, 0, blob(0), 0.0)
    transfers.demote(ID, 0.0)
    assert transfers.asked(2, ID, (0,), 0.0) == [Give(2, ID, 0, blob(0), False)]
    transfers.asked(2, ID, (2,), 0.0)
    effects = transfers.arrived(0, ID, 2, blob(2), 0.0)
    assert only(effects, Give) == [Give(2, ID, 2, blob(2), False)]
    assert not only(effects, Store)


def test_a_copy_that_was_changed_after_it_was_complete_is_had_from_before() -> None:
    transfers = begun(1, have=(1 << CHUNKS) - 1)
    assert transfers.asked(2, ID, (4,), 0.0) == [Read(ID, 4)]
    assert asks(transfers.was_read(ID, [(4, b"altered" * 9, None)], 0.0)) == [(0, (4,))]
    assert only(transfers.arrived(0, ID, 4, blob(4), 0.0), Give) == [Give(2, ID, 4, blob(4), False)]


# --- those behind -----------------------------------------------------------------------------------------------------


def test_a_chunk_that_memory_has_lost_is_read_from_disk_once_for_all_who_ask() -> None:
    transfers = begun(None, Role.SOURCE)
    assert transfers.asked(1, ID, (5,), 0.0) == [Read(ID, 5)]
    assert transfers.asked(2, ID, (5,), 0.0) == []
    gives: list[Effect] = [Give(peer, ID, 5, blob(5), False) for peer in (1, 2)]
    assert transfers.was_read(ID, [(5, blob(5), None)], 0.0) == gives


def test_a_source_that_changed_under_the_push_says_so() -> None:
    transfers = begun(None, Role.SOURCE)
    transfers.asked(1, ID, (5,), 0.0)
    why = "the file changed while it was pushed"
    assert transfers.was_read(ID, [(5, b"?" * 256, None)], 0.0) == [Decline(1, ID, 5, why, final=True)]


def test_who_asks_before_this_host_is_ready_waits_and_is_not_refused() -> None:
    transfers = Transfers(1)
    transfers.join(ID, PUSH, 0.0)
    assert transfers.asked(2, ID, (0,), 0.0) == []
    transfers.begin(ID, PUSH, Role.TARGET, 0, 0.1)
    assert only(transfers.arrived(0, ID, 0, blob(0), 0.2), Give) == [Give(2, ID, 0, blob(0), False)]


def test_who_waits_is_told_that_this_host_lives_and_how_far_it_is() -> None:
    transfers = begun(1, have=0b111)
    transfers.asked(2, ID, (9,), 0.0)
    transfers.held(0, ID, 0, HOLD_EVERY)
    assert Hold(2, ID, 3) in transfers.advance(HOLD_EVERY)


def test_who_asks_for_nothing_is_told_how_far_this_host_is() -> None:
    assert begun(1, have=0b1011).asked(2, ID, (), 0.0) == [Hold(2, ID, 2)]


def test_an_unknown_push_is_declined_for_now() -> None:
    (declined,) = Transfers(1).asked(2, ID, (0,), 0.0)
    assert isinstance(declined, Decline)
    assert not declined.final


@pytest.mark.parametrize("peer", [0, 1, 9])
def test_only_those_behind_a_host_may_ask_it(peer: int) -> None:
    assert only(begun(1).asked(peer, ID, (0,), 0.0), Abuse)
    assert only(begun(1).asked(peer, ID, (), 0.0), Abuse)


def test_who_asks_beyond_its_credit_or_beyond_the_stream_is_an_abuser() -> None:
    transfers = begun(1)
    transfers.asked(2, ID, tuple(range(ASK_WINDOW)), 0.0)
    assert only(transfers.asked(2, ID, (ASK_WINDOW,), 0.0), Abuse)
    assert only(transfers.asked(3, ID, (CHUNKS,), 0.0), Abuse)


def test_who_asks_again_for_the_same_gets_one_answer_and_no_blame() -> None:
    transfers = begun(1)
    for _ in range(3):
        assert transfers.asked(2, ID, tuple(range(ASK_WINDOW)), 0.0) == []
    assert only(transfers.arrived(0, ID, 0, blob(0), 0.0), Give) == [Give(2, ID, 0, blob(0), False)]


def test_a_lost_host_gets_nothing_and_comes_back_with_full_credit() -> None:
    transfers = begun(1)
    transfers.asked(2, ID, tuple(range(ASK_WINDOW)), 0.0)
    transfers.peer_lost(2)
    assert not only(transfers.arrived(0, ID, 0, blob(0), 0.0), Give)
    assert transfers.asked(2, ID, tuple(range(1, ASK_WINDOW + 1)), 0.0) == []


def test_memory_is_bounded_by_the_cache() -> None:
    big = 1 << 20
    count = 2 * CHUNK_CACHE // big
    transfers = begun(None, Role.SOURCE, push_of(bytes(big * count), big))
    for index in range(count):
        transfers.asked(1, ID, (index,), 0.0)
        transfers.was_read(ID, [(index, bytes(big), None)], 0.0)
    assert transfers.held_bytes() <= CHUNK_CACHE
    read_again = []
    for index in range(count):
        transfers.peer_lost(2)
        read_again += only(transfers.asked(2, ID, (index,), 0.0), Read)
    assert len(read_again) >= count - CHUNK_CACHE // big


def test_pushes_of_one_time_share_the_memory() -> None:
    big = 1 << 20
    stream = push_of(bytes(big * CHUNK_CACHE // big), big)
    transfers = begun(None, Role.SOURCE, stream)
    for id_ in (ID, ID + 1, ID + 2):
        transfers.begin(id_, stream, Role.SOURCE, 0, 0.0)
        for index in range(CHUNK_CACHE // big):
            transfers.asked(1, id_, (index,), 0.0)
            transfers.was_read(id_, [(index, bytes(big), None)], 0.0)
        assert CHUNK_CACHE // 2 <= transfers.held_bytes() <= CHUNK_CACHE


# --- a head -----------------------------------------------------------------------------------------------------------


def test_nothing_behind_the_head_is_asked_for_before_it_was_looked_at() -> None:
    transfers = Transfers(1)
    stream = msgspec.structs.replace(PUSH, head=2)
    assert asks(transfers.begin(ID, stream, Role.TARGET, 0, 0.0)) == [(0, (0, 1))]
    for index in (0, 1):
        assert transfers.arrived(0, ID, index, blob(index), 0.0) == [Store(ID, index, blob(index))]
    assert transfers.was_stored(ID, [0], 0.0) == []
    assert transfers.was_stored(ID, [1], 0.0) == [Headed(ID)]
    ((_, indices),) = asks(transfers.was_headed(ID, 0b111100, 0.0))
    assert indices[:2] == (6, 7)


def test_who_has_all_that_is_behind_the_head_is_complete() -> None:
    transfers = begun(1, stream=msgspec.structs.replace(PUSH, head=1))
    transfers.arrived(0, ID, 0, blob(0), 0.0)
    assert transfers.was_stored(ID, [0], 0.0) == [Headed(ID)]
    assert transfers.was_headed(ID, (1 << CHUNKS) - 2, 0.0) == [Complete(ID)]


def test_a_stream_that_is_all_head_is_complete_once_that_was_looked_at() -> None:
    transfers = begun(1, stream=msgspec.structs.replace(push_of(b"x", 256), head=1))
    transfers.arrived(0, ID, 0, b"x", 0.0)
    assert transfers.was_stored(ID, [0], 0.0) == [Headed(ID)]
    assert transfers.was_headed(ID, 0, 0.0) == [Complete(ID)]
