"""Schedules: what is asked of a tree and what strikes it, all from one seed, as data that can be shrunk."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from protocol.commands import Body, Run
from protocol.limits import KEEP_AFTER, LOST_AFTER, RETRY_MOST, SILENT_AFTER
from protocol.outcomes import NO_OUTPUT, Exited, Killed, Outcome, Output
from protocol.topology import depth_for
from tests.sim.tree import Tree

#: After the last fault: silence is noticed, all ancestors tried, each pause at its longest, some times over.
HEALED_WITHIN = 3 * (SILENT_AFTER + LOST_AFTER + 2 * RETRY_MOST)
#: Then every command is settled: the longest deadline or work, and who is out of reach.
_SETTLED_WITHIN = 60.0
#: And forgotten: the word of it goes out each second, and to whoever attached meanwhile.
_FORGOTTEN_WITHIN = 15.0
#: A link may be so slow, in seconds each way, and still be none that beats don't get through.
SLOWEST = 2.0
_MOST_HOSTS = 2_000
#: Short work and KEEP_AFTER, in seconds, and less than it takes to be given up.
_KEPT_WITHIN = KEEP_AFTER + 1.0

#: What commands end in, by themselves.
_ENDS: tuple[tuple[Outcome, Output], ...] = (
    (Exited(0), NO_OUTPUT),
    (Exited(0), NO_OUTPUT),
    (Exited(1), NO_OUTPUT),
    (Exited(0), Output(out=b"hello")),
    (Killed(11), NO_OUTPUT),
)
_TAKES = (0.001, 0.1, 3.0)
#: Between two steps, in seconds: at once, in mid-flight, within a fold window, later, and after silence is noticed.
_PAUSES = (0.0, 0.0005, 0.001, 0.05, 1.0, 6.0, 8.0)


@dataclass(frozen=True)
class Step:
    """One thing that is done, to a rank or with a number where it needs one, and the pause after it, in seconds."""

    what: str
    rank: int = 0
    number: int = 0
    ttl: float | None = None
    pause: float = 0.0

    def __str__(self) -> str:
        ttl = "" if self.ttl is None else f" ttl {self.ttl:g} s"
        return f"{self.what} h{self.rank} ({self.number}){ttl}, then {self.pause:g} s"


@dataclass(frozen=True)
class Schedule:
    """A tree and what happens to it. `formed`: whether it stands before the first step."""

    seed: int
    hosts: int
    fanout: int
    formed: bool
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        head = f"seed {self.seed}: {self.hosts} hosts, fanout {self.fanout}, {'formed' if self.formed else 'forming'}"
        return "\n".join((head, *(f"  {step}" for step in self.steps)))


#: Steps by how often they are drawn.
_KINDS = (
    ("broadcast", 8),
    ("broadcast to some", 5),
    ("cancel", 4),
    ("kill", 4),
    ("restart", 5),
    ("restart without disk", 1),
    ("restart with a damaged disk", 1),
    ("full disk", 1),
    ("restart behind a cut", 4),
    ("restart without a service", 2),
    ("cut", 3),
    ("cut from parent", 2),
    ("cut way up", 2),
    ("cut way down", 2),
    ("heal", 3),
    ("freeze", 3),
    ("thaw", 3),
    ("slow", 2),
    ("freeze the service", 1),
    ("restart the service", 2),
    ("kill the service", 1),
    ("replan", 2),
    ("join", 2),
    ("leave", 1),
)


def shape(chooser: random.Random, most: int) -> tuple[int, int]:
    """Hosts and fanout: any size, or one around a power of the fanout, at most five levels deep."""
    while True:
        fanout = chooser.choice((1, 2, 2, 3, 3, 4, 5, 8, 16, 32, 64))
        if chooser.random() < 0.4:
            levels = chooser.randint(1, 5)
            full = sum(fanout**level for level in range(1, levels + 1))
            hosts = chooser.choice((fanout**levels, full)) + chooser.choice((-1, 0, 1))
        else:
            hosts = chooser.choice((2, 3, 5, 8, 13, 20, most // 2, most))
        if 2 <= hosts <= most and depth_for(hosts, fanout) <= 5:
            return hosts, fanout


def most_hosts(seed: int) -> int:
    """How large the tree of this seed may be: mostly small, where faults meet one another, and now and then not."""
    if seed % 1_000 == 999:
        return _MOST_HOSTS
    if seed % 100 == 99:
        return 300
    return 90 if seed % 10 == 9 else 25


def drawn(seed: int, most: int | None = None) -> Schedule:
    """The schedule of a seed, with at most `most` hosts."""
    chooser = random.Random(seed)
    limit = most_hosts(seed) if most is None else min(most, most_hosts(seed))
    hosts, fanout = shape(chooser, limit)
    if limit == _MOST_HOSTS:
        hosts, fanout = chooser.randint(_MOST_HOSTS // 2, _MOST_HOSTS), chooser.choice((8, 16, 32, 64))
    kinds, weights = zip(*_KINDS, strict=True)
    steps = tuple(
        Step(
            what,
            rank=chooser.randrange(hosts),
            number=chooser.randrange(1_000),
            ttl=chooser.choice((None, None, 0.0, 0.5, 5.0)),
            pause=chooser.choice(_PAUSES),
        )
        for what in chooser.choices(kinds, weights, k=chooser.randint(3, 14))
    )
    return Schedule(seed, hosts, fanout, chooser.random() < 0.7, steps)


class Performance:
    """One schedule, played on a tree. Raises AssertionError where what must hold does not."""

    def __init__(self, schedule: Schedule, *, keep_digest: bool = False) -> None:
        self.schedule = schedule
        self.tree = Tree(schedule.hosts, fanout=schedule.fanout, seed=schedule.seed, keep_digest=keep_digest)
        self.tree.work = self._work
        self._commands: list[int] = []

    def _work(self, rank: int, id_: int, _body: Body) -> tuple[float, Outcome, Output]:
        chooser = random.Random(f"{self.schedule.seed} {rank} {id_}")
        return chooser.choice(_TAKES), *chooser.choice(_ENDS)

    def play(self) -> None:
        """All of it, and what must come of it."""
        tree = self.tree
        if self.schedule.formed:
            tree.form()
        for step in self.schedule.steps:
            self._do(step)
            tree.run_for(step.pause)
            tree.check()
        tree.mend()
        tree.run_until(lambda: not tree.leaving, _SETTLED_WITHIN, "those who leave")
        tree.form(HEALED_WITHIN)
        # An agent takes its start for as much later as its question for the time was under way.
        tree.run_for(SLOWEST)
        last = tree.broadcast()
        for command in [*self._commands, last]:
            tree.settle(command, _SETTLED_WITHIN)
        # Who was asked to leave, and given up, may do so now.
        stay = {rank: outcome for rank, outcome in tree.outcomes(last).items() if not tree.nodes[rank].departed}
        lost = {rank: outcome for rank, outcome in stay.items() if not isinstance(outcome, Exited | Killed)}
        assert not lost, f"all faults are mended and the tree has formed, and yet {lost}"
        tree.run_for(_FORGOTTEN_WITHIN)
        tree.check()
        tree.form()
        assert tree.root.reachable == tree.living()
        assert tree.leftovers() == {}, f"what is settled is still remembered: {tree.leftovers()}"

    def _do(self, step: Step) -> None:
        tree = self.tree
        there = sorted(tree.parents)
        if not there:
            return
        rank = there[step.rank % len(there)]
        chooser = random.Random(step.number)
        if not tree.nodes[None].alive:
            tree.restart_root()
        if tree.nodes[None].frozen:
            tree.thaw(None)
        for condition, act in self._acts(step, rank, there, chooser)[step.what]:
            if condition:
                act()

    def _acts(
        self, step: Step, rank: int, there: list[int], chooser: random.Random
    ) -> dict[str, tuple[tuple[object, Callable[[], object]], ...]]:
        tree = self.tree
        node, up = tree.nodes[rank], tree.parents[rank]
        return {
            "broadcast": ((True, lambda: self._give(None, step.ttl)),),
            "broadcast to some": (
                (True, lambda: self._give(chooser.sample(there, chooser.randint(1, len(there))), step.ttl)),
            ),
            "cancel": ((self._commands, lambda: tree.cancel(self._commands[-1 - step.number % len(self._commands)])),),
            "kill": ((node.alive, lambda: tree.kill(rank)),),
            "restart": ((not node.departed, lambda: tree.restart(rank)),),
            "restart without disk": (
                (not node.departed, lambda: tree.disks.harm(rank, damaged=False)),
                (not node.departed, lambda: tree.restart(rank)),
            ),
            "restart with a damaged disk": (
                (not node.departed, lambda: tree.disks.harm(rank, damaged=True)),
                (not node.departed, lambda: tree.restart(rank)),
            ),
            "full disk": ((True, lambda: tree.disks.fill(rank)),),
            "restart behind a cut": ((not node.departed, lambda: self._restart_behind_a_cut(rank)),),
            "restart without a service": ((not node.departed, lambda: self._restart_without_service(rank)),),
            "cut": ((True, lambda: tree.cut(rank)),),
            "cut from parent": ((True, lambda: tree.cut(rank, up)),),
            "cut way up": ((True, lambda: tree.cut_way(rank, up)),),
            "cut way down": ((True, lambda: tree.cut_way(up, rank)),),
            "heal": ((True, lambda: tree.heal(rank)), (True, lambda: tree.heal(rank, up))),
            "freeze": ((node.alive, lambda: tree.freeze(rank)),),
            "thaw": ((node.frozen and node.alive, lambda: tree.thaw(rank)),),
            "slow": ((True, lambda: tree.slow(rank, chooser.choice((0.05, 0.5, SLOWEST)))),),
            "freeze the service": ((True, lambda: tree.freeze(None)),),
            "restart the service": ((True, tree.restart_root),),
            "kill the service": ((True, lambda: tree.kill(None)),),
            "replan": ((True, lambda: tree.replan(tree.random_parents(chooser))),),
            "join": ((True, lambda: tree.join(self.schedule.fanout)),),
            "leave": ((len(there) > 1 and node.alive, lambda: tree.leave(rank)),),
        }

    def _restart_behind_a_cut(self, rank: int) -> None:
        """What the agent finishes meanwhile it has to keep, and is asked for when it has begun anew."""
        self.tree.cut(rank)
        self.tree.run_for(_KEPT_WITHIN)
        self.tree.restart(rank)
        self.tree.heal(rank)

    def _restart_without_service(self, rank: int) -> None:
        """The same, where it is the service that is away."""
        self.tree.kill(None)
        self.tree.run_for(_KEPT_WITHIN)
        self.tree.restart(rank)
        self.tree.restart_root()

    def _give(self, targets: list[int] | None, ttl: float | None) -> None:
        self._commands.append(self.tree.broadcast(targets, ttl=ttl))


def failure(schedule: Schedule) -> str | None:
    """What goes wrong with this schedule, in one line; None where nothing does."""
    try:
        Performance(schedule).play()
    except Exception as error:  # whatever a relay raises is a failure as well
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def shrink(schedule: Schedule, tries: int = 300) -> Schedule:
    """A smaller schedule that fails too: fewer steps, fewer hosts, shorter pauses, as far as `tries` go."""
    left = tries
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(schedule):
            left -= 1
            if left < 0:
                return schedule
            if failure(candidate) is not None:
                schedule, smaller = candidate, True
                break
    return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    steps = schedule.steps
    size = len(steps) // 2
    while size:
        for at in range(0, len(steps), size):
            yield replace(schedule, steps=steps[:at] + steps[at + size :])
        size //= 2
    for hosts in sorted({2, schedule.hosts // 2, schedule.hosts - 1}):
        if 2 <= hosts < schedule.hosts:
            yield replace(schedule, hosts=hosts)
    if not schedule.formed:
        yield replace(schedule, formed=True)
    for at, step in enumerate(steps):
        if step.ttl is not None:
            yield replace(schedule, steps=(*steps[:at], replace(step, ttl=None), *steps[at + 1 :]))
        for pause in (0.0, 1.0):
            if step.pause > pause:
                yield replace(schedule, steps=(*steps[:at], replace(step, pause=pause), *steps[at + 1 :]))


__all__ = ["HEALED_WITHIN", "Performance", "Run", "Schedule", "Step", "drawn", "failure", "shrink"]
