"""What can be done to a VM that is there. Each function blocks: it runs on a thread, through Hypervisor.

All but the snapshot find out first whether the VM is in the wanted state already, so that doing it twice is doing it
once. The calls are described at https://libvirt.org/html/libvirt-libvirt-domain.html and, for snapshots, at
https://libvirt.org/html/libvirt-libvirt-domain-snapshot.html.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from agent import domains
from agent.hypervisor import Connection, load_libvirt
from protocol.vms import Action, VmChange, VmPower

#: How long each may take, in seconds. A QEMU that is well answers within a second, on a loaded host within a few; one
#: that starts may have to wait for its disk, and a snapshot writes all of a VM's memory.
SECONDS = {
    Action.START: 120.0,
    Action.STOP: 30.0,
    Action.REBOOT: 15.0,
    Action.SUSPEND: 15.0,
    Action.RESUME: 15.0,
    Action.SNAPSHOT: 300.0,
}
# A QEMU that has not answered its last question for so long is taken for hung (virDomainGetControlInfo); in ms.
_OCCUPIED_MS = 5_000
_RUNS = (VmPower.RUNNING, VmPower.BLOCKED, VmPower.SHUTDOWN)
_OFF = (VmPower.SHUTOFF, VmPower.CRASHED)


class CannotAct(Exception):
    """The VM is in no state for that, or its QEMU does not answer; the text says which, and what to do."""


def act(
    connection: Connection, name: str, owner: str, deployment: str | None, action: Action, *, hard: bool, label: str
) -> VmChange:
    """Do it; what has changed. With a stop that asks the guest the change is that it was asked.

    ABSENT where there is no such domain. Raises CannotAct, and domains.NotOurs with nothing done.
    """
    domain = domains.mine(connection, name, owner, deployment)
    if domain is None:
        return VmChange.ABSENT
    power = domains.power_of(domain)
    if action is Action.START:
        return _start(domain, power)
    # The certain stop is libvirt's to bring about, whatever QEMU is at.
    if power not in _OFF and not (action is Action.STOP and hard):
        _refuse_hung(domain, power)
    match action:
        case Action.STOP:
            if power in _OFF:
                return VmChange.UNCHANGED
            if not hard and power is VmPower.PAUSED:
                raise CannotAct("it is paused, and its guest can't be asked to stop; resume it first, or use --hard")
            domain.destroy() if hard else domain.shutdown()
            return VmChange.STOPPED
        case Action.REBOOT:
            _need_running(power)
            domain.reset(0) if hard else domain.reboot(0)
            return VmChange.REBOOTED
        case Action.SUSPEND:
            if power is VmPower.PAUSED:
                return VmChange.UNCHANGED
            _need_running(power)
            domain.suspend()
            return VmChange.SUSPENDED
        case Action.RESUME:
            return _resume(domain, power)
        case Action.SNAPSHOT:
            return _snapshot(domain, label)


def _start(domain: Connection, power: VmPower) -> VmChange:
    if power in _RUNS:
        return VmChange.UNCHANGED
    if power not in _OFF:
        raise CannotAct(f"it is {power.value}; resume it instead")
    domain.create()
    return VmChange.STARTED


def _resume(domain: Connection, power: VmPower) -> VmChange:
    if power in (VmPower.RUNNING, VmPower.BLOCKED):
        return VmChange.UNCHANGED
    if power is VmPower.SUSPENDED:
        domain.pMWakeup(0)
    elif power is VmPower.PAUSED:
        domain.resume()
    else:
        raise CannotAct(f"it is {power.value}; start it instead")
    return VmChange.RESUMED


def _snapshot(domain: Connection, label: str) -> VmChange:
    libvirt = load_libvirt()
    if label in domain.snapshotListNames():
        return VmChange.UNCHANGED
    document = ET.Element("domainsnapshot")
    ET.SubElement(document, "name").text = label
    try:
        domain.snapshotCreateXML(ET.tostring(document, encoding="unicode"), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC)
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_CONFIG_UNSUPPORTED):
            raise
        said = " ".join((error.get_error_message() or "").split())
        raise CannotAct(f"it can't be kept in a snapshot, which takes a qcow2 disk: {said}") from None
    return VmChange.SNAPSHOT


def _need_running(power: VmPower) -> None:
    if power not in (VmPower.RUNNING, VmPower.BLOCKED):
        raise CannotAct(f"it is {power.value}; " + ("start it first" if power in _OFF else "resume it first"))


def _refuse_hung(domain: Connection, power: VmPower) -> None:
    """A question to a QEMU that hangs would hang as well, and take a thread of libvirtd with it."""
    libvirt = load_libvirt()
    try:
        state, _details, since_ms = domain.controlInfo()
    except libvirt.libvirtError:
        return  # it went off, or the driver has none
    hung = state == libvirt.VIR_DOMAIN_CONTROL_OCCUPIED and since_ms >= _OCCUPIED_MS
    if hung or state == libvirt.VIR_DOMAIN_CONTROL_ERROR:
        raise CannotAct(
            f"its QEMU is {power.value} by libvirt's word and has not answered for {since_ms / 1000:.0f} s; "
            "stop it with --hard, or destroy it"
        )
