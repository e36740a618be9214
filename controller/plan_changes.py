"""What a spawn would change: the plan beside what is there. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from agent.vmxml import differences
from controller import api
from controller.hosts import fold
from controller.render import clean
from controller.spawn_plan import Prepared
from controller.tables import count
from protocol.vms import VmPower, VmSpec

_OFF = (VmPower.SHUTOFF, VmPower.CRASHED)


class Sign(StrEnum):
    """What becomes of a VM."""

    MAKE = "+"
    CHANGE = "~"
    REMOVE = "-"


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One VM that is not as the plan has it. `why` is a sentence."""

    sign: Sign
    vm: str
    host: str
    why: str


class Changes(msgspec.Struct, frozen=True, kw_only=True):
    """All that differs, by host and name. `right` is how many VMs are as planned."""

    deployment: str
    changes: tuple[Change, ...]
    right: int
    warnings: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {sign.value: sum(change.sign is sign for change in self.changes) for sign in Sign}


def changes(prepared: Prepared, status: api.Status | None, known: api.Deployment | None) -> Changes:
    """What a spawn of this would do. Without the service's word there are no VMs yet.

    A VM that differs from the plan (`~`) is not changed by a spawn, which tells of it; one that is off is started. VMs
    that the file lacks (`-`) are removed by a spawn with --prune.
    """
    made = {spec.name: spec for spec in known.specs} if known is not None else {}
    homes = known.hosts if known is not None else {}
    deployment = prepared.plan.deployment
    vms = {vm.name: vm for vm in status.vms if vm.deployment == deployment} if status is not None else {}
    found: list[Change] = []
    right = 0
    for host, specs in prepared.slices.items():
        for spec in specs:
            change = _change(spec, host, spec.name in homes, made.get(spec.name), vms.get(spec.name))
            if change is None:
                right += 1
            else:
                found.append(change)
    found += [
        Change(sign=Sign.REMOVE, vm=name, host=homes[name], why="on record and not in the file")
        for name in prepared.others
    ]
    held = [f"{fold(sorted(prepared.held))}: left alone, since their hosts are down"] if prepared.held else []
    return Changes(
        deployment=deployment,
        changes=tuple(sorted(found, key=lambda change: (change.host, change.vm))),
        right=right,
        warnings=(*prepared.plan.warnings, *held),
    )


def _change(spec: VmSpec, host: str, on_record: bool, made: VmSpec | None, vm: api.VmStatus | None) -> Change | None:
    if not on_record:
        return Change(sign=Sign.MAKE, vm=spec.name, host=host, why="")
    if made is None:
        return Change(sign=Sign.MAKE, vm=spec.name, host=host, why="asked for before, and not made as far as is known")
    power = vm.state.power if vm is not None and vm.state is not None else None
    if power is VmPower.GONE:
        return Change(sign=Sign.MAKE, vm=spec.name, host=host, why="its host has lost it")
    differ = differences(made, spec)
    if differ:
        return Change(sign=Sign.CHANGE, vm=spec.name, host=host, why="; ".join(differ))
    if spec.start and power in _OFF:
        return Change(sign=Sign.CHANGE, vm=spec.name, host=host, why="it is off, and would be started")
    return None


def render_changes(found: Changes, *, most: int = 20) -> str:
    """A line for each host with its counts, up to `most` of its VMs below it, and a total."""
    by_host: dict[str, list[Change]] = {}
    for change in found.changes:
        by_host.setdefault(change.host, []).append(change)
    lines = []
    for host, mine in by_host.items():
        lines.append(f"{host}: {_counted(mine)}")
        for change in mine[:most]:
            why = f": {clean(change.why)}" if change.why else ""
            lines.append(f"  {change.sign.value} {change.vm}{why}")
        if len(mine) > most:
            lines.append(f"  and {len(mine) - most} more")
    lines += [f"warning: {warning}" for warning in found.warnings]
    if found.changes:
        lines.append(f"{found.deployment}: {_counted(found.changes)}, {found.right} as planned")
    else:
        lines.append(f"{found.deployment}: {count(found.right, 'VM')} as planned, nothing to do")
    return "\n".join(lines) + "\n"


def _counted(found: Sequence[Change]) -> str:
    counts: Mapping[Sign, int] = {sign: sum(change.sign is sign for change in found) for sign in Sign}
    return " ".join(f"{sign.value}{number}" for sign, number in counts.items() if number)


def changes_object(found: Changes) -> object:
    """The same for programs."""
    hosts: dict[str, list[dict[str, str]]] = {}
    for change in found.changes:
        fields = {"name": change.vm, "change": change.sign.value, "detail": change.why}
        hosts.setdefault(change.host, []).append(fields)
    return {
        "deployment": found.deployment,
        "total": {**found.counts(), "=": found.right},
        "hosts": hosts,
        "warnings": found.warnings,
    }
