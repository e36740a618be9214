"""VMs from a plan, and their end: what `ctl spawn` and `ctl destroy` do, as functions over a Session.

Run again, both find what is there and do what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import zip_longest
from typing import Protocol

from controller import api
from controller.on_record import Vm
from controller.session import Happening, ImageAnswer, Job, Result, Session, VmAnswer, VmReached
from controller.spawn_plan import Prepared
from controller.status import CtlError, ExitStatus
from controller.text_problems import some
from protocol.outcomes import Outcome, describe, succeeded
from protocol.vms import Action, ImageAction, ImageResult, ImageState, VmChange, VmPower, VmResult, VmSpec, images_of

#: How often the service is asked for states, in seconds. Agents report within a fraction of one.
_LOOK_EVERY = 0.2
#: And how long it may take to hear that VMs run which their hosts have started, in seconds: agents look every few.
_STARTED_WITHIN = 15.0
#: A VM in one of these runs.
_RUNNING = (VmPower.RUNNING, VmPower.BLOCKED)
#: What a VM is that is not as the file has it.
NOT_RIGHT = (VmChange.FAILED, VmChange.DIFFERS)


class Watch(Protocol):
    """Sees to what takes time, for whoever waits for it."""

    def __call__(self, what: str, job: Job) -> Sequence[Happening]:
        """Watch a job to its end; what happened. `what` says what the job is for."""
        ...

    def until(self, what: str, look: Callable[[], str | None]) -> None:
        """Call `look` until it returns None; what it returns says how far it is. It takes its time by itself."""
        ...


class PlainWatch:
    """Waits and says nothing."""

    def __call__(self, what: str, job: Job) -> Sequence[Happening]:
        """All that happened."""
        del what
        return list(job)

    def until(self, what: str, look: Callable[[], str | None]) -> None:
        """Until it is over."""
        del what
        while look() is not None:
            pass


class Wait(StrEnum):
    """What `ctl spawn` waits for."""

    DEFINED = "defined"  # libvirt knows the VMs
    STARTED = "started"  # and their hosts say that those that shall run do
    ADDRESS = "address"  # and these have their addresses: they answer ping, or their hosts find them by ARP
    REACHABLE = "reachable"  # and these answer ping from their hosts


@dataclass(frozen=True, kw_only=True)
class SpawnReport:
    """What came of it.

    `answers` are hosts' words on their VMs; `troubles` are hosts that gave none, with the reason. `not_running` and
    `unreachable` are VMs that the wait was in vain for. `unnamed` are hosts without the new name -> IP file.
    `not_begun` are VMs of the waves after one in which too many failed.
    """

    answers: dict[str, tuple[VmResult, ...]]
    troubles: dict[str, str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    not_running: tuple[str, ...] = ()
    unreachable: tuple[str, ...] = ()
    unnamed: dict[str, str] = field(default_factory=dict)
    not_begun: tuple[str, ...] = ()


def spawn(
    session: Session,
    prepared: Prepared,
    *,
    wait: Wait = Wait.STARTED,
    timeout: float = 600.0,
    wave: int | None = None,
    max_fail: int | None = None,
    in_flight: int | None = None,
    in_etc_hosts: bool | None = None,
    watch: Watch | None = None,
) -> SpawnReport:
    """Bring images and VMs to their hosts, and names to all hosts. Raises CtlError where the service refuses.

    `timeout` in seconds is for making the VMs, and as much again for the wait. `wave` is how many VMs are made at a
    time, None all; each wave is waited for, and where more than `max_fail` VMs have failed the next is not begun.
    `in_flight` is how many of them a host makes at a time, None as it sees fit.
    `in_etc_hosts` has the names put into hosts' /etc/hosts as well, or taken out of it; None leaves that as it is.
    `watch` sees to each job until its end.
    """
    spawning = _Spawning(session, prepared, wait, timeout, watch=watch or PlainWatch(), in_flight=in_flight)
    return spawning.run(wave, max_fail, in_etc_hosts)


class _Spawning:
    """One spawn: what is still to be done, and what came of the rest."""

    def __init__(
        self,
        session: Session,
        prepared: Prepared,
        wait: Wait,
        timeout: float,
        *,
        watch: Watch,
        in_flight: int | None,
    ) -> None:
        self._session = session
        self._prepared = prepared
        self._deployment = prepared.plan.deployment
        self._wait = wait
        self._timeout = timeout
        self._in_flight = in_flight
        self._watch = watch
        self._slices = dict(prepared.slices)
        self._troubles: dict[str, str] = {}
        self._outcomes: list[Outcome] = []
        self._answers: dict[str, tuple[VmResult, ...]] = {}
        self._not_running: list[str] = []
        self._unreachable: list[str] = []
        self._starts = {spec.name for specs in self._slices.values() for spec in specs if spec.start}

    def run(self, wave: int | None, max_fail: int | None, in_etc_hosts: bool | None) -> SpawnReport:
        prepared = self._prepared
        if self._slices:
            self._session.reserve_vms(reserved(prepared), prepared.capacities)
            self._bring_images()
        waves = in_waves(self._slices, wave)
        begun = 0
        for slices in waves:
            if begun and max_fail is not None and self._failed() > max_fail:
                break
            begun += 1
            self._make({host: specs for host, specs in slices.items() if host in self._slices})
        left = [spec.name for slices in waves[begun:] for specs in slices.values() for spec in specs]
        return SpawnReport(
            answers=dict(sorted(self._answers.items())),
            troubles=dict(sorted(self._troubles.items())),
            outcomes=tuple(self._outcomes),
            not_running=tuple(self._not_running),
            unreachable=tuple(self._unreachable),
            unnamed=_send_names(self._session, self._watch, in_etc_hosts=in_etc_hosts),
            not_begun=tuple(left),
        )

    def _failed(self) -> int:
        """How many VMs are not as they should be by now."""
        bad = {result.name for results in self._answers.values() for result in results if result.change in NOT_RIGHT}
        silent = {spec.name for host in self._troubles for spec in self._prepared.slices.get(host, ())}
        return len(bad | silent | set(self._not_running) | set(self._unreachable))

    def _fail(self, happened: Iterable[Happening], what: str) -> None:
        """Hosts that could not are left out of what follows."""
        for result in happened:
            if isinstance(result, Result) and not succeeded(result.outcome):
                self._outcomes.append(result.outcome)
                for host in result.hosts:
                    self._troubles[host] = f"{what}: {describe(result.outcome)}"
                    self._slices.pop(host, None)

    def _bring_images(self) -> None:
        """Push the images that hosts lack."""
        needed = {
            host: {digest for spec in specs for digest in images_of(spec)} for host, specs in self._slices.items()
        }
        every = list(dict.fromkeys([*self._prepared.images, *self._prepared.stored]))
        what = "look for images"
        happened = self._watch(what, self._session.images_on(ImageAction.LIST, every, sorted(self._slices)))
        self._fail(happened, what)
        for answer in happened:
            if isinstance(answer, ImageAnswer):
                needed[answer.host] -= {one.digest for one in answer.results if self._is_there(one)}
        for digest in every:
            hosts = [host for host in sorted(self._slices) if digest in needed[host]]
            path = self._prepared.images.get(digest)
            if hosts and path is not None:
                what = f"push {path.name}"
                self._fail(self._watch(what, self._session.push(path, "", hosts, image=True)), what)
            elif hosts:
                name = self._prepared.stored.get(digest, digest[:12])
                for host in hosts:
                    self._troubles[host] = f"it has no image {name}; bring it there with `ctl image add FILE`"
                    del self._slices[host]

    def _is_there(self, image: ImageResult) -> bool:
        path = self._prepared.images.get(image.digest)
        return image.state is ImageState.PRESENT and (path is None or path.stat().st_size == image.size)

    def _make(self, slices: dict[str, tuple[VmSpec, ...]]) -> None:
        """Make these, and wait for them as was asked."""
        if not slices:
            return
        session, deployment = self._session, self._deployment
        what = "create VMs"
        job = session.create_vms(deployment, slices, in_flight=self._in_flight, timeout=self._timeout)
        happened = self._watch(what, job)
        self._fail(happened, what)
        told = {answer.host: answer.results for answer in happened if isinstance(answer, VmAnswer)}
        for host, results in told.items():
            self._answers[host] = (*self._answers.get(host, ()), *results)
        for host in slices:
            if host in self._slices and host not in told:
                self._troubles.setdefault(host, "create VMs: it said nothing of them")
        right = {result.name for results in told.values() for result in results if result.change not in NOT_RIGHT}
        right &= self._starts
        waited = [spec.name for specs in slices.values() for spec in specs if spec.name in right]
        if self._wait is Wait.DEFINED or not waited:
            return
        self._not_running += self._wait_until_running(waited)
        if self._wait is Wait.STARTED:
            return
        address = self._wait is Wait.ADDRESS
        what = "wait for addresses" if address else "ping VMs"
        job = session.probe_vms(deployment, waited, timeout=self._timeout, address=address)
        happened = self._watch(what, job)
        reached = {name for answer in happened if isinstance(answer, VmReached) for name in answer.names}
        self._unreachable += [name for name in waited if name not in reached]
        self._outcomes += [result.outcome for result in happened if isinstance(result, Result)]

    def _wait_until_running(self, names: Sequence[str]) -> list[str]:
        """Those that do not run in time."""
        deadline = time.monotonic() + min(self._timeout, _STARTED_WITHIN)
        left = list(names)
        looked = False

        def look() -> str | None:
            nonlocal left, looked
            if looked:
                time.sleep(_LOOK_EVERY)
            looked = True
            states = {vm.name: vm for vm in self._session.status().vms if vm.deployment == self._deployment}
            left = [name for name in names if not _runs(states.get(name))]
            if not left or time.monotonic() >= deadline:
                return None
            return f"{len(names) - len(left)}/{len(names)} VMs"

        self._watch.until("start VMs", look)
        return left


def reserved(prepared: Prepared) -> list[Vm]:
    """The VMs of a plan as they come on record, in the order of their declaration."""
    order = {name: place for place, name in enumerate(prepared.addresses.by_name)}
    found = [
        Vm(
            deployment=prepared.plan.deployment,
            name=spec.name,
            host=host,
            ip=spec.ip,
            mac=spec.mac,
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            cpu=prepared.demands.get(spec.name, 0),
        )
        for host, specs in prepared.slices.items()
        for spec in specs
    ]
    return sorted(found, key=lambda vm: order.get(vm.name, len(order)))


def in_waves(slices: Mapping[str, tuple[VmSpec, ...]], size: int | None) -> list[dict[str, tuple[VmSpec, ...]]]:
    """The same VMs in waves of `size` (None: all at once), in turn from each host, so that a wave meets many hosts."""
    if size is None:
        return [dict(slices)] if slices else []
    rounds = zip_longest(*([(host, spec) for spec in specs] for host, specs in slices.items()))
    order = [one for round_ in rounds for one in round_ if one is not None]
    waves: list[dict[str, tuple[VmSpec, ...]]] = []
    for first in range(0, len(order), size):
        wave: dict[str, tuple[VmSpec, ...]] = {}
        for host, spec in order[first : first + size]:
            wave[host] = (*wave.get(host, ()), spec)
        waves.append(wave)
    return waves


def _send_names(session: Session, watch: Watch, *, in_etc_hosts: bool | None = None) -> dict[str, str]:
    """Bring the name -> IP file to all hosts; those that did not take it, with the reason."""
    happened = watch("send names", session.send_names(in_etc_hosts=in_etc_hosts))
    return {
        host: describe(result.outcome)
        for result in happened
        if isinstance(result, Result) and not result.ok
        for host in result.hosts
    }


def _runs(vm: api.VmStatus | None) -> bool:
    return vm is not None and vm.state is not None and vm.state.power in _RUNNING


@dataclass(frozen=True, kw_only=True)
class DestroyReport:
    """What came of `ctl destroy`: hosts' words on their VMs, hosts that gave none, names that were not on record."""

    answers: dict[str, tuple[VmResult, ...]]
    troubles: dict[str, str] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    absent: tuple[str, ...] = ()
    unnamed: dict[str, str] = field(default_factory=dict)


