"""What was begun with VMs and not ended, by this agent or one before it: taken back, or finished.

A VM that is to be worked on is settled first; all others are, in the background, for as long as it takes libvirt to
come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, TypeVar

from agent import domains
from agent.hypervisor import Connection, HypervisorError, Unavailable
from agent.journal import LetGo, RemoveDomain, RemoveFiles, RemoveSockets, Step, Undo
from agent.ledger import Entry, Ledger, Pages
from agent.vmfiles import VmFiles
from agent.vmlocks import Locks, name_key
from protocol.vms import VmPower

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)

OFF = (VmPower.SHUTOFF, VmPower.CRASHED)
_ASK_SECONDS = 30.0
# libvirt gives a QEMU that hangs some 10 s before it kills it.
REMOVE_SECONDS = 60.0
# libvirtd restarts in about a second; a VM that can't be taken back is tried for ever, at little cost.
_FIRST_SECONDS = 0.5
_LAST_SECONDS = 30.0


class HalfDone(Exception):
    """An earlier request left the VM in a state that can't be mended now; the text says why."""


class Call(Protocol):
    """Hypervisor.call."""

    def __call__(self, function: Callable[[Connection], _T], deadline_s: float, /) -> Awaitable[_T]:
        """`function(connection)` in at most `deadline_s` seconds; raises HypervisorError."""


class Repairs:
    """The journals of a host's VMs, below `directory`, the agent's own, by which its domains are marked."""

    def __init__(self, directory: Path, files: VmFiles, locks: Locks, call: Call, pages: Pages | None) -> None:
        self._owner = str(directory)
        self._files = files
        self._locks = locks
        self._call = call
        self._ledger = Ledger(directory / "journal", self.undo, pages)
        #: Calls to libvirt that were given up and may still do what was asked, by the VM's name.
        self._pending: dict[str, Future[Any]] = {}
        #: VMs that came from other hosts and wait for word that they are gone there.
        self._waiting: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stop. What is left is for the next agent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def names(self) -> list[str]:
        """The VMs of which something is begun and not ended. Blocks."""
        return self._ledger.names()

    def begin(self, name: str) -> Entry:
        """A journal for a VM that is settled."""
        return self._ledger.begin(name)

    def wait_for(self, name: str, error: BaseException) -> None:
        """Note that libvirt may still do what was asked of a VM, where `error` says so."""
        if isinstance(error, Unavailable) and error.pending is not None:
            self._pending[name] = error.pending

    async def give_up(self, name: str, entry: Entry, error: BaseException) -> str:
        """Take back what was begun of a VM, now or once libvirt answers; what is to be said of it."""
        self.wait_for(name, error)
        if name in self._pending:
            # What was asked for may still happen, and could not be taken back before.
            self.soon()
            return "what was begun is taken back when it does"
        left = await entry.take_back()
        if left:
            self.soon()
            return f"what was begun is not yet taken back: {left}"
        return ""

    async def undo(self, undo: Undo) -> None:
        """Perform one undoing."""
        match undo:
            case RemoveFiles(name=name):
                await asyncio.to_thread(self._files.remove, name)
            case RemoveDomain(name=name, uuid=uuid):
                # Another's domain of that name is not what this agent began.
                with contextlib.suppress(domains.NotOurs):
                    await self._call(
                        lambda libvirt: domains.remove(libvirt, name, self._owner, None, uuid), REMOVE_SECONDS
                    )
            case RemoveSockets(paths=paths):
                for path in paths:
                    await asyncio.to_thread(Path(path).unlink, missing_ok=True)
            case LetGo(name=name, uuid=uuid):
                here = await self._call(lambda libvirt: domains.let_go(libvirt, name, self._owner, uuid), _ASK_SECONDS)
                if not here:
                    await asyncio.to_thread(self._files.remove, name)
            case _:
                raise TypeError(f"the journal of a VM can't {undo}")

    async def settle(self, name: str) -> None:
        """Finish or take back what an earlier request left of a VM. Its lock is held. Raises HalfDone."""
        pending = self._pending.get(name)
        if pending is not None and not pending.done():
            raise HalfDone("libvirt has not answered an earlier request for it yet; try again in a minute")
        self._pending.pop(name, None)
        steps = await asyncio.to_thread(self._ledger.steps, name)
        if steps is None:
            return
        entry = self._ledger.found(name, steps)
        if steps and steps[0].arrives:
            await self._look_for_arrival(name, steps)
        if steps and steps[-1].last and await self._is_whole(name, steps):
            await entry.end()
            return
        left = await entry.take_back()
        if left:
            raise HalfDone(f"an earlier request left it half done, and that can't be taken back: {left}")
        _LOG.info("VM %s: took back: %s", name, ", ".join(step.does for step in steps))

    async def arrival(self, name: str, uuid: str) -> Entry | None:
        """The journal of a VM that came from another host, or is on its way; None where there is none. Its lock is
        held."""
        steps = await asyncio.to_thread(self._ledger.steps, name)
        ours = any(isinstance(undo, RemoveDomain) and undo.uuid == uuid for step in steps or () for undo in step.undo)
        if not steps or not steps[0].arrives or not ours:
            return None
        self._waiting.discard(name)
        return self._ledger.found(name, steps)

    def waits(self, name: str) -> bool:
        """Whether a VM has arrived, and nobody has said yet that it is gone where it was."""
        return name in self._waiting

    async def _look_for_arrival(self, name: str, steps: Sequence[Step]) -> None:
        """Raises HalfDone unless nothing of the VM is here, or will be."""
        uuid = next((undo.uuid for step in steps for undo in step.undo if isinstance(undo, RemoveDomain)), "")
        arrived = await self._call(lambda libvirt: domains.arrived(libvirt, name, self._owner, uuid), _ASK_SECONDS)
        if arrived is None:
            return
        if not arrived:
            raise HalfDone("it is on its way here from another host")
        self._waiting.add(name)
        raise HalfDone("it came from another host, and waits for word that it is gone there; move it again")

    async def _is_whole(self, name: str, steps: Sequence[Step]) -> bool:
        """Whether a creation had come to its end but for the journal: the VM may be in use since."""
        uuid = next((undo.uuid for step in steps for undo in step.undo if isinstance(undo, RemoveDomain)), "")
        found = await self._call(lambda libvirt: domains.find(libvirt, name, uuid), _ASK_SECONDS)
        domain = found.domain
        if domain is None or domain.mark is None or domain.mark.owner != self._owner or domain.uuid != uuid:
            return False
        spec = domain.mark.spec
        return spec is not None and (domain.power not in OFF or not spec.start)

    def soon(self) -> None:
        """Repair all, in the background."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._all(), name="repair VMs")

    async def _all(self) -> None:
        """See to it that no journal is left that nobody works on, however long libvirt is away."""
        pause = _FIRST_SECONDS
        while True:
            left = False
            for name in await asyncio.to_thread(self._ledger.names):
                if name_key(name) in self._locks:
                    left = True
                    continue
                try:
                    async with self._locks.alone(name_key(name)):
                        await self.settle(name)
                except (HalfDone, HypervisorError, OSError) as error:
                    if self.waits(name):
                        continue  # nothing that is known here can mend that
                    left = True
                    _LOG.warning("VM %s: %s", name, error)
            if not left:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_SECONDS)
