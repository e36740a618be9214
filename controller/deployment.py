"""From a placement and addresses to what each host's agent is told, and what --dry-run shows. Pure.

The CPU cap of infra.conf is in the unit of its node's CPU capacity: Entropy compares a VM's CPU with its node's, and
the cap is the most that this CPU may come to. So cap / capacity is the share of the node's CPUs, and the quota is
that share * CPUs * 100. Of a node with 4 CPUs and a capacity of 20, a cap of 5 is one CPU: quota 100. The same file
gives the same domain whether it counts in units, percent or MHz.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network
from uuid import UUID, uuid5

import msgspec

from controller.addresses import Addresses, mac_of
from controller.infra import Node
from controller.placement import MemoryUnit, NodeUse, Placement
from controller.text_problems import shown, some
from controller.vm_parts import Parts
from protocol.vms import NAME_PATTERN, DirectBoot, Disk, Network, VmSpec

#: Canopy's own namespace for uuid5, drawn once. Another value would give every VM another UUID.
NAMESPACE = UUID("d8329f30-e236-446e-a12d-9316f00bfef4")
#: Linux reads so many bytes of its command line and drops the rest without a word: COMMAND_LINE_SIZE less the final
#: NUL, on x86 (arch/x86/include/asm/setup.h) and arm64 (arch/arm64/include/uapi/asm/setup.h).
MAX_CMDLINE = 2047
#: libvirt takes no quota below 1000 µs in a period of 100 ms (https://libvirt.org/formatdomain.html#cpu-tuning).
MIN_QUOTA = 1


class DeploymentError(Exception):
    """What the plan asks for cannot be made. `problems` holds one sentence for each cause."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(shown(self.problems)))


def vm_uuid(deployment: str, vm: str) -> str:
    """The VM's UUID: the same for the same names, always. Neither name can hold a `/`."""
    return str(uuid5(NAMESPACE, f"{deployment}/{vm}"))


def cpu_quota(cap: int, node: Node) -> int:
    """`cap`, in the unit of the node's CPU capacity (not 0), as hundredths of one CPU, rounded.

    At least MIN_QUOTA, and at most all of the node's CPUs, since a cap above the capacity limits nothing.
    """
    quota = (2 * cap * node.cpus * 100 + node.cpu_capacity) // (2 * node.cpu_capacity)
    return max(MIN_QUOTA, min(quota, node.cpus * 100))


def guest_cmdline(cmdline: str, *, name: str, ip: str, prefix: int, gateway: str | None) -> str:
    """`cmdline` with the guest's address, netmask, gateway and host name before it, in the kernel's `ip=` form:

    ip=<client>:<server>:<gateway>:<netmask>:<host name>:<device>:<autoconf>, where an empty server and device mean
    none and the only one, and `off` sets the address as given and asks nobody. A kernel without CONFIG_IP_PNP leaves
    it to the initramfs. An `ip=` that is there already stays, and none is added. Source: Linux,
    Documentation/admin-guide/nfs/nfsroot.rst.
    """
    # What comes after `--` belongs to init.
    words = cmdline.split()
    if any(word.startswith("ip=") for word in words[: words.index("--") if "--" in words else None]):
        return cmdline
    netmask = IPv4Network((0, prefix)).netmask
    return f"ip={ip}::{gateway or ''}:{netmask}:{name}::off {cmdline}".rstrip()


