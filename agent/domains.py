"""What is asked of a libvirt connection about domains. Each function blocks: it runs on a thread, through Hypervisor.

Only domains that carry the mark of this agent (`agent.vmxml.Mark`, its owner the agent's directory) are ever changed.
Numbers of states and reasons: https://libvirt.org/html/libvirt-libvirt-domain.html; they are part of libvirt's ABI.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from agent.hypervisor import Connection, load_libvirt
from agent.vmxml import NAMESPACE, Mark, read_mark
from protocol.vms import VmPower

_POWERS = {
    0: VmPower.UNKNOWN,
    1: VmPower.RUNNING,
    2: VmPower.BLOCKED,
    3: VmPower.PAUSED,
    4: VmPower.SHUTDOWN,
    5: VmPower.SHUTOFF,
    6: VmPower.CRASHED,
    7: VmPower.SUSPENDED,
}
# virDomainRunningReason and its kin, by position. "unknown" is said by an empty reason.
_REASONS: dict[int, tuple[str, ...]] = {
    1: (
        *("", "booted", "migrated", "restored", "from snapshot", "unpaused", "migration cancelled", "save cancelled"),
        *("woken up", "crashed", "post-copy", "post-copy failed"),
    ),
    3: (
        *("", "by user", "migration", "save", "dump", "I/O error", "watchdog", "from snapshot", "shutting down"),
        *("snapshot", "crashed", "starting up", "post-copy", "post-copy failed", "API error"),
    ),
    4: ("", "by user"),
    5: ("", "shut down", "destroyed", "crashed", "migrated", "saved", "failed", "from snapshot", "daemon"),
    6: ("", "panicked"),
}


class NotOurs(Exception):
    """The domain was not made by this agent, or belongs to another deployment; the text says which."""


@dataclass(frozen=True)
class Domain:
    """A domain as it was seen. `run` is libvirt's id, another for each start, -1 while it is off.
    `mark` is None where Canopy did not make it."""

    name: str
    uuid: str
    power: VmPower
    reason: str
    run: int
    mark: Mark | None


@dataclass(frozen=True)
class Found:
    """The domain of a name, and the name of whichever domain has the UUID that was asked for."""

    domain: Domain | None
    uuid_holder: str | None


def find(connection: Connection, name: str, uuid: str) -> Found:
    """What is there under a name and a UUID."""
    by_name = _lookup(connection, name)
    by_uuid = _lookup_uuid(connection, uuid)
    domain = None if by_name is None else _seen(by_name, by_name.state(0), _mark(by_name))
    return Found(domain=domain, uuid_holder=None if by_uuid is None else by_uuid.name())


def ours(connection: Connection, owner: str, marks: MutableMapping[str, Mark | None]) -> list[Domain]:
    """All domains that `owner` made, with their states, by calls that do not wait for any QEMU.

    `marks` remembers what the domain of each UUID is, so that metadata are read once and not at each look.
    """
    libvirt = load_libvirt()
    seen: list[Domain] = []
    uuids: set[str] = set()
    for domain, statistics in connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE):
        uuid = domain.UUIDString()
        uuids.add(uuid)
        if uuid not in marks:
            try:
                marks[uuid] = _mark(domain)
            except libvirt.libvirtError:  # it went away since it was listed
                continue
        mark = marks[uuid]
        if mark is not None and mark.owner == owner:
            state = (statistics.get("state.state", 0), statistics.get("state.reason", 0))
            seen.append(_seen(domain, state, mark))
    for uuid in marks.keys() - uuids:
        marks.pop(uuid, None)
    return seen


def everybody(connection: Connection) -> list[Domain]:
    """All domains, whoever made them, sorted by name, by calls that do not wait for any QEMU."""
    libvirt = load_libvirt()
    seen: list[Domain] = []
    for domain, statistics in connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE):
        try:
            mark = _mark(domain)
        except libvirt.libvirtError:  # it went away since it was listed
            continue
        seen.append(_seen(domain, (statistics.get("state.state", 0), statistics.get("state.reason", 0)), mark))
    return sorted(seen, key=lambda domain: domain.name)


def is_off(connection: Connection, name: str) -> bool:
    """Whether there is no domain of that name, or none that runs in any way."""
    domain = _lookup(connection, name)
    return domain is None or not _is_active(domain)


def power_of(domain: Connection) -> VmPower:
    """A domain's state, by a call that does not wait for its QEMU."""
    return _POWERS.get(domain.state(0)[0], VmPower.UNKNOWN)


def define(connection: Connection, document: str) -> None:
    """Define a persistent domain. Fails where its name or UUID is another domain's."""
    connection.defineXML(document)


def start(connection: Connection, name: str) -> None:
    """Start a domain that is defined and off."""
    connection.lookupByName(name).create()


def remove(connection: Connection, name: str, owner: str, deployment: str | None, uuid: str | None = None) -> bool:
    """Stop a domain at once and undefine it; whether it was there. `deployment` None takes any, and so does `uuid`.

    Raises NotOurs, with the domain untouched. A QEMU that hangs takes libvirt some 10 s to kill.
    """
    domain = mine(connection, name, owner, deployment)
    if domain is None or uuid not in (None, domain.UUIDString()):
        return False
    libvirt = load_libvirt()
    if domain.isActive():
        try:
            domain.destroy()
        except libvirt.libvirtError:
            # It may have ended by itself in the meantime.
            if _is_active(domain):
                raise
    _undefine(domain)
    return True


