"""VMs that come from other hosts while they run: made ready for, let in, and let go on once they are gone there.

A VM arrives halted. It goes on here when the host that had it says that it is there no more, or the root does; so it
never runs twice, whatever breaks in between. Until then its journal stays, and neither a start of the agent nor a
repair removes what has arrived: it may be all that there is of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agent import domains, moveways
from agent.arrivals import check_arrival
from agent.hypervisor import HypervisorError
from agent.journal import RemoveDomain, RemoveFiles, RemoveSockets, Step
from agent.lanes import finish
from agent.ledger import Entry
from agent.moveways import (
    CannotMove,
    Links,
    Ways,
    connect_libvirt,
    flags_for,
    make_folder,
    pair,
    read_seed,
    ways,
)
from agent.passage import Broken, Forbidding, Passage, Sift
from agent.ports import free_ports
from agent.rpcgate import Forbidden, Gate, Move
from agent.vmhost import HostVms
from agent.vmlocks import name_key, uuid_key
from agent.vmrepair import HalfDone
from agent.vmxml import Flavour, Layout, domain_xml
from protocol import codec
from protocol.codec import MalformedMessage
from protocol.commands import Awaiting, ReceiveVm
from protocol.limits import MOVE_WITHIN
from protocol.messages import MOVE_UPWARDS, Gone, LeadsTo
from protocol.vms import VmChange, VmResult, VmSpec

_LOG = logging.getLogger(__name__)

_ASK_SECONDS = 30.0
#: libvirt gives up a VM that was on its way within seconds of the connection's end.
_SETTLE_TRIES, _SETTLE_EVERY = 60, 0.5
#: Where Linux lists interfaces (sysfs(5)).
_BRIDGES = Path("/sys/class/net")


class Receptions:
    """The VMs that this host is taking in."""

    def __init__(self, vms: HostVms, prepare: Callable[[], Awaitable[Flavour]]) -> None:
        self._uri, self._owner = vms.uri, vms.owner
        self._files, self._locks, self._repairs = vms.files, vms.locks, vms.repairs
        self._call = vms.call
        self._prepare = prepare
        self._open: dict[str, _Reception] = {}
        #: Why VMs did not come, until the root asks: it is known here alone.
        self._why: dict[str, str] = {}

    async def receive(self, id_: int, body: ReceiveVm, links: Links, fleet: str) -> Awaiting:
        """Make ready for a VM, and wait for it from then on. Raises CannotMove and others with what is in the way."""
        moveways.only_libvirtd(self._uri)
        reception = _Reception(self, id_, body, links, ways(fleet, id_, body.spec.name))
        task = asyncio.get_running_loop().create_task(self._take_in(reception), name=f"take in {body.spec.name}")
        reception.task = task
        task.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
        try:
            return await asyncio.shield(reception.ready)
        except asyncio.CancelledError:
            task.cancel()
            raise

    async def settle(self, deployment: str, name: str, uuid: str, *, keep: bool) -> VmResult:
        """The root's word on a VM that arrived: whether it goes on here. Raises HypervisorError, HalfDone, …"""
        reception = self._open.get(name)
        if reception is not None and reception.body.spec.uuid == uuid and reception.task is not None:
            if keep:
                reception.let_go_on()
            else:
                reception.task.cancel()
            await asyncio.wait({reception.task})
        async with self._locks.alone(name_key(name), uuid_key(uuid)):
            entry = await self._repairs.arrival(name, uuid)
            if entry is None:
                there = await self._call(
                    lambda libvirt: domains.mine(libvirt, name, self._owner, deployment) is not None, _ASK_SECONDS
                )
                change = VmChange.UNCHANGED if there else VmChange.ABSENT
                return VmResult(name=name, change=change, detail=self._why.pop(name, ""))
            if keep:
                await self._go_on(name, uuid, entry)
                return VmResult(name=name, change=VmChange.MOVED)
            left = await entry.take_back()
            if left:
                self._repairs.soon()
                raise HalfDone(f"what had arrived of it can't be removed: {left}")
            return VmResult(name=name, change=VmChange.REMOVED, detail=self._why.pop(name, ""))

    async def _go_on(self, name: str, uuid: str, entry: Entry) -> None:
        await finish(self._call(lambda libvirt: domains.go_on(libvirt, name, self._owner, uuid), _ASK_SECONDS))
        for undo in (undo for step in entry.steps for undo in step.undo if isinstance(undo, RemoveSockets)):
            await self._repairs.undo(undo)
        await entry.end()

    async def close(self) -> None:
        """End. What has arrived waits for the next agent."""
        tasks = [one.task for one in self._open.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- one VM -------------------------------------------------------------------------------------------------------

    async def _take_in(self, reception: _Reception) -> None:
        spec = reception.body.spec
        try:
            flavour = await self._prepare()
            async with self._locks.alone(name_key(spec.name), uuid_key(spec.uuid)):
                await self._repairs.settle(spec.name)
                layout = await self._look(spec)
                self._open[spec.name] = reception
                try:
                    await self._await(reception, spec, layout, flavour)
                finally:
                    del self._open[spec.name]
        except BaseException as error:
            if not reception.ready.done():
                reception.ready.set_exception(error if isinstance(error, Exception) else CannotMove("it was stopped"))
            elif isinstance(error, Exception):
                _LOG.warning("VM %s did not come: %s", spec.name, error)
                self._why[spec.name] = str(error)
            if not isinstance(error, Exception):
                raise

    async def _look(self, spec: VmSpec) -> Layout:
        found = await self._call(lambda libvirt: domains.find(libvirt, spec.name, spec.uuid), _ASK_SECONDS)
        if found.domain is not None or found.uuid_holder is not None:
            raise CannotMove(
                f"there is a domain {spec.name if found.domain is not None else found.uuid_holder} of its name or UUID"
            )
        if await asyncio.to_thread(self._files.has, spec.name):
            raise CannotMove("there are files of a VM of this name; destroy it there first")
        bridge = spec.network.bridge
        if bridge is not None and not (_BRIDGES / bridge).exists():
            raise CannotMove(f"there is no bridge {bridge}; make it, or `ctl net create` does on all hosts")
        return await asyncio.to_thread(self._files.layout, spec)

    async def _await(self, reception: _Reception, spec: VmSpec, layout: Layout, flavour: Flavour) -> None:
        undo = (
            RemoveDomain(name=spec.name, uuid=spec.uuid),
            RemoveFiles(name=spec.name),
            RemoveSockets(paths=reception.ways.paths),
        )
        entry = self._repairs.begin(spec.name)
        try:
            await entry.note(Step(does="take it in", undo=undo, arrives=True))
            document = domain_xml(spec, layout, flavour, self._owner)
            await asyncio.to_thread(self._files.add, spec.name, document)
            if spec.disk is not None:
                await self._files.make_overlay(spec.name, spec.disk)
            await asyncio.to_thread(make_folder, reception.ways.folder, self._files.user)
            move = Move(
                name=spec.name,
                uuid=spec.uuid,
                flags=flags_for(spec),
                memory_uri=f"unix://{reception.ways.memory}",
                disk_uri=f"unix://{reception.ways.disk}",
                domain=lambda text: check_arrival(text, spec, layout, flavour.kind, self._owner),
            )
            await reception.wait(move, layout, self._owner)
        except BaseException as error:
            await asyncio.shield(self._gave_up(spec, entry, error, began=reception.ready.done()))
            raise
        await self._go_on(spec.name, spec.uuid, entry)

    async def _gave_up(self, spec: VmSpec, entry: Entry, error: BaseException, *, began: bool) -> None:
        """It did not come, or nobody can tell here whether it did: what has arrived stays until somebody can."""
        if not began:
            await self._repairs.give_up(spec.name, entry, error)
            return
        for _ in range(_SETTLE_TRIES):
            try:
                await self._repairs.settle(spec.name)
                return
            except HalfDone as left:
                if self._repairs.waits(spec.name):
                    _LOG.warning("VM %s: %s", spec.name, left)
                    return
            except (HypervisorError, OSError) as trouble:
                _LOG.warning("VM %s: %s", spec.name, trouble)
            await asyncio.sleep(_SETTLE_EVERY)
        self._repairs.soon()


class _Reception:
    """One VM that is awaited: the link to the host that has it, and what its channels lead to."""

    def __init__(self, receptions: Receptions, id_: int, body: ReceiveVm, links: Links, ways: Ways) -> None:
        self._id, self.body, self._links, self.ways = id_, body, links, ways
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Awaiting] = self._loop.create_future()
        self.task: asyncio.Task[None] | None = None
        self._end: asyncio.Future[None] = self._loop.create_future()
        self._heard_of = False
        self._link: Any = None
        self._passage: Passage | None = None
        self._move: Move | None = None
        self._layout: Layout | None = None
        self._seeds: set[asyncio.Task[None]] = set()

    def let_go_on(self) -> None:
        """It is gone where it was."""
        if not self._end.done():
            self._end.set_result(None)

    def _over(self, why: str) -> None:
        if not self._end.done():
            self._end.set_exception(CannotMove(why))

    async def wait(self, move: Move, layout: Layout, owner: str) -> None:
        """Listen until the VM may go on here. Raises CannotMove where the link ends without that."""
        self._move, self._layout = move, layout
        [port] = free_ports("0.0.0.0", 1)  # noqa: S104  only looked at
        self._passage = Passage(self._id, self._send, leads=self._lead)
        self._link = self._links.await_host(self._id, self.body.source, port, heard=self._heard, lost=self._over)
        try:
            self.ready.set_result(Awaiting(port, owner))
            await asyncio.wait({self._end}, timeout=MOVE_WITHIN)
            if not self._heard_of and not self._end.done():
                raise CannotMove(f"nobody came within {MOVE_WITHIN:.0f} s")
            await self._end
        finally:
            self._link.close()
            self._links.dismiss_host(self._id)
            await self._passage.close()
            for task in self._seeds:
                task.cancel()
            self.ways.remove()
            if self._end.done() and not self._end.cancelled():
                self._end.exception()

    def _send(self, message: Any, blob: bytes | None) -> None:
        self._link.send(self.body.source.rank, codec.encode(message, blob))

    def _heard(self, frames: list[bytes]) -> None:
        self._heard_of = True
        try:
            message, blob = codec.decode(frames)
            if type(message) not in MOVE_UPWARDS or getattr(message, "id", None) != self._id:
                raise MalformedMessage(f"nobody sends {type(message).__name__} there")
            if isinstance(message, Gone):
                self.let_go_on()
            elif self._passage is not None:
                self._passage.heard(message, blob)
        except (MalformedMessage, Broken) as error:
            self._link.drop(self.body.source.rank, penalty=False)
            self._over(f"the host that has it broke the rules: {error}")

    async def _lead(self, to: LeadsTo) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Sift | None]:
        if to is LeadsTo.SEED:
            return await self._lead_to_seed()
        if to is LeadsTo.LIBVIRT and self._move is not None:
            reader, writer = await connect_libvirt()
            gate = Gate(self._move)

            def sift(data: bytes) -> bytes:
                try:
                    return gate.feed(data)
                except Forbidden as error:
                    self._over(f"the host that has it asked for what no move needs: {error}")
                    raise Forbidding(str(error)) from error

            return reader, writer, sift
        path = self.ways.memory if to is LeadsTo.MEMORY else self.ways.disk
        return (*await asyncio.open_unix_connection(path), None)

    async def _lead_to_seed(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Sift | None]:
        if self._layout is None or self._layout.seed is None or self._seeds:
            raise CannotMove("it has no seed, or two")
        ours, theirs = await pair()
        task = self._loop.create_task(read_seed(*theirs, Path(self._layout.seed)))
        self._seeds.add(task)
        task.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
        return (*ours, None)