def destroy(
    session: Session, doomed: Mapping[str, Sequence[str]], *, absent: Sequence[str] = (), watch: Watch | None = None
) -> DestroyReport:
    """Remove VMs, named by deployment, with their disks; their addresses are free then. Raises CtlError."""
    watch = watch or PlainWatch()
    happened: list[Happening] = []
    for deployment, names in sorted(doomed.items()):
        happened += watch("destroy VMs", session.destroy_vms(deployment, names))
    unnamed = _send_names(session, watch) if doomed else {}
    return replace(_reported(happened), absent=tuple(absent), unnamed=unnamed)


def act(
    session: Session,
    meant: Mapping[str, Sequence[str]],
    action: Action,
    *,
    hard: bool = False,
    label: str | None = None,
    timeout: float = 600.0,
    watch: Watch | None = None,
) -> DestroyReport:
    """Start, stop, reboot, suspend, resume or snapshot VMs, named by deployment. Raises CtlError."""
    watch = watch or PlainWatch()
    happened: list[Happening] = []
    for deployment, names in sorted(meant.items()):
        job = session.act(deployment, names, action, hard=hard, label=label, timeout=timeout)
        happened += watch(f"{action.value} VMs", job)
    return _reported(happened)


def _reported(happened: Iterable[Happening]) -> DestroyReport:
    answers: dict[str, tuple[VmResult, ...]] = {}
    troubles: dict[str, str] = {}
    outcomes: list[Outcome] = []
    for happening in happened:
        if isinstance(happening, VmAnswer):
            answers[happening.host] = (*answers.get(happening.host, ()), *happening.results)
        elif isinstance(happening, Result) and not succeeded(happening.outcome):
            outcomes.append(happening.outcome)
            troubles |= dict.fromkeys(happening.hosts, describe(happening.outcome))
    return DestroyReport(answers=dict(sorted(answers.items())), troubles=troubles, outcomes=tuple(outcomes))


def on_record(
    status: api.Status, names: Sequence[str], deployment: str | None
) -> tuple[dict[str, list[str]], list[str]]:
    """The named VMs by deployment, and the names of which none is on record.

    Raises CtlError (USAGE) for a name that several deployments have, where none was chosen.
    """
    owners: dict[str, list[str]] = {}
    for vm in status.vms:
        if deployment is None or vm.deployment == deployment:
            owners.setdefault(vm.name, []).append(vm.deployment)
    unclear = [name for name in names if len(owners.get(name, ())) > 1]
    if unclear:
        raise CtlError(f"several deployments have {some(unclear)}: choose one with --deployment", ExitStatus.USAGE)
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        for owner in owners.get(name, ()):
            found.setdefault(owner, []).append(name)
    return found, [name for name in dict.fromkeys(names) if name not in owners]