def mine(connection: Connection, name: str, owner: str, deployment: str | None) -> Connection | None:
    """libvirt's handle of a domain that `owner` made, None where there is no domain of that name. Raises NotOurs."""
    domain = _lookup(connection, name)
    if domain is None:
        return None
    mark = _mark(domain)
    if mark is None:
        raise NotOurs(f"the domain {name} was not made by Canopy and is left as it is")
    if mark.owner != owner:
        raise NotOurs(f"the domain {name} was made by the agent in {mark.owner} and is left as it is")
    if deployment is not None and mark.deployment != deployment:
        raise NotOurs(f"the domain {name} belongs to the deployment {mark.deployment} and is left as it is")
    return domain


def movable(connection: Connection, name: str, owner: str, deployment: str) -> tuple[str, str]:
    """The XML of a VM that runs, as it is and as it is kept, in a form for another host. Raises CannotAct, NotOurs."""
    from agent.vmactions import CannotAct

    libvirt = load_libvirt()
    domain = mine(connection, name, owner, deployment)
    if domain is None:
        raise CannotAct("there is no such VM on this host")
    power = power_of(domain)
    if power not in (VmPower.RUNNING, VmPower.BLOCKED):
        next_step = "start it first" if power in (VmPower.SHUTOFF, VmPower.CRASHED) else "resume it first"
        raise CannotAct(f"it is {power.value}, and only a VM that runs is moved; {next_step}")
    live = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
    return live, domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_INACTIVE)


def arrived(connection: Connection, name: str, owner: str, uuid: str) -> bool | None:
    """Whether a VM that came from another host is here for good, which libvirt says by keeping its definition; None
    where there is none of it."""
    domain = _lookup(connection, name)
    if domain is None or domain.UUIDString() != uuid:
        return None
    return bool(domain.isPersistent())


def go_on(connection: Connection, name: str, owner: str, uuid: str) -> None:
    """Let a VM that has arrived halted go on. Raises NotOurs where it has not."""
    domain = mine(connection, name, owner, None)
    if domain is None or domain.UUIDString() != uuid or not domain.isPersistent():
        raise NotOurs(f"{name} has not arrived on this host")
    if power_of(domain) is VmPower.PAUSED:
        domain.resume()


def let_go(connection: Connection, name: str, owner: str, uuid: str) -> bool:
    """Whether a VM that was to leave is still here; it runs on then. Raises CannotAct while libvirt is at it still."""
    from agent.vmactions import CannotAct

    libvirt = load_libvirt()
    domain = _lookup(connection, name)
    if domain is None:
        return False
    if domain.UUIDString() != uuid or not domain.isActive():
        return True
    mine(connection, name, owner, None)
    try:
        busy = domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise
        busy = False  # a driver without jobs moves nothing
    if busy:
        raise CannotAct("libvirt still moves it, or is at something else with it")
    state, reason = domain.state(0)
    # Nobody but this host decides that it has gone, and so it runs nowhere else.
    if (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION):
        domain.resume()
    return True


def abort_job(connection: Connection, name: str) -> None:
    """Have libvirt give up what it is doing with a VM."""
    domain = _lookup(connection, name)
    if domain is not None:
        domain.abortJob()


def job_bytes(connection: Connection, name: str) -> tuple[int, int]:
    """How many bytes of a VM's memory and disk are over, and how many are left."""
    libvirt = load_libvirt()
    told = connection.lookupByName(name).jobStats(0)
    fields = (libvirt.VIR_DOMAIN_JOB_DATA_PROCESSED, libvirt.VIR_DOMAIN_JOB_DATA_REMAINING)
    done, left = (max(0, int(told.get(field, 0))) for field in fields)
    return done, left


def knows_kvm(connection: Connection, architecture: str) -> bool:
    """Whether libvirt itself would run a KVM domain."""
    try:
        connection.getDomainCapabilities(None, architecture, None, "kvm")
    except load_libvirt().libvirtError:
        return False
    return True


def _is_active(domain: Connection) -> bool:
    try:
        return bool(domain.isActive())
    except load_libvirt().libvirtError:
        return False


def _undefine(domain: Connection) -> None:
    libvirt = load_libvirt()
    everything = (
        libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
    )
    try:
        domain.undefineFlags(everything)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return
        # The test driver knows fewer flags.
        if error.get_error_code() not in (libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_NO_SUPPORT):
            raise
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)


def _lookup(connection: Connection, name: str) -> Connection | None:
    libvirt = load_libvirt()
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None


def _lookup_uuid(connection: Connection, uuid: str) -> Connection | None:
    libvirt = load_libvirt()
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None


def _mark(domain: Connection) -> Mark | None:
    libvirt = load_libvirt()
    try:
        return read_mark(domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE))
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            raise
        return None


def _seen(domain: Connection, state: tuple[int, int], mark: Mark | None) -> Domain:
    reasons = _REASONS.get(state[0], ())
    return Domain(
        name=domain.name(),
        uuid=domain.UUIDString(),
        power=_POWERS.get(state[0], VmPower.UNKNOWN),
        reason=reasons[state[1]] if 0 <= state[1] < len(reasons) else "",
        run=domain.ID(),
        mark=mark,
    )
