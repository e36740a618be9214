"""One VM without an infra.conf: what `ctl vm create` makes."""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Interface, NetmaskValueError
from pathlib import Path
from typing import Any

import msgspec

from controller import api
from controller.addresses import Addresses, mac_of
from controller.deployment import Plan, guest_cmdline, vm_uuid
from controller.placement import MemoryUnit
from controller.profile import Settings
from controller.spawn_images import DigestCache, ImageFinder
from controller.spawn_plan import Prepared
from controller.status import CtlError, ExitStatus
from controller.vm_parts import PartsFinder
from protocol.vms import VmSpec


def single(
    name: str,
    *,
    deployment: str,
    host: str,
    address: str,
    vcpus: int,
    memory_mib: int,
    settings: Settings,
    status: api.Status,
    known: api.Deployment,
    images: tuple[api.KnownImage, ...] = (),
    gateway: str | None = None,
    uuid: str | None = None,
    cache: Path | None = None,
) -> Prepared:
    """A plan of one VM. `address` is its IP with the network's prefix, as 10.0.0.5/16. Raises CtlError."""
    try:
        interface = IPv4Interface(address)
    except (AddressValueError, NetmaskValueError):
        raise CtlError(
            f"--ip {address}: give an IPv4 address with its network's prefix, as 10.0.0.5/16", ExitStatus.USAGE
        ) from None
    if "/" not in address:
        raise CtlError(f"--ip {address}: the network's prefix is missing, as in {address}/16", ExitStatus.USAGE)
    at = next((one for one in status.hosts if one.name == host), None)
    if at is None:
        raise CtlError(f"{host} is not in the fleet: start it with `ctl up -w {host}`", ExitStatus.NO_TARGET)
    if not at.up:
        raise CtlError(f"{host} is down: {at.why or 'nobody knows why'}", ExitStatus.UNREACHABLE)
    if known.hosts.get(name, host) != host:
        raise CtlError(
            f"{name} is on {known.hosts[name]}, and VMs are not moved by this: destroy it first", ExitStatus.USAGE
        )
    finder = ImageFinder(known=images, cache=DigestCache(cache))
    parts = PartsFinder(finder).of(settings)
    ip, prefix = str(interface.ip), interface.network.prefixlen
    boot = parts.boot
    if boot is not None:
        line = guest_cmdline(boot.cmdline, name=name, ip=ip, prefix=prefix, gateway=gateway)
        boot = msgspec.structs.replace(boot, cmdline=line)
    fields: dict[str, Any] = {
        "name": name,
        "uuid": uuid or vm_uuid(deployment, name),
        "deployment": deployment,
        "vcpus": vcpus,
        "memory_mib": memory_mib,
        "mac": mac_of(ip),
        "ip": ip,
        "prefix": prefix,
        "gateway": gateway,
        "boot": boot,
        "disk": parts.disk,
        "network": parts.network,
        "seed": parts.seed,
    }
    try:
        spec = msgspec.convert(msgspec.to_builtins(VmSpec(**fields)), VmSpec)
    except msgspec.ValidationError as error:
        raise CtlError(f"{name} can't be made so: {error}", ExitStatus.USAGE) from error
    plan = Plan(
        deployment=deployment,
        memory_unit=MemoryUnit.MIB,
        unit_was_auto=False,
        hosts=(),
        vm_count=1,
        cpu=0,
        cpu_capacity=0,
        memory_mib=memory_mib,
        memory_mib_capacity=0,
    )
    addresses = Addresses(by_name={name: ip}, prefix=prefix, gateway=gateway)
    return Prepared(
        plan=plan, slices={host: (spec,)}, images=finder.files, stored=finder.stored, addresses=addresses, others=()
    )
