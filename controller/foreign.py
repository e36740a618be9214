"""Domains of hosts that are not this fleet's VMs: shown where somebody asks for them, and never touched."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from controller.api import Status
from controller.render import clean
from controller.results import Happening, Result
from protocol.vms import SeenDomain, VmPower


class Foreign(msgspec.Struct, frozen=True, kw_only=True):
    """A domain that is none of the VMs on record. `whose` says in words who made it."""

    name: str
    host: str
    uuid: str
    power: VmPower
    whose: str


def foreign(happened: Iterable[Happening], status: Status) -> tuple[list[Foreign], list[str]]:
    """What hosts named beside the VMs on record, by host and name; and hosts whose answer can't be read, in words."""
    record = {(vm.host, vm.deployment, vm.name) for vm in status.vms}
    found: list[Foreign] = []
    wrong: list[str] = []
    for result in happened:
        if not isinstance(result, Result) or not result.ok:
            continue
        for host in result.hosts:
            try:
                domains = msgspec.json.decode(result.stdout, type=list[SeenDomain])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                wrong.append(f"{host}: its answer is none that an agent gives: {error}")
                continue
            found += [
                Foreign(name=one.name, host=host, uuid=one.uuid, power=one.power, whose=_whose(one))
                for one in domains
                if not (one.mine and (host, one.deployment, one.name) in record)
            ]
    return sorted(found, key=lambda one: (one.host, one.name)), wrong


def _whose(domain: SeenDomain) -> str:
    if not domain.owner:
        return "not Canopy's"
    if domain.mine:
        return f"{clean(domain.deployment)}, not on record"
    return f"{clean(domain.deployment)} of another fleet ({clean(domain.owner)})"
