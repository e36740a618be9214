"""Random faults, seeded: whatever happens, each target has one outcome, nothing runs twice, and the tree heals."""

from __future__ import annotations

import random

import pytest

from protocol import ranks
from protocol.limits import LOST_AFTER, RETRY_MOST, SILENT_AFTER
from protocol.outcomes import NO_OUTPUT, Exited, Output
from tests.sim.tree import Tree

_SOME = ((Exited(0), NO_OUTPUT), (Exited(1), NO_OUTPUT), (Exited(0), Output(out=b"hello")))
#: After the last fault: silence is noticed, all ancestors tried, each pause at its longest, some times over.
_HEALED_WITHIN = 3 * (SILENT_AFTER + LOST_AFTER + 2 * RETRY_MOST)


def _sizes() -> list[tuple[int, int]]:
    """(seed, hosts), small trees more often than large ones: faults meet one another there."""
    chooser = random.Random(1)
    return [(seed, chooser.choice((2, 2, 3, 3, 5, 5, 8, 8, 13, 13, 20, 20, 40, 40))) for seed in range(196)] + [
        (196, 80),
        (197, 80),
        (198, 200),
        (199, 200),
    ]


def _harm(tree: Tree, chooser: random.Random) -> None:
    """One fault, of any kind, anywhere."""
    victim = chooser.choice(sorted(tree.parents))
    node = tree.nodes[victim]
    match chooser.randrange(8):
        case 0:
            tree.kill(victim)
        case 1 | 2:
            tree.restart(victim)
        case 3:
            tree.cut(victim)
        case 4:
            tree.cut(victim, tree.parents[victim])
        case 5 if node.alive:
            tree.freeze(victim)
        case 6:
            tree.heal(victim)
            tree.heal(victim, tree.parents[victim])
        case _ if node.frozen and node.alive:
            tree.thaw(victim)


def _mend(tree: Tree) -> None:
    """Undo every fault."""
    tree.heal_all()
    for rank, node in list(tree.nodes.items()):
        if rank is not None and not node.alive:
            tree.restart(rank)
        elif node.frozen:
            tree.thaw(rank)


@pytest.mark.parametrize(("seed", "hosts"), _sizes())
def test_under_random_faults_each_target_has_one_outcome_and_nothing_runs_twice(seed: int, hosts: int) -> None:
    chooser = random.Random(seed)
    tree = Tree(hosts, fanout=chooser.choice((1, 2, 3, 8)) if hosts <= 40 else 8, seed=seed)
    tree.work = lambda _rank, _id, _body: (chooser.choice((0.001, 0.1, 3.0)), *_SOME[chooser.randrange(3)])
    if chooser.random() < 0.7:
        tree.form()
    commands = []
    for _ in range(chooser.randrange(3, 12)):
        match chooser.randrange(4):
            case 0:
                targets = chooser.sample(sorted(tree.parents), chooser.randint(1, hosts))
                commands.append(tree.broadcast(targets, ttl=chooser.choice((None, 0.5, 5.0))))
            case 1 if commands:
                tree.cancel(chooser.choice(commands))
            case 2 if chooser.random() < 0.3:
                tree.replan(tree.random_parents(chooser))
            case _:
                _harm(tree, chooser)
        tree.run_for(chooser.choice((0.0, 0.001, 0.05, 1.0, 6.0)))
    _mend(tree)
    tree.form(_HEALED_WITHIN)
    last = tree.broadcast()
    for command in [*commands, last]:
        tree.settle(command)
    assert set(map(str, tree.outcomes(last).values())) <= {str(outcome) for outcome, _ in _SOME}, tree.outcomes(last)
    tree.run_for(15.0)
    tree.check()
    assert tree.root.reachable == ranks.union(tree.parents)
    assert tree.leftovers() == {}
