"""Agents' disks, as far as outcomes are kept there. What is asked of a disk is done in that order, some milliseconds
later, unless the agent dies before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol import events

if TYPE_CHECKING:
    from tests.sim.tree import Node, Tree

#: A disk's time for a small file, in seconds.
_TAKES = 0.002

#: What is on one disk, by command; None is damaged.
Disk = dict[int, events.Keep | None]


class Disks:
    """The disks of a tree."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._disks: dict[int, Disk] = {}
        #: Whose disks are full.
        self.full: set[int] = set()

    def of(self, rank: int) -> Disk:
        """What is on this host's disk."""
        return self._disks.setdefault(rank, {})

    def found(self, rank: int) -> dict[int, int]:
        """What an agent finds that begins: commands, and the bytes of each."""
        return {id_: 0 if kept is None else len(kept.output.out) for id_, kept in self.of(rank).items()}

    def perform(self, node: Node, effect: events.Keep | events.Load | events.Forget) -> None:
        """What a relay wants done with its disk."""
        rank, life = node.rank, node.life
        assert rank is not None
        work: Callable[[], events.Event | None] = {
            events.Keep: lambda: self._keep(rank, effect),  # type: ignore[arg-type]
            events.Load: lambda: self._load(rank, effect),  # type: ignore[arg-type]
            events.Forget: lambda: self._forget(rank, effect),  # type: ignore[arg-type]
        }[type(effect)]

        def done() -> None:
            now = self._tree.nodes[rank]
            if now.alive and now.life == life:
                event = work()
                if event is not None:
                    self._tree.feed(rank, event)

        self._tree.at(self._tree.now + _TAKES, done)

    def _keep(self, rank: int, effect: events.Keep) -> events.Event:
        well = rank not in self.full
        if well:
            self.of(rank)[effect.id] = effect
            self._tree.witness.kept(rank, effect.id)
        return events.Kept(effect.id, well)

    def _load(self, rank: int, effect: events.Load) -> events.Event:
        kept = self.of(rank).get(effect.id)
        right = kept is not None and kept.signature == effect.signature
        return events.Loaded(effect.id, (kept.outcome, kept.output) if kept is not None and right else None)

    def _forget(self, rank: int, effect: events.Forget) -> None:
        for id_ in effect.ids:
            self.of(rank).pop(id_, None)

    def fill(self, rank: int) -> None:
        """From now on nothing can be written there."""
        self._tree.note(f"h{rank}'s disk is full")
        self.full.add(rank)

    def harm(self, rank: int, *, damaged: bool) -> None:
        """What outcomes were kept there can't be read any more, or are gone."""
        self._tree.note(f"what h{rank} has on disk is {'damaged' if damaged else 'gone'}")
        self._tree.witness.harmed(rank)
        self._tree.witness.wiped(rank)
        disk = self.of(rank)
        self._disks[rank] = dict.fromkeys(disk) if damaged else {}
