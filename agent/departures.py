"""VMs that move to other hosts while they run: libvirt moves them, from daemon to daemon, over the agents' own link.

Whatever ends a move early leaves the VM here: what arrived of it on the other host does not run before this host says
that it has gone. What tells it has gone is libvirt, which forgets it once the other one has all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from agent import domains, moveways
from agent.arrivals import rehomed
from agent.hypervisor import HypervisorError, Unavailable, load_libvirt
from agent.journal import LetGo, RemoveSockets, Step
from agent.lanes import Lane
from agent.ledger import Entry
from agent.moveways import (
    CannotMove,
    Links,
    Ways,
    flags_for,
    hand_to,
    make_folder,
    pair,
    ways,
)
from agent.passage import Broken, Passage
from agent.vmactions import CannotAct
from agent.vmfiles import VmFiles
from agent.vmhost import HostVms
from agent.vmlocks import name_key
from agent.vmrepair import HalfDone
from agent.vmxml import Layout, mark_in_domain
from protocol import codec
from protocol.codec import MalformedMessage
from protocol.commands import MoveVm, Moving
from protocol.messages import MOVE_DOWNWARDS, Gone, LeadsTo
from protocol.stream import Blob
from protocol.vms import VmChange, VmResult, VmSpec

_LOG = logging.getLogger(__name__)

_ASK_SECONDS = 30.0
#: VIR_MIGRATE_AUTO_CONVERGE: a guest that writes faster than the link takes is slowed down until it goes. libvirt does
#: not tell the other side.
_CONVERGE = 8192
#: How often it is told how far a move is, in seconds.
_TELL_EVERY = 1.0
#: How long libvirt may take to end a move that is given up, in seconds: it waits for QEMU to take its disks back.
_ABORT_SECONDS = 60.0
#: What is left to be sent gets so long when the link is closed, in ms.
_LINGER_MS = 2_000
#: How long a seed may take to be on the other host's disk, in seconds.
_SEED_SECONDS = 60.0


class Departures:
    """The VMs that leave this host."""

    def __init__(self, vms: HostVms, prepare: Callable[[], Awaitable[object]]) -> None:
        """`prepare` finds out whom QEMU runs as, for whom the sockets are."""
        self._prepare = prepare
        self._uri, self._owner = vms.uri, vms.owner
        self._files, self._locks, self._repairs = vms.files, vms.locks, vms.repairs
        self._watch, self._call = vms.watch, vms.call

    async def move(self, body: MoveVm, links: Links, fleet: str, moving: Callable[[Moving], None]) -> VmResult:
        """Move a VM; `moving` is told how far it is. Raises CannotMove and others, and then it runs on here."""
        moveways.only_libvirtd(self._uri)
        await self._prepare()
        name = body.name
        async with self._locks.alone(name_key(name)):
            await self._repairs.settle(name)
            document, kept = await self._call(
                lambda libvirt: domains.movable(libvirt, name, self._owner, body.deployment), _ASK_SECONDS
            )
            mark = mark_in_domain(kept)
            if mark is None or mark.spec is None:
                raise CannotMove("it was made by another version of Canopy, which nobody here can read")
            spec = mark.spec
            old = await asyncio.to_thread(self._files.layout, spec)
            new = _layout_at(old, self._owner, body.directory)
            departure = _Departure(body, links, ways(fleet, body.of, name), self._files)
            entry = self._repairs.begin(name)
            try:
                await entry.note(
                    Step(
                        does="move it away",
                        undo=(LetGo(name=name, uuid=spec.uuid), RemoveSockets(paths=departure.ways.paths)),
                    )
                )
                await self._go(departure, spec, old, (rehomed(document, old, new, body.directory), kept, new), moving)
            except BaseException as error:
                gone = await asyncio.shield(self._gave_up(name, spec, entry, error))
                if gone and isinstance(error, Exception):
                    departure.say_gone()
                    return VmResult(name=name, change=VmChange.MOVED)
                raise
            else:
                departure.say_gone()
                await entry.take_back()
                self._watch.forget(spec.uuid)
                return VmResult(name=name, change=VmChange.MOVED)
            finally:
                await departure.close()

    async def settle(self, deployment: str, name: str, uuid: str) -> VmResult:
        """What became of a VM that was to move: `unchanged` where it is here. Raises HalfDone where nobody can tell."""
        async with self._locks.alone(name_key(name)):
            await self._repairs.settle(name)
            if await self._call(lambda libvirt: domains.let_go(libvirt, name, self._owner, uuid), _ASK_SECONDS):
                return VmResult(name=name, change=VmChange.UNCHANGED)
            mark = await asyncio.to_thread(self._files.mark, name)
            if mark is None or mark.spec is None or mark.spec.uuid != uuid or mark.deployment != deployment:
                return VmResult(name=name, change=VmChange.ABSENT)
            await asyncio.to_thread(self._files.remove, name)
            return VmResult(name=name, change=VmChange.REMOVED)

    async def _go(
        self,
        departure: _Departure,
        spec: VmSpec,
        old: Layout,
        documents: tuple[str, str, Layout],
        moving: Callable[[Moving], None],
    ) -> None:
        document, kept, new = documents
        await departure.open()
        if spec.seed is not None and old.seed is not None:
            await departure.send_seed(Path(old.seed))
        parameters = departure.parameters(document, rehomed(kept, old, new, departure.body.directory), spec)
        lane = Lane(f"move {spec.name}", 1)
        call = asyncio.wrap_future(
            lane.submit(lambda: self._migrate(departure, parameters, flags_for(spec) | _CONVERGE))
        )
        telling = asyncio.get_running_loop().create_task(self._tell(spec.name, moving))
        try:
            await asyncio.shield(call)
        except asyncio.CancelledError:
            with contextlib.suppress(HypervisorError):
                await self._watch.hypervisor().risk(lambda libvirt: domains.abort_job(libvirt, spec.name), _ASK_SECONDS)
            await asyncio.wait({call}, timeout=_ABORT_SECONDS)
            if call.done() and not call.cancelled():
                call.exception()
            raise
        except HypervisorError as error:
            # What the agents know of it is nearer to the cause than what libvirt saw.
            raise HypervisorError(f"{departure.trouble}: {error}" if departure.trouble else str(error)) from error
        finally:
            telling.cancel()
            lane.stop()

    def _migrate(self, departure: _Departure, parameters: dict[str, str], flags: int) -> None:
        libvirt = load_libvirt()
        try:
            connection = libvirt.open(self._uri)
            try:
                domain = connection.lookupByName(departure.body.name)
                domain.migrateToURI3(f"qemu+unix:///system?socket={departure.ways.libvirt}", parameters, flags)
            finally:
                connection.close()
        except libvirt.libvirtError as error:
            raise HypervisorError(" ".join(str(error).split()), error.get_error_code()) from None

    async def _tell(self, name: str, moving: Callable[[Moving], None]) -> None:
        while True:
            await asyncio.sleep(_TELL_EVERY)
            with contextlib.suppress(HypervisorError):
                done, left = await self._watch.hypervisor().risk(
                    lambda libvirt: domains.job_bytes(libvirt, name), _ASK_SECONDS
                )
                moving(Moving(done, left))

    async def _gave_up(self, name: str, spec: VmSpec, entry: Entry, error: BaseException) -> bool:
        """The move has ended early: whether the VM has gone all the same. It goes on here else."""
        until = asyncio.get_running_loop().time() + _ABORT_SECONDS
        while True:
            try:
                here = await self._call(
                    lambda libvirt: domains.let_go(libvirt, name, self._owner, spec.uuid), _ASK_SECONDS
                )
                if here:
                    await entry.end()
                else:
                    await entry.take_back()
                return not here
            except (Unavailable, CannotAct) as trouble:
                if asyncio.get_running_loop().time() >= until:
                    self._repairs.soon()
                    _LOG.warning("VM %s: %s, after %s", name, trouble, error)
                    return False
            except (HypervisorError, OSError, HalfDone) as trouble:
                self._repairs.soon()
                _LOG.warning("VM %s: %s, after %s", name, trouble, error)
                return False
            await asyncio.sleep(_TELL_EVERY)


def _layout_at(old: Layout, owner: str, directory: str) -> Layout:
    """The same files in another agent's directory."""
    found = {
        field: None if path is None else directory + path.removeprefix(owner)
        for field, path in ((field, getattr(old, field)) for field in Layout.__dataclass_fields__)
    }
    return Layout(**found)  # type: ignore[arg-type]  # a console is always there


