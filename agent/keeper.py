"""Writes outcomes to disk and reads them again, beside the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from agent.outcomes import KeptOutcomes
from protocol import events

log = logging.getLogger("canopy")


class Keeper:
    """What the relay wants done with outcomes on disk. `feed` takes what comes of it."""

    def __init__(self, kept: KeptOutcomes, feed: Callable[[events.Event], None]) -> None:
        self._kept = kept
        self._feed = feed
        #: One thread, so that an outcome is written before it is removed; made when it is first needed.
        self._thread: ThreadPoolExecutor | None = None

    def keep(self, outcome: events.Keep) -> None:
        """Write an outcome, and say Kept."""
        self._kept.expect(outcome.id)

        def then(_: object, error: BaseException | None) -> None:
            if error is not None:
                log.warning("the outcome of command %d can't be kept: %s", outcome.id, error)
            self._feed(events.Kept(outcome.id, well=error is None))

        self._do(partial(self._kept.keep, outcome.id, outcome.signature, outcome.outcome, outcome.output), then)

    def load(self, id_: int, signature: bytes) -> None:
        """Read an outcome, and say Loaded."""
        self._do(partial(self._kept.load, id_, signature), lambda found, _error: self._feed(events.Loaded(id_, found)))

    def forget(self, ids: tuple[int, ...]) -> None:
        """The root has these: remove those of them that are on disk."""
        doomed = self._kept.no_more(ids)
        if doomed:
            self._do(partial(self._kept.remove, doomed), lambda _result, _error: None)

    def close(self) -> None:
        """Wait until all is done."""
        if self._thread is not None:
            self._thread.shutdown()

    def _do(self, work: Callable[[], Any], then: Callable[[Any, BaseException | None], None]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outcomes")

        def done(future: asyncio.Future[Any]) -> None:
            if not future.cancelled():
                error = future.exception()
                then(None if error else future.result(), error)

        asyncio.get_running_loop().run_in_executor(self._thread, work).add_done_callback(done)
