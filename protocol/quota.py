"""How much output a relay passes up for those below it: what honest hosts can have on their way, and no more. Pure.

A host that keeps to its credit has at most STREAM_MOST bytes of a command unacknowledged, and is acknowledged by
grants, which pass here; it sends them again by a new way up, of which a relay knows as well. So since the last of these
no more comes than that, twice where both crossed. Whoever sends more lies about its credit, and would fill the memory
of a relay whose own link is slower.
"""

from __future__ import annotations

from protocol import ranks
from protocol.limits import STREAM_MOST, STREAM_TOTAL
from protocol.ranks import Ranks

#: Bytes of one command at one host since anything was told it: the two above, and one more for what crossed again.
PASSED_MOST = 3 * STREAM_MOST
#: Bytes of commands that never passed here, from one child: those of which it brought the output along from another
#: relay. The service has no more than STREAM_TOTAL of all hosts on its way, and as much may be on its way again.
STRANGE_MOST = 2 * STREAM_TOTAL
#: What a piece costs at the least, and commands that are remembered, the latest of them: some hours' worth.
_PIECE_LEAST, _COMMANDS = 64, 4_096


class Quota:
    """What was passed up of each command at each host since it was last told anything."""

    def __init__(self) -> None:
        self._passed: dict[tuple[int, int], int] = {}
        self._commands: dict[int, None] = {}
        self._strange: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._passed)

    def given(self, id_: int) -> None:
        """A command goes down."""
        self._commands.pop(id_, None)
        self._commands[id_] = None
        if len(self._commands) > _COMMANDS:
            del self._commands[next(iter(self._commands))]

    def granted(self, id_: int, rank: int) -> None:
        """A host is told how much more it may send."""
        self.given(id_)
        self._passed.pop((rank, id_), None)

    def anew(self, who: Ranks) -> None:
        """These hosts are told something, or may have another way: they may send again what is not acknowledged."""
        if self._passed:
            self._passed = {key: count for key, count in self._passed.items() if not ranks.holds(who, key[0])}

    def attached(self, child: int, hanging: Ranks) -> None:
        """A child attaches, with what hangs below it."""
        self._strange[child] = 0
        self.anew(hanging)

    def passes(self, child: int, rank: int, id_: int, size: int) -> bool:
        """Whether `size` bytes more of a command's output at `rank`, which came by `child`, are what may be."""
        size = max(size, _PIECE_LEAST)
        if id_ not in self._commands:
            self._strange[child] = self._strange.get(child, 0) + size
            if self._strange[child] > STRANGE_MOST:
                return False
        count = self._passed.get((rank, id_), 0) + size
        if count > PASSED_MOST:
            return False
        if id_ in self._commands:
            self._passed[rank, id_] = count
        return True
