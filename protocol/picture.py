"""A relay's picture of the tree below it, kept as links that are compared, never counted.

Each agent numbers its own link to its parent (incarnation, epoch). Of two statements about one rank the later one is true,
and at equal numbers "down" beats "up". So statements may arrive twice, in any order and by any path, and all relays that have
heard the same statements have the same picture.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol import ranks
from protocol.messages import Link
from protocol.ranks import Ranks


def later(new: Link, old: Link) -> bool:
    """Whether `new` supersedes `old`; both are about the same rank."""
    return (new.incarnation, new.epoch, not new.up) > (old.incarnation, old.epoch, not old.up)


class Picture:
    """What hangs below `me` (None: the root), through which child."""

    def __init__(self, me: int | None) -> None:
        self._me = me
        self.links: dict[int, Link] = {}
        self._routes: dict[int, Ranks] | None = {}
        self._reachable: Ranks = ranks.NONE

    def apply(self, links: Iterable[Link]) -> tuple[Link, ...]:
        """Take statements in; returns those that were news."""
        news = []
        for link in links:
            old = self.links.get(link.rank)
            if old is None or later(link, old):
                self.links[link.rank] = link
                news.append(link)
        if news:
            self._routes = None
        return tuple(news)

    @property
    def routes(self) -> dict[int, Ranks]:
        """For each child of mine, the set of ranks that are reached through it, its own included."""
        if self._routes is None:
            self._recompute()
        assert self._routes is not None  # noqa: S101  tells the type checker what _recompute did
        return self._routes

    @property
    def reachable(self) -> Ranks:
        """All ranks that hang below me now."""
        if self._routes is None:
            self._recompute()
        return self._reachable

    def subtree(self) -> tuple[Link, ...]:
        """The links of all that hangs below me, in ascending order of rank."""
        return tuple(self.links[rank] for rank in ranks.each(self.reachable))

    def _recompute(self) -> None:
        children: dict[int | None, list[int]] = {}
        for link in self.links.values():
            if link.up:
                children.setdefault(link.parent, []).append(link.rank)
        self._routes = {}
        self._reachable = ranks.NONE
        for child in sorted(children.get(self._me, ())):
            found = [child]
            for rank in found:  # the list grows while it is walked: breadth first
                # A rank can't be met twice: each has one link, and a circle has no way in from here.
                found.extend(children.get(rank, ()))
            mask = ranks.union(found)
            self._routes[child] = mask
            self._reachable |= mask
