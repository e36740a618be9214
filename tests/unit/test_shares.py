"""agent/shares.py: who starts which host next."""

from __future__ import annotations

import random
from collections import deque

import pytest

from agent.shares import (
    HOPELESS,
    Added,
    Ask,
    Asked,
    Dismiss,
    Effect,
    Ended,
    Event,
    GiveBack,
    Grant,
    NoMore,
    Settled,
    Shares,
    Start,
)

ROOT, NOBODY = -1, -2
LOSS = 0.1  # of sessions, and again of starters that ask for more


def root(slots: int, hosts: int) -> tuple[Shares, list[Effect]]:
    shares = Shares(slots, parent=False)
    return shares, shares.handle(Added(hosts=tuple(range(hosts))))


def up(shares: Shares, host: int) -> list[Effect]:
    """A host that was started here is up, and asks for work."""
    return shares.handle(Settled(host=host, reached=True)) + shares.handle(Asked(worker=host))


def test_the_root_fills_its_slots_and_no_more() -> None:
    _, effects = root(3, 10)
    assert effects == [Start(host=0), Start(host=1), Start(host=2)]


def test_a_slot_is_free_only_when_its_process_is_gone() -> None:
    shares, _ = root(1, 2)
    assert shares.handle(Settled(host=0, reached=False)) == []
    assert shares.handle(Ended(host=0)) == [Start(host=1)]


def test_a_worker_gets_one_first_then_twice_its_last_share() -> None:
    shares, _ = root(1, 64)
    given: list[int] = []
    for _ in range(4):
        (grant,) = up(shares, 0) if not given else shares.handle(Asked(worker=0))
        assert isinstance(grant, Grant)
        given.append(len(grant.hosts))
        for host in grant.hosts:
            shares.handle(Settled(host=host, reached=True))
    assert given == [1, 2, 4, 8]


def test_no_share_is_more_than_half_of_what_is_left() -> None:
    shares, _ = root(1, 1 + 7)
    given: list[int] = []
    while shares.waiting:
        (grant,) = up(shares, 0)
        assert isinstance(grant, Grant)
        given.append(len(grant.hosts))
        for host in grant.hosts:
            shares.handle(Settled(host=host, reached=True))
    assert given == [1, 2, 2, 1, 1]


def test_a_worker_is_dismissed_when_nothing_is_left() -> None:
    shares, _ = root(2, 2)
    assert up(shares, 0) == [Dismiss(worker=0)]


def test_a_worker_with_hosts_at_work_is_kept_until_they_are_settled() -> None:
    shares, _ = root(1, 2)
    assert up(shares, 0) == [Grant(worker=0, hosts=(1,))]
    assert shares.handle(Asked(worker=0)) == []
    assert shares.handle(Settled(host=1, reached=True)) == [Dismiss(worker=0)]


def test_what_a_lost_worker_had_goes_to_others() -> None:
    shares, _ = root(1, 3)
    assert up(shares, 0) == [Grant(worker=0, hosts=(1,))]
    assert shares.handle(Ended(host=0)) == [Start(host=2)]
    assert shares.handle(Ended(host=2)) == [Start(host=1)]


def test_a_host_that_is_lost_with_every_worker_is_given_back() -> None:
    shares, _ = root(2, 4)
    assert up(shares, 0) == [Grant(worker=0, hosts=(2,))]
    assert shares.handle(Ended(host=0)) == [Start(host=3)]
    assert up(shares, 1) == [Grant(worker=1, hosts=(2,))]
    assert shares.handle(Ended(host=1)) == [GiveBack(host=2)]


def test_a_worker_that_reaches_nothing_gets_no_more_and_frees_its_slot() -> None:
    shares, _ = root(1, 20)
    (grant,) = up(shares, 0)
    for _ in range(HOPELESS):
        assert isinstance(grant, Grant)
        assert len(grant.hosts) == 1
        shares.handle(Settled(host=grant.hosts[0], reached=False))
        (grant,) = shares.handle(Asked(worker=0))
    assert grant == Dismiss(worker=0)


def test_hosts_of_the_service_node_alone_are_never_shared() -> None:
    shares, _ = root(1, 1)
    assert shares.handle(Added(hosts=(7,), own=True)) == []
    assert up(shares, 0) == [Dismiss(worker=0)]
    assert shares.handle(Ended(host=0)) == [Start(host=7)]


def test_hosts_of_the_service_node_alone_do_not_wait_for_busy_workers() -> None:
    shares, _ = root(1, 40)
    (grant,) = up(shares, 0)
    assert isinstance(grant, Grant)
    shares.handle(Added(hosts=(99,), own=True))
    shares.handle(Settled(host=grant.hosts[0], reached=True))
    assert shares.handle(Asked(worker=0)) == [Dismiss(worker=0)]
    assert shares.handle(Ended(host=0)) == [Start(host=99)]


