"""VMs brought to what their specifications say: what is missing is made, what is off is started, all else is left.

Each step is in the journal with its undo before it is done, so that a VM is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import platform
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from agent import domains
from agent.claims import claimed
from agent.journal import RemoveDomain, RemoveFiles, Step
from agent.lanes import finish
from agent.vmhost import HostVms, VmRefused, outcome
from agent.vmlocks import name_key, uuid_key
from agent.vmrepair import OFF
from agent.vmxml import Flavour, differences, domain_xml, spec_digest
from protocol.vms import VmChange, VmPower, VmResult, VmSpec

# The first definition has libvirt try out QEMU: seconds, and most of a minute where the host's init reaps slowly.
_DEFINE_SECONDS = 120.0
_START_SECONDS = 120.0
_ASK_SECONDS = 30.0


class Creations:
    """The VMs that are being made on a host."""

    def __init__(self, vms: HostVms, prepare: Callable[[], Awaitable[Flavour]], slots: asyncio.Semaphore) -> None:
        """`prepare` finds out what this host's VMs are like, or raises VmRefused. What libvirt works at holds one of
        `slots`."""
        self._owner, self._files, self._locks, self._repairs = vms.owner, vms.files, vms.locks, vms.repairs
        self._watch, self._call = vms.watch, vms.call
        self._prepare = prepare
        self._slots = slots

    async def create(self, deployment: str, specs: Sequence[VmSpec], *, in_flight: int | None = None) -> list[VmResult]:
        """Bring VMs to what their specifications say; one result for each, in their order. `in_flight` of them are
        worked on at a time, None for as many as are best on most hosts, all requests taken together.

        What is missing is made, what is defined and off is started, what is right is left, and what differs from its
        specification is reported and left. Never raises for a VM's sake.
        """
        try:
            flavour = await self._prepare()
        except VmRefused as error:
            return [VmResult(name=spec.name, change=VmChange.FAILED, detail=str(error)) for spec in specs]
        standing = await self._standing(deployment, specs)
        missing = [spec for spec in specs if spec.name not in standing]
        if not missing:
            return [standing[spec.name] for spec in specs]
        slots = self._slots if in_flight is None else asyncio.Semaphore(in_flight)
        making = _Making(deployment, flavour, slots, asyncio.ensure_future(self._claimed(missing)))
        named: set[str] = set()
        work = []
        for spec in missing:
            twice = spec.name in named
            named.add(spec.name)
            work.append(outcome(spec.name, self._create(spec, making, twice=twice)))
        try:
            made = iter(await asyncio.gather(*work))
        finally:
            making.claimed.cancel()
        await self._watch.look()
        return [standing.get(spec.name) or next(made) for spec in specs]

    async def need_free_address(self, name: str) -> None:
        """Raises VmRefused where a VM of this agent's that is off has an address that somebody else has."""
        await self._watch.look()
        domain = self._watch.seen().get(name)
        if domain is not None and domain.mark is not None and domain.mark.spec is not None:
            spec = msgspec.structs.replace(domain.mark.spec, start=True)
            _need_free(spec, await self._claimed([spec]))

    async def _standing(self, deployment: str, specs: Sequence[VmSpec]) -> dict[str, VmResult]:
        """The results of those that need nothing, by one look at all. Whoever is worked on, or was, is not among
        them."""
        await self._watch.look()
        seen = self._watch.seen()
        begun = set(await asyncio.to_thread(self._repairs.names)) if seen else set()
        counts = Counter(spec.name for spec in specs)
        found = {}
        for spec in specs:
            domain = seen.get(spec.name)
            if domain is None or domain.mark is None or spec.name in begun or counts[spec.name] > 1:
                continue
            if name_key(spec.name) in self._locks or not deployment == spec.deployment == domain.mark.deployment:
                continue
            if domain.mark.digest == spec_digest(spec) and (result := _as_planned(spec, domain)) is not None:
                found[spec.name] = result
        return found

    async def _claimed(self, specs: Iterable[VmSpec]) -> dict[str, str]:
        """Who else has the addresses of VMs that are to start, by address; see `agent.claims`."""
        running = {name for name, domain in self._watch.seen().items() if domain.power not in OFF}
        asked: dict[str, list[str]] = {}
        for spec in specs:
            if spec.network.bridge is not None and spec.start and spec.name not in running:
                asked.setdefault(spec.network.bridge, []).append(spec.ip)
        found: dict[str, str] = {}
        for answers in await asyncio.gather(*(claimed(bridge, ips) for bridge, ips in asked.items())):
            found |= answers
        return found

    async def _create(self, spec: VmSpec, making: _Making, *, twice: bool) -> VmResult:
        check(making.deployment, spec)
        if twice:
            raise VmRefused("it is named twice in this request; the first one counts")
        async with self._locks.alone(name_key(spec.name), uuid_key(spec.uuid)), making.slots:
            await self._repairs.settle(spec.name)
            found = await self._call(lambda libvirt: domains.find(libvirt, spec.name, spec.uuid), _ASK_SECONDS)
            if found.domain is not None:
                return await self._converge(spec, found.domain, making)
            if found.uuid_holder is not None:
                raise VmRefused(f"its UUID is that of the domain {found.uuid_holder} already; remove that one")
            return await self._make(spec, making)

    async def _converge(self, spec: VmSpec, domain: domains.Domain, making: _Making) -> VmResult:
        mark = domain.mark
        if mark is None:
            raise VmRefused("a domain of this name is there, was not made by Canopy and is left as it is")
        if mark.owner != self._owner:
            raise VmRefused(f"a domain of this name was made by the agent in {mark.owner} and is left as it is")
        if mark.deployment != spec.deployment:
            raise VmRefused(f"a VM of this name belongs to the deployment {mark.deployment} and is left as it is")
        if mark.digest != spec_digest(spec):
            detail = "; ".join(differences(mark.spec, spec)) if mark.spec else "made by another version of Canopy"
            return VmResult(name=spec.name, change=VmChange.DIFFERS, detail=detail)
        result = _as_planned(spec, domain)
        if result is not None:
            return result
        await asyncio.to_thread(self._files.layout, spec)
        await making.free(spec)
        await self._call(lambda libvirt: domains.start(libvirt, spec.name), _START_SECONDS)
        return VmResult(name=spec.name, change=VmChange.STARTED, detail=_without_cap(spec, making.flavour))

    async def _make(self, spec: VmSpec, making: _Making) -> VmResult:
        layout = await asyncio.to_thread(self._files.layout, spec)
        document = domain_xml(spec, layout, making.flavour, self._owner)
        has_files = await asyncio.to_thread(self._has_files, spec)
        entry = self._repairs.begin(spec.name)
        try:
            if not has_files:
                await entry.note(Step(does="make its directory", undo=(RemoveFiles(name=spec.name),)))
                await asyncio.to_thread(self._files.add, spec.name, document)
            if spec.disk is not None:
                await entry.note(Step(does="make its disk"))
                await self._files.make_overlay(spec.name, spec.disk)
            if spec.seed is not None:
                await entry.note(Step(does="make its seed"))
                await asyncio.to_thread(self._files.make_seed, spec, platform.node())
            removal = RemoveDomain(name=spec.name, uuid=spec.uuid)
            await entry.note(Step(does="define it", undo=(removal,), last=not spec.start))
            await finish(self._call(lambda libvirt: domains.define(libvirt, document), _DEFINE_SECONDS))
            self._watch.forget(spec.uuid)
            if spec.start:
                await making.free(spec)
                await entry.note(Step(does="start it", last=True))
                await finish(self._call(lambda libvirt: domains.start(libvirt, spec.name), _START_SECONDS))
            await entry.end()
        except BaseException as error:
            left = await asyncio.shield(self._repairs.give_up(spec.name, entry, error))
            if left and isinstance(error, Exception):
                raise VmRefused(f"{error}; {left}") from error
            raise
        return VmResult(name=spec.name, change=VmChange.CREATED, detail=_without_cap(spec, making.flavour))

    def _has_files(self, spec: VmSpec) -> bool:
        """Whether there is a VM's directory already. One of the same specification is that of a VM which libvirt has
        forgotten: what is on its disk is kept."""
        if not self._files.has(spec.name):
            return False
        mark = self._files.mark(spec.name)
        if mark is not None and mark.digest == spec_digest(spec):
            return True
        raise VmRefused(
            "there are files of a VM of this name that libvirt does not know, of another specification; "
            "destroy it first"
        )


