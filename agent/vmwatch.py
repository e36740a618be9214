"""The states of an agent's VMs, kept true: at once by libvirt's events, and by a look at all of them every few seconds.

A look makes no call that waits for a QEMU. While libvirt does not answer, the state of every VM is "unknown".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Container

from agent import domains
from agent.hypervisor import Hypervisor, HypervisorError, Unavailable
from agent.lanes import within
from agent.vmfiles import VmFiles
from agent.vmstates import StateTable
from agent.vmxml import Mark
from protocol.vms import VmState

_LOG = logging.getLogger(__name__)

# libvirtd that takes longer has more wrong with it, and that too must show within 5 s: one pause and one look.
_LOOK_SECONDS = 3.0


class VmWatch:
    """Watches the VMs of the agent `owner`, from the first `hypervisor()` on.

    `is_busy(name)` is whether somebody is working on a VM: its files say nothing then. `on_change` is called in the
    event loop with the states that are new.
    """

    def __init__(
        self,
        uri: str,
        owner: str,
        files: VmFiles,
        *,
        is_busy: Callable[[str], bool],
        on_change: Callable[[list[VmState]], None] | None,
        poll_s: float,
    ) -> None:
        self._uri = uri
        self._owner = owner
        self._files = files
        self._is_busy = is_busy
        self._on_change = on_change
        self._poll_s = poll_s
        self._hypervisor: Hypervisor | None = None
        self._table = StateTable()
        #: What the domain of each UUID is, None for those of others.
        self._marks: dict[str, Mark | None] = {}
        #: The agent's domains as of the last look, by name; none where it could not see.
        self._seen: dict[str, domains.Domain] = {}
        self._looking = asyncio.Lock()
        self._nudge = asyncio.Event()
        self._problem: str | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether libvirt has been asked for anything yet."""
        return self._hypervisor is not None

    def hypervisor(self) -> Hypervisor:
        """libvirt, from now on watched."""
        if self._hypervisor is None:
            self._hypervisor = Hypervisor(self._uri, on_link=self._linked, on_event=self._nudge.set)
            self._hypervisor.start()
            self._task = asyncio.get_running_loop().create_task(self._watch(), name="watch VMs")
        return self._hypervisor

    async def close(self) -> None:
        """Stop, and let go of libvirt."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})  # however it ends
        if self._hypervisor is not None:
            await self._hypervisor.close()

    def forget(self, uuid: str) -> None:
        """The domain of this UUID has been defined anew."""
        self._marks.pop(uuid, None)

    def states(self) -> list[VmState]:
        """As of the last look, sorted by name."""
        return self._table.states(_now())

    def seen(self) -> dict[str, domains.Domain]:
        """The agent's domains as of the last look, by name; none where libvirt did not answer then."""
        return self._seen

    def addresses(self) -> dict[str, str]:
        """The IPv4 address of each of the agent's VMs, as of the last look."""
        mine = [mark for mark in self._marks.values() if mark is not None and mark.owner == self._owner]
        return {mark.name: mark.spec.ip for mark in mine if mark.spec is not None}

    def answered(self, answers: dict[str, bool | None]) -> None:
        """Which VMs answered at their addresses."""
        self._report(self._table.answered(answers, _now()))

    async def look(self) -> None:
        """Bring the states up to date, and tell what is new."""
        async with self._looking:
            hypervisor = self.hypervisor()
            try:
                if hypervisor.problem is not None:
                    raise Unavailable(hypervisor.problem)
                seen = await hypervisor.watch(
                    lambda libvirt: domains.ours(libvirt, self._owner, self._marks), _LOOK_SECONDS
                )
                self._seen = {domain.name: domain for domain in seen}
                files = await self._files_without(self._seen)
                changed = self._table.saw(seen, files, _now())
            except HypervisorError as error:
                self._seen = {}
                files = await self._files_without({state.name for state in self.states()})
                changed = self._table.lost_sight(str(error), files, _now())
            self._report(changed)

    async def _watch(self) -> None:
        while True:
            await self.look()
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self._poll_s, self._nudge.wait())
            self._nudge.clear()

    def _linked(self, problem: str | None) -> None:
        if problem is not None and problem != self._problem:
            _LOG.warning("%s", problem)
        self._problem = problem
        self._nudge.set()

    def _report(self, changed: list[VmState]) -> None:
        if changed and self._on_change is not None:
            self._on_change(changed)

    async def _files_without(self, known: Container[str]) -> dict[str, str]:
        """The deployment of each VM that has files here, is not known and is not being worked on."""
        marks = await asyncio.to_thread(self._files.marks, known)
        return {name: mark.deployment for name, mark in marks.items() if not self._is_busy(name)}


def _now() -> float:
    return asyncio.get_running_loop().time()
