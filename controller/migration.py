"""What `ctl migrate` is going to do, and what came of it: which VMs go where, in which order. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from controller import api
from controller.hosts import site_of
from controller.infra import Infra
from controller.inventory import as_in_fleet
from controller.move_plan import MovePlan, Moving, Room, room_left
from controller.placement import MemoryUnit, PlacementError, place
from controller.progress import size_text
from controller.render import clean
from controller.results import VmProgress
from controller.status import CtlError, ExitStatus
from controller.tables import count
from controller.text_problems import some
from protocol.vms import VmChange, VmResult


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The moves that are wanted, in their order, and the VMs of a file that are not there to be moved."""

    moves: tuple[Moving, ...]
    absent: tuple[str, ...] = ()


def rooms(status: api.Status, record: api.InfraRecord) -> dict[str, Room]:
    """What each host has left, as the service sees it."""
    health = {host.name: host.health for host in status.hosts}
    return room_left(health, record.capacities, record.vms)


def to_hosts(
    meant: Mapping[str, Sequence[str]], targets: Sequence[str], status: api.Status, record: api.InfraRecord
) -> Wanted:
    """Moves of VMs, named by deployment, to some hosts: each goes to the one that has most memory left, those that are
    on one of them stay. Raises CtlError where all are there."""
    room = {host: one for host, one in rooms(status, record).items() if host in set(targets)}
    left = {host: room[host].memory_mib if host in room else None for host in targets}
    places = {host: number for number, host in enumerate(targets)}
    known = {(vm.deployment, vm.name): vm for vm in record.vms}
    moves = []
    taken = dict.fromkeys(targets, 0)
    for deployment, names in meant.items():
        for name in names:
            vm = known[deployment, name]
            if vm.host in left:
                continue

            def order(host: str) -> tuple[float, int, int]:
                free = left[host]
                return (-(free if free is not None else float("inf")), taken[host], places[host])

            target = min(targets, key=order)
            taken[target] += 1
            had = left[target]
            left[target] = None if had is None else had - vm.memory_mib
            moves.append(
                Moving(
                    deployment=deployment,
                    name=name,
                    source=vm.host,
                    target=target,
                    cpu=vm.cpu,
                    memory_mib=vm.memory_mib,
                )
            )
    return Wanted(moves=tuple(moves))


def by_file(
    infra: Infra,
    deployment: str,
    status: api.Status,
    record: api.InfraRecord,
    *,
    memory_unit: MemoryUnit = MemoryUnit.AUTO,
    overcommit: bool = False,
) -> Wanted:
    """The moves that bring a deployment's VMs to where its file has them. A VM that the file gives no place stays where
    it is. Raises CtlError where the file has no plan."""
    infra = as_in_fleet(infra, [host.name for host in status.hosts])
    mine = {vm.name: vm for vm in record.vms if vm.deployment == deployment}
    homes = {name: vm.host for name, vm in mine.items()}
    try:
        placement = place(infra, memory_unit=memory_unit, overcommit=overcommit, homes=homes)
    except PlacementError as error:
        raise CtlError(f"this can't be done, and nothing was changed: {error}", ExitStatus.USAGE) from error
    moves = [
        Moving(
            deployment=deployment,
            name=at.vm.name,
            source=homes[at.vm.name],
            target=at.node,
            cpu=mine[at.vm.name].cpu,
            memory_mib=mine[at.vm.name].memory_mib,
        )
        for at in placement.places
        if at.vm.name in mine and homes[at.vm.name] != at.node
    ]
    absent = tuple(at.vm.name for at in placement.places if at.vm.name not in mine)
    strangers = sorted({move.target for move in moves} - {host.name for host in status.hosts})
    if strangers:
        raise CtlError(f"not in the fleet, and nothing was moved: {some(strangers)}", ExitStatus.NO_TARGET)
    return Wanted(moves=tuple(moves), absent=absent)


def in_rounds(
    moves: Iterable[Moving], room: Mapping[str, Room], sites: Mapping[str, str], *, per_host: int, per_link: int
) -> tuple[list[list[Moving]], dict[str, str]]:
    """The moves as they could go if each took as long as any other: round after round; and those that can't begin,
    by name, with the reason."""
    plan = MovePlan(moves, room, per_host=per_host, per_link=per_link, site=lambda host: sites.get(host, site_of(host)))
    rounds = []
    while begun := plan.begin():
        rounds.append(begun)
        for move in begun:
            plan.ended(move, moved=True)
    return rounds, {move.name: plan.why_not(move) for move in plan.waiting}


def plan_lines(rounds: Sequence[Sequence[Moving]], stuck: Mapping[str, str]) -> list[str]:
    """What would be done: a line a VM, rounds apart."""
    lines = [
        f"{number} {move.name}: {move.source} -> {move.target}"
        for number, begun in enumerate(rounds, 1)
        for move in begun
    ]
    lines += [f"! {name}: {clean(why)}" for name, why in stuck.items()]
    total = sum(map(len, rounds))
    return [*lines, f"{count(total, 'VM')} would move, {len(stuck)} could not"]


def plan_object(rounds: Sequence[Sequence[Moving]], stuck: Mapping[str, str], absent: Sequence[str]) -> Any:
    """The same for programs."""
    return {
        "moves": [
            {
                "name": move.name,
                "deployment": move.deployment,
                "from": move.source,
                "to": move.target,
                "round": number,
            }
            for number, begun in enumerate(rounds, 1)
            for move in begun
        ],
        "stuck": dict(stuck),
        "not_on_record": list(absent),
    }


def moved_lines(moves: Iterable[Moving], results: Mapping[str, VmResult]) -> list[str]:
    """What came of it: a line for each VM that has moved, and how many did."""
    done = [move for move in moves if _moved(results.get(move.name))]
    return [
        *(f"{move.name}: {move.source} -> {move.target}" for move in done),
        f"{count(len(done), 'VM')} moved",
    ]


def failed_lines(moves: Iterable[Moving], results: Mapping[str, VmResult]) -> list[str]:
    """A line for each VM that has not."""
    return [
        f"{move.name}: {move.source} -> {move.target}: {clean(_why(results.get(move.name)))}"
        for move in moves
        if not _moved(results.get(move.name))
    ]


def moved_object(moves: Iterable[Moving], results: Mapping[str, VmResult], absent: Collection[str]) -> Any:
    """The same for programs."""
    return {
        "moves": [
            {
                "name": move.name,
                "deployment": move.deployment,
                "from": move.source,
                "to": move.target,
                "moved": _moved(results.get(move.name)),
                "detail": "" if _moved(results.get(move.name)) else _why(results.get(move.name)),
            }
            for move in moves
        ],
        "not_on_record": list(absent),
    }


def moving_line(total: int, done: int, failed: int, going: Mapping[str, VmProgress]) -> str:
    """The live line: `3/8 VMs moved, 1 failed; vm07 61 %, 38.2 MiB left`."""
    parts = []
    for name, at in sorted(going.items())[:3]:
        whole = at.done + at.left
        parts.append(f"{name} {100 * at.done // whole if whole else 0} %, {size_text(at.left)} left")
    told = f"{done}/{total} VMs moved" + (f", {failed} failed" if failed else "")
    return f"{told}; {'; '.join(parts)}" if parts else told


def _moved(result: VmResult | None) -> bool:
    return result is not None and result.change is VmChange.MOVED


def _why(result: VmResult | None) -> str:
    return "nobody said what became of it" if result is None else result.detail or result.change.value
