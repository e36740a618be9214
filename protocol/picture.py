"""A relay's picture of the tree below it, kept as links that are compared, never counted.

Each agent numbers its own link to its parent (incarnation, epoch). Of two statements about one rank the later one is
true, and at equal numbers "down" beats "up". So statements may arrive twice, in any order and by any path, and all
relays that have heard the same statements have the same picture.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from protocol import ranks
from protocol.messages import Link
from protocol.ranks import Ranks


def later(new: Link, old: Link) -> bool:
    """Whether `new` supersedes `old`; both are about the same rank."""
    return (new.incarnation, new.epoch, not new.up) > (old.incarnation, old.epoch, not old.up)


class Picture:
    """What hangs below `me` (None: the root), through which child.

    A statement costs as much as it moves: one host that comes or goes is one bit, whatever the size of the fleet.
    """

    def __init__(self, me: int | None) -> None:
        self._me = me
        self.links: dict[int, Link] = {}
        #: For each child of mine, the set of ranks that are reached through it, its own included.
        self.routes: dict[int, Ranks] = {}
        #: All ranks that hang below me now.
        self.reachable: Ranks = ranks.NONE
        self._children: dict[int | None, set[int]] = {}
        #: Each reachable rank's child of mine that it is reached through.
        self._via: dict[int, int] = {}

    def apply(self, links: Iterable[Link]) -> tuple[Link, ...]:
        """Take statements in; returns those that were news."""
        news = []
        for link in links:
            old = self.links.get(link.rank)
            if (old is not None and not later(link, old)) or link.rank == self._me:
                continue  # not news, or of somebody who makes me hang below myself
            self.links[link.rank] = link
            news.append(link)
            if old is not None and old.up:
                if link.up and link.parent == old.parent:
                    continue
                self._hang(link.rank, old.parent, None)
            if link.up:
                self._children.setdefault(link.parent, set()).add(link.rank)
                self._hang(link.rank, None, link)
        return tuple(news)

    def contradicted(self, credible: Iterable[Link], attached: Iterable[Link]) -> tuple[Link, ...]:
        """What the full list of a subtree says without words: a child of somebody in it that is not in it is down.

        A relay that began anew, or was cut off while it lost a child, can't name the link that is no more. Only the
        topmost lost ones are named; what hangs below them may still be there, and attach with them again. Nothing is
        concluded about the children of hosts that are not in `credible`, the part of the list that is believed.
        """
        listed = {link.rank for link in attached}
        return tuple(
            msgspec.structs.replace(self.links[rank], up=False, why="its parent came back without it")
            for parent, link in sorted({link.rank: link for link in credible}.items())
            # Of somebody who has moved on since, the list knows nothing.
            if parent in self.links and not later(self.links[parent], link)
            for rank in sorted(self._children.get(parent, ()))
            if rank not in listed
        )

    def under(self, tops: Iterable[int]) -> Ranks:
        """These ranks and all that hangs below them, as far as they are reachable."""
        return ranks.union(rank for top in tops if top in self._via for rank in self._below(top))

    def subtree(self) -> tuple[Link, ...]:
        """The links of all that hangs below me, in ascending order of rank."""
        return tuple(self.links[rank] for rank in ranks.each(self.reachable))

    def _hang(self, rank: int, old_parent: int | None, link: Link | None) -> None:
        """Take `rank` with all below it from `old_parent`, or hang it where `link` says."""
        if link is None:
            siblings = self._children[old_parent]
            siblings.discard(rank)
            if not siblings:
                del self._children[old_parent]
            via = self._via.get(rank)
        elif link.parent == self._me:
            via = rank
        else:
            via = None if link.parent is None else self._via.get(link.parent)
        if via is None:
            return
        moved = self._below(rank)
        mask = ranks.union(moved) if len(moved) > 1 else ranks.only(rank)
        if link is None:
            for gone in moved:
                del self._via[gone]
            self.reachable &= ~mask
            self.routes[via] &= ~mask
            if not self.routes[via]:
                del self.routes[via]
        else:
            self._via |= dict.fromkeys(moved, via)
            self.reachable |= mask
            self.routes[via] = self.routes.get(via, ranks.NONE) | mask

    def _below(self, top: int) -> list[int]:
        """`top` and all below it. A circle has no way in from `me`, yet a liar can make one: nobody is met twice."""
        found, met = [top], {top}
        for rank in found:  # the list grows while it is walked: breadth first
            for child in self._children.get(rank, ()):
                if child not in met:
                    met.add(child)
                    found.append(child)
        return found
