"""Waiting with deadlines, and blocking calls on daemon threads for libraries that may never return from one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def within(seconds: float, work: Awaitable[_T]) -> _T:
    """The result of `work`, which is cancelled after `seconds`. Raises asyncio.TimeoutError then.

    asyncio.wait_for of Python 3.10 and 3.11 forgets a cancellation that comes in the moment in which the work ends,
    and a task that is to end goes on for ever.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise asyncio.TimeoutError
    return task.result()


async def finish(work: Awaitable[_T]) -> _T:
    """Like `await work`, but a cancellation takes effect only when the work is done: what goes on in a thread can't be
    stopped, and what it makes could not be undone before."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def aside(call: Callable[[], _T]) -> _T:
    """The result of a blocking call, on a daemon thread of its own: no other call that hangs keeps it from beginning,
    and if it never returns itself, whoever waits for it can give up."""
    lane = Lane("aside", 1)
    try:
        return await asyncio.wrap_future(lane.submit(call))
    finally:
        lane.stop()


class GivenUp(asyncio.TimeoutError):
    """A call did not return in time. `call` is the one that goes on all the same, None where it had not begun."""

    def __init__(self, call: concurrent.futures.Future[Any] | None) -> None:
        super().__init__()
        self.call = call


class Lane:
    """Blocking calls on at most `workers` daemon threads, begun in order.

    Unlike concurrent.futures' executor, a call that never returns does not keep the process from ending.
    """

    def __init__(self, name: str, workers: int) -> None:
        self._name = name
        self._workers = workers
        self._threads = 0
        self._unfinished = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]
        self._queue = queue.SimpleQueue()

    async def run(self, call: Callable[[], _T], deadline_s: float) -> _T:
        """The call's result. Raises GivenUp after `deadline_s` seconds, and what the call raises.

        A call that has begun by then goes on, and its thread with it; one that has not is dropped.
        """
        future = self.submit(call)
        try:
            return await within(deadline_s, asyncio.wrap_future(future))
        except asyncio.TimeoutError:
            raise GivenUp(None if future.cancel() or future.done() else future) from None
        finally:
            # asyncio's future passes its cancellation on a moment later; this one refuses where the call has begun.
            future.cancel()

    def submit(self, call: Callable[[], _T]) -> concurrent.futures.Future[_T]:
        """Queue a call from any thread."""
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()
        with self._lock:
            self._unfinished += 1
            if self._threads < min(self._unfinished, self._workers):
                self._threads += 1
                name = f"{self._name}-{self._threads}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
        self._queue.put((future, call))
        return future

    def stop(self) -> None:
        """End the threads, each after the call that it is at. Nothing may be queued afterwards."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del item, future, call
            with self._lock:
                self._unfinished -= 1
