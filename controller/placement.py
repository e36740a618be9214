"""Which VM goes to which node: a pure function of infra.conf, so that every rerun gives the same plan.

A mapping is kept where it fits; VMs without a place, and on request those of offline nodes, are placed first fit
decreasing: the largest memory first, then the largest CPU demand, then the order of declaration; each goes to the
first node, in the order of declaration, that has room for both. What a VM needs is its wanted demand.

A sleeping VM that the file maps to a node counts nothing there, since in Entropy it lies on disk and a full node may
hold it. One that the planner places gets room like any other: it may be woken, and its place was our choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import ClassVar, Literal

import msgspec

from controller.infra import Infra, Node, Vm
from controller.text_problems import shown, some

#: `auto` takes memory for GiB where no node has so much: a host with 1 TiB is rare, one with less than 1 GiB too.
AUTO_GIB_BELOW = 1024


class MemoryUnit(StrEnum):
    """The unit of a file's memory columns."""

    GIB = "GiB"
    MIB = "MiB"
    AUTO = "auto"


class OverCapacity(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A node whose mapped VMs want more than it has. `unit` is empty for CPU, whose unit only the file knows."""

    next_step: ClassVar[str] = "Map fewer VMs to these nodes, or allow it with --overcommit."

    node: str
    resource: Literal["CPU", "memory"]
    wanted: int
    capacity: int
    unit: str = ""

    @property
    def over(self) -> int:
        return self.wanted - self.capacity

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return (
            f"{self.node}: its VMs want {self.resource} {self.wanted}{unit}, "
            f"{self.over}{unit} over its capacity of {self.capacity}{unit}"
        )


class OfflineMapping(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An offline node that VMs are mapped to."""

    next_step: ClassVar[str] = "Have the VMs of offline nodes placed on others with --replace-offline."

    node: str
    vms: tuple[str, ...]

    def __str__(self) -> str:
        plural = "" if len(self.vms) == 1 else "s"
        return f"{self.node}: offline, with {len(self.vms)} VM{plural} mapped to it ({some(self.vms)})"


class NoRoom(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A VM that fits on no online node, beside what is there already."""

    next_step: ClassVar[str] = "Add nodes, or make these VMs smaller."

    vm: str
    cpu: int
    memory: int
    unit: str

    def __str__(self) -> str:
        return f"{self.vm}: no online node has room for memory {self.memory} {self.unit} and CPU {self.cpu}"


PlacementProblem = OverCapacity | OfflineMapping | NoRoom


class PlacementError(Exception):
    """No plan. `problems`: nodes over capacity first, then offline ones, then VMs without room."""

    def __init__(self, problems: Iterable[PlacementProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "\n".join([*shown(self.problems), *dict.fromkeys(problem.next_step for problem in self.problems)])
        )


class NodeUse(msgspec.Struct, frozen=True, kw_only=True):
    """A node after placement: its VMs in the order of declaration, and the demand that counts on it."""

    node: Node
    vms: tuple[str, ...]
    cpu: int
    memory: int


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a VM goes. `planned` where the planner chose, not the file."""

    vm: Vm
    node: str
    planned: bool


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """The plan. `nodes` and `places` are in the order of declaration, offline nodes included.

    `memory_unit` is GIB or MIB, never AUTO; `unit_was_auto` says that it was guessed, which users are to be told.
    `overcommitted` is what --overcommit let pass.
    """

    memory_unit: MemoryUnit
    unit_was_auto: bool
    nodes: tuple[NodeUse, ...]
    places: tuple[Place, ...]
    overcommitted: tuple[OverCapacity, ...] = ()


def place(
    infra: Infra,
    *,
    memory_unit: MemoryUnit = MemoryUnit.AUTO,
    overcommit: bool = False,
    replace_offline: bool = False,
) -> Placement:
    """A node for every VM.

    `overcommit` lets the file's own mapping exceed a node; the planner itself never does. `replace_offline` places
    the VMs of offline nodes elsewhere. Raises PlacementError with everything that stands in the way.
    """
    unit, was_auto = chosen_unit(infra, memory_unit)
    offline = {node.name for node in infra.nodes if node.offline}
    cpu = {node.name: 0 for node in infra.nodes}
    memory = dict(cpu)
    home: dict[str, str] = {}
    waiting: list[Vm] = []
    stranded: dict[str, list[str]] = {}
    for vm in infra.vms:
        if vm.node is None or (vm.node in offline and replace_offline):
            waiting.append(vm)
            continue
        if vm.node in offline:
            stranded.setdefault(vm.node, []).append(vm.name)
            continue
        home[vm.name] = vm.node
        if not vm.sleeping:
            cpu[vm.node] += vm.cpu_wanted
            memory[vm.node] += vm.memory_wanted

    over = tuple(_over_capacity(infra, cpu, memory, unit))
    problems: list[PlacementProblem] = [] if overcommit else list(over)
    problems += [OfflineMapping(node=name, vms=tuple(stranded[name])) for name in cpu if name in stranded]
    for vm in _first_fit_decreasing(infra, waiting, cpu, memory, home):
        problems.append(NoRoom(vm=vm.name, cpu=vm.cpu_wanted, memory=vm.memory_wanted, unit=unit.value))
    if problems:
        raise PlacementError(problems)

    lists: dict[str, list[str]] = {node.name: [] for node in infra.nodes}
    for vm in infra.vms:
        lists[home[vm.name]].append(vm.name)
    return Placement(
        memory_unit=unit,
        unit_was_auto=was_auto,
        nodes=tuple(
            NodeUse(node=node, vms=tuple(lists[node.name]), cpu=cpu[node.name], memory=memory[node.name])
            for node in infra.nodes
        ),
        places=tuple(Place(vm=vm, node=home[vm.name], planned=vm.node != home[vm.name]) for vm in infra.vms),
        overcommitted=over,
    )


def chosen_unit(infra: Infra, asked: MemoryUnit) -> tuple[MemoryUnit, bool]:
    """GIB or MIB, and whether it was guessed: GiB where the largest node memory is below 1024, else MiB."""
    if asked is not MemoryUnit.AUTO:
        return asked, False
    largest = max((node.memory for node in infra.nodes), default=0)
    return (MemoryUnit.GIB if largest < AUTO_GIB_BELOW else MemoryUnit.MIB), True


def _over_capacity(
    infra: Infra, cpu: dict[str, int], memory: dict[str, int], unit: MemoryUnit
) -> Iterable[OverCapacity]:
    for node in infra.nodes:
        wanted = cpu[node.name]
        if wanted > node.cpu_capacity:
            yield OverCapacity(node=node.name, resource="CPU", wanted=wanted, capacity=node.cpu_capacity)
        wanted = memory[node.name]
        if wanted > node.memory:
            yield OverCapacity(node=node.name, resource="memory", wanted=wanted, capacity=node.memory, unit=unit.value)


def _first_fit_decreasing(
    infra: Infra, waiting: list[Vm], cpu: dict[str, int], memory: dict[str, int], home: dict[str, str]
) -> list[Vm]:
    """Place `waiting`, adding to `cpu`, `memory` and `home`; those that fit nowhere, in the order of declaration."""
    online = [node for node in infra.nodes if not node.offline]
    left_over: set[str] = set()
    demand, start = (-1, -1), 0
    # sorted() is stable, which keeps the order of declaration among equals.
    for vm in sorted(waiting, key=lambda vm: (-vm.memory_wanted, -vm.cpu_wanted)):
        # Room only shrinks: what was too full for the last VM of this size is too full for this one.
        if demand != (vm.memory_wanted, vm.cpu_wanted):
            demand, start = (vm.memory_wanted, vm.cpu_wanted), 0
        while start < len(online):
            node = online[start]
            if (
                memory[node.name] + vm.memory_wanted <= node.memory
                and cpu[node.name] + vm.cpu_wanted <= node.cpu_capacity
            ):
                break
            start += 1
        if start == len(online):
            left_over.add(vm.name)
            continue
        home[vm.name] = online[start].name
        cpu[home[vm.name]] += vm.cpu_wanted
        memory[home[vm.name]] += vm.memory_wanted
    return [vm for vm in waiting if vm.name in left_over]
