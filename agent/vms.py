"""A host's VMs: made, removed, watched. All that it knows is in libvirt and in the VMs' files, so it may end any time.

Every VM is worked on by itself: what becomes of one is said in its VmResult and holds up no other. Each step of a
creation has its undo, so that a VM is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from agent import domains
from agent.embedded import embedded_root, embedded_settings
from agent.hypervisor import CALLS_IN_FLIGHT, Hypervisor, HypervisorError, default_uri
from agent.kvmprobe import probe_kvm
from agent.ping import ping
from agent.vmfiles import VmFileError, VmFiles, qemu_user
from agent.vmwatch import VmWatch
from agent.vmxml import Flavour, differences, domain_xml, spec_digest
from protocol.vms import NAME_PATTERN, VmChange, VmPower, VmResult, VmSpec, VmState

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)

#: Half of the 5 s within which a VM that is killed behind libvirt's back must show, less the time of one look.
POLL_SECONDS = 2.0
# The first definition has libvirt try out QEMU: seconds, and most of a minute where the host's init reaps slowly.
_DEFINE_SECONDS = 120.0
_START_SECONDS = 120.0
# libvirt gives a QEMU that hangs some 10 s before it kills it.
_REMOVE_SECONDS = 60.0
_ASK_SECONDS = 30.0
_OFF = (VmPower.SHUTOFF, VmPower.CRASHED)


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
    ) -> None:
        self._owner = str(directory.absolute())
        self.uri = uri or default_uri()
        self._privileged = _runs_privileged(self.uri)
        self._files = VmFiles(Path(self._owner))
        self._watch = VmWatch(
            self.uri, self._owner, self._files, is_busy=self._is_busy, on_change=on_change, poll_s=poll_s
        )
        self._flavour: Flavour | None = None
        self._preparing = asyncio.Lock()
        self._locks: dict[str, tuple[asyncio.Lock, list[None]]] = {}
        self._slots = asyncio.Semaphore(CALLS_IN_FLIGHT)

    async def start(self) -> None:
        """Watch the VMs of an earlier run, where there are any."""
        if await asyncio.to_thread(self._files.names):
            self._watch.hypervisor()

    async def close(self) -> None:
        """Stop watching. VMs run on."""
        await self._watch.close()

    async def create(self, deployment: str, specs: Sequence[VmSpec]) -> list[VmResult]:
        """Bring VMs to what their specifications say; one result for each, in their order.

        What is missing is made, what is defined and off is started, what is right is left, and what differs from its
        specification is reported and left. Never raises for a VM's sake.
        """
        try:
            flavour = await self._prepare()
        except _Refused as error:
            return [VmResult(name=spec.name, change=VmChange.FAILED, detail=str(error)) for spec in specs]
        named: set[str] = set()
        work = []
        for spec in specs:
            twice = spec.name in named
            named.add(spec.name)
            work.append(_outcome(spec.name, self._create(deployment, spec, flavour, twice=twice)))
        results = await asyncio.gather(*work)
        await self._watch.look()
        return list(results)

    async def destroy(self, deployment: str | None, names: Iterable[str] | None = None) -> list[VmResult]:
        """Stop VMs and remove them with all their files; one result for each, in the order of `names`.

        `names` None is all that the deployment has here, sorted; `deployment` None is all of this agent's.
        """
        if names is None:
            names = await self._names(deployment)
        results = await asyncio.gather(
            *(_outcome(name, self._destroy(deployment, name)) for name in dict.fromkeys(names))
        )
        await self._watch.look()
        return list(results)

    async def states(self) -> list[VmState]:
        """This agent's VMs as they are now, sorted by name."""
        await self.start()
        if self._watch.begun:
            await self._watch.look()
        return self._watch.states()

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

    # --- creation -----------------------------------------------------------------------------------------------

    async def _prepare(self) -> Flavour:
        """Make ready for creations. Raises _Refused with what stands in the way of all of them."""
        try:
            async with self._preparing:
                if self._flavour is None:
                    flavour = await _find_flavour(self._watch.hypervisor(), privileged=self._privileged)
                    await asyncio.to_thread(self._open_up_files)
                    self._flavour = flavour
                return self._flavour
        except (HypervisorError, VmFileError) as error:
            raise _Refused(str(error)) from error
        except OSError as error:
            raise _Refused(f"{error.filename or self._owner} can't hold VMs: {error.strerror}") from error

    def _open_up_files(self) -> None:
        self._files.open_up(qemu_user(embedded_settings(self.uri)) if self._privileged else None)

    async def _create(self, deployment: str, spec: VmSpec, flavour: Flavour, *, twice: bool) -> VmResult:
        _check(deployment, spec)
        if twice:
            raise _Refused("it is named twice in this request; the first one counts")
        async with self._alone(f"name {spec.name}", f"uuid {spec.uuid}"), self._slots:
            found = await self._call(lambda libvirt: domains.find(libvirt, spec.name, spec.uuid), _ASK_SECONDS)
            if found.domain is not None:
                return await self._converge(spec, found.domain, flavour)
            if found.uuid_holder is not None:
                raise _Refused(f"its UUID is that of the domain {found.uuid_holder} already; remove that one")
            return await self._make(spec, flavour)

    async def _converge(self, spec: VmSpec, domain: domains.Domain, flavour: Flavour) -> VmResult:
        mark = domain.mark
        if mark is None:
            raise _Refused("a domain of this name is there, was not made by Canopy and is left as it is")
        if mark.owner != self._owner:
            raise _Refused(f"a domain of this name was made by the agent in {mark.owner} and is left as it is")
        if mark.deployment != spec.deployment:
            raise _Refused(f"a VM of this name belongs to the deployment {mark.deployment} and is left as it is")
        if mark.digest != spec_digest(spec):
            detail = "; ".join(differences(mark.spec, spec)) if mark.spec else "made by another version of Canopy"
            return VmResult(name=spec.name, change=VmChange.DIFFERS, detail=detail)
        if domain.power not in _OFF:
            odd = domain.power not in (VmPower.RUNNING, VmPower.BLOCKED)
            detail = f"it is {domain.power.value}" if odd else "" if spec.start else "it runs, and is planned not to"
            return VmResult(name=spec.name, change=VmChange.UNCHANGED, detail=detail)
        if not spec.start:
            return VmResult(name=spec.name, change=VmChange.UNCHANGED)
        await asyncio.to_thread(self._files.layout, spec)
        await self._call(lambda libvirt: domains.start(libvirt, spec.name), _START_SECONDS)
        return VmResult(name=spec.name, change=VmChange.STARTED, detail=_without_cap(spec, flavour))

    async def _make(self, spec: VmSpec, flavour: Flavour) -> VmResult:
        layout = await asyncio.to_thread(self._files.layout, spec)
        document = domain_xml(spec, layout, flavour, self._owner)
        undo: list[tuple[str, Callable[[], Awaitable[object]]]] = []
        try:
            if await asyncio.to_thread(self._add_files, spec, document):
                undo.append(("its files", lambda: asyncio.to_thread(self._files.remove, spec.name)))
            if spec.disk is not None:
                await self._files.make_overlay(spec.name, spec.disk)
            undo.append(("its domain", lambda: self._remove_domain(spec.name, spec.deployment)))
            await _finish(self._call(lambda libvirt: domains.define(libvirt, document), _DEFINE_SECONDS))
            self._watch.forget(spec.uuid)
            if spec.start:
                await _finish(self._call(lambda libvirt: domains.start(libvirt, spec.name), _START_SECONDS))
        except BaseException as error:
            left = await asyncio.shield(_undo_all(undo))
            if left and isinstance(error, Exception):
                raise _Refused(f"{error}; and {left}") from error
            raise
        return VmResult(name=spec.name, change=VmChange.CREATED, detail=_without_cap(spec, flavour))

    def _add_files(self, spec: VmSpec, document: str) -> bool:
        """The VM's directory; whether it is new. One of the same specification is that of a VM which libvirt has
        forgotten, or of a creation that was cut short: what is on its disk is kept."""
        try:
            self._files.add(spec.name, document)
        except FileExistsError:
            mark = self._files.mark(spec.name)
            if mark is not None and mark.digest == spec_digest(spec):
                return False
            raise _Refused(
                "there are files of a VM of this name that libvirt does not know, of another specification; "
                "destroy it first"
            ) from None
        return True

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
            raise _Refused(f"{name!r} is no name of a VM")
        async with self._alone(f"name {name}"), self._slots:
            removed = await self._remove_domain(name, deployment)
            mark = await asyncio.to_thread(self._files.mark, name)
            if mark is not None and deployment not in (None, mark.deployment):
                raise _Refused(f"its files belong to the deployment {mark.deployment} and are left as they are")
            removed |= await asyncio.to_thread(self._files.remove, name)
        return VmResult(name=name, change=VmChange.REMOVED if removed else VmChange.ABSENT)

    async def _remove_domain(self, name: str, deployment: str | None) -> bool:
        return await self._call(lambda libvirt: domains.remove(libvirt, name, self._owner, deployment), _REMOVE_SECONDS)

    # --- common -------------------------------------------------------------------------------------------------

    async def _call(self, function: Callable[[object], _T], deadline_s: float) -> _T:
        return await self._watch.hypervisor().call(function, deadline_s)

    @contextlib.asynccontextmanager
    async def _alone(self, *keys: str) -> AsyncIterator[None]:
        """Nobody else works on any of `keys`. libvirt can crash on two creations of one name or UUID at a time."""
        async with contextlib.AsyncExitStack() as stack:
            for key in sorted(keys):
                lock, users = self._locks.setdefault(key, (asyncio.Lock(), []))
                users.append(None)
                stack.callback(self._leave, key)
                await stack.enter_async_context(lock)
            yield

    def _is_busy(self, name: str) -> bool:
        return f"name {name}" in self._locks

    def _leave(self, key: str) -> None:
        _, users = self._locks[key]
        users.pop()
        if not users:
            del self._locks[key]


