"""The shape of the tree: a pure function of hosts, sites and fanout.

`grow` places new hosts under those that are there and moves nobody; the plan of a whole fleet is `grow` from nothing.
Every host's parent is placed before the host itself, so a tree can grow while its hosts come up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

#: The root's place in a map of parents.
ROOT: None = None

#: 1,024 hosts in two levels, and few enough children that one process folds for them without becoming the bottleneck.
DEFAULT_FANOUT = 32


@dataclass(frozen=True)
class Seat:
    """A host that wants a place: its rank, and its site ('' where sites are of no concern)."""

    rank: int
    site: str = ""


def depth_for(hosts: int, fanout: int) -> int:
    """The fewest levels below the root that hold `hosts` hosts with at most `fanout` children each."""
    depth, held, level = 0, 0, 1
    while held < hosts:
        level *= fanout
        held += level
        depth += 1
    return depth


def even_fanout(hosts: int, fanout: int) -> int:
    """The smallest fanout that needs no more levels than `fanout` does, so that no relay carries more than it must."""
    if hosts <= fanout:
        return fanout
    depth = depth_for(hosts, fanout)
    low, high = 1, fanout
    while low < high:
        middle = (low + high) // 2
        if depth_for(hosts, middle) <= depth:
            high = middle
        else:
            low = middle + 1
    return low


def grow(
    parents: Mapping[int, int | None],
    sites: Mapping[int, str],
    seats: Iterable[Seat],
    fanout: int,
    closed: Collection[int] = (),
) -> dict[int, int | None]:
    """Parents of the hosts in `parents` and of the new `seats`.

    Each new host goes to the shallowest parent with room, among equals to the one with the fewest children, then to the
    one that came first. Where hosts have sites, the first host of a site hangs below the root and the others of that
    site below it, so that a command crosses the link to a site once. `sites` names the sites of the hosts already
    placed. Hosts in `closed` (those that are down) keep their place and get no new children.

    Raises ValueError for a fanout below 1, or a rank that is placed already.
    """
    if fanout < 1:
        raise ValueError(f"a fanout must be at least 1, not {fanout}")
    seats = list(seats)
    placed = dict(parents)
    site_of = dict(sites) | {seat.rank: seat.site for seat in seats}
    several_sites = len({site_of.get(rank, "") for rank in placed} | {seat.site for seat in seats}) > 1
    # One search tree per site; hosts of one site never take children of another. With a single site the root is its
    # head.
    trees: dict[str, _Site] = {}
    for rank in below(children_of(placed), ROOT):
        parent = placed[rank]
        site = site_of.get(rank, "") if several_sites else ""
        tree = trees.setdefault(site, _Site(fanout, closed, rooted=not several_sites))
        tree.add(rank, parent)
    for seat in seats:
        if seat.rank in placed:
            raise ValueError(f"rank {seat.rank} has a place already")
        tree = trees.setdefault(seat.site if several_sites else "", _Site(fanout, closed, rooted=not several_sites))
        placed[seat.rank] = tree.place(seat.rank)
    return placed


class _Site:
    """Open places of one site, level by level. Hosts are added with their parents first."""

    def __init__(self, fanout: int, closed: Collection[int], *, rooted: bool) -> None:
        self._fanout = fanout
        self._closed = closed
        self._level: dict[int | None, int] = {ROOT: 0} if rooted else {}
        self._children: dict[int | None, int] = {ROOT: 0} if rooted else {}
        self._by_level: list[list[int | None]] = [[ROOT]] if rooted else [[]]
        self._first_open = 0

    def add(self, rank: int, parent: int | None) -> None:
        """A host that has its place already."""
        if parent in self._children:
            self._children[parent] += 1
        self._enter(rank, self._level.get(parent, 0) + 1)

    def place(self, rank: int) -> int | None:
        """Find a place for `rank`, take it, and return the parent."""
        parent = self._open_parent()
        if parent in self._children:
            self._children[parent] += 1
        self._enter(rank, self._level.get(parent, 0) + 1)
        return parent

    def _enter(self, rank: int, level: int) -> None:
        self._level[rank] = level
        self._children[rank] = 0
        if rank in self._closed:
            return
        while len(self._by_level) <= level:
            self._by_level.append([])
        self._by_level[level].append(rank)
        self._first_open = min(self._first_open, level)

    def _open_parent(self) -> int | None:
        for level in range(self._first_open, len(self._by_level)):
            nodes = self._by_level[level]
            if not nodes:
                continue
            # The least loaded of a level: children are given out in rounds, so the scan ends at the first of the lowest
            # count.
            best = min(nodes, key=self._children.__getitem__)
            if self._children[best] < self._fanout:
                return best
            self._first_open = level + 1
        return ROOT  # the first host of its site


def ancestors(parents: Mapping[int, int | None], rank: int) -> list[int | None]:
    """The ranks above `rank`, parent first, the root (None) last."""
    path: list[int | None] = []
    at: int | None = rank
    while at is not None:
        at = parents[at]
        path.append(at)
        if len(path) > len(parents) + 1:
            raise ValueError(f"rank {rank} hangs in a circle")
    return path


def children_of(parents: Mapping[int, int | None]) -> dict[int | None, list[int]]:
    """Each parent's children in ascending order."""
    children: dict[int | None, list[int]] = {}
    for rank in sorted(parents):
        children.setdefault(parents[rank], []).append(rank)
    return children


def below(children: Mapping[int | None, list[int]], rank: int | None) -> list[int]:
    """All ranks below `rank`, each after its parent."""
    found = list(children.get(rank, ()))
    for child in found:  # the list grows while it is walked: breadth first
        found.extend(children.get(child, ()))
    return found
