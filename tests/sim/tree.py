"""A whole tree in memory and in virtual time: real relays, real signatures, real frames; a network and processes that
are made up. One seed gives one trace.

A process that dies is noticed at the other ends of its connections; one that is frozen is not. What must hold at any
time is checked as it happens (`witness`).
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from protocol import codec, events, ranks
from protocol.commands import Below, Body, Cancel, Command, Leave, Member, Plan, Push, Quiet, Run, Settled
from protocol.limits import (
    DEFAULT_LIFETIME_MS,
    DEFAULT_OUTPUT,
    FOLD_BYTES,
    FOLD_KEEP,
    MAX_OUTPUT,
    PENALTY,
    SETTLED_EVERY,
)
from protocol.messages import DOWNWARDS, UPWARDS, Deliver, Link, Manner, Message, Outcomes, Reports
from protocol.outcomes import NO_OUTPUT, Exited, Killed, Lost, Outcome, Output
from protocol.relay import Relay, RootPart
from protocol.topology import Seat, ancestors, below, children_of, even_fanout, grow
from protocol.trust import Guard, Signer
from tests.sim.disks import Disks
from tests.sim.network import Connection, Network
from tests.sim.witness import Witness

if TYPE_CHECKING:
    from tests.sim.bulk import Bulk

FLEET = "sim"
#: The root's clock at virtual time zero, in seconds since 1970; any number does that no monotonic clock shows.
_EPOCH = 1_700_000_000.0
#: From a process's creation to its first event, in seconds: a Python interpreter and its imports.
_STARTS_IN = 0.15
#: Calls at one moment; more are a relay that does not get on. All of the largest tree may begin or be healed at once.
_AT_ONCE = 50_000
#: Reaction of made-up processes to SIGTERM.
_DIES_AFTER = 0.01

#: After a host's leaving is settled, in seconds, it is planned no more: its children have gone, or were given up.
_LEAVES_WITHIN = 7.0

Work = Callable[[int, int, Body], tuple[float, Outcome, Output]]


@dataclass
class Node:
    """One process: a relay, and what surrounds it."""

    rank: int | None
    relay: Relay
    plan: Plan
    #: Its monotonic clock minus virtual time: no two hosts' clocks have anything to do with each other.
    clock: float
    life: int = 0
    alive: bool = True
    frozen: bool = False
    admitted: dict[bytes, int] = field(default_factory=dict)
    refused_until: dict[int, float] = field(default_factory=dict)
    up: Connection | None = None
    down: dict[int, Connection] = field(default_factory=dict)
    inbox: list[events.Event] = field(default_factory=list)
    timer: float | None = None
    running: set[int] = field(default_factory=set)
    departed: bool = False


class Tree:
    """`hosts` agents with ranks 0 to `hosts` - 1 and a root, connected as `protocol.topology` plans it."""

    def __init__(
        self,
        hosts: int,
        *,
        fanout: int = 32,
        seed: int = 0,
        with_codec: bool = True,
        parents: Mapping[int, int | None] | None = None,
        keep_trace: bool = False,
        keep_digest: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self._with_codec = with_codec
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._at_once = 0
        self.network = Network(self.at, lambda: self.now, self.random)
        self.witness = Witness()
        #: Called with each event and the effects that it had, for whoever tells the story.
        self.watch: Callable[[Node, events.Event, list[events.Effect]], None] | None = None
        #: The same for what befalls them from outside.
        self.note: Callable[[str], None] = lambda _text: None
        #: The same for what one of them does beside its relay.
        self.say: Callable[[int | None, str], None] = lambda _rank, _text: None
        self.bulk: Bulk | None = None
        self._living = ranks.NONE
        self.trace: list[str] | None = [] if keep_trace else None
        #: Over the same lines as `trace`.
        self.digest = hashlib.sha256() if keep_digest else None
        #: How often each (rank, command) was begun.
        self.executions: Counter[tuple[int, int]] = Counter()
        #: Messages that arrived, by receiver and type.
        self.received: Counter[tuple[int | None, str]] = Counter()
        self.events_handled = 0
        self.work: Work = lambda _rank, _id, _body: (self.random.uniform(0.001, 0.02), Exited(0), NO_OUTPUT)
        #: Processes that ignore SIGTERM.
        self.stubborn: set[int] = set()
        self.disks = Disks(self)
        # The root's service:
        self.told: dict[int, dict[int, tuple[Outcome, Output]]] = {}
        #: What hosts answered that had been settled as lost.
        self.late: dict[int, dict[int, tuple[Outcome, Output]]] = {}
        self.tells: Counter[int] = Counter()
        self.targets: dict[int, int] = {}
        self.settled: set[int] = set()
        self.streamed: list[events.TellStream] = []
        self.reports: list[events.TellReports] = []
        self.progress: dict[int, dict[int, int]] = {}
        self.links: list[Link] = []
        self.warnings: list[str] = []
        self.dropped: list[tuple[int | None, int, str]] = []
        self.next_id = 1
        self._unsettled: set[int] = set()
        self._settling = False
        self._formed = False

        self.signer = Signer(self.random.randbytes(32))
        self.members: dict[int | None, Member] = {
            rank: Member(
                rank, "root" if rank is None else f"h{rank}", "198.18.0.1", 1_000, 1_001, self.random.randbytes(32)
            )
            for rank in (None, *range(hosts))
        }
        seats = (Seat(rank) for rank in range(hosts))
        self.parents = dict(grow({}, {}, seats, even_fanout(hosts, fanout)) if parents is None else parents)
        self._version = 1
        #: The version of the plan that each host has answered for; 1 is what all start with.
        self.planned: dict[int, int] = {}
        #: The version of the plan that each host has to have, where that is not the first.
        self._wanted: dict[int, int] = {}
        self._plan_versions: dict[int, int] = {}
        self._plan_open: dict[int, int] = {}
        #: What the service keeps on disk of commands that are not settled: with the deadline, in virtual time.
        self._open: dict[int, tuple[Deliver, Body, float | None]] = {}
        self._incarnations: dict[int, int] = {}
        #: The latest command that had been given when each agent's present incarnation was first heard of.
        self._starts: dict[int, int] = {}
        self._next_rank = hosts
        #: The commands by which hosts are leaving.
        self.leaving: set[int] = set()
        plans = self._present_plans = self._plans(self.parents)
        self.nodes: dict[int | None, Node] = {}
        self._members = ranks.union(self.parents)
        self.witness.planned(self.parents)
        self._boot_root(1)
        for rank in range(hosts):
            self._boot(rank, plans[rank], 1)

    # --- making it ----------------------------------------------------------------------------------------------------

    def _nonce(self) -> bytes:
        return self.random.randbytes(16)

    def _plans(self, parents: Mapping[int, int | None]) -> dict[int | None, Plan]:
        children = children_of(parents)
        plans = {}
        for rank in (None, *sorted(parents)):
            above = () if rank is None else tuple(self.members[up] for up in ancestors(parents, rank))
            under = tuple(Below(low, parents[low], self.members[low].key) for low in below(children, rank))
            plans[rank] = Plan(version=self._version, you=self.members[rank], ancestors=above, below=under)
        return plans

    def _boot_root(self, life: int) -> None:
        clock = self.random.uniform(1e3, 1e6)
        root = RootPart(
            signer=self.signer,
            fleet=FLEET,
            clock_ms=lambda local: round((local - clock + _EPOCH) * 1000),
            name=lambda rank: self.members[rank].name,
            incarnations=dict(self._incarnations),
        )
        plan = self._present_plans[None]
        relay = Relay(plan=plan, incarnation=life, draw=self.random.random, nonce=self._nonce, root=root)
        self.nodes[None] = Node(None, relay, plan, clock, life=life)
        self.feed(None, events.Begin())

    def _boot(self, rank: int, plan: Plan, incarnation: int) -> None:
        clock = self.random.uniform(1e3, 1e6)
        started = self.now + clock - _STARTS_IN
        guard = Guard(fleet=FLEET, verify_key=self.signer.verify_key, rank=rank, started=started)
        relay = Relay(
            plan=plan,
            incarnation=incarnation,
            draw=self.random.random,
            nonce=self._nonce,
            guard=guard,
            found=self.disks.found(rank),
        )
        self.nodes[rank] = Node(rank, relay, plan, clock, life=incarnation)
        self._living |= ranks.only(rank)
        self.feed(rank, events.Begin())

    # --- virtual time -------------------------------------------------------------------------------------------------

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Call at this virtual time."""
        self._sequence += 1
        heapq.heappush(self._heap, (time, self._sequence, call))

    def run_until(self, condition: Callable[[], object], within: float = 60.0, what: str = "it") -> None:
        """Let time pass until the condition holds. Raises AssertionError after `within` virtual seconds."""
        deadline = self.now + within
        while not condition():
            if not self._heap or self._heap[0][0] > deadline:
                raise AssertionError(f"waited {within:g} virtual seconds in vain for {what}")
            self._step()

    def run_for(self, seconds: float) -> None:
        """Let this much time pass."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self._step()
        self.now = end

    def _step(self) -> None:
        before = self.now
        self.now, _, call = heapq.heappop(self._heap)
        self._at_once = self._at_once + 1 if self.now == before else 0
        assert self._at_once < _AT_ONCE, "time stands still: somebody wants to be called again and again"
        call()

    def feed(self, rank: int | None, event: events.Event) -> None:
        """This happens to it now."""
        node = self.nodes[rank]
        if not node.alive:
            return
        if node.frozen:
            if not isinstance(event, events.Tick):
                node.inbox.append(event)
            return
        queue = [event]
        for current in queue:  # grows while it is walked
            self.events_handled += 1
            effects = node.relay.handle(current, self.now + node.clock)
            if self.watch is not None:
                self.watch(node, current, effects)
            for effect in effects:
                if self.trace is not None:
                    self.trace.append(f"{self.now:.6f} {rank} {effect}")
                if self.digest is not None:
                    self.digest.update(f"{self.now:.6f} {rank} {effect}\n".encode())
                self._perform(node, effect, queue)
        if node.alive:
            self._set_timer(node)

    def _set_timer(self, node: Node) -> None:
        due = max(self.now, node.relay.next_wakeup() - node.clock)
        if node.timer is not None and node.timer <= due:
            return
        node.timer = due
        assert due < self.now + 1e6, "a relay that never wants to be called again beats no more"
        life = node.life

        def tick() -> None:
            current = self.nodes[node.rank]
            if current.life == life and current.timer == due:
                current.timer = None
                self.feed(node.rank, events.Tick())

        self.at(due, tick)

    # --- effects ------------------------------------------------------------------------------------------------------

    def _perform(self, node: Node, effect: events.Effect, queue: list[events.Event]) -> None:
        match effect:
            case events.ToParent(message):
                if node.up is not None:
                    assert type(message) in UPWARDS
                    self._send(node.up, True, message)
            case events.ToChild(rank, message):
                assert type(message) in DOWNWARDS
                connection = node.down.get(rank)
                if connection is None:
                    queue.append(events.ChildLost(rank, "connection closed"))
                else:
                    self._send(connection, False, message)
            case events.Connect(member):
                self._connect(node, member)
            case events.Disconnect():
                self._close_up(node)
            case events.DropChild(rank, why):
                self.dropped.append((node.rank, rank, why))
                node.refused_until[rank] = self.now + PENALTY
                connection = node.down.pop(rank, None)
                if connection is not None:
                    self._end(connection, at_child=True, why="connection closed")
            case events.Admit(keys):
                node.admitted = dict(keys)
            case events.SavePlan(delivery):
                command = codec_command(delivery)
                assert isinstance(command.body, Plan)
                node.plan = command.body
            case events.Depart():
                node.departed = True
                self.kill(node.rank)
            case events.Start(id_, body, _):
                self._start(node, id_, body)
            case events.Stop(id_, hard):
                self._stop(node, id_, hard=hard)
            case events.Keep() | events.Load():
                self.disks.perform(node, effect)
            case events.Warn(text):
                self.warnings.append(f"{node.rank}: {text}")
            case events.Arrived():
                pass
            case events.Forget():
                self.disks.perform(node, effect)
                if self.bulk is not None:
                    self.bulk.perform(node, effect)
            case _:
                self._serve(effect)

    def _start(self, node: Node, id_: int, body: Body) -> None:
        assert node.rank is not None
        self.executions[node.rank, id_] += 1
        self.witness.began(node.rank, id_)
        node.running.add(id_)
        if isinstance(body, Push) and self.bulk is not None:
            self.bulk.begin(node, id_, body)
            return
        duration, outcome, output = self.work(node.rank, id_, body)
        self.finish_later(node, id_, duration, outcome, output)

    def _stop(self, node: Node, id_: int, *, hard: bool) -> None:
        self.witness.stopped(node.rank, id_)
        if hard or node.rank not in self.stubborn:
            self.finish_later(node, id_, _DIES_AFTER, Killed(9 if hard else 15), NO_OUTPUT)

    def finish_later(self, node: Node, id_: int, after: float, outcome: Outcome, output: Output) -> None:
        """Let the work end so, unless it has ended or the process is another by then."""
        life = node.life

        def finish() -> None:
            current = self.nodes[node.rank]
            if current.alive and current.life == life and id_ in current.running:
                current.running.discard(id_)
                self.witness.ended(current.rank, id_, outcome, output)
                self.feed(node.rank, events.Finished(id_, outcome, output))

        self.at(self.now + after, finish)

    # --- the network --------------------------------------------------------------------------------------------------

    def _connect(self, node: Node, member: Member) -> None:
        self._close_up(node)
        assert node.rank is not None
        child, parent = node.rank, self.nodes[member.rank]
        connection = self.network.connect(child, member.rank, node.life, parent.life)
        node.up = connection

        def opened() -> None:
            if not connection.open:
                return  # the child gave it up before its handshake was through
            connection.established = True
            if not parent_is_the_same():
                self._end(connection, at_child=True, why="connection refused")
                return
            key = self.members[child].key
            if parent.admitted.get(key) != child or parent.refused_until.get(child, 0.0) > self.now:
                self._end(connection, at_child=True, why="it does not admit this host's key yet")
                return
            older = parent.down.get(child)
            if older is not None:
                older.open = False
            parent.down[child] = connection

        def parent_is_the_same() -> bool:
            return parent.alive and self.nodes[parent.rank] is parent

        self.network.travel(connection, True, opened)

    def _close_up(self, node: Node) -> None:
        connection, node.up = node.up, None
        if connection is not None:
            self._end(connection, at_child=False, why="connection closed")

    def _end(self, connection: Connection, *, at_child: bool, why: str) -> None:
        """The connection ends; the end that did not end it hears of it when the news arrives."""
        if not connection.open:
            return
        connection.open = False

        def noticed() -> None:
            if at_child:
                child = self.nodes[connection.child]
                if child.up is connection:
                    child.up = None
                    self.feed(connection.child, events.ParentLost(why))
            else:
                parent = self.nodes[connection.parent]
                if parent.down.get(connection.child) is connection:
                    del parent.down[connection.child]
                    self.feed(connection.parent, events.ChildLost(connection.child, why))

        self.network.travel(connection, not at_child, noticed)

    def _send(self, connection: Connection, upwards: bool, message: Message) -> None:
        if not connection.open:
            return
        frames = codec.encode(message) if self._with_codec else None
        if frames is not None and isinstance(message, Outcomes | Reports):
            # What is folded leaves at FOLD_BYTES, so that it is above that by one fold or report at most.
            assert len(frames[1]) <= FOLD_BYTES + 2 * MAX_OUTPUT + 64_000, f"{len(frames[1])} bytes of {type(message)}"

        def arrive() -> None:
            if not connection.open:
                return
            received = message if frames is None else codec.decode(frames)[0]
            to = connection.parent if upwards else connection.child
            self.received[to, type(message).__name__] += 1
            if upwards:
                self.feed(to, events.FromChild(connection.child, received))
            else:
                self.feed(to, events.FromParent(received))

        self.network.travel(connection, upwards, arrive)

    # --- faults -------------------------------------------------------------------------------------------------------

    def kill(self, rank: int | None) -> None:
        """The process dies; the other ends of its connections notice."""
        self.note(f"{self.members[rank].name} is killed")
        node = self.nodes[rank]
        node.alive = False
        self.witness.harmed(rank)
        if rank is not None:
            self._living &= ~ranks.only(rank)
        node.running.clear()
        for connection in self.network.of(rank):
            if connection.child == rank and connection.child_life == node.life:
                self._end(connection, at_child=False, why="connection closed")
            elif connection.parent == rank:
                self._end(connection, at_child=True, why="connection closed")
        self.network.forget_closed()

    def restart(self, rank: int) -> None:
        """The agent begins anew: with its plan, its keys and its disk, and without its memory."""
        node = self.nodes[rank]
        if node.alive:
            self.kill(rank)
        self.note(f"{self.members[rank].name} is started again")
        self._boot(rank, node.plan, node.life + 1)

    def restart_root(self) -> None:
        """The service begins anew, with what it has on disk: keys, plan, incarnations, and commands not settled."""
        node = self.nodes[None]
        if node.alive:
            self.kill(None)
        for id_ in [id_ for id_ in self._open if id_ in self._plan_versions]:
            # A plan is not taken up again: those who have not answered for it are sent the present one.
            del self._open[id_], self.told[id_], self.targets[id_]
        self._plan_open.clear()
        self.note("the service is started again")
        self._boot_root(node.life + 1)
        for id_ in sorted(self._open):
            delivery, body, deadline = self._open[id_]
            ttl_ms = None if deadline is None else max(0, round((deadline - self.now) * 1000))
            missing = self.targets[id_] & ~ranks.union(self.told[id_])
            anew = missing & ranks.union(rank for rank, latest in self._starts.items() if latest >= id_)
            self.feed(None, events.Submit(msgspec.structs.replace(delivery, ttl_ms=ttl_ms), body, missing, anew))
        self._unsettled |= self.settled
        self._settle_soon()

    def freeze(self, rank: int | None) -> None:
        """The process is not run (SIGSTOP); its kernel keeps its connections, and its commands run on."""
        self.note(f"{self.members[rank].name} is frozen")
        self.nodes[rank].frozen = True
        self.witness.harmed(rank)

    def thaw(self, rank: int | None) -> None:
        """The process is run again, and finds all that came meanwhile."""
        self.note(f"{self.members[rank].name} is thawed")
        node = self.nodes[rank]
        node.frozen = False
        inbox, node.inbox = node.inbox, []
        node.timer = None
        for event in inbox:
            self.feed(rank, event)
        self.feed(rank, events.Tick())

    def cut(self, rank: int | None, other: int | str | None = "all") -> None:
        """Pull the cable of a host, or take away the way between two."""
        if isinstance(other, str):
            self.note(f"{self.members[rank].name}'s cable is pulled")
            self.witness.harmed(rank)
            self.network.isolate(rank)
        else:
            self.cut_way(rank, other)
            self.cut_way(other, rank)

    def cut_way(self, sender: int | None, receiver: int | None) -> None:
        """Let nothing pass from one to the other; the way back still works."""
        for rank in (sender, receiver):
            if rank is not None:  # it is the agent's own way that is gone, not the root's to everybody
                self.witness.harmed(rank)
        self.note(f"nothing passes from {self.members[sender].name} to {self.members[receiver].name}")
        self.network.cut(sender, receiver)

    def slow(self, rank: int, most: float) -> None:
        """Let what goes to this host or from it take up to so many seconds longer."""
        self.witness.harmed(rank)
        self.network.slow(rank, most)

    def heal(self, rank: int | None, other: int | str | None = "all") -> None:
        """Undo `cut`; what was sent meanwhile arrives."""
        self.note(f"{self.members[rank].name} is reached again")
        if isinstance(other, str):
            self.network.heal(rank)
        else:
            self.network.heal_between(rank, other)

    def heal_all(self) -> None:
        """Undo every cut."""
        self.network.heal_all()

    def mend(self) -> None:
        """Undo every fault: all who are planned run, and reach one another."""
        self.heal_all()
        self.disks.full.clear()
        if not self.nodes[None].alive:
            self.restart_root()
        for rank, node in sorted(self.nodes.items(), key=lambda item: (item[0] is not None, item[0] or 0)):
            if node.alive and node.frozen:
                self.thaw(rank)
            elif rank is not None and not node.alive and rank in self.parents and not node.departed:
                self.restart(rank)

    # --- the root's service -------------------------------------------------------------------------------------------

    def _serve(self, effect: events.Effect) -> None:
        match effect:
            case events.Tell(id_, folds):
                self.tells[id_] += 1
                for fold in folds:
                    for rank in ranks.each(ranks.unpack(fold.ranks)):
                        self.witness.told(rank, id_, fold.outcome, fold.output)
                        assert rank not in self.told[id_], f"rank {rank} was settled twice for command {id_}"
                        self.told[id_][rank] = (fold.outcome, fold.output)
                        if id_ in self._plan_versions and fold.outcome == Exited(0):
                            self.planned[rank] = max(self._plan_versions[id_], self.planned.get(rank, 0))
            case events.TellLate(id_, folds):
                for fold in folds:
                    for rank in ranks.each(ranks.unpack(fold.ranks)):
                        lost = self.told.get(id_, {}).get(rank)
                        if lost is not None and isinstance(lost[0], Lost):  # as on record, whichever root said so
                            self.witness.late(rank, id_, fold.outcome, fold.output)
                            self.late.setdefault(id_, {}).setdefault(rank, (fold.outcome, fold.output))
            case events.TellSettled(id_):
                self.settled.add(id_)
                self._open.pop(id_, None)
                self._unsettled.add(id_)
                self._settle_soon()
            case events.TellStream():
                self.streamed.append(effect)
            case events.TellReports():
                self.reports.append(effect)
            case events.TellProgress(id_, done):
                self.progress.setdefault(id_, {}).update(done)
            case events.TellLinks(links):
                self.links += links
                for link in links:
                    if self._incarnations.get(link.rank, 0) < link.incarnation:
                        self._incarnations[link.rank] = link.incarnation
                        self._starts[link.rank] = self.next_id - 1
                if self._wanted:
                    self._plan_again()
                if any(link.up for link in links) and self.settled:
                    # Whoever was away may not have heard what is settled.
                    self._unsettled |= self.settled
                    self._settle_soon()
            case _:
                raise AssertionError(f"the root has no use for {effect}")

    def _plan_again(self) -> None:
        """Whoever was away has missed the plan."""
        for rank in ranks.each(self.root.reachable):
            is_open = self._plan_open.get(rank) in self._open
            if rank in self.parents and self.planned.get(rank, 1) < self._wanted.get(rank, 1) and not is_open:
                self._plan_open[rank] = self.next_id
                self.submit(self._present_plans[rank], ranks.only(rank))

    def _settle_soon(self) -> None:
        if self._settling:
            return
        self._settling = True

        def settle() -> None:
            self._settling = False
            if not self.nodes[None].alive:
                return  # all is told anew when it is back
            ids, self._unsettled = tuple(sorted(self._unsettled)), set()
            targets = 0
            for id_ in ids:
                targets |= self.targets[id_]
            self.submit(Settled(ids=ids), targets)

        self.at(self.now + SETTLED_EVERY, settle)

    def sign(self, body: Body, targets: int, *, ttl: float | None = None, id_: int | None = None) -> Deliver:
        """A command as the root's service makes it."""
        if id_ is None:
            id_, self.next_id = self.next_id, self.next_id + 1
        issued = round((self.now + _EPOCH) * 1000)
        command = Command(
            fleet=FLEET,
            id=id_,
            targets=ranks.pack(targets),
            issued_ms=issued,
            expires_ms=issued + DEFAULT_LIFETIME_MS,
            body=body,
        )
        payload, signature = self.signer.command(command)
        manner = Manner.WORK
        if isinstance(body, Quiet):
            manner = Manner.QUIET
        elif isinstance(body, Push) and body.stream.inline is None:
            manner = Manner.BULK
        ttl_ms = None if ttl is None else round(ttl * 1000)
        return Deliver(id_, ranks.pack(targets), ttl_ms, manner, payload, signature)

    def submit(self, body: Body, targets: int, *, ttl: float | None = None) -> int:
        """Give the root a command; returns its id."""
        delivery = self.sign(body, targets, ttl=ttl)
        if not isinstance(body, Quiet):
            self.told[delivery.id] = {}
            self.targets[delivery.id] = targets
            self._open[delivery.id] = (delivery, body, None if ttl is None else self.now + ttl)
            self.witness.given(delivery.id, body, has_deadline=ttl is not None, formed=self._formed)
        if isinstance(body, Plan):
            self._plan_versions[delivery.id] = body.version
        self.feed(None, events.Submit(delivery, body))
        return delivery.id

    def broadcast(self, targets: Iterable[int] | None = None, *, ttl: float | None = None, stream: bool = False) -> int:
        """Run something on these hosts, on all by default."""
        body = Run(argv=("true",), output_limit=DEFAULT_OUTPUT, stream=stream)
        return self.submit(body, ranks.union(self.parents if targets is None else targets), ttl=ttl)

    def cancel(self, id_: int) -> None:
        """Cancel a command everywhere."""
        self.witness.cancelled(id_)
        self.submit(Cancel(of=id_), self.targets[id_])

    def wrote(self, rank: int, id_: int, offset: int, data: bytes) -> None:
        """The command writes to its standard output there."""
        self.feed(rank, events.Wrote(id_, 1, offset, data))

    def advanced(self, rank: int, id_: int, done: int) -> None:
        """A push gets on there."""
        self.feed(rank, events.Advanced(id_, done))

    def observed(self, rank: int) -> None:
        """The host looks at itself."""
        self.feed(rank, events.Observed(None, (), whole=True))

    def replan(self, parents: Mapping[int, int | None]) -> None:
        """Give everybody a new plan whom it concerns, parents before children."""
        self.parents = dict(parents)
        self._members = ranks.union(self.parents)
        self.witness.planned(self.parents)
        self._version += 1
        before, plans = self._present_plans, self._plans(self.parents)
        self._present_plans = plans
        self.feed(None, events.Replan(plans[None]))
        self.nodes[None].plan = plans[None]
        for rank in below(children_of(self.parents), None):
            old, new = before.get(rank), plans[rank]
            if old is None:
                self._wanted[rank] = self.planned[rank] = self._version
            elif (old.ancestors, old.below) != (new.ancestors, new.below):
                self._wanted[rank] = self._version
                self._plan_open[rank] = self.submit(new, ranks.only(rank))

    def join(self, fanout: int) -> int:
        """A new host is planned, and begins; returns its rank."""
        rank, self._next_rank = self._next_rank, self._next_rank + 1
        self.members[rank] = Member(rank, f"h{rank}", "198.18.0.1", 1_000, 1_001, self.random.randbytes(32))
        down = [at for at in self.parents if not self.nodes[at].alive]
        self.witness.harmed(rank)  # it is planned, and not there yet
        self.replan(grow(self.parents, {}, [Seat(rank)], fanout, closed=down))
        self._boot(rank, self._present_plans[rank], 1)
        return rank

    def leave(self, rank: int) -> int:
        """Ask a host to leave; once it has, or can't be reached, its children hang where it hung."""
        self.witness.harmed(rank)
        command = self.submit(Leave(), ranks.only(rank))
        self.leaving.add(command)

        def settled() -> None:
            if command in self.settled:
                self.at(self.now + _LEAVES_WITHIN, gone)
            else:
                self.at(self.now + SETTLED_EVERY, settled)

        def gone() -> None:
            if not self.nodes[None].alive:
                self.at(self.now + SETTLED_EVERY, gone)
                return
            self.leaving.discard(command)
            departed = self.nodes[rank].departed or not ranks.holds(self.root.reachable, rank)
            if rank in self.parents and departed:
                up = self.parents[rank]
                self.replan({r: up if parent == rank else parent for r, parent in self.parents.items() if r != rank})

        settled()
        return command

    def random_parents(self, chooser: random.Random) -> dict[int, int | None]:
        """Another tree of the same hosts: any shape, a few levels deep."""
        order = sorted(self.parents)
        chooser.shuffle(order)
        return {rank: None if at < 2 else order[chooser.randrange(at // 2 + 1)] for at, rank in enumerate(order)}

    # --- what tests ask -----------------------------------------------------------------------------------------------

    @property
    def root(self) -> Relay:
        """The root's relay."""
        return self.nodes[None].relay

    def form(self, within: float = 30.0) -> None:
        """Run until everybody who is alive is in the tree as it is planned now, and the root knows where."""
        self.run_until(self._is_known, within, "the tree to form")
        self._formed = True

    def _is_known(self) -> bool:
        if self.root.reachable != self.living():
            return False
        for rank, wanted in self._wanted.items():
            # Who was asked to leave and given up may have left, and is planned all the same.
            if self.planned.get(rank, 1) < wanted and rank in self.parents and not self.nodes[rank].departed:
                return False
        for rank in ranks.each(self.living()):
            link, node = self.root.links[rank], self.nodes[rank]
            if link.incarnation != node.life or node.relay.parent_name != self.members[link.parent].name:
                return False
        return True

    def living(self) -> int:
        """Those who are planned and whose process lives, as a set of ranks."""
        return self._living & self._members

    def outcomes(self, id_: int) -> dict[int, Outcome]:
        """Each host's outcome of the command, as far as the root has told."""
        return {rank: outcome for rank, (outcome, _) in self.told[id_].items()}

    def settle(self, id_: int, within: float = 60.0) -> dict[int, Outcome]:
        """Run until the command is settled; returns its outcomes."""
        self.run_until(lambda: id_ in self.settled, within, f"command {id_}; missing {bin(self.root.missing(id_))}")
        return self.outcomes(id_)

    def check(self) -> None:
        """What must hold at any time, whatever happened."""
        twice = {key: count for key, count in self.executions.items() if count > 1}
        assert not twice, f"run more than once: {twice}"
        for id_ in self.settled:
            assert ranks.union(self.told[id_]) == self.targets[id_]
        liars = [(rank, child) for rank, child, why in self.dropped if "than its credit" in why]
        assert not liars, f"honest relays were cut off for the outcomes that they sent: {liars}"
        given = self.next_id - 1
        for rank, node in self.nodes.items():
            # A command is kept as what is owed below, and as what was done here.
            assert node.relay.kept() <= 2 * given, f"{rank} keeps {node.relay.kept()} of {given} commands"
            assert node.relay.held() <= FOLD_KEEP + 2 * MAX_OUTPUT, f"{rank} holds {node.relay.held()} bytes"

    def leftovers(self) -> dict[int | None, int]:
        """How many commands each living relay still keeps something about."""
        planned = {None, *self.parents}
        kept = {rank: node.relay.kept() for rank, node in self.nodes.items() if node.alive and rank in planned}
        for rank in self.parents:
            if self.nodes[rank].alive:
                kept[rank] += len(self.disks.of(rank))
        return {rank: count for rank, count in kept.items() if count}


def codec_command(delivery: Deliver) -> Command:
    """The command in a delivery, unverified."""
    return msgspec.msgpack.decode(delivery.payload, type=Command)
