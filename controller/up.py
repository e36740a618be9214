"""`ctl up` and `ctl down` as functions: a fleet from bare hosts, and back."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from controller import api
from controller.bootstrap import Enrolment, HostResult, Options, Progress, Target, bootstrap
from controller.bundle import BundleError, Bundles, Platform
from controller.hosts import fold, site_of
from controller.launch import ensure_service
from controller.local import hypervisor_directory, wait_until_gone
from controller.session import Result, Session, VmAnswer
from controller.ssh import SshError
from controller.status import CtlError, ExitStatus
from controller.upgrade import Upgrader, wave_size, waves
from protocol.topology import DEFAULT_FANOUT

#: What a started agent may take to its place in the tree, in seconds: its imports, a handshake, and two more for a
#: parent that comes up later than it. More where many start on one machine.
_ATTACH_WITHIN, _ATTACH_EACH = 20.0, 0.1
#: What an agent may take to answer, in seconds: it runs /bin/true. Whoever is slower is looked at over SSH, no more.
_ANSWER_WITHIN, _ANSWER_EACH = 3.0, 0.01
#: What local agents may take to end, in seconds.
_END_WITHIN = 20.0
#: A tenth of the fleet is seldom more than what can be spared for a second, and ten waves are soon over.
DEFAULT_WAVE = "10%"


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What `ctl up` was asked for. Times are in seconds."""

    hosts: tuple[str, ...]
    fleet: str | None = None
    ssh_config: Path | None = None
    login: str | None = None
    fanout: int = DEFAULT_FANOUT
    tries: int = 3
    connect_timeout: float = 10.0
    flat: bool = False
    address: str | None = None
    #: How many outdated hosts are replaced at a time: a percentage of them, or a number.
    wave: str = DEFAULT_WAVE
    #: Which site a host is in, by its name.
    site_of: Callable[[str], str] = site_of


@dataclass(frozen=True, kw_only=True)
class UpReport:
    """What came of it: hosts in the tree (those started or replaced now, those that were there, and those that are on
    an older version, with the reason for each), and the reasons of the others.

    `stopped` is why the upgrade was not gone on with, empty where it was.
    """

    started: tuple[str, ...]
    current: tuple[str, ...]
    failed: dict[str, str] = field(default_factory=dict)
    outdated: dict[str, str] = field(default_factory=dict)
    stopped: str = ""

    @property
    def up(self) -> tuple[str, ...]:
        """All hosts that are in the tree."""
        return (*self.started, *self.current, *self.outdated)


class _Enroller:
    """The service, for the bootstrap."""

    def __init__(self, session: Session, site_of: Callable[[str], str]) -> None:
        self._session = session
        self._site_of = site_of

    async def enrol(self, enrolment: Enrolment) -> bytes:
        """Take a host in."""
        request = api.Enrol(
            name=enrolment.name,
            site=self._site_of(enrolment.name),
            key=enrolment.key,
            address=enrolment.address,
            control_port=enrolment.control_port,
            bulk_port=enrolment.bulk_port,
            digest=enrolment.bundle,
            facts={
                "python": f"{enrolment.python[0]}.{enrolment.python[1]}",
                "machine": enrolment.machine,
                "libc": enrolment.libc,
                "libc_version": f"{enrolment.libc_version[0]}.{enrolment.libc_version[1]}",
                "uid": str(enrolment.uid),
            },
        )
        return await asyncio.to_thread(self._session.enrol, request)


def up(options: UpOptions, progress: Callable[[Progress], None] = lambda _: None) -> UpReport:
    """Bring these hosts into the fleet: start what is missing, and then replace what is outdated, a wave at a time.

    Hosts that are in the tree, answer, and run the present code are not visited at all. Raises CtlError.
    """
    wave_size(options.wave, 1)
    session = ensure_service(options.fleet, advertised=options.address)
    session.begin(len(options.hosts), options.fanout)
    status = session.status()
    current, outdated = _in_the_tree(status, options.hosts)
    # A host below a relay that has just frozen seems to be there, and is visited unless it says so itself.
    silent = session.wait_for(current | outdated, _answer_within(len(current | outdated)), answering=True).keys()
    current, outdated = current - silent, outdated - silent
    targets = [Target(name=name) for name in options.hosts if name not in current and name not in outdated]
    settings = Options(
        fleet=status.fleet,
        fanout=options.fanout,
        tries=options.tries,
        flat=options.flat,
        config=options.ssh_config,
        login=options.login or "",
        connect_timeout=options.connect_timeout,
    )
    enroller = _Enroller(session, options.site_of)
    try:
        report = _report(session, asyncio.run(bootstrap(targets, settings, enroller, progress)), current)
        if not outdated:
            return report
        plan = waves(session.status().hosts, outdated, wave_size(options.wave, len(outdated)))
        done = len(report.up) + len(report.failed)

        def note(now: Progress) -> None:
            progress(msgspec.structs.replace(now, started=now.started + done))

        upgrade = Upgrader(session, settings, enroller, _attach_within, note).run(plan)
    except SshError as error:
        raise CtlError(str(error)) from error
    return UpReport(
        started=(*report.started, *upgrade.new),
        current=report.current,
        failed=report.failed | upgrade.gone,
        outdated=upgrade.old,
        stopped=upgrade.stopped,
    )


