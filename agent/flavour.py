"""What a host's hypervisor gives: KVM or not, and whether it runs with root's rights."""

from __future__ import annotations

import logging
import os
import platform

from agent import domains
from agent.embedded import embedded_root
from agent.hypervisor import Hypervisor
from agent.kvmprobe import probe_kvm
from agent.vmxml import Flavour

_LOG = logging.getLogger(__name__)

_ASK_SECONDS = 30.0
# The first such question has libvirt try out QEMU: seconds, and most of a minute where the host's init reaps slowly.
_TRY_SECONDS = 120.0


async def find_flavour(hypervisor: Hypervisor, *, privileged: bool) -> Flavour:
    """What this host gives to VMs; raises HypervisorError. `privileged` as `runs_privileged` has it."""
    driver = await hypervisor.call(lambda libvirt: str(libvirt.getType()), _ASK_SECONDS)
    architecture = platform.machine()
    if driver.upper() == "TEST":
        return Flavour(kind="test", architecture=architecture)
    answer = await probe_kvm()
    # Where this user may not try, libvirtd with its own rights may still have KVM.
    worth_asking = answer.usable or (answer.usable is None and privileged)
    kvm = worth_asking and await hypervisor.call(lambda libvirt: domains.knows_kvm(libvirt, architecture), _TRY_SECONDS)
    _LOG.info("VMs run %s KVM: %s", "with" if kvm else "without", answer.why)
    return Flavour(kind="kvm" if kvm else "qemu", architecture=architecture, caps=privileged)


def runs_privileged(uri: str) -> bool:
    """Whether libvirt at `uri` has root's rights, and so runs QEMU as a user of its own."""
    if embedded_root(uri) is not None:
        return os.geteuid() == 0
    return uri.partition("?")[0].endswith("/system")
