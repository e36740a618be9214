"""Work on a thread, in batches: what comes while one batch is worked at makes the next.

Handing one thing over to a thread and back takes some 60 us (a future, a wake-up, the interpreter's lock), which is
more than the work on a chunk of a push takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches(Generic[Item, Result]):
    """One thread's work at a time, in the order in which it came."""

    def __init__(
        self,
        executor: Executor,
        work: Callable[[list[Item]], Result],
        then: Callable[[list[Item], Result | None, BaseException | None], None],
        *,
        most: int,
        linger: float = 0.0,
        last: Callable[[Sequence[Item]], bool] = lambda _: False,
    ) -> None:
        """`work` gets up to `most` items on a thread of `executor`; `then`, on the event loop, the same items and what
        came of them, or what `work` raised. The first may wait `linger` seconds for others, and for none after
        those of which one is the `last`."""
        self._executor, self._work, self._then = executor, work, then
        self._most, self._linger, self._last = most, linger, last
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Item] = []
        self._busy = False
        self._due: asyncio.Handle | None = None

    def add(self, *items: Item) -> None:
        """Work at these, with others that come soon."""
        self._waiting += items
        if self._busy:
            return
        if len(self._waiting) >= self._most or self._last(items):
            self._next()
        elif self._due is None:
            self._due = self._loop.call_later(self._linger, self._next)

    def drop(self) -> None:
        """Forget what waits: nobody wants to know what comes of it any more."""
        self._waiting = []
        self._next()

    def _next(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._waiting and not self._busy:
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            self._busy = True
            self._executor.submit(self._run, batch)

    def _run(self, batch: list[Item]) -> None:
        """On the thread."""
        result: Result | None = None
        error: BaseException | None = None
        try:
            result = self._work(batch)
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._done, batch, result, error)

    def _done(self, batch: list[Item], result: Result | None, error: BaseException | None) -> None:
        self._busy = False
        self._then(batch, result, error)
        self._next()
