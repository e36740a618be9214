"""The made-up network: what TCP gives, and what it takes away.

Each connection is a FIFO in either direction, and each message has a delay of its own, so that messages of different
peers overtake one another. What is sent into a cut waits, and arrives when the cut is healed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

#: Between a message's leaving and its arriving, in seconds: a switched network and an event loop's turn.
_DELAY = (0.0002, 0.002)

Rank = int | None
Call = Callable[[], None]


@dataclass
class Connection:
    """A child's connection to a parent, each in one life. `stalled` holds what was sent into a cut, by number."""

    child: int
    parent: Rank
    child_life: int
    parent_life: int
    open: bool = True
    #: Whether the handshake is through; before, nothing arrives unless both directions work.
    established: bool = False
    arrives: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    stalled: list[tuple[int, bool, Call]] = field(default_factory=list)
    sent: int = 0

    def ends(self, upwards: bool) -> tuple[Rank, Rank]:
        """Sender and receiver of this direction."""
        return (self.child, self.parent) if upwards else (self.parent, self.child)


class Network:
    """All connections. `at` schedules a call at a virtual time, `now` tells it."""

    def __init__(self, at: Callable[[float, Call], None], now: Callable[[], float], chooser: random.Random) -> None:
        self._at = at
        self._now = now
        self._random = chooser
        #: Pairs (sender, receiver) between which nothing passes, and hosts whose cable is pulled.
        self._cuts: set[tuple[Rank, Rank]] = set()
        self._islands: set[Rank] = set()
        #: Seconds that a message takes longer, at most, by the host that is one of its ends.
        self._slow: dict[Rank, float] = {}
        self._connections: list[Connection] = []

    def connect(self, child: int, parent: Rank, child_life: int, parent_life: int) -> Connection:
        """A new connection; it carries nothing before its first message has come through."""
        connection = Connection(child, parent, child_life, parent_life)
        self._connections.append(connection)
        return connection

    def forget_closed(self) -> None:
        """Keep no more than what can still carry something."""
        self._connections = [connection for connection in self._connections if connection.open or connection.stalled]

    def of(self, rank: Rank) -> Iterator[Connection]:
        """The open connections that end at this host."""
        return (c for c in list(self._connections) if c.open and rank in (c.child, c.parent))

    def travel(self, connection: Connection, upwards: bool, arrive: Call) -> None:
        """Let something arrive at the other end, behind all that went before it in this direction."""
        connection.sent += 1
        self._go(connection, connection.sent, upwards, arrive)

    def _go(self, connection: Connection, number: int, upwards: bool, arrive: Call) -> None:
        if self._is_cut(connection, upwards):
            connection.stalled.append((number, upwards, arrive))
            return
        delay = self._random.uniform(*_DELAY)
        if self._slow:
            most = max(self._slow.get(end, 0.0) for end in connection.ends(upwards))
            if most:
                delay += self._random.uniform(0.0, most)
        time = max(connection.arrives[upwards], self._now() + delay)
        connection.arrives[upwards] = time

        def arrive_unless_cut() -> None:
            if self._is_cut(connection, upwards):
                connection.stalled.append((number, upwards, arrive))
            else:
                arrive()

        self._at(time, arrive_unless_cut)

    def _is_cut(self, connection: Connection, upwards: bool) -> bool:
        sender, receiver = connection.ends(upwards)
        if sender in self._islands or receiver in self._islands or (sender, receiver) in self._cuts:
            return True
        return not connection.established and (receiver, sender) in self._cuts

    # --- faults -------------------------------------------------------------------------------------------------------

    def isolate(self, rank: Rank) -> None:
        """Pull the cable of a host."""
        self._islands.add(rank)

    def cut(self, sender: Rank, receiver: Rank) -> None:
        """Let nothing pass from one to the other."""
        self._cuts.add((sender, receiver))

    def slow(self, rank: Rank, most: float) -> None:
        """Let what goes to this host or from it take up to so many seconds longer."""
        self._slow[rank] = most

    def heal(self, rank: Rank) -> None:
        """Put the cable of a host back."""
        self._islands.discard(rank)
        self._release()

    def heal_between(self, a: Rank, b: Rank) -> None:
        """Undo the cuts between two, in both directions."""
        self._cuts -= {(a, b), (b, a)}
        self._release()

    def heal_all(self) -> None:
        """Undo everything."""
        self._islands.clear()
        self._cuts.clear()
        self._slow.clear()
        self._release()

    def _release(self) -> None:
        for connection in self._connections:
            if connection.stalled:
                # What was on its way when the cut came stalled after what was sent later.
                stalled, connection.stalled = sorted(connection.stalled, key=lambda item: item[0]), []
                for number, upwards, arrive in stalled:
                    self._go(connection, number, upwards, arrive)
