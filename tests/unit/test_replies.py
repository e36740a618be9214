"""What waits for a client that does not read: little in memory, and nothing lost."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from controller import api
from controller.jobs import Job
from controller.replies import HELD_MOST
from controller.service import together
from controller.status import CtlError
from protocol.outcomes import Exited, Fold, Output


def fold(number: int) -> Fold:
    return Fold(
        bytes([0] * (number // 8) + [1 << number % 8]), Exited(0), Output(b"%06d" % number * 16_384, b"", 98_304)
    )


def missing() -> Fold:
    raise CtlError("it is on record no more")


async def all_of(job: Job) -> list[Fold]:
    found: list[Fold] = []
    while (reply := await job.replies.get()) is not None:
        if isinstance(reply, api.Folded):
            found += reply.folds
    return found


def test_outcomes_that_wait_are_read_from_the_record_in_their_turn() -> None:
    async def run() -> None:
        job = Job()
        job.began(1)
        reads: list[int] = []

        def read(number: int) -> Fold:
            reads.append(number)
            return fold(number)

        for number in range(1_000):
            job.fold(fold(number), partial(read, number))
        assert HELD_MOST // 2 < job.replies.held <= HELD_MOST
        job.seal()
        job.settled(1)
        assert await all_of(job) == [fold(number) for number in range(1_000)]
        assert reads == list(range(1_000 - len(reads), 1_000))
        assert job.replies.held == 0

    asyncio.run(run())


def test_what_comes_to_nothing_is_not_taken_for_a_reply_that_is_there() -> None:
    async def run() -> None:
        replies = Job().replies
        replies.put_outcome((), 0, None)
        assert not replies.more()
        replies.put(api.Settled())
        assert replies.more()
        assert await replies.get() == api.Settled()
        assert not replies.more()

    asyncio.run(run())


def test_late_answers_that_wait_are_read_from_the_record_in_their_turn_too() -> None:
    async def run() -> None:
        job = Job()
        reads: list[int] = []

        def read(number: int) -> Fold:
            reads.append(number)
            return fold(number)

        for number in range(100):
            job.late(fold(number), partial(read, number))
        assert job.replies.held <= HELD_MOST
        assert [await job.replies.get() for _ in range(100)] == [
            api.Late(folds=(fold(number),)) for number in range(100)
        ]
        assert reads == list(range(100 - len(reads), 100)) != []

    asyncio.run(run())


def test_a_client_that_reads_waits_for_no_disk_and_one_large_outcome_is_no_reason_to() -> None:
    async def run() -> None:
        job = Job()
        large = Fold(b"\1", Exited(0), Output(bytes(2 * HELD_MOST), b"", 2 * HELD_MOST))
        for _ in range(3):
            job.fold(large, missing)
            assert await job.replies.get() == api.Folded(folds=(large,))

    asyncio.run(run())


def test_how_far_a_push_is_waits_once_as_it_is_by_then() -> None:
    async def run() -> None:
        job = Job()
        for size in range(1_000):
            left = ((7, 3, "silent"),) if size % 2 else ()
            job.say(api.Advanced(size=1_000, done={size % 5: size}, left=left))
        job.say(api.Settled())
        latest = {rank: 995 + rank for rank in range(5)}
        assert await job.replies.get() == api.Advanced(size=1_000, done=latest, left=((7, 3, "silent"),))
        assert await job.replies.get() == api.Settled()
        job.say(api.Fetched(size=5, done={1: 2}))
        job.say(api.Fetched(size=5, done={2: 3}))
        assert await job.replies.get() == api.Fetched(size=5, done={1: 2, 2: 3})

    asyncio.run(run())


def test_what_is_on_record_no_more_is_said() -> None:
    async def run() -> None:
        job = Job()
        job.fold(fold(1), missing)
        job.replies.put_recorded(lambda: [api.Folded(folds=(missing(),))])
        assert await job.replies.get() == api.Folded(folds=(fold(1),))
        with pytest.raises(CtlError, match="no more"):
            await job.replies.get()

    asyncio.run(run())


def test_outcomes_that_follow_each_other_are_sent_as_one_reply() -> None:
    folds = [fold(number) for number in range(4)]
    piece = api.Streamed(rank=1, stream=1, offset=0, data=b"x")
    batch: list[api.Reply] = [
        *(api.Folded(folds=(one,)) for one in folds[:3]),
        piece,
        api.Folded(folds=(folds[3],)),
        api.Settled(),
    ]
    assert together(batch) == [api.Folded(folds=tuple(folds[:3])), piece, api.Folded(folds=(folds[3],)), api.Settled()]
    assert together([]) == []