class _Refused(Exception):
    """One VM can't be had as asked; the text says why."""


async def _outcome(name: str, work: Awaitable[VmResult]) -> VmResult:
    try:
        return await work
    except (_Refused, VmFileError, HypervisorError, domains.NotOurs) as error:
        return VmResult(name=name, change=VmChange.FAILED, detail=str(error))
    except OSError as error:
        detail = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return VmResult(name=name, change=VmChange.FAILED, detail=detail)
    except Exception as error:
        _LOG.exception("VM %s", name)
        return VmResult(name=name, change=VmChange.FAILED, detail=f"{type(error).__name__}: {error}")


def _without_cap(spec: VmSpec, flavour: Flavour) -> str:
    if spec.cpu_quota is None or flavour.caps:
        return ""
    return "without its CPU cap, which libvirt can't set for an ordinary user"


async def _finish(work: Awaitable[_T]) -> _T:
    """Like `await work`, but a cancellation takes effect only when the work is done: a call to libvirt goes on in its
    thread all the same, and what it makes could not be undone before."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def _undo_all(undo: list[tuple[str, Callable[[], Awaitable[object]]]]) -> str:
    """Take back what was done, last first. Returns what could not be."""
    left = []
    for what, step in reversed(undo):
        try:
            await step()
        except Exception as error:
            left.append(f"{what} could not be removed: {error}")
    return "; ".join(left)


def _check(deployment: str, spec: VmSpec) -> None:
    try:
        # What came over the wire was checked there; what a program made in place was not.
        msgspec.convert(msgspec.to_builtins(spec), VmSpec)
    except msgspec.ValidationError as error:
        raise _Refused(f"its specification is malformed: {error}") from None
    if spec.deployment != deployment:
        raise _Refused(f"its specification is for the deployment {spec.deployment}, the request for {deployment}")
    if spec.boot is None and spec.disk is None:
        raise _Refused("it has neither a kernel nor a disk to boot; give it one")


async def _find_flavour(hypervisor: Hypervisor, *, privileged: bool) -> Flavour:
    driver = await hypervisor.call(lambda libvirt: str(libvirt.getType()), _ASK_SECONDS)
    architecture = platform.machine()
    if driver.upper() == "TEST":
        return Flavour(kind="test", architecture=architecture)
    answer = await probe_kvm()
    # Where this user may not try, libvirtd with its own rights may still have KVM.
    worth_asking = answer.usable or (answer.usable is None and privileged)
    kvm = worth_asking and await hypervisor.call(
        lambda libvirt: domains.knows_kvm(libvirt, architecture), _DEFINE_SECONDS
    )
    _LOG.info("VMs run %s KVM: %s", "with" if kvm else "without", answer.why)
    return Flavour(kind="kvm" if kvm else "qemu", architecture=architecture, caps=privileged)


def _runs_privileged(uri: str) -> bool:
    """Whether libvirt at `uri` has root's rights, and so runs QEMU as a user of its own."""
    if embedded_root(uri) is not None:
        return os.geteuid() == 0
    return uri.partition("?")[0].endswith("/system")
