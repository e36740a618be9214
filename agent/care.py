"""`check host` and `tune host`: the agent looks at its host, and changes its settings, on a thread of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from agent.identity import HostDirectory
from agent.lanes import aside
from agent.look import look
from agent.tuning import TuneError, Tuner, Unfit
from protocol.checks import TuneAnswer
from protocol.commands import TuneHost
from protocol.outcomes import Exited, Outcome, Output, Refused

log = logging.getLogger("canopy")


class Care:
    """This host's facts and settings. Made when it is first needed."""

    def __init__(self, directory: HostDirectory, uri: str | None, tuner: Tuner | None = None) -> None:
        """`uri` is libvirt's; None for the usual one. `tuner` is that of this host but in tests."""
        self._directory = directory
        self._uri = uri
        self._tuner = tuner or Tuner(directory.path)
        # One thread: two changes at a time would not know of each other.
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="care")

    async def check(self) -> tuple[Outcome, Output]:
        """Look at the host."""
        facts = await look(self._directory, self._uri, self._tuner, self._threads)
        return Exited(0), Output(out=msgspec.json.encode(facts))

    async def tune(self, body: TuneHost) -> tuple[Outcome, Output]:
        """Raise settings, or put them back."""

        def work() -> TuneAnswer:
            if body.undo:
                return self._tuner.undo(restart_libvirt=body.restart_libvirt)
            settings = {setting.key: setting.least for setting in body.settings}
            if len(settings) < len(body.settings):
                raise Unfit("a setting is named twice")
            return self._tuner.apply(settings, restart_libvirt=body.restart_libvirt)

        try:
            answer = await self._whole(work)
        except Unfit as error:
            return Refused(str(error)), Output()
        except (TuneError, OSError) as error:
            answer = TuneAnswer(problem=str(error))
        return Exited(1 if answer.problem else 0), Output(out=msgspec.json.encode(answer))

    async def repair(self) -> None:
        """Take back what the agent's predecessor was in the middle of."""
        try:
            await self._whole(self._tuner.repair)
        except (TuneError, OSError) as error:
            log.warning("settings that were being changed when the agent ended: %s", error)

    async def _whole(self, work: Callable[[], TuneAnswer | None]) -> TuneAnswer:
        """Do it to its end, whoever has had enough of waiting: a thread can't be stopped."""
        doing = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(doing) or TuneAnswer()
        except asyncio.CancelledError:
            await asyncio.wait({doing})
            raise

    async def close(self, *, undo: bool) -> None:
        """Let go of the thread; with `undo` what was raised is put back first."""
        if undo:
            try:
                await self._whole(self._tuner.undo)
            except (TuneError, OSError) as error:
                log.warning("the host's settings stay as they are: %s", error)
        await aside(self._threads.shutdown)