class _Departure:
    """One VM that goes: the sockets at which libvirt and QEMU are met, and the link to the other host."""

    def __init__(self, body: MoveVm, links: Links, ways: Ways, files: VmFiles) -> None:
        self.body, self._links, self.ways, self._files = body, links, ways, files
        self._link: Any = None
        self._passage = Passage(body.of, self._send)
        self._servers: list[asyncio.AbstractServer] = []
        self._lost = ""

    @property
    def trouble(self) -> str:
        """What is known here of why it did not go well."""
        return self._lost or self._passage.trouble

    async def open(self) -> None:
        """Listen for libvirt and QEMU, and connect to the other host. Raises OSError."""
        user = self._files.user
        await asyncio.to_thread(make_folder, self.ways.folder, user)
        self.ways.remove()
        for path, to in self._paths():
            self._servers.append(await asyncio.start_unix_server(self._accept(to), path))
            hand_to(path, user if to is not LeadsTo.LIBVIRT else None)
        self._link = self._links.dial(self.body.to, heard=self._heard, lost=self._is_lost)

    def _paths(self) -> Iterator[tuple[Path, LeadsTo]]:
        yield self.ways.libvirt, LeadsTo.LIBVIRT
        yield self.ways.memory, LeadsTo.MEMORY
        yield self.ways.disk, LeadsTo.DISK

    def _accept(self, to: LeadsTo) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                if self._lost:
                    raise Broken(self._lost)
                self._passage.open(to, reader, writer)
            except Broken as error:
                _LOG.warning("VM %s: %s", self.body.name, error)
                writer.close()

        return accepted

    async def send_seed(self, path: Path) -> None:
        """Bring the seed disk over. Raises CannotMove where the other host did not take it."""
        data = await asyncio.to_thread(path.read_bytes)
        ours, (reader, writer) = await pair()
        self._passage.open(LeadsTo.SEED, *ours)
        try:
            writer.write(data)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(1), _SEED_SECONDS)
        except (OSError, asyncio.TimeoutError):
            answer = b""
        finally:
            writer.close()
        if not answer:
            raise CannotMove(
                f"its seed disk could not be brought to the other host: {self.trouble or 'it said nothing'}"
            )

    def parameters(self, document: str, kept: str, spec: VmSpec) -> dict[str, str]:
        """What libvirt is told (virDomainMigrateToURI3): the domain as it is to be there, and the ways to there."""
        libvirt = load_libvirt()
        found = {
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: document,
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: kept,
            libvirt.VIR_MIGRATE_PARAM_URI: f"unix://{self.ways.memory}",
        }
        if spec.disk is not None:
            found[libvirt.VIR_MIGRATE_PARAM_DISKS_URI] = f"unix://{self.ways.disk}"
        return found

    def say_gone(self) -> None:
        """Tell the other host that it may go on there."""
        if self._link is not None:
            self._send(Gone(self.body.of), None)

    def _send(self, message: Any, blob: bytes | None) -> None:
        self._link.send(codec.encode(message, blob))

    def _heard(self, frames: list[Blob]) -> None:
        try:
            message, blob = codec.decode(frames)
            if type(message) not in MOVE_DOWNWARDS or getattr(message, "id", None) != self.body.of:
                raise MalformedMessage(f"nobody sends {type(message).__name__} there")
            self._passage.heard(message, blob)
        except (MalformedMessage, Broken) as error:
            self._is_lost(f"the other host broke the rules: {error}")

    def _is_lost(self, why: str) -> None:
        if not self._lost:
            self._lost = f"the link to the other host: {why}"
            closing = asyncio.get_running_loop().create_task(self._passage.close())
            closing.add_done_callback(lambda done: None if done.cancelled() else done.exception())

    async def close(self) -> None:
        """Close all of it."""
        for server in self._servers:
            server.close()
        await self._passage.close()
        if self._link is not None:
            self._link.close(_LINGER_MS)
        await asyncio.to_thread(self.ways.remove)
