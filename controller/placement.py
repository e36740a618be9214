"""Which VM goes to which node: a pure function of infra.conf, so that every rerun gives the same plan.

A mapping is kept where it fits; VMs without a place, and on request those of offline nodes, are placed first fit
decreasing: the largest memory first, then the largest CPU demand, then the order of declaration; each goes to the
first node, in the order of declaration, that has room for both (`Strategy.PACK`: few nodes), or to the one with the
fewest VMs, then the most free memory, among those that have room (`Strategy.SPREAD`). What a VM needs is its wanted
demand. VMs that stay apart share no node. A VM that is there already, and has no place in the file, stays where it is.

A sleeping VM that the file maps to a node counts nothing there, since in Entropy it lies on disk and a full node may
hold it. One that the planner places gets room like any other: it may be woken, and its place was our choice.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
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


class Strategy(StrEnum):
    """Where VMs without a place go: on few nodes, or on as many as there are."""

    PACK = "pack"
    SPREAD = "spread"


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


class Together(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """VMs that are to stay apart (`rule` says by what), and that the file maps to one node."""

    next_step: ClassVar[str] = "Map VMs that stay apart to different nodes, or take the rule out of the profile."

    node: str
    rule: str
    vms: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.node}: {some(self.vms)} are mapped to it and stay apart by {self.rule!r}"


class NoRoom(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A VM that fits on no online node, beside what is there already. `rule` is the one that it stays apart by."""

    next_step: ClassVar[str] = "Add nodes, or make these VMs smaller."

    vm: str
    cpu: int
    memory: int
    unit: str
    rule: str = ""

    def __str__(self) -> str:
        apart = f", apart from the others of {self.rule!r}" if self.rule else ""
        return f"{self.vm}: no online node has room for memory {self.memory} {self.unit} and CPU {self.cpu}{apart}"


PlacementProblem = OverCapacity | OfflineMapping | Together | NoRoom


class PlacementError(Exception):
    """No plan. `problems`: nodes over capacity first, then offline ones, then broken rules, then VMs without room."""

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
    strategy: Strategy = Strategy.PACK,
    apart: Mapping[str, str] | None = None,
    homes: Mapping[str, str] | None = None,
) -> Placement:
    """A node for every VM.

    `overcommit` lets the file's own mapping exceed a node; the planner itself never does. `replace_offline` places
    the VMs of offline nodes elsewhere. `apart` names the rule of each VM that has one: those of one rule share no node.
    `homes` are the nodes where VMs are already. Raises PlacementError with everything that stands in the way.
    """
    apart, homes = apart or {}, homes or {}
    unit, was_auto = chosen_unit(infra, memory_unit)
    offline = {node.name for node in infra.nodes if node.offline}
    room = _Room(infra, apart)
    waiting: list[Vm] = []
    stranded: dict[str, list[str]] = {}
    for vm in infra.vms:
        if vm.node in offline and not replace_offline:
            stranded.setdefault(vm.node, []).append(vm.name)
        elif vm.node is not None and vm.node not in offline:
            room.take(vm, vm.node, counts=not vm.sleeping)
        else:
            waiting.append(vm)

    over = tuple(_over_capacity(infra, room.cpu, room.memory, unit))
    problems: list[PlacementProblem] = [] if overcommit else list(over)
    problems += [OfflineMapping(node=name, vms=tuple(stranded[name])) for name in room.cpu if name in stranded]
    problems += room.together()
    there = [vm for vm in waiting if homes.get(vm.name) in room.online]
    for vm in there:
        room.take(vm, homes[vm.name], counts=True)
    settled = {vm.name for vm in there}
    left_over = set()
    for vm in sorted(
        (vm for vm in waiting if vm.name not in settled),
        # sorted() is stable, which keeps the order of declaration among equals.
        key=lambda vm: (-vm.memory_wanted, -vm.cpu_wanted),
    ):
        node = room.first_fit(vm) if strategy is Strategy.PACK else room.emptiest_fit(vm)
        if node is None:
            left_over.add(vm.name)
        else:
            room.take(vm, node, counts=True)
    problems += [
        NoRoom(vm=vm.name, cpu=vm.cpu_wanted, memory=vm.memory_wanted, unit=unit.value, rule=apart.get(vm.name, ""))
        for vm in waiting
        if vm.name in left_over
    ]
    if problems:
        raise PlacementError(problems)

    home = room.home
    lists: dict[str, list[str]] = {node.name: [] for node in infra.nodes}
    for vm in infra.vms:
        lists[home[vm.name]].append(vm.name)
    return Placement(
        memory_unit=unit,
        unit_was_auto=was_auto,
        nodes=tuple(
            NodeUse(node=node, vms=tuple(lists[node.name]), cpu=room.cpu[node.name], memory=room.memory[node.name])
            for node in infra.nodes
        ),
        places=tuple(Place(vm=vm, node=home[vm.name], planned=vm.node != home[vm.name]) for vm in infra.vms),
        overcommitted=over,
    )