def test_a_session_over_a_jump_host_takes_two_slots() -> None:
    shares = Shares(3, parent=False)
    assert shares.handle(Added(hosts=(0, 1), own=True, weight=2)) == [Start(host=0)]
    assert shares.used == 2
    assert shares.handle(Ended(host=0)) == [Start(host=1)]


def test_a_host_asks_its_parent_once_until_it_is_answered() -> None:
    shares = Shares(2, parent=True)
    assert shares.handle(Added(hosts=(1,))) == [Start(host=1), Ask()]
    assert up(shares, 1) == []
    assert shares.handle(Added(hosts=(2, 3))) == [Start(host=2), Grant(worker=1, hosts=(3,))]
    assert shares.handle(Asked(worker=1)) == [Ask()]


def test_a_host_dismisses_its_own_workers_only_after_its_parent_dismissed_it() -> None:
    shares = Shares(1, parent=True)
    shares.handle(Added(hosts=(1,)))
    assert up(shares, 1) == [Ask()]
    assert shares.handle(NoMore()) == [Dismiss(worker=1)]
    assert not shares.over
    shares.handle(Ended(host=1))
    assert shares.over


def test_only_the_worker_that_has_a_host_speaks_for_it() -> None:
    shares, _ = root(2, 4)
    assert up(shares, 0) == [Grant(worker=0, hosts=(2,))]
    assert shares.belongs(2, 0)
    assert shares.belongs(0, 0)
    assert not shares.belongs(2, 1)
    assert not shares.belongs(3, 0)


class Fleet:
    """Starters in memory: each host that is up runs a Shares of its own, and sessions are lost at random."""

    def __init__(self, seed: int) -> None:
        self.luck = random.Random(seed)
        self.hosts, self.slots = self.luck.choice([3, 40, 200]), self.luck.choice([1, 4, 16])
        self.starters: dict[int, Shares] = {ROOT: Shares(self.slots, parent=False)}
        self.parent: dict[int, int] = {}
        self.settled: set[int] = set()
        self.todo: deque[tuple[int, Effect]] = deque()
        self.most = 0

    def feed(self, at: int, event: Event) -> None:
        if at in self.starters:
            self.todo.extend((at, effect) for effect in self.starters[at].handle(event))
            self.most = max(self.most, self.starters[ROOT].used)

    def report(self, at: int, host: int, *, reached: bool) -> None:
        """A result goes up as far as the sessions hold; the root tries again by itself what was not reached."""
        while at in self.starters:
            self.feed(at, Settled(host=host, reached=reached))
            if at == ROOT and reached:
                self.settled.add(host)
            elif at == ROOT:
                self.feed(ROOT, Added(hosts=(host,), own=True))
            at = self.parent.get(at, NOBODY)

    def lose(self, host: int) -> None:
        """The session to a host ends, and those that it holds end with it."""
        self.starters.pop(host, None)
        for below in [other for other, parent in self.parent.items() if parent == host]:
            self.lose(below)
        self.feed(self.parent.pop(host, NOBODY), Ended(host=host))

    def unlucky(self) -> bool:
        return self.luck.random() < LOSS

    def perform(self, at: int, effect: Effect) -> None:
        match effect:
            case Start(host=host):
                self.parent[host] = at
                if self.unlucky():
                    self.report(at, host, reached=False)
                    self.lose(host)
                else:
                    self.report(at, host, reached=True)
                    self.starters[host] = Shares(4, parent=True)
                    self.feed(at, Asked(worker=host))
            case Grant(worker=worker, hosts=given):
                self.feed(worker, Added(hosts=given))
            case Dismiss(worker=worker):
                self.feed(worker, NoMore())
            case Ask() if self.unlucky():
                self.lose(at)
            case Ask():
                self.feed(self.parent[at], Asked(worker=at))
            case GiveBack(host=host):
                self.report(at, host, reached=False)

    def run(self) -> None:
        self.feed(ROOT, Added(hosts=tuple(range(self.hosts))))
        while self.todo:
            self.todo.rotate(self.luck.randint(0, len(self.todo)))
            at, effect = self.todo.popleft()
            if at in self.starters:
                self.perform(at, effect)
            while over := [host for host, shares in self.starters.items() if shares.over and host != ROOT]:
                self.lose(over[0])


@pytest.mark.parametrize("seed", range(40))
def test_every_host_is_settled_whatever_is_lost_on_the_way(seed: int) -> None:
    fleet = Fleet(seed)
    fleet.run()
    assert fleet.settled == set(range(fleet.hosts))
    assert fleet.most <= fleet.slots
    assert fleet.starters[ROOT].over
