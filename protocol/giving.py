"""Who waits for which chunk of one push at this host, and how many each may: the giving half of `protocol.transfer`."""

from __future__ import annotations

from collections.abc import Collection, Iterator


class Giving:
    """The hosts that ask here."""

    def __init__(self, credit: int) -> None:
        """`credit` is how many chunks a host may have asked for and not been answered about."""
        self._credit = credit
        self._waiting: dict[int, list[int]] = {}
        self._open: dict[int, int] = {}
        #: Who was told something since the last `quiet`.
        self._told: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, peer: int, index: int) -> bool:
        """A host asks for a chunk. False where it asks for more than it may.

        Asking again for what it waits for is harmless: that is what one does whose connection broke.
        """
        peers = self._waiting.get(index)
        if peers is not None and peer in peers:
            return True
        count = self._open.get(peer, 0)
        if count >= self._credit:
            return False
        self._open[peer] = count + 1
        if peers is None:
            self._waiting[index] = [peer]
        else:
            peers.append(peer)
        return True

    def among(self, indices: Collection[int]) -> list[int]:
        """Those of the chunks that somebody waits for, in order."""
        return sorted(self._waiting.keys() & indices) if self._waiting else []

    def wanted(self) -> list[int]:
        """All chunks that somebody waits for, in order."""
        return sorted(self._waiting)

    def take(self, index: int) -> list[int]:
        """Who waited for this chunk, and is answered now."""
        peers = self._waiting.pop(index, None)
        if peers is None:
            return []
        for peer in peers:
            self._open[peer] -= 1
            self._told.add(peer)
        return peers

    def lost(self, peer: int) -> None:
        """A host's connection is gone: nobody waits in its name."""
        if self._open.pop(peer, 0):
            for index, peers in list(self._waiting.items()):
                if peer in peers:
                    peers.remove(peer)
                    if not peers:
                        del self._waiting[index]

    def quiet(self) -> Iterator[int]:
        """Who waits and has been told nothing since this was asked last."""
        waiting = sorted(peer for peer, count in self._open.items() if count)
        told, self._told = self._told, set()
        return (peer for peer in waiting if peer not in told)
