"""agent.lanes: waiting with deadlines, and blocking calls on threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from agent.lanes import Lane, within

DEADLINE_S = 20.0
# Long enough for a loop to begin a call, short enough to wait for.
SHORT_S = 0.05


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, DEADLINE_S))


def test_results_and_errors_come_back() -> None:
    async def scenario() -> None:
        lane = Lane("test", 2)
        assert await lane.run(lambda: 42, DEADLINE_S) == 42
        with pytest.raises(ZeroDivisionError):
            await lane.run(lambda: 1 // 0, DEADLINE_S)
        lane.stop()

    run(scenario())


def test_a_call_that_hangs_holds_up_its_own_thread_alone() -> None:
    async def scenario() -> None:
        lane, let_go = Lane("test", 2), threading.Event()
        with pytest.raises(asyncio.TimeoutError):
            await lane.run(let_go.wait, SHORT_S)
        assert await asyncio.gather(*(lane.run(lambda: 1, DEADLINE_S) for _ in range(20))) == [1] * 20
        let_go.set()
        lane.stop()

    run(scenario())


def test_never_more_calls_at_a_time_than_threads_and_never_fewer_for_no_reason() -> None:
    async def scenario() -> None:
        lane, meet = Lane("test", 4), threading.Barrier(4)
        # Passes only if four run at the same time, again and again.
        await asyncio.gather(*(lane.run(lambda: meet.wait(DEADLINE_S), DEADLINE_S) for _ in range(40)))
        assert sum(thread.name.startswith("test-") for thread in threading.enumerate()) == 4
        lane.stop()

    run(scenario())


def test_a_call_whose_deadline_passes_before_its_turn_is_never_begun() -> None:
    async def scenario() -> None:
        lane, let_go, begun = Lane("test", 1), threading.Event(), threading.Event()
        first = lane.submit(let_go.wait)
        with pytest.raises(asyncio.TimeoutError):
            await lane.run(begun.set, SHORT_S)
        let_go.set()
        await asyncio.wrap_future(first)
        await lane.run(lambda: None, DEADLINE_S)
        assert not begun.is_set()
        lane.stop()

    run(scenario())


def test_a_cancellation_in_the_moment_of_the_end_is_not_forgotten() -> None:
    async def scenario() -> None:
        done = asyncio.Event()

        async def wait() -> None:
            await within(DEADLINE_S, done.wait())

        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        done.set()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())


def test_what_is_not_done_within_its_time_is_cancelled() -> None:
    async def scenario() -> None:
        cancelled = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        with pytest.raises(asyncio.TimeoutError):
            await within(SHORT_S, work())
        await cancelled.wait()

    run(scenario())
