"""The running state as an infra.conf: `ctl get infra`. Pure. CPU is in hundredths of a CPU, memory in MiB."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from controller.api import HostStatus, InfraRecord, Status, VmStatus
from controller.infra import Infra, Node, Vm
from controller.on_record import Capacity
from controller.status import CtlError, ExitStatus
from controller.text_problems import some
from protocol.vms import VmPower

_OFF = (VmPower.SHUTOFF, VmPower.CRASHED, VmPower.GONE)


def running_infra(
    status: Status, record: InfraRecord, *, deployment: str | None = None, hosts: Collection[str] | None = None
) -> Infra:
    """The hosts as they were declared last (those in no file: as they are), and the VMs on record, where they are.

    A host that is down is (offline), a VM that is off sleeps. Raises CtlError where a name would stand there twice.
    """
    shown = [host for host in status.hosts if hosts is None or host.name in hosts]
    names = {host.name for host in shown}
    mine = [vm for vm in record.vms if deployment in (None, vm.deployment) and (hosts is None or vm.host in names)]
    twice = [name for name, times in Counter([*names, *(vm.name for vm in mine)]).items() if times > 1]
    if twice:
        raise CtlError(
            f"several VMs or hosts are named {some(twice)}, and a file can't have that: choose with --deployment",
            ExitStatus.USAGE,
        )
    specs = {(spec.deployment, spec.name): spec for spec in record.specs}
    heard = {(vm.deployment, vm.name): vm for vm in status.vms}
    vms = tuple(
        Vm(
            name=vm.name,
            vcpus=vm.vcpus,
            cpu=vm.cpu,
            cpu_wanted=vm.cpu,
            memory=vm.memory_mib,
            memory_wanted=vm.memory_mib,
            cpu_cap=spec.cpu_quota if (spec := specs.get((vm.deployment, vm.name))) is not None else None,
            node=vm.host,
            sleeping=_sleeps(heard.get((vm.deployment, vm.name)), starts=spec is None or spec.start),
        )
        for vm in mine
    )
    # A host that has left the fleet may still have VMs on record.
    left = list(dict.fromkeys(vm.host for vm in mine if vm.host not in names))
    nodes = [_node(host, record.capacities.get(host.name), vms) for host in shown]
    nodes += [_unseen(name, record.capacities.get(name), vms) for name in left]
    return Infra(nodes=tuple(nodes), vms=vms)


def _sleeps(vm: VmStatus | None, *, starts: bool) -> bool:
    return not starts if vm is None or vm.state is None else vm.state.power in _OFF


def _node(host: HostStatus, declared: Capacity | None, vms: Iterable[Vm]) -> Node:
    if declared is None and host.health is not None:
        told = host.health
        declared = Capacity(cpus=max(1, told.cpus), cpu=max(1, told.cpus) * 100, memory_mib=told.memory_mib)
    node = _unseen(host.name, declared, vms)
    return Node(name=node.name, cpus=node.cpus, cpu_capacity=node.cpu_capacity, memory=node.memory, offline=not host.up)


def _unseen(name: str, declared: Capacity | None, vms: Iterable[Vm]) -> Node:
    """A host of which nobody knows more: as large as its VMs take."""
    if declared is None:
        here = [vm for vm in vms if vm.node == name]
        declared = Capacity(cpus=1, cpu=sum(vm.cpu for vm in here), memory_mib=sum(vm.memory for vm in here))
    return Node(name=name, cpus=declared.cpus, cpu_capacity=declared.cpu, memory=declared.memory_mib, offline=True)
