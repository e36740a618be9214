"""A host's VMs: made, removed, watched. All that it knows is in libvirt and in the VMs' files, so it may end any time.

Every VM is worked on by itself: what becomes of one is said in its VmResult and holds up no other. Each step is in the
journal with its undo before it is done, so that a VM is there whole or not at all, whoever is killed in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from agent import domains
from agent.console import Console
from agent.embedded import embedded_settings
from agent.flavour import find_flavour, runs_privileged
from agent.hypervisor import Connection, HypervisorError, Unavailable, default_uri
from agent.journal import RemoveDomain, RemoveFiles, Step, Undo
from agent.lanes import finish
from agent.ledger import Pages
from agent.ping import ping
from agent.vmactions import SECONDS, CannotAct, act
from agent.vmcreation import Creations, check
from agent.vmfiles import VmFileError, VmFiles, qemu_user
from agent.vmhost import OWN_WORDS, HostVms, VmRefused, outcome
from agent.vmlocks import Locks, name_key
from agent.vmrepair import Repairs
from agent.vmwatch import VmWatch
from agent.vmxml import Flavour
from protocol.vms import NAME_PATTERN, Action, SeenDomain, VmChange, VmResult, VmSpec, VmState

if TYPE_CHECKING:
    from agent.departures import Departures
    from agent.moveways import Links
    from agent.receptions import Receptions
    from protocol.commands import Awaiting, MoveVm, Moving, ReceiveVm, SettleMove

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)

#: Half of the 5 s within which a VM that is killed behind libvirt's back must show, less the time of one look.
POLL_SECONDS = 2.0
_ASK_SECONDS = 30.0
#: Creations in flight. Sixteen VMs on two loaded cores without KVM took 16 to 19 s one at a time, 6 to 9 s two, 5 to
#: 6 s four and 5 to 7 s eight at a time: more make nothing faster, and leave less CPU time to the guests that run.
CREATIONS_AT_A_TIME = 4
# What a guest gets for its shutdown, as systemd gives its services (DefaultTimeoutStopSec), and
# how often it is looked at.
_STOP_SECONDS = 90.0
_OFF_LOOK_SECONDS = 0.3


class VmWorker:
    """The VMs of one agent. `directory` is the agent's own; `uri` is libvirt's, by default the user's usual one.

    libvirt is not touched before the first request, unless VMs of an earlier run have files in the directory.
    `on_change` is called in the event loop with the states that are new.
    """

    def __init__(
        self,
        directory: Path,
        uri: str | None = None,
        *,
        on_change: Callable[[list[VmState]], None] | None = None,
        poll_s: float = POLL_SECONDS,
        pages: Pages | None = None,
    ) -> None:
        self._owner = str(directory.absolute())
        self.uri = uri or default_uri()
        self._privileged = runs_privileged(self.uri)
        self._files = VmFiles(Path(self._owner))
        self._watch = VmWatch(
            self.uri,
            self._owner,
            self._files,
            is_busy=lambda name: name_key(name) in self._locks,
            on_change=on_change,
            poll_s=poll_s,
        )
        self._flavour: Flavour | None = None
        self._preparing = asyncio.Lock()
        self._locks = Locks()
        self._slots = asyncio.Semaphore(CREATIONS_AT_A_TIME)
        self._repairs = Repairs(Path(self._owner), self._files, self._locks, self._call, pages)
        self._shared = HostVms(
            uri=self.uri,
            owner=self._owner,
            files=self._files,
            locks=self._locks,
            repairs=self._repairs,
            watch=self._watch,
            call=self._call,
        )
        self._creations = Creations(self._shared, self._prepare, self._slots)
        self._moves: tuple[Receptions, Departures] | None = None

    async def start(self) -> None:
        """Watch the VMs of an earlier run, where there are any, and take back what it left half done."""
        if await asyncio.to_thread(self._files.names):
            self._watch.hypervisor()
        self._repairs.soon()

    async def close(self) -> None:
        """Stop watching. VMs run on."""
        if self._moves is not None:
            await self._moves[0].close()
        await self._repairs.close()
        await self._watch.close()

    async def create(self, deployment: str, specs: Sequence[VmSpec], *, in_flight: int | None = None) -> list[VmResult]:
        """Bring VMs to what their specifications say; one result for each, in their order. `in_flight` of them are
        worked on at a time, None for as many as are best on most hosts, all requests taken together."""
        return await self._creations.create(deployment, specs, in_flight=in_flight)

    async def destroy(self, deployment: str | None, names: Iterable[str] | None = None) -> list[VmResult]:
        """Stop VMs and remove them with all their files; one result for each, in the order of `names`.

        `names` None is all that the deployment has here, sorted; `deployment` None is all of this agent's.
        """
        if names is None:
            names = await self._names(deployment)
        results = await asyncio.gather(
            *(outcome(name, self._destroy(deployment, name)) for name in dict.fromkeys(names))
        )
        await self._watch.look()
        return list(results)

    async def act(
        self,
        deployment: str,
        names: Iterable[str] | None,
        action: Action,
        *,
        hard: bool = False,
        label: str | None = None,
        deadline_s: float | None = None,
    ) -> list[VmResult]:
        """Do something to VMs; one result for each, in the order of `names` (None: all of the deployment, sorted).

        `hard` stops and reboots without asking the guest. `label` names the snapshot. A stop waits until the guest is
        off, for `deadline_s` seconds at most.
        """
        if names is None:
            names = await self._names(deployment)
        until = _now() + min(_STOP_SECONDS, deadline_s or _STOP_SECONDS)
        results = await asyncio.gather(
            *(
                outcome(name, self._act(deployment, name, action, hard=hard, label=label, until=until))
                for name in dict.fromkeys(names)
            )
        )
        await self._watch.look()
        return list(results)

    async def console(self, deployment: str, name: str, console: Console, *, force: bool) -> str:
        """Open a VM's console, until it ends. What was in the way, in one sentence; nothing where all was well."""
        try:
            await self._watch.hypervisor().risk(
                lambda libvirt: console.open(libvirt, name, self._owner, deployment, force=force), _ASK_SECONDS
            )
        except (HypervisorError, CannotAct, domains.NotOurs) as error:
            return str(error)
        await console.wait()
        return ""

    async def receive(self, id_: int, body: ReceiveVm, links: Links, fleet: str) -> Awaiting:
        """Make ready for a VM that comes from another host, and wait for it. Raises CannotAct where that can't be."""
        try:
            check(body.deployment, body.spec)
            return await self._ways()[0].receive(id_, body, links, fleet)
        except OWN_WORDS as error:
            raise CannotAct(f"{body.spec.name}: {error}") from error
        except OSError as error:
            raise CannotAct(f"{body.spec.name}: {error.filename or 'its files'}: {error.strerror}") from error

    async def move(self, body: MoveVm, links: Links, fleet: str, moving: Callable[[Moving], None]) -> VmResult:
        """Move a VM to a host that awaits it; `moving` is told how far it is."""

        async def work() -> VmResult:
            return await self._ways()[1].move(body, links, fleet, moving)

        result = await outcome(body.name, work())
        await self._watch.look()
        return result

    async def settle_move(self, body: SettleMove) -> VmResult:
        """Say what became of a move here, or follow what the root says became of it."""

        async def work() -> VmResult:
            receptions, departures = self._ways()
            if body.keep is None:
                return await departures.settle(body.deployment, body.name, body.uuid)
            return await receptions.settle(body.deployment, body.name, body.uuid, keep=body.keep)

        result = await outcome(body.name, work())
        await self._watch.look()
        return result

    def _ways(self) -> tuple[Receptions, Departures]:
        """Who takes VMs in and lets them go, made when first needed."""
        if self._moves is None:
            from agent.departures import Departures
            from agent.receptions import Receptions

            self._moves = Receptions(self._shared, self._prepare), Departures(self._shared, self._prepare)
        return self._moves

    async def states(self) -> list[VmState]:
        """This agent's VMs as they are now, sorted by name."""
        await self.start()
        if self._watch.begun:
            await self._watch.look()
        return self._watch.states()

    async def everybody(self) -> list[SeenDomain]:
        """All domains of this host's libvirt, whoever made them, sorted by name. Raises HypervisorError."""
        found = await self._call(domains.everybody, _ASK_SECONDS)
        return [
            SeenDomain(
                name=domain.name[:253],
                uuid=domain.uuid,
                power=domain.power,
                owner=domain.mark.owner[:4096] if domain.mark is not None else "",
                deployment=domain.mark.deployment[:253] if domain.mark is not None else "",
                mine=domain.mark is not None and domain.mark.owner == self._owner,
            )
            for domain in found
        ]

    async def reachable(self, names: Iterable[str], deadline_s: float) -> dict[str, bool | None]:
        """Which VMs answer ping at their addresses from this host, within `deadline_s` seconds.

        Returns as soon as all do. None where it can't be told: no such VM, no route, or no right to ping.
        """
        await self.states()
        addresses = self._watch.addresses()
        wanted = {name: addresses.get(name) for name in names}
        answers = await ping({address for address in wanted.values() if address is not None}, deadline_s)
        result = {name: None if address is None else answers[address] for name, address in wanted.items()}
        self._watch.answered(result)
        return result

    # --- getting ready ------------------------------------------------------------------------------------------

    async def _prepare(self) -> Flavour:
        """Make ready for creations. Raises VmRefused with what stands in the way of all of them."""
        try:
            async with self._preparing:
                if self._flavour is None:
                    flavour = await find_flavour(self._watch.hypervisor(), privileged=self._privileged)
                    await asyncio.to_thread(self._open_up_files)
                    self._flavour = flavour
                return self._flavour
        except (HypervisorError, VmFileError) as error:
            raise VmRefused(str(error)) from error
        except OSError as error:
            raise VmRefused(f"{error.filename or self._owner} can't hold VMs: {error.strerror}") from error

    def _open_up_files(self) -> None:
        self._files.open_up(qemu_user(embedded_settings(self.uri)) if self._privileged else None)

    # --- removal ------------------------------------------------------------------------------------------------

    async def _names(self, deployment: str | None) -> list[str]:
        marks = await asyncio.to_thread(self._files.marks)
        # Without libvirt each of these fails with the reason; and where there are none, none was made here.
        with contextlib.suppress(HypervisorError):
            here = await self._call(lambda libvirt: domains.ours(libvirt, self._owner, {}), _ASK_SECONDS)
            marks.update((domain.name, domain.mark) for domain in here if domain.mark is not None)
        return sorted(name for name, mark in marks.items() if deployment in (None, mark.deployment))

    async def _destroy(self, deployment: str | None, name: str) -> VmResult:
        if re.fullmatch(NAME_PATTERN, name) is None:
            raise VmRefused(f"{name!r} is no name of a VM")
        async with self._locks.alone(name_key(name)), self._slots:
            await self._repairs.settle(name)
            uuid, others = None, ""
            try:
                uuid = await self._call(lambda libvirt: _uuid_of(libvirt, name, self._owner, deployment), _ASK_SECONDS)
            except domains.NotOurs as error:
                others = str(error)
            has_files = await asyncio.to_thread(self._files.has, name)
            mark = await asyncio.to_thread(self._files.mark, name) if has_files else None
            if mark is not None and deployment not in (None, mark.deployment):
                has_files = False
                others = others or f"its files belong to the deployment {mark.deployment} and are left as they are"
            if uuid is None and not has_files:
                # What has the name is another VM than the one meant, which was never made and keeps no address.
                return VmResult(name=name, change=VmChange.ABSENT, detail=others)
            if others:
                raise VmRefused(others)
            await self._remove(name, uuid)
        return VmResult(name=name, change=VmChange.REMOVED)

    async def _remove(self, name: str, uuid: str | None) -> None:
        """Remove a VM that is this agent's to remove. What is cut short is finished: nobody wants half of it."""
        entry = self._repairs.begin(name)
        # The domain first: files don't go while it has them.
        domain = () if uuid is None else (RemoveDomain(name=name, uuid=uuid),)
        removal: tuple[Undo, ...] = (*domain, RemoveFiles(name=name))
        try:
            # A disk that is full must not keep VMs from being removed.
            with contextlib.suppress(OSError):
                await entry.note(Step(does="remove it", undo=removal))
            for undo in removal:
                await finish(self._repairs.undo(undo))
            await entry.end()
        except BaseException as error:
            self._repairs.wait_for(name, error)
            if isinstance(error, HypervisorError) and not isinstance(error, Unavailable):
                await entry.end()  # libvirt said no, and all is as it was
            else:
                self._repairs.soon()
            raise

    # --- life ---------------------------------------------------------------------------------------------------

    async def _act(
        self, deployment: str, name: str, action: Action, *, hard: bool, label: str | None, until: float
    ) -> VmResult:
        if action is Action.SNAPSHOT and label is None:
            raise VmRefused("a snapshot needs a name")
        async with self._locks.alone(name_key(name)):
            await self._repairs.settle(name)
            if action is Action.START:
                await self._creations.need_free_address(name)
            change = await self._watch.hypervisor().risk(
                lambda libvirt: act(libvirt, name, self._owner, deployment, action, hard=hard, label=label or ""),
                SECONDS[action],
            )
            if change is VmChange.STOPPED and not hard:
                await self._wait_off(name, until)
        return VmResult(name=name, change=change)

    async def _wait_off(self, name: str, until: float) -> None:
        while True:
            if await self._call(lambda libvirt: domains.is_off(libvirt, name), _ASK_SECONDS):
                return
            if _now() >= until:
                raise VmRefused("its guest was asked to stop and still runs; stop it with --hard")
            await asyncio.sleep(_OFF_LOOK_SECONDS)

    # --- common -------------------------------------------------------------------------------------------------

    async def _call(self, function: Callable[[object], _T], deadline_s: float) -> _T:
        return await self._watch.hypervisor().call(function, deadline_s)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _uuid_of(libvirt: Connection, name: str, owner: str, deployment: str | None) -> str | None:
    domain = domains.mine(libvirt, name, owner, deployment)
    return None if domain is None else str(domain.UUIDString())
