"""Who starts which host next: the pure part of a starter, with no I/O and no clock.

A starter (the service node, or a host that is up) has a queue of hosts still waiting. It starts some by
itself, a session each in one of its slots, and shares the rest with the hosts that it has started and that
ask for more: work stealing as in TakTuk, where a worker asks when it has a slot free, gets one first, then
twice its last share, and never more than half of what is left. A slow worker simply asks less often; a hung
host holds up nobody but itself.

Hosts are known by the number that the service node gave them. `handle(event)` answers with what is to be done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

import msgspec

# A worker that has reached none of its first hosts gets no more: three, since one or two may well be down themselves.
HOPELESS = 3
# A host lost twice with the starter that had it goes back to where it came from: it may be what kills them.
RETURNS = 2


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """Hosts to start; `own` ones are not to be shared. `weight` is how many processes a session to one takes."""

    hosts: tuple[int, ...]
    own: bool = False
    weight: int = 1


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A worker has a slot free."""

    worker: int


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a host is known, whoever started it; `reached` is false where SSH to it failed."""

    host: int
    reached: bool


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The session to a host that was started from here is over, its process gone."""

    host: int


class NoMore(msgspec.Struct, frozen=True, kw_only=True):
    """The parent has nothing left to give."""


class Resized(msgspec.Struct, frozen=True, kw_only=True):
    """There are `slots` processes to be had from now on."""

    slots: int


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Open a session to a host."""

    host: int


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """Give a worker its share."""

    worker: int
    hosts: tuple[int, ...]


class Dismiss(msgspec.Struct, frozen=True, kw_only=True):
    """Tell a worker that there is no more for it; its session ends."""

    worker: int


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Ask the parent for more."""


class GiveBack(msgspec.Struct, frozen=True, kw_only=True):
    """A host was lost too often with those it was shared with."""

    host: int


Event: TypeAlias = Added | Asked | Settled | Ended | NoMore | Resized
Effect: TypeAlias = Start | Grant | Dismiss | Ask | GiveBack


class _Worker(msgspec.Struct):
    granted: set[int] = msgspec.field(default_factory=set)
    last: int = 0
    reached: int = 0
    missed: int = 0
    asking: bool = False
    retired: bool = False


class Shares:
    """The state of one starter."""

    def __init__(self, slots: int, *, parent: bool) -> None:
        """`slots` processes at a time; with a `parent` to ask for more, or as the root."""
        self._slots = slots
        self._shared: deque[int] = deque()
        self._own: deque[int] = deque()
        self._weights: dict[int, int] = {}
        self._sessions: dict[int, int] = {}
        self._workers: dict[int, _Worker] = {}
        self._returned: dict[int, int] = {}
        self._may_ask = parent
        self._asked = False

    @property
    def used(self) -> int:
        """Processes that the open sessions take."""
        return sum(self._sessions.values())

    @property
    def waiting(self) -> int:
        """Hosts that nobody is at work on."""
        return len(self._shared) + len(self._own)

    @property
    def over(self) -> bool:
        """Nothing waits, nothing runs, and there is no one to ask."""
        return not (self._sessions or self._shared or self._own or self._may_ask)

    def belongs(self, host: int, worker: int) -> bool:
        """Whether `worker` may speak for `host`: itself, or one that it was given."""
        return host == worker or (worker in self._workers and host in self._workers[worker].granted)

    def handle(self, event: Event) -> list[Effect]:
        """Take in what happened; returns what is to be done, in order."""
        effects: list[Effect] = []
        match event:
            case Added():
                self._asked = False
                self._weights.update(dict.fromkeys(event.hosts, event.weight))
                (self._own if event.own else self._shared).extend(event.hosts)
            case Asked():
                self._workers.setdefault(event.worker, _Worker()).asking = True
            case Settled():
                self._settle(event)
            case Ended():
                effects += self._end(event.host)
            case NoMore():
                self._may_ask = self._asked = False
            case Resized():
                self._slots = event.slots
        return effects + self._start() + self._share()

    def _settle(self, event: Settled) -> None:
        for worker in self._workers.values():
            if event.host in worker.granted:
                worker.granted.discard(event.host)
                worker.reached += event.reached
                worker.missed += not event.reached
                worker.retired |= worker.reached == 0 and worker.missed >= HOPELESS

    def _end(self, host: int) -> list[Effect]:
        self._sessions.pop(host, None)
        worker = self._workers.pop(host, None)
        effects: list[Effect] = []
        for orphan in sorted(worker.granted) if worker else ():
            self._returned[orphan] = self._returned.get(orphan, 0) + 1
            if self._returned[orphan] < RETURNS:
                self._shared.append(orphan)
            else:
                effects.append(GiveBack(host=orphan))
        return effects

    def _start(self) -> list[Effect]:
        """Fill the slots; a session that takes more than there ever are goes alone."""
        effects: list[Effect] = []
        while queue := self._own or self._shared:
            weight = self._weights[queue[0]]
            if self._sessions and self.used + weight > self._slots:
                break
            host = queue.popleft()
            self._sessions[host] = weight
            effects.append(Start(host=host))
        return effects

    def _share(self) -> list[Effect]:
        effects: list[Effect] = []
        self._make_room()
        for name, worker in self._workers.items():
            if worker.asking and not worker.retired and self._shared:
                # Only success makes a share grow: what a worker cannot reach, others have to take again.
                fair = 2 * worker.last if worker.reached else 1
                share = min(fair, (len(self._shared) + 1) // 2)
                hosts = tuple(self._shared.popleft() for _ in range(share))
                worker.granted.update(hosts)
                worker.last, worker.asking = share, False
                effects.append(Grant(worker=name, hosts=hosts))
            elif worker.asking and not worker.granted and (worker.retired or not self._may_ask):
                worker.asking = False
                effects.append(Dismiss(worker=name))
        hungry = self.used < self._slots or any(w.asking and not w.retired for w in self._workers.values())
        if self._may_ask and not self._asked and not self._shared and hungry:
            self._asked = True
            effects.append(Ask())
        return effects

    def _make_room(self) -> None:
        """Let as many workers finish as there are hosts that only a slot here can start."""
        room = len(self._own) - sum(worker.retired for worker in self._workers.values())
        if room > 0:
            busy: Sequence[_Worker] = sorted(
                (worker for worker in self._workers.values() if not worker.retired), key=lambda w: len(w.granted)
            )
            for worker in busy[:room]:
                worker.retired = True