def make_specs(
    *,
    deployment: str,
    placement: Placement,
    addresses: Addresses,
    boot: DirectBoot | None = None,
    disk: Disk | None = None,
    network: Network | None = None,
    parts: Mapping[str, Parts] | None = None,
) -> dict[str, tuple[VmSpec, ...]]:
    """What each host is to run: hosts with VMs, sorted by name, and their VMs, sorted by name.

    `boot`, `disk` and `network` hold for all VMs that `parts` does not name; a kernel's command line gets each guest's
    own address. Raises DeploymentError with all causes.
    """
    problems: list[str] = []
    if re.fullmatch(NAME_PATTERN, deployment) is None:
        problems.append(
            f"{deployment!r} is no deployment name: it takes 1 to 63 letters, digits, '-', '_' and '.', "
            "with a letter or digit first and last."
        )
    nodes = {use.node.name: use.node for use in placement.nodes}
    for_all = Parts(boot=boot, disk=disk, network=network or Network())
    specs: dict[str, list[VmSpec]] = {}
    for place in placement.places:
        vm, node = place.vm, nodes[place.node]
        ip = addresses.by_name.get(vm.name)
        if ip is None:
            problems.append(f"{vm.name} has no address; assign one for each VM of the plan.")
            continue
        if vm.memory_wanted == 0:
            problems.append(f"{vm.name} has memory 0, with which nothing boots; give it at least 1.")
        quota, segment = None, addresses.segment(vm.name)
        if vm.cpu_cap is not None and node.cpu_capacity == 0:
            problems.append(
                f"{vm.name} has a CPU cap and {node.name} a CPU capacity of 0, so the cap is no share of anything; "
                "give the node a capacity, or the VM no cap."
            )
        elif vm.cpu_cap is not None:
            quota = cpu_quota(vm.cpu_cap, node)
        made_of = for_all if parts is None else parts.get(vm.name, for_all)
        vm_boot = made_of.boot
        if vm_boot is not None:
            cmdline = guest_cmdline(
                vm_boot.cmdline, name=vm.name, ip=ip, prefix=segment.prefix, gateway=segment.gateway
            )
            if len(cmdline.encode()) > MAX_CMDLINE:
                problems.append(
                    f"{vm.name} would get a kernel command line of {len(cmdline.encode())} bytes and Linux reads "
                    f"{MAX_CMDLINE}; shorten --cmdline."
                )
            vm_boot = msgspec.structs.replace(vm_boot, cmdline=cmdline)
        spec = VmSpec(
            name=vm.name,
            uuid=vm_uuid(deployment, vm.name),
            deployment=deployment,
            vcpus=vm.vcpus,
            memory_mib=_mib(vm.memory_wanted, placement.memory_unit),
            mac=mac_of(ip),
            ip=ip,
            prefix=segment.prefix,
            gateway=segment.gateway,
            cpu_quota=quota,
            start=not vm.sleeping,
            boot=vm_boot,
            disk=made_of.disk,
            network=made_of.network,
            seed=made_of.seed,
        )
        specs.setdefault(node.name, []).append(spec)
    if problems:
        raise DeploymentError(problems)
    return {host: tuple(sorted(specs[host], key=lambda spec: spec.name)) for host in sorted(specs)}


class PlannedVm(msgspec.Struct, frozen=True, kw_only=True):
    """One VM of a plan. `planned` where the planner chose its host, not the file."""

    name: str
    ip: str
    mac: str
    vcpus: int
    memory_mib: int
    cpu_quota: int | None
    start: bool
    planned: bool


class PlannedHost(msgspec.Struct, frozen=True, kw_only=True):
    """One host of a plan. CPU is in the file's unit; both amounts are the demand that counts (see placement)."""

    name: str
    offline: bool
    cpu: int
    cpu_capacity: int
    memory_mib: int
    memory_mib_capacity: int
    vms: tuple[PlannedVm, ...]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What `ctl spawn` would do. Hosts and their VMs are sorted by name; offline hosts and empty ones are there.

    The totals leave offline hosts out: their capacity is no use to anybody. `warnings` are sentences.
    """

    deployment: str
    memory_unit: MemoryUnit
    unit_was_auto: bool
    hosts: tuple[PlannedHost, ...]
    vm_count: int
    cpu: int
    cpu_capacity: int
    memory_mib: int
    memory_mib_capacity: int
    warnings: tuple[str, ...] = ()


def make_plan(
    *,
    deployment: str,
    placement: Placement,
    specs: Mapping[str, tuple[VmSpec, ...]],
    warnings: Iterable[object] = (),
) -> Plan:
    """A summary of `specs`. `warnings` come first, for example those of parse_infra; the plan's own follow."""
    chosen = {place.vm.name for place in placement.places if place.planned}
    unit = placement.memory_unit
    hosts = tuple(
        _planned_host(use, specs.get(use.node.name, ()), chosen, unit)
        for use in sorted(placement.nodes, key=lambda use: use.node.name)
    )
    online = [host for host in hosts if not host.offline]
    return Plan(
        deployment=deployment,
        memory_unit=unit,
        unit_was_auto=placement.unit_was_auto,
        hosts=hosts,
        vm_count=len(placement.places),
        cpu=sum(host.cpu for host in online),
        cpu_capacity=sum(host.cpu_capacity for host in online),
        memory_mib=sum(host.memory_mib for host in online),
        memory_mib_capacity=sum(host.memory_mib_capacity for host in online),
        warnings=(*map(str, warnings), *_plan_warnings(placement)),
    )


