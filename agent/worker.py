"""An agent's local work: each command body to the file that knows how, and every command to exactly one Finished."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.health import EVERY, Health
from agent.identity import HostDirectory
from agent.keeper import Keeper
from agent.outcomes import KeptOutcomes
from agent.outlet import Outlet
from agent.processes import Process
from agent.pulls import Pulls
from agent.pushes import Pushes, sentence
from agent.settings import Settings
from agent.settings import read as settings_of
from agent.spool import Spools, spooled
from agent.tunables import JOURNAL
from agent.vmcommands import VmBody, VmCommands
from agent.watching import Watching
from protocol import events, names
from protocol.commands import (
    Body,
    CheckHost,
    Feed,
    FetchOutput,
    Images,
    Leave,
    Offer,
    Push,
    Run,
    Send,
    SetNets,
    TuneHost,
)
from protocol.messages import Deliver, Grant
from protocol.nets import BRIDGE_PREFIX
from protocol.outcomes import NO_OUTPUT, Exited, FailedToStart, Killed, Outcome, Output, Refused
from protocol.stream import Blob
from protocol.vms import ImageState

if TYPE_CHECKING:
    from agent.care import Care
    from agent.leaving import Ending
    from agent.nets import Nets
    from agent.shell import Shell


log = logging.getLogger("canopy")

#: What a signal would have said of work that is no process. The relay knows why it was stopped.
_STOPPED = Killed(15)
#: How often old output is looked for, in seconds: its age is counted in days.
_TIDY_EVERY = 3_600.0


class AgentWorker:
    """The work of one host."""

    def __init__(
        self, shell: Shell, directory: HostDirectory, kept: KeptOutcomes, *, version: str, uri: str | None
    ) -> None:
        """`uri` is libvirt's; None for the usual one. `version` is that of this agent."""
        self._shell = shell
        self._keeper = Keeper(kept, shell.feed)
        self._directory = directory
        self._uri = uri
        self._loop = asyncio.get_running_loop()
        self._disk = ThreadPoolExecutor(max_workers=2, thread_name_prefix="disk")
        self._health = Health(directory.path, version)
        self._watching = Watching()
        self._processes: dict[int, Process] = {}
        self._spools = Spools(directory.spool, self._settings)
        self._settings_wrong: list[str] = []
        #: Output on its way to the root, until the root has the outcome: what is lost on the way is sent again.
        self._outlets: dict[int, Outlet] = {}
        self._pushes = Pushes(shell, directory, self._disk, self._finish, self._placed)
        self._pulls = Pulls(shell, directory, self._finish)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._vms = VmCommands(shell, directory, uri, self._finish)
        self._carer: Care | None = None
        self._nets: Nets | None = None
        self._nets_version = 0
        self._environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        self.ended: asyncio.Future[Leave | None] = self._loop.create_future()
        self._watch: asyncio.TimerHandle | None = None
        self._tidying: asyncio.TimerHandle | None = None

    # --- commands -----------------------------------------------------------------------------------------------------

    def start(self, id_: int, body: Body, ttl: float | None) -> None:
        """Begin a command."""
        match body:
            case Run():
                self._run(id_, body)
            case FetchOutput():
                self._task(id_, self._fetch(id_, body))
            case Push():
                self._task(id_, self._pushes.begin(id_, body))
            case SetNets():
                self._task(id_, self._set_nets(id_, body))
            case Offer():
                self._task(id_, self._pulls.offer(id_, body))
            case Send():
                self._pulls.send(id_, body)
            case Images():
                self._task(id_, self._image_work(id_, body))
            case CheckHost():
                self._task(id_, self._outcome(id_, self._care().check()))
            case TuneHost():
                self._task(id_, self._outcome(id_, self._care().tune(body)))
            case _ if isinstance(body, VmBody):
                self._task(id_, self._vms.work(id_, body, ttl))
            case _:
                self._finish(id_, Refused(f"this agent does not know how to {type(body).__name__}"))

    def stop(self, id_: int, *, hard: bool) -> None:
        """End a command."""
        process, task = self._processes.get(id_), self._tasks.get(id_)
        if process is not None:
            process.stop(hard=hard)
        elif task is not None:
            task.cancel()
        elif self._pulls.stop(id_):
            pass
        elif id_ in self._pushes:
            self._pushes.end(id_, _STOPPED)

    def forget(self, ids: tuple[int, ...]) -> None:
        """The root has these outcomes: pushes need no longer be served."""
        self._keeper.forget(ids)
        for id_ in ids:
            outlet = self._outlets.pop(id_, None)
            if outlet is not None:
                outlet.close()
            self._shell.end_transfer(id_)
            self._pushes.forget(id_)

    def keep(self, outcome: events.Keep) -> None:
        """Write an outcome to disk."""
        self._keeper.keep(outcome)

    def load(self, id_: int, signature: bytes) -> None:
        """Read an outcome from disk."""
        self._keeper.load(id_, signature)

    def _finish(self, id_: int, outcome: Outcome, output: Output = NO_OUTPUT) -> None:
        self._shell.feed(events.Finished(id_, outcome, output))

    def _task(self, id_: int, work: Coroutine[Any, Any, None]) -> None:
        """Work that is a coroutine: whatever becomes of it, the command gets an outcome."""

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.pop(id_, None)
            if task.cancelled():
                self._pushes.end(id_, _STOPPED)
            elif (error := task.exception()) is not None:
                log.error("command %d", id_, exc_info=error)
                self._pushes.end(id_, FailedToStart(sentence(error)))

        task = self._loop.create_task(work)
        self._tasks[id_] = task
        task.add_done_callback(done)

    def _run(self, id_: int, body: Run) -> None:
        def finished(outcome: Outcome, output: Output) -> None:
            self._processes.pop(id_, None)
            self._finish(id_, outcome, output)

        self._processes[id_] = Process(
            body,
            id_,
            self._spools,
            environment=self._environment,
            disk=self._disk,
            finished=finished,
            outlet=self._outlet(id_, body.first) if body.stream else None,
            took=lambda taken, is_open, anew: self._shell.feed(events.Took(id_, taken, is_open, anew)),
            watching=self._watching,
        )

    def _outlet(self, id_: int, first: int) -> Outlet:
        def send(stream: int, offset: int, data: bytes, has: int, fast: bool) -> None:
            self._shell.feed(events.Wrote(id_, stream, offset, data, has, fast))

        outlet = self._outlets[id_] = Outlet(send, first, outlets=lambda: len(self._outlets))
        return outlet

    def granted(self, id_: int, grant: Grant) -> None:
        """More of a command's output may go up."""
        outlet = self._outlets.get(id_)
        if outlet is not None:
            outlet.granted(grant)

    def pour(self, id_: int, offset: int, data: bytes, *, last: bool) -> None:
        """A piece of a command's input."""
        process = self._processes.get(id_)
        if process is not None and process.inlet is not None:
            process.inlet.feed(offset, data, last=last)

    async def _fetch(self, id_: int, body: FetchOutput) -> None:
        outlet = self._outlet(id_, body.first)
        on_disk = partial(self._loop.run_in_executor, self._disk)
        outcome, output = await spooled(self._directory.spool, body.of, outlet, on_disk)
        self._finish(id_, outcome, output)

    # --- pushes -------------------------------------------------------------------------------------------------------

    def read(self, id_: int, index: int) -> None:
        """A chunk from this host's own copy."""
        self._pushes.read(id_, index)

    def store(self, id_: int, chunks: Sequence[tuple[int, Blob]]) -> None:
        """Chunks to disk."""
        self._pushes.store(id_, chunks)

    def headed(self, id_: int) -> None:
        """The head of a stream is stored."""
        self._pushes.headed(id_)

    def complete(self, id_: int) -> None:
        """The last chunk is stored."""
        self._pushes.complete(id_)

    def _placed(self, folder: str, first: str) -> None:
        """A push is in its place: see to what follows from it. Blocks."""
        if folder + first == names.PATH:
            from agent import etchosts

            etchosts.follow(self._directory.path / "vms.hosts", self._directory.welcome().fleet)

    def broken(self, id_: int, why: str, *, keep: bool) -> None:
        """The chunks can't be had."""
        self._pushes.end(id_, FailedToStart(why), keep=keep)

    def type(self, feed: Feed) -> None:
        """Something was typed into a console."""
        self._vms.type(feed)

    # --- images -------------------------------------------------------------------------------------------------------

    async def _image_work(self, id_: int, body: Images) -> None:
        import threading

        from agent import images

        given_up = threading.Event()
        try:
            results = await asyncio.to_thread(
                images.handle, self._directory.path, body.action, body.digests, given_up.is_set
            )
        finally:
            given_up.set()
        code = 1 if any(result.state in (ImageState.WRONG, ImageState.FAILED) for result in results) else 0
        self._finish(id_, Exited(code), Output(out=msgspec.msgpack.encode(results)))

    # --- the host itself ----------------------------------------------------------------------------------------------

    def _care(self) -> Care:
        """Who looks at the host and changes its settings, made when first needed."""
        if self._carer is None:
            from agent.care import Care

            self._carer = Care(self._directory, self._uri)
        return self._carer

    async def _outcome(self, id_: int, work: Coroutine[Any, Any, tuple[Outcome, Output]]) -> None:
        outcome, output = await work
        self._finish(id_, outcome, output)

    def _net_worker(self) -> Nets:
        """Who makes networks, made when first needed."""
        if self._nets is None:
            from agent.nets import Nets

            self._nets = Nets(self._directory.path, self._directory.identity().address)
        return self._nets

    async def _set_nets(self, id_: int, body: SetNets) -> None:
        from agent.nets import NetError

        if body.version < self._nets_version:
            self._finish(id_, Exited(0), Output(out=b"a newer list of networks was followed before"))
            return
        self._nets_version = body.version
        try:
            done = await self._net_worker().bring_to(body.nets)
        except NetError as error:
            self._finish(id_, FailedToStart(str(error)))
            return
        self._finish(id_, Exited(0), Output(out="\n".join(done).encode()))

    # --- reports ------------------------------------------------------------------------------------------------------

    def begin_watching(self) -> None:
        """Look at this host every few seconds, and at its VMs where it has some."""
        if any(map(_holds_any, (self._directory.vms, self._directory.path / "journal"))):
            self._loop.create_task(self._vms.start()).add_done_callback(lambda task: task.exception())
        if (self._directory.path / JOURNAL).exists():
            self._loop.create_task(self._care().repair()).add_done_callback(lambda task: task.exception())
        if _holds_any(self._directory.path / "journal-nets"):
            self._loop.create_task(self._net_worker().repair()).add_done_callback(lambda task: task.exception())
        self._look()
        self._tidy()

    def _settings(self) -> Settings:
        """What is set on this host; what is wrong there is logged once."""
        settings, wrong = settings_of(self._directory.path / "agent.conf")
        if wrong != self._settings_wrong:
            self._settings_wrong = wrong
            for line in wrong:
                log.warning("agent.conf: %s", line)
        return settings

    def _tidy(self) -> None:
        """Remove output that was kept for long enough."""
        self._tidying = self._loop.call_later(_TIDY_EVERY, self._tidy)
        self._spools.trim()

    def _look(self) -> None:
        self._watch = self._loop.call_later(EVERY, self._look)
        seen = self._health.news()
        if seen is not None:
            self._shell.feed(events.Observed(seen, (), whole=False))

    def arrived(self) -> None:
        """Attached, perhaps to a root that knows nothing: everything anew."""
        for outlet in list(self._outlets.values()):
            outlet.rewind()
        for process in list(self._processes.values()):
            if process.inlet is not None:
                process.inlet.announce()
        self._loop.create_task(self._report_all()).add_done_callback(lambda task: task.exception())

    async def _report_all(self) -> None:
        states = await self._vms.states()
        self._shell.feed(events.Observed(self._health.news(anyway=True), tuple(states), whole=True))

    # --- the rest -----------------------------------------------------------------------------------------------------

    def save_plan(self, delivery: Deliver) -> None:
        """Keep this plan for the next start."""
        try:
            self._directory.save_plan(delivery)
        except OSError as error:  # it is followed all the same; after a restart the root sends it again
            log.warning("the new plan can't be kept: %s", sentence(error))

    def tell(self, effect: events.Effect) -> None:
        """Agents have no clients."""
        raise TypeError(f"an agent can't {effect}")

    def depart(self, leave: Leave) -> None:
        """End this agent, because the root said so."""
        self.end(leave)

    def end(self, leave: Leave | None = None) -> None:
        """End this agent."""
        if not self.ended.done():
            self.ended.set_result(leave)

    async def close(self, leave: Leave | None) -> list[str]:
        """Let go of everything, and take away what `leave` says. All at the same time and each part within its own
        bound, so that a disk that hangs does not keep VMs from being destroyed, nor outcomes from being written. What
        did not come to its end is logged and returned, a sentence each. Does not block the event loop."""
        from agent.lanes import aside
        from agent.leaving import LAST_WITHIN, LET_GO_WITHIN, PUT_BACK_WITHIN, Ending

        for timer in (self._watch, self._tidying):
            if timer is not None:
                timer.cancel()
        purge = leave is not None and leave.purge
        ending = Ending()
        await asyncio.gather(
            ending.part("outcomes", aside(self._keeper.close), LET_GO_WITHIN),
            self._pushes.close(ending, keep=leave is None),
            ending.part("pulls", self._pulls.close(), LET_GO_WITHIN),
            ending.part("the host's settings", self._end_care(undo=purge), PUT_BACK_WITHIN if purge else LET_GO_WITHIN),
            self._end_vms(ending, vms=leave is not None and leave.vms, purge=purge),
        )
        self._watching.close()
        await ending.part("what is written", aside(self._disk.shutdown), LAST_WITHIN)
        return ending.left

    async def _end_vms(self, ending: Ending, *, vms: bool, purge: bool) -> None:
        """VMs, then what they need."""
        from agent.leaving import PUT_BACK_WITHIN

        await self._vms.end(ending, destroy=vms, purge=purge)
        if purge:
            await ending.part("networks", self._remove_nets(), PUT_BACK_WITHIN)

    async def _remove_nets(self) -> None:
        if self._nets is not None or _holds_net():
            await self._net_worker().bring_to(())

    async def _end_care(self, *, undo: bool) -> None:
        if self._carer is not None or (undo and (self._directory.path / JOURNAL).exists()):
            await self._care().close(undo=undo)


def _holds_net() -> bool:
    """Whether there is a network of VMs here, perhaps another agent's."""
    return any(name.startswith(BRIDGE_PREFIX) for name in os.listdir("/sys/class/net"))


def _holds_any(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())