def _answer_within(hosts: int) -> float:
    return _ANSWER_WITHIN + _ANSWER_EACH * hosts


def _attach_within(hosts: int) -> float:
    return _ATTACH_WITHIN + _ATTACH_EACH * hosts


def _report(session: Session, results: list[HostResult], current: set[str]) -> UpReport:
    ready = [result.name for result in results if result.state != "failed"]
    missing = session.wait_for(ready, _attach_within(len(ready))) if ready else {}
    failed = {result.name: result.reason for result in results if result.state == "failed"}
    failed |= {name: f"its agent runs and is not in the tree: {why}" for name, why in missing.items()}
    started = tuple(result.name for result in results if result.state == "started" and result.name not in missing)
    found = tuple(result.name for result in results if result.state == "current" and result.name not in missing)
    return UpReport(started=started, current=(*sorted(current), *found), failed=failed)


def _in_the_tree(status: api.Status, names: Sequence[str]) -> tuple[set[str], set[str]]:
    """Those of the hosts that are in the tree and run what a bundle of today would hold, and those that run another."""
    bundles = Bundles()
    wanted = set(names)
    identities: dict[tuple[str, ...], str] = {}
    current: set[str] = set()
    outdated: set[str] = set()
    for host in status.hosts:
        if host.name not in wanted or not host.up or "machine" not in host.facts:
            continue
        kind = tuple(host.facts[key] for key in ("python", "machine", "libc", "libc_version"))
        if kind not in identities:
            try:
                identities[kind] = bundles.identity(_platform(host.facts))
            except BundleError:
                identities[kind] = ""
        (current if host.digest == identities[kind] else outdated).add(host.name)
    return current, outdated


def _platform(facts: dict[str, str]) -> Platform:
    return Platform(
        python=_pair(facts["python"]),
        machine=facts["machine"],
        libc=facts["libc"],
        libc_version=_pair(facts["libc_version"]),
    )


def _pair(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


@dataclass(frozen=True, kw_only=True)
class DownReport:
    """What came of `ctl down`: what hosts said of their VMs, what became of the command, and whether the service
    ended."""

    vms: tuple[VmAnswer, ...]
    results: tuple[Result, ...]
    left: tuple[str, ...]
    service_ended: bool


def down(
    fleet: str | None, hosts: Sequence[str] | None = None, *, purge: bool = False, vms: bool = False
) -> DownReport:
    """End the agents of these hosts (None: all, and the service with the last of them). Raises CtlError.

    With `vms` their VMs are destroyed first; with `purge` nothing is left on them, which takes that where there are
    VMs.
    """
    session = Session(fleet)
    status = session.status()
    chosen = {host.name for host in status.hosts} if hosts is None else set(hosts)
    up = {host.name for host in status.hosts if host.up}
    doomed_with = sorted({vm.host for vm in status.vms if vm.host in chosen & up})
    if purge and not vms and doomed_with:
        raise CtlError(
            f"there are VMs on {fold(doomed_with)}, whose disks --purge would remove: give --vms as well, or leave "
            "--purge out",
            ExitStatus.USAGE,
        )
    answers: list[VmAnswer] = []
    results: list[Result] = []
    if vms:
        doomed: dict[str, list[str]] = {}
        for vm in status.vms:
            if vm.host in chosen:
                doomed.setdefault(vm.deployment, []).append(vm.name)
        for deployment, names in sorted(doomed.items()):
            for happening in session.destroy_vms(deployment, names):
                if isinstance(happening, VmAnswer):
                    answers.append(happening)
                elif isinstance(happening, Result):
                    results.append(happening)
    if chosen:
        results += session.down(None if hosts is None else hosts, purge=purge, vms=vms).results()
    locals_ = [host.name for host in status.hosts if host.name in chosen and "local" in host.facts and host.up]
    left = wait_until_gone(session, locals_, _END_WITHIN)
    with_vms = {vm.host for vm in session.status().vms}
    for name in locals_ if purge else ():
        if name not in with_vms:  # else QEMU still runs there
            shutil.rmtree(hypervisor_directory(session, name), ignore_errors=True)
    ended = not session.status().hosts
    if ended:
        _end_service(session)
    return DownReport(vms=tuple(answers), results=tuple(results), left=tuple(left), service_ended=ended)


def _end_service(session: Session) -> None:
    session.shutdown()
    deadline = time.monotonic() + _END_WITHIN
    while (session.directory / "client.sock").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