def render_plan(plan: Plan) -> str:
    """The plan as people read it: a line for each host, its VMs below it, then totals and warnings."""
    gib = plan.memory_unit is MemoryUnit.GIB
    scale, unit = (1024, "GiB") if gib else (1, "MiB")
    guessed = " (guessed from the largest node; --memory-unit sets it)" if plan.unit_was_auto else ""
    lines = [f"deployment {plan.deployment}: {_count(plan.vm_count, 'VM')}, memory in {unit}{guessed}"]

    def amounts(item: PlannedHost | Plan) -> str:
        memory = f"memory {item.memory_mib // scale}/{item.memory_mib_capacity // scale} {unit}"
        return f"CPU {item.cpu}/{item.cpu_capacity}, {memory}"

    for host in plan.hosts:
        if host.offline:
            lines.append(f"{host.name}: offline")
            continue
        lines.append(f"{host.name}: {_count(len(host.vms), 'VM')}, {amounts(host)}")
        width = max((len(vm.name) for vm in host.vms), default=0)
        lines += [f"  {vm.name:<{width}}  {vm.ip:<15}  {vm.mac}  {_details(vm)}" for vm in host.vms]
    online = sum(not host.offline for host in plan.hosts)
    lines.append(f"total: {_count(plan.vm_count, 'VM')} on {_count(online, 'host')}, {amounts(plan)}")
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines) + "\n"


def _planned_host(use: NodeUse, specs: Iterable[VmSpec], chosen: set[str], unit: MemoryUnit) -> PlannedHost:
    return PlannedHost(
        name=use.node.name,
        offline=use.node.offline,
        cpu=use.cpu,
        cpu_capacity=use.node.cpu_capacity,
        memory_mib=_mib(use.memory, unit),
        memory_mib_capacity=_mib(use.node.memory, unit),
        vms=tuple(
            PlannedVm(
                name=spec.name,
                ip=spec.ip,
                mac=spec.mac,
                vcpus=spec.vcpus,
                memory_mib=spec.memory_mib,
                cpu_quota=spec.cpu_quota,
                start=spec.start,
                planned=spec.name in chosen,
            )
            for spec in specs
        ),
    )


def _plan_warnings(placement: Placement) -> list[str]:
    warnings = [f"{over}; let pass by --overcommit" for over in placement.overcommitted]
    moved = [place.vm.name for place in placement.places if place.planned and place.vm.node is not None]
    if moved:
        warnings.append(f"{_count(len(moved), 'VM')} of offline nodes placed elsewhere: {some(moved)}")
    capped = [place.vm.name for place in placement.places if place.vm.cpu_cap == 0]
    if capped:
        warnings.append(f"CPU cap 0 becomes {MIN_QUOTA} % of a CPU, the least that libvirt takes: {some(capped)}")
    return warnings


def _details(vm: PlannedVm) -> str:
    parts = [_count(vm.vcpus, "vCPU"), f"{vm.memory_mib} MiB"]
    if vm.cpu_quota is not None:
        parts.append(f"at most {vm.cpu_quota} % of a CPU")
    if not vm.start:
        parts.append("sleeping")
    if vm.planned:
        parts.append("placed by the planner")
    return ", ".join(parts)


def _mib(memory: int, unit: MemoryUnit) -> int:
    return memory * 1024 if unit is MemoryUnit.GIB else memory


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
