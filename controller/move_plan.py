"""Which VMs move when: as many at a time as hosts and links between sites may have, and none to where there is no room.

Pure. Memory in MiB, CPU in hundredths of a CPU, as they are on record. A VM that moves has its room on both hosts until
its move has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import msgspec

from controller.on_record import Capacity, Vm
from protocol.messages import HostHealth


class Moving(msgspec.Struct, frozen=True, kw_only=True):
    """One VM that is to move."""

    deployment: str
    name: str
    source: str
    target: str
    cpu: int = 0
    memory_mib: int = 0


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What a host has left; None where nobody said how much it has."""

    cpu: int | None
    memory_mib: int | None


class MovePlan:
    """Moves that are to be done, and those that are under way. Between sites at most `per_link` at a time for any two,
    and of a host, to it and from it together, at most `per_host`; within a site links are taken to be as fast as hosts.
    """

    def __init__(
        self,
        moves: Iterable[Moving],
        room: Mapping[str, Room],
        *,
        per_host: int,
        per_link: int,
        site: Callable[[str], str],
    ) -> None:
        self._waiting = list(moves)
        self._running: list[Moving] = []
        self._cpu = {host: one.cpu for host, one in room.items()}
        self._memory = {host: one.memory_mib for host, one in room.items()}
        self._per_host, self._per_link, self._site = per_host, per_link, site
        self._at_host: Counter[str] = Counter()
        self._on_link: Counter[tuple[str, str]] = Counter()

    @property
    def waiting(self) -> tuple[Moving, ...]:
        """Those that have not begun, in their order."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Moving, ...]:
        """Those that are under way."""
        return tuple(self._running)

    def begin(self) -> list[Moving]:
        """Those that may begin now, in their order; they are under way from now on."""
        begun = []
        for move in list(self._waiting):
            if self._may(move):
                self._waiting.remove(move)
                self._running.append(move)
                self._count(move, 1)
                self._take(move.target, move, 1)
                begun.append(move)
        return begun

    def ended(self, move: Moving, *, moved: bool) -> None:
        """A move is over: the VM is on one of the two hosts."""
        self._running.remove(move)
        self._count(move, -1)
        self._take(move.source if moved else move.target, move, -1)

    def drop_waiting(self) -> list[Moving]:
        """Begin no more; those that have not begun."""
        dropped, self._waiting = self._waiting, []
        return dropped

    def why_not(self, move: Moving) -> str:
        """What a waiting move waits for, in words."""
        lacks = []
        for what, left, needs, unit in (
            ("memory", self._memory.get(move.target), move.memory_mib, " MiB"),
            ("CPU", self._cpu.get(move.target), move.cpu, " hundredths of a CPU"),
        ):
            if left is not None and needs > left:
                lacks.append(f"{move.target} has {what} for {max(0, left)}{unit} more, and it needs {needs}")
        return "; ".join(lacks) or "others are to move first"

    def _may(self, move: Moving) -> bool:
        link = self._link(move)
        return (
            max(self._at_host[move.source], self._at_host[move.target]) < self._per_host
            and (link is None or self._on_link[link] < self._per_link)
            and self._fits(move)
        )

    def _fits(self, move: Moving) -> bool:
        cpu, memory = self._cpu.get(move.target), self._memory.get(move.target)
        return (cpu is None or move.cpu <= cpu) and (memory is None or move.memory_mib <= memory)

    def _link(self, move: Moving) -> tuple[str, str] | None:
        here, there = sorted((self._site(move.source), self._site(move.target)))
        return None if here == there else (here, there)

    def _count(self, move: Moving, by: int) -> None:
        self._at_host[move.source] += by
        self._at_host[move.target] += by
        link = self._link(move)
        if link is not None:
            self._on_link[link] += by

    def _take(self, host: str, move: Moving, by: int) -> None:
        cpu, memory = self._cpu.get(host), self._memory.get(host)
        if cpu is not None:
            self._cpu[host] = cpu - by * move.cpu
        if memory is not None:
            self._memory[host] = memory - by * move.memory_mib


def room_left(
    health: Mapping[str, HostHealth | None], declared: Mapping[str, Capacity], vms: Iterable[Vm]
) -> dict[str, Room]:
    """What hosts have left beside the VMs that are on record there: of what a file declared last, else of what they say
    of themselves; those that said nothing are missing."""
    found: dict[str, Room] = {}
    for host, told in health.items():
        if host in declared:
            found[host] = Room(cpu=declared[host].cpu, memory_mib=declared[host].memory_mib)
        elif told is not None:
            found[host] = Room(cpu=told.cpus * 100, memory_mib=told.memory_mib)
    for vm in vms:
        left = found.get(vm.host)
        if left is not None and left.cpu is not None and left.memory_mib is not None:
            found[vm.host] = Room(cpu=left.cpu - vm.cpu, memory_mib=left.memory_mib - vm.memory_mib)
    return found