class _Room:
    """What is taken of each node so far, and by whom."""

    def __init__(self, infra: Infra, apart: Mapping[str, str]) -> None:
        self.online = {node.name: node for node in infra.nodes if not node.offline}
        self.cpu = {node.name: 0 for node in infra.nodes}
        self.memory = dict(self.cpu)
        self.home: dict[str, str] = {}
        self._apart = apart
        self._of_rule: dict[tuple[str, str], list[str]] = {}
        self._order = list(self.online)
        self._places = {name: place for place, name in enumerate(self._order)}
        # Where first fit goes on for VMs of the same size and rule: room only shrinks.
        self._first: dict[tuple[int, int, str], int] = {}
        # Nodes by how full they are, the emptiest first; entries that are out of date are passed over.
        self._count = dict(self.cpu)
        self._heap = [(0, -node.memory, place) for place, node in enumerate(self.online.values())]
        heapq.heapify(self._heap)

    def take(self, vm: Vm, node: str, *, counts: bool) -> None:
        """The VM is on this node. Whether it fits is not looked at."""
        self.home[vm.name] = node
        if vm.name in self._apart:
            self._of_rule.setdefault((node, self._apart[vm.name]), []).append(vm.name)
        if counts:
            self.cpu[node] += vm.cpu_wanted
            self.memory[node] += vm.memory_wanted
            self._count[node] += 1
            if node in self.online:
                heapq.heappush(self._heap, self._entry(self.online[node]))

    def together(self) -> list[Together]:
        """The rules that are broken by now."""
        return [
            Together(node=node, rule=rule, vms=tuple(vms))
            for (node, rule), vms in self._of_rule.items()
            if len(vms) > 1
        ]

    def _entry(self, node: Node) -> tuple[int, int, int]:
        return self._count[node.name], self.memory[node.name] - node.memory, self._places[node.name]

    def _fits(self, vm: Vm, node: Node) -> bool:
        return (
            self.memory[node.name] + vm.memory_wanted <= node.memory
            and self.cpu[node.name] + vm.cpu_wanted <= node.cpu_capacity
            and (vm.name not in self._apart or (node.name, self._apart[vm.name]) not in self._of_rule)
        )

    def first_fit(self, vm: Vm) -> str | None:
        """The first node, in the order of declaration, that has room."""
        key = (vm.memory_wanted, vm.cpu_wanted, self._apart.get(vm.name, ""))
        for place in range(self._first.get(key, 0), len(self._order)):
            if self._fits(vm, self.online[self._order[place]]):
                self._first[key] = place
                return self._order[place]
        self._first[key] = len(self._order)
        return None

    def emptiest_fit(self, vm: Vm) -> str | None:
        """Of the nodes that have room the one with the fewest VMs, then with the most free memory."""
        key = (vm.memory_wanted, vm.cpu_wanted, self._apart.get(vm.name, ""))
        if key in self._first:
            return None
        passed = []
        found = None
        while self._heap:
            entry = heapq.heappop(self._heap)
            node = self.online[self._order[entry[2]]]
            if entry != self._entry(node):
                continue
            passed.append(entry)
            if self._fits(vm, node):
                found = node.name
                break
        for entry in passed:
            heapq.heappush(self._heap, entry)
        if found is None:
            self._first[key] = len(self._order)
        return found


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
