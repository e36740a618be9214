"""The commands on a host's VMs: each to what knows how, and to exactly one outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from agent.identity import HostDirectory
from agent.pushes import sentence
from protocol import events
from protocol.commands import (
    Console,
    CreateVms,
    DestroyVms,
    Feed,
    ListVms,
    MoveVm,
    Moving,
    ProbeVms,
    ReceiveVm,
    SettleMove,
    VmAction,
)
from protocol.outcomes import NO_OUTPUT, Exited, FailedToStart, Outcome, Output, Refused
from protocol.vms import VmChange, VmResult, VmState

if TYPE_CHECKING:
    from agent.console import Console as OpenConsole
    from agent.leaving import Ending
    from agent.shell import Shell
    from agent.vms import VmWorker

#: What this file knows how to do.
VmBody: TypeAlias = CreateVms | DestroyVms | VmAction | ProbeVms | ListVms | Console | ReceiveVm | MoveVm | SettleMove
#: How long VMs are pinged where the command has no deadline, and how long before its deadline the answer is given, in
#: s.
_PROBE_WITHIN, _SLACK = 30.0, 0.5
#: How often ARP's table is looked at for VMs that do not answer ping, in seconds.
_ARP_EVERY = 2.0


class VmCommands:
    """What is asked of a host's VMs. libvirt is not touched before the first command."""

    def __init__(
        self, shell: Shell, directory: HostDirectory, uri: str | None, finish: Callable[[int, Outcome, Output], None]
    ) -> None:
        """`uri` is libvirt's; None for the usual one. `finish` is told each command's outcome."""
        self._shell = shell
        self._directory = directory
        self._uri = uri
        self._finish = finish
        self._loop = asyncio.get_running_loop()
        self._worker: VmWorker | None = None
        self._consoles: dict[int, OpenConsole] = {}

    def _vms(self) -> VmWorker:
        """The worker for VMs, made when it is first needed: libvirt costs an idle agent nothing."""
        if self._worker is None:
            from agent.vms import VmWorker

            self._worker = VmWorker(self._directory.path, self._uri, on_change=self._vms_changed)
        return self._worker

    def _vms_changed(self, states: list[VmState]) -> None:
        self._shell.feed(events.Observed(None, tuple(states), whole=False))

    async def work(self, id_: int, body: VmBody, ttl: float | None) -> None:
        """Do what a command says, within `ttl` seconds where it has a deadline."""
        within = None if ttl is None else max(0.1, ttl - _SLACK)
        match body:
            case CreateVms():
                self._changed(id_, await self._vms().create(body.deployment, body.specs, in_flight=body.in_flight))
            case DestroyVms():
                self._changed(id_, await self._vms().destroy(body.deployment, body.names))
            case VmAction():
                self._changed(id_, await self._act(body, within))
            case ProbeVms():
                answered = await self._probe(self._vms(), body, _PROBE_WITHIN if within is None else within)
                code = 0 if len(answered) == len(set(body.names)) else 1
                self._finish(id_, Exited(code), Output(out=msgspec.msgpack.encode(sorted(answered))))
            case ListVms():
                await self._list(id_)
            case Console():
                await self._console(id_, body)
            case ReceiveVm():
                await self._receive(id_, body)
            case MoveVm():
                self._changed(id_, [await self._move(id_, body)])
            case SettleMove():
                self._changed(id_, [await self._vms().settle_move(body)])

    def _changed(self, id_: int, results: list[VmResult]) -> None:
        bad = any(result.change in (VmChange.FAILED, VmChange.DIFFERS) for result in results)
        self._finish(id_, Exited(1 if bad else 0), Output(out=msgspec.msgpack.encode(results)))

    async def _act(self, body: VmAction, within: float | None) -> list[VmResult]:
        return await self._vms().act(
            body.deployment, body.names, body.action, hard=body.hard, label=body.label, deadline_s=within
        )

    async def _list(self, id_: int) -> None:
        from agent.hypervisor import HypervisorError

        try:
            found = await self._vms().everybody()
        except HypervisorError as error:
            self._finish(id_, FailedToStart(str(error)), NO_OUTPUT)
            return
        self._finish(id_, Exited(0), Output(out=msgspec.json.encode(found)))

    async def _receive(self, id_: int, body: ReceiveVm) -> None:
        from agent.vmactions import CannotAct

        try:
            awaiting = await self._vms().receive(id_, body, self._shell, self._directory.welcome().fleet)
        except CannotAct as error:
            self._finish(id_, Refused(sentence(error)), NO_OUTPUT)
            return
        self._finish(id_, Exited(0), Output(out=msgspec.msgpack.encode(awaiting)))

    async def _move(self, id_: int, body: MoveVm) -> VmResult:
        written = 0

        def moving(how_far: Moving) -> None:
            nonlocal written
            data = msgspec.msgpack.encode(how_far)
            self._shell.feed(events.Wrote(id_, 1, written, data))
            written += len(data)

        return await self._vms().move(body, self._shell, self._directory.welcome().fleet, moving)

    async def _probe(self, worker: VmWorker, body: ProbeVms, within: float) -> set[str]:
        """Those that answer, or have their addresses where that is enough."""
        if not body.address:
            answers = await worker.reachable(body.names, within)
            return {name for name, answer in answers.items() if answer}
        from agent.addressed import found_by_arp
        from agent.claims import holders
        from agent.vmfiles import VmFiles

        marks = await asyncio.to_thread(VmFiles(self._directory.path).marks)
        specs = {name: mark.spec for name, mark in marks.items() if name in set(body.names) and mark.spec is not None}
        deadline = self._loop.time() + within
        have: set[str] = set()
        while (left := deadline - self._loop.time()) > 0 and len(have) < len(set(body.names)):
            missing = [name for name in body.names if name not in have]
            bridges: dict[str, list[str]] = {}
            for name in missing:
                if name in specs and specs[name].network.bridge is not None:
                    bridges.setdefault(str(specs[name].network.bridge), []).append(specs[name].ip)
            # Asking for an echo has the kernel ask for the MAC; of an isolated network it has no address, and can't.
            answers, told = await asyncio.gather(
                worker.reachable(missing, min(left, _ARP_EVERY)),
                asyncio.gather(*(holders(bridge, addresses) for bridge, addresses in bridges.items())),
            )
            found = found_by_arp({spec.ip: spec.mac for spec in specs.values()})
            for heard in told:
                found |= {spec.ip for spec in specs.values() if heard.get(spec.ip) == spec.mac.lower()}
            have |= {name for name in missing if answers.get(name) or (name in specs and specs[name].ip in found)}
        return have

    async def _console(self, id_: int, body: Console) -> None:
        from agent.console import Console as Opened

        def wrote(stream: int, offset: int, data: bytes) -> None:
            self._shell.feed(events.Wrote(id_, stream, offset, data))

        console = self._consoles[id_] = Opened(wrote)
        try:
            problem = await self._vms().console(body.deployment, body.name, console, force=body.force)
        finally:
            del self._consoles[id_]
        self._finish(id_, Refused(problem) if problem else Exited(0), NO_OUTPUT)

    def type(self, feed: Feed) -> None:
        """Something was typed into a console."""
        console = self._consoles.get(feed.of)
        if console is not None:
            console.feed(feed.offset, feed.data, feed.seen, again=feed.again)

    # --- beside commands ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Watch the VMs of an earlier agent, and take back what it left half done."""
        await self._vms().start()

    async def states(self) -> list[VmState]:
        """The states of all VMs; none where nobody has asked for a VM here."""
        return [] if self._worker is None else await self._worker.states()

    async def end(self, ending: Ending, *, destroy: bool, purge: bool) -> None:
        """Let go of libvirt; with `destroy` all VMs of this agent's go first."""
        from agent.leaving import DESTROY_WITHIN, LET_GO_WITHIN

        if destroy:
            await ending.part("VMs", self._destroy_all(), DESTROY_WITHIN)
        if self._worker is not None:
            await ending.part("libvirt", self._worker.close(), LET_GO_WITHIN)
            if purge:
                await ending.part("sockets of moves", self._remove_sockets(), LET_GO_WITHIN)

    async def _destroy_all(self) -> None:
        from agent.leaving import NotEnded

        results = await self._vms().destroy(None)
        failed = [f"{result.name}: {result.detail}" for result in results if result.change is VmChange.FAILED]
        if failed:
            raise NotEnded("; ".join(failed))

    async def _remove_sockets(self) -> None:
        from agent.moveways import folder_of

        with suppress(OSError):
            folder_of(self._directory.welcome().fleet).rmdir()