@dataclass(frozen=True)
class _Making:
    """What the creations of one request share. `claimed` tells who else has an address, once it is known."""

    deployment: str
    flavour: Flavour
    slots: asyncio.Semaphore
    claimed: asyncio.Future[dict[str, str]]

    async def free(self, spec: VmSpec) -> None:
        """Return once it is known that nobody else has the VM's address. Raises VmRefused."""
        _need_free(spec, await asyncio.shield(self.claimed))


def _need_free(spec: VmSpec, claimed: Mapping[str, str]) -> None:
    who = claimed.get(spec.ip)
    if who is not None:
        raise VmRefused(
            f"its address {spec.ip} is in use: {who}; take it away there, or have another (--subnet, --skip-ips)"
        )


def _as_planned(spec: VmSpec, domain: domains.Domain) -> VmResult | None:
    """The result for a VM that is of this specification, None where it has to be started."""
    if domain.power not in OFF:
        odd = domain.power not in (VmPower.RUNNING, VmPower.BLOCKED)
        detail = f"it is {domain.power.value}" if odd else "" if spec.start else "it runs, and is planned not to"
        return VmResult(name=spec.name, change=VmChange.UNCHANGED, detail=detail)
    return None if spec.start else VmResult(name=spec.name, change=VmChange.UNCHANGED)


def _without_cap(spec: VmSpec, flavour: Flavour) -> str:
    if spec.cpu_quota is None or flavour.caps:
        return ""
    return "without its CPU cap, which libvirt can't set for an ordinary user"


def check(deployment: str, spec: VmSpec) -> None:
    """Raises VmRefused for a specification that can't be followed."""
    try:
        # What came over the wire was checked there; what a program made in place was not.
        msgspec.convert(msgspec.to_builtins(spec), VmSpec)
    except msgspec.ValidationError as error:
        raise VmRefused(f"its specification is malformed: {error}") from None
    if spec.deployment != deployment:
        raise VmRefused(f"its specification is for the deployment {spec.deployment}, the request for {deployment}")
    if spec.boot is None and spec.disk is None:
        raise VmRefused("it has neither a kernel nor a disk to boot; give it one")
