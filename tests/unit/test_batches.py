"""Work on a thread by the batch: in order, all of it, and no batch larger than it may be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.batches import Batches


class Log:
    """What was worked at, and what was told of it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.worked: list[list[int]] = []
        self.told: list[tuple[list[int], int | None, str]] = []
        self.heard = asyncio.Event()
        self.began = threading.Event()

    def work(self, batch: list[int]) -> int:
        self.began.set()
        assert self.gate.wait(60)
        self.worked.append(batch)
        if 13 in batch:
            raise ValueError("thirteen")
        return sum(batch)

    def then(self, batch: list[int], result: int | None, error: BaseException | None) -> None:
        self.told.append((batch, result, str(error or "")))
        self.heard.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(60):
            while sum(len(batch) for batch, _, _ in self.told) < count:
                await self.heard.wait()
                self.heard.clear()


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_what_comes_while_a_batch_is_worked_at_makes_the_next(executor: ThreadPoolExecutor) -> None:
    async def run() -> Log:
        log = Log()
        batches = Batches(executor, log.work, log.then, most=4)
        batches.add(0)
        assert await asyncio.to_thread(log.began.wait, 60)
        for item in range(1, 8):
            batches.add(item)
        log.gate.set()
        await log.until(8)
        return log

    log = asyncio.run(run())
    assert log.worked == [[0], [1, 2, 3, 4], [5, 6, 7]]
    assert log.told == [([0], 0, ""), ([1, 2, 3, 4], 10, ""), ([5, 6, 7], 18, "")]


def test_a_batch_that_fails_is_told_of_and_the_next_is_worked_at(executor: ThreadPoolExecutor) -> None:
    async def run() -> Log:
        log = Log()
        log.gate.set()
        batches = Batches(executor, log.work, log.then, most=2)
        for item in (12, 13, 14):
            batches.add(item)
        await log.until(3)
        return log

    log = asyncio.run(run())
    assert log.told == [([12, 13], None, "thirteen"), ([14], 14, "")]


def test_nothing_waits_after_the_last_nor_when_a_batch_is_full(executor: ThreadPoolExecutor) -> None:
    async def run() -> Log:
        log = Log()
        log.gate.set()
        batches = Batches(executor, log.work, log.then, most=2, linger=3_600, last=lambda items: 9 in items)
        for item in (1, 2, 9):
            batches.add(item)
        await log.until(3)
        return log

    assert asyncio.run(run()).worked == [[1, 2], [9]]


def test_what_waits_when_all_is_dropped_is_not_worked_at(executor: ThreadPoolExecutor) -> None:
    async def run() -> Log:
        log = Log()
        batches = Batches(executor, log.work, log.then, most=1)
        for item in (1, 2):
            batches.add(item)
        assert await asyncio.to_thread(log.began.wait, 60)
        batches.drop()
        log.gate.set()
        await log.until(1)
        return log

    log = asyncio.run(run())
    executor.shutdown()
    assert log.worked == [[1]]


def test_a_loop_that_was_closed_meanwhile_is_told_nothing(executor: ThreadPoolExecutor) -> None:
    log = Log()

    async def run() -> None:
        batches = Batches(executor, log.work, log.then, most=1)
        batches.add(1)

    asyncio.run(run())
    log.gate.set()
    executor.shutdown()
    assert log.worked == [[1]]
    assert log.told == []
