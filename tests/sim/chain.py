"""Pushes in virtual time over links that have a rate: `protocol.transfer` at each host, nothing else of the tree.

What is sent leaves a host through one interface, message behind message at its rate, and comes in at the other
likewise; a made-up disk takes its time as well. Hosts can be killed, frozen, cut off, slowed down and started again.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from random import Random

import msgspec

from protocol import transfer_effects as effects
from protocol.asking import window_of
from protocol.commands import Hop, Stream
from protocol.limits import CHUNK_CACHE, UNSTORED_MOST
from protocol.stream import Blob, stream_of
from protocol.transfer import Role, Transfers
from protocol.transfer_effects import Effect, Source

#: One way through a switched network and an event loop, in seconds.
LATENCY = 0.0005
#: After this a connection to a host that does not answer has failed, in seconds: agent.links does it so.
CONNECT_S = 3.0
#: A message beside its chunk, in bytes.
_HEADER = 150
ID = 7


def order_of(hosts: int) -> tuple[Hop, ...]:
    """Hosts 0 to `hosts` - 1, one after the other."""
    return tuple(Hop(rank, "127.0.0.1", 1, rank.to_bytes(32, "big")) for rank in range(hosts))


def _without(peer: int) -> Callable[[Transfers], list[Effect]]:
    def lost(transfers: Transfers) -> list[Effect]:
        transfers.peer_lost(peer)
        return []

    return lost


def pushed(data: bytes, chunk: int, hosts: int, head: int = 0) -> Stream:
    """The stream of a push of `data` to that many hosts."""
    stream = stream_of(lambda index: data[index * chunk :][:chunk], len(data), chunk=chunk)
    return msgspec.structs.replace(stream, order=order_of(hosts), inline=None, head=head)


@dataclass
class Host:
    """One host, in one life after the other."""

    rank: Source
    transfers: Transfers
    #: Bytes a second that its link carries each way, and that its disk takes.
    rate: float
    disk: float
    alive: bool = True
    dark: bool = False
    frozen: list[Callable[[], None]] | None = None
    life: int = 0
    out_free: float = 0.0
    in_free: float = 0.0
    disk_free: float = 0.0
    sent: int = 0
    received: int = 0
    most_held: int = 0
    stored: dict[int, bytes] = field(default_factory=dict)
    finished: float | None = None
    failed: str | None = None
    bypassed: list[tuple[Source, str]] = field(default_factory=list)
    links: dict[Source, int] = field(default_factory=dict)
    due: float = inf


class Chain:
    """A push to all hosts. `run` plays it."""

    def __init__(
        self, data: bytes, hosts: int, *, chunk: int, rate: float, disk: float = inf, seed: int = 0, head: int = 0
    ) -> None:
        self.data, self.chunk, self.rate = data, chunk, rate
        self.now = 0.0
        self.stream = pushed(data, chunk, hosts, head)
        self._random = Random(seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._connections = itertools.count(1)
        self.hosts: dict[Source, Host] = {
            rank: Host(rank, Transfers(rank), rate, disk) for rank in (None, *range(hosts))
        }
        self.alters: dict[Source, Callable[[int, Blob], Blob]] = {}
        self.asked: Counter[tuple[Source, int]] = Counter()
        #: Messages that ask for chunks.
        self.questions = 0

    # --- time ---------------------------------------------------------------------------------------------------------

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Do something then."""
        heapq.heappush(self._heap, (time, next(self._number), call))

    def run(self, within: float = 600.0) -> dict[int, float]:
        """Play until every living host has ended; when each had all, in seconds."""
        self.begin()
        while any(
            host.alive and not host.dark and host.frozen is None and host.finished is None and host.failed is None
            for rank, host in self.hosts.items()
            if rank is not None
        ):
            self.step()
            assert self.now <= within, f"not done after {within} s: {self.unfinished()}"
        self.check()
        return {
            rank: host.finished for rank, host in self.hosts.items() if rank is not None and host.finished is not None
        }

    def step(self) -> None:
        """Let the next thing happen."""
        assert self._heap, "nothing will ever happen any more"
        self.now, _, call = heapq.heappop(self._heap)
        call()

    def begin(self) -> None:
        """The command reaches all hosts, in any order."""
        self._begin(self.hosts[None], Role.SOURCE)
        for rank in range(len(self.hosts) - 1):
            self.at(self._random.uniform(0, 0.02), lambda rank=rank: self._begin(self.hosts[rank], Role.TARGET))  # type: ignore[misc]

    def _begin(self, host: Host, role: Role) -> None:
        have = sum(1 << index for index in host.stored)
        self._do(host, lambda t: t.begin(ID, self.stream, role, have, self.now))

    def unfinished(self) -> list[Source]:
        """Who lives and is not done."""
        return [rank for rank, host in self.hosts.items() if rank is not None and host.alive and host.finished is None]

    # --- faults -------------------------------------------------------------------------------------------------------

    def kill(self, rank: Source) -> None:
        """kill -9: every connection ends."""
        host = self.hosts[rank]
        host.alive, host.life, host.links = False, host.life + 1, {}
        for other in self.hosts.values():
            if other.alive and other is not host:
                if host.rank is not None:
                    self._later(other, _without(host.rank))
                if rank in other.links:
                    self._end(other, rank, "connection closed")

    def restart(self, rank: int, *, keeps: bool = True) -> None:
        """Started again, with what it had on disk."""
        host = self.hosts[rank]
        host.alive, host.transfers, host.links, host.due = True, Transfers(rank), {}, inf
        if not keeps:
            host.stored = {}
        self._begin(host, Role.TARGET)

    def restart_root(self) -> None:
        """The service begins anew."""
        self.kill(None)
        root = self.hosts[None]
        root.alive, root.transfers, root.due = True, Transfers(None), inf
        self._begin(root, Role.SOURCE)

    def press(self, rank: Source) -> None:
        """Its processor is the limit from now on."""
        self.hosts[rank].transfers.pressed = True

    def freeze(self, rank: Source) -> None:
        """SIGSTOP."""
        self.hosts[rank].frozen = []

    def thaw(self, rank: Source) -> None:
        """SIGCONT."""
        waiting, self.hosts[rank].frozen = self.hosts[rank].frozen or [], None
        for call in waiting:
            call()

    def cut(self, rank: Source) -> None:
        """Pull the cable: silence."""
        self.hosts[rank].dark = True

    # --- the wire -----------------------------------------------------------------------------------------------------

    def _send(self, sender: Host, receiver: Host, size: int, arrive: Callable[[], None]) -> None:
        """Over the sender's interface and the receiver's, one message behind the other."""
        life = receiver.life
        sender.out_free = max(self.now, sender.out_free) + size / sender.rate
        sender.sent += size

        def come() -> None:
            if sender.dark or receiver.dark or not receiver.alive or receiver.life != life:
                return
            receiver.received += size
            if receiver.frozen is not None:
                receiver.frozen.append(come)
                return
            arrive()

        def out() -> None:
            # Its turn at the receiver's comes now: what a slow sender is still at keeps nobody else out.
            receiver.in_free = max(self.now, receiver.in_free + size / receiver.rate)
            self.at(receiver.in_free + LATENCY, come)

        self.at(sender.out_free, out)

    def _connected(self, host: Host, source: Source) -> int:
        number = host.links.get(source)
        if number is None:
            number = host.links[source] = next(self._connections)
            other = self.hosts[source]
            if other.dark or host.dark or not other.alive:
                after = LATENCY if not other.alive and not other.dark else CONNECT_S
                self.at(self.now + after, lambda: self._end(host, source, "no connection", number))
        return number

    def _end(self, host: Host, source: Source, why: str, number: int | None = None) -> None:
        if host.alive and source in host.links and number in (None, host.links[source]):
            del host.links[source]
            self._later(host, lambda t: t.source_lost(source, why, self.now))

    def _later(self, host: Host, work: Callable[[Transfers], list[Effect]]) -> None:
        life = host.life

        def call() -> None:
            if host.alive and host.life == life:
                if host.frozen is not None:
                    host.frozen.append(call)
                else:
                    self._do(host, work)

        self.at(self.now + LATENCY, call)

    # --- a host -------------------------------------------------------------------------------------------------------

    def _copy_of(self, host: Host, index: int) -> Blob:
        return self.data[index * self.chunk :][: self.chunk] if host.rank is None else host.stored[index]

    def _do(self, host: Host, work: Callable[[Transfers], list[Effect]]) -> None:
        reads: list[tuple[int, Blob | None, Blob | None]] = []
        for effect in work(host.transfers):
            if isinstance(effect, effects.Read):
                reads.append((effect.index, self._copy_of(host, effect.index), None))
            else:
                self._perform(host, effect)
        if reads:
            self._on_disk(host, 0, lambda t: t.was_read(ID, reads, self.now))
        host.most_held = max(host.most_held, host.transfers.held_bytes())
        due = host.transfers.wakeup()
        if due is not None and due < host.due:
            host.due = due
            life = host.life

            def tick() -> None:
                if host.alive and host.life == life:
                    if host.frozen is not None:
                        host.frozen.append(tick)
                        return
                    host.due = inf
                    self._do(host, lambda t: t.advance(self.now))
                    self._close_unused(host)

            self.at(max(due, self.now), tick)

    def _close_unused(self, host: Host) -> None:
        for source in set(host.links) - host.transfers.sources():
            del host.links[source]
            host.transfers.source_closed(source)
            if host.rank is not None:
                self._later(self.hosts[source], _without(host.rank))

    def _perform(self, host: Host, effect: Effect) -> None:
        match effect:
            case effects.AskOf(source, id_, indices):
                self._connected(host, source)
                self.questions += bool(indices)
                for index in indices:
                    self.asked[source, index] += 1
                other, rank = self.hosts[source], host.rank
                assert rank is not None
                self._send(
                    host, other, _HEADER, lambda: self._do(other, lambda t: t.asked(rank, id_, indices, self.now))
                )
            case effects.Give(peer, id_, index, blob, _):
                alter = self.alters.get(host.rank)
                altered = blob if alter is None else alter(index, blob)
                self._answer(host, peer, len(blob), lambda t: t.arrived(host.rank, id_, index, altered, self.now))
            case effects.Decline(peer, id_, index, why, final):
                self._answer(host, peer, 0, lambda t: t.declined(host.rank, id_, index, why, self.now, final=final))
            case effects.Hold(peer, id_, front):
                self._answer(host, peer, 0, lambda t: t.held(host.rank, id_, front, self.now))
            case effects.Read():
                raise AssertionError("what is read is read together")
            case effects.Store(id_, index, blob):
                self._on_disk(host, len(blob), lambda t: self._was_stored(host, t, index, bytes(blob)))
            case effects.Headed(id_):
                self._on_disk(host, 0, lambda t: t.was_headed(id_, 0, self.now))
            case effects.Complete():
                host.finished = self.now
            case effects.Broken(_, why, _):
                host.failed = why
            case effects.Bypassed(_, source, why):
                host.bypassed.append((source, why))
            case effects.Abuse(peer, why):
                raise AssertionError(f"{host.rank} blames {peer}: {why}")

    def _answer(self, host: Host, peer: int, size: int, work: Callable[[Transfers], list[Effect]]) -> None:
        other = self.hosts[peer]
        number = other.links.get(host.rank)

        def arrive() -> None:
            if number is not None and other.links.get(host.rank) == number:
                self._do(other, work)

        self._send(host, other, _HEADER + size, arrive)

    def _on_disk(self, host: Host, size: int, work: Callable[[Transfers], list[Effect]]) -> None:
        host.disk_free = max(self.now, host.disk_free) + size / host.disk
        life = host.life

        def done() -> None:
            if host.alive and host.life == life:
                if host.frozen is not None:
                    host.frozen.append(done)
                else:
                    self._do(host, work)

        self.at(host.disk_free + 1e-4, done)

    def _was_stored(self, host: Host, transfers: Transfers, index: int, blob: bytes) -> list[Effect]:
        assert index not in host.stored, f"{host.rank} stores chunk {index} twice"
        host.stored[index] = blob
        return transfers.was_stored(ID, [index], self.now)

    # --- what must be true --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Who finished has all of it, and nobody ever held more than it may."""
        for rank, host in self.hosts.items():
            if host.finished is not None:
                assert b"".join(host.stored[index] for index in sorted(host.stored)) == self.data, rank
            bound = CHUNK_CACHE + UNSTORED_MOST + 2 * (window_of(self.chunk) + 1) * self.chunk
            assert host.most_held <= bound, (rank, host.most_held)
