"""Commands over whole trees: what becomes of them, and what that costs the root."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from protocol import ranks
from protocol.commands import Leave, Run
from protocol.limits import DEADLINE_SLACK, KILL_AFTER, LOST_AFTER, SILENT_AFTER
from protocol.outcomes import NO_OUTPUT, Cancelled, Exited, Lost, Output, TimedOut
from tests.sim.schedule import Performance, Schedule, Step
from tests.sim.tree import Tree

#: Longer than any fault takes to be noticed.
_LONG = 60.0


def _slow(tree: Tree, seconds: float, who: set[int] | None = None) -> None:
    """Let commands take this long on these hosts, on all by default; elsewhere they are quick."""
    tree.work = lambda rank, _id, _body: (seconds if who is None or rank in who else 0.01, Exited(0), NO_OUTPUT)


def _rested(hosts: int, *, fanout: int = 32, parents: Mapping[int, int | None] | None = None) -> Tree:
    """A tree in which everybody is in, and knows the root's time."""
    tree = Tree(hosts, fanout=fanout, parents=parents)
    tree.form()
    tree.run_for(1.0)
    return tree


def test_a_broadcast_over_1000_relays_reaches_each_once_and_the_root_by_a_handful_of_messages() -> None:
    tree = _rested(1_000)
    tree.received.clear()
    command = tree.broadcast()
    assert tree.settle(command) == {rank: Exited(0) for rank in range(1_000)}
    assert set(tree.executions.values()) == {1}
    top = len([parent for parent in tree.parents.values() if parent is None])
    # Each of the root's children answers when all below it have, or a fold window after the first.
    assert tree.received[None, "Outcomes"] <= 2 * top
    assert tree.tells[command] <= 2 * top


def test_different_outputs_stay_different_and_equal_ones_become_one() -> None:
    tree = _rested(200)
    tree.work = lambda rank, _id, _body: (0.01, Exited(rank % 2), Output(out=b"%d" % (rank % 5)))
    command = tree.broadcast()
    tree.settle(command)
    for rank in range(200):
        assert tree.told[command][rank] == (Exited(rank % 2), Output(out=b"%d" % (rank % 5)))


def test_outputs_of_each_host_its_own_arrive_whole() -> None:
    tree = _rested(100)
    tree.work = lambda rank, _id, _body: (0.01, Exited(0), Output(out=b"%d" % rank * 2_000))
    command = tree.broadcast()
    tree.settle(command)
    assert all(tree.told[command][rank][1].out == b"%d" % rank * 2_000 for rank in range(100))


def test_only_the_targets_run_it() -> None:
    tree = _rested(300)
    command = tree.broadcast([3, 77, 299])
    assert set(tree.settle(command)) == {3, 77, 299}
    assert set(tree.executions) == {(3, command), (77, command), (299, command)}


def test_a_command_for_nobody_is_settled_at_once() -> None:
    tree = _rested(3)
    assert tree.broadcast([]) in tree.settled


def test_commands_given_before_the_tree_stands_are_lost_where_nobody_is_and_run_where_somebody_is() -> None:
    tree = Tree(20)
    tree.run_until(lambda: ranks.count(tree.root.reachable) == 10)
    there = tree.root.reachable
    command = tree.broadcast()
    outcomes = tree.settle(command)
    for rank, outcome in outcomes.items():
        assert isinstance(outcome, Exited) == ranks.holds(there, rank)


def test_a_host_that_is_not_in_the_tree_is_lost_at_once() -> None:
    tree = _rested(5)
    tree.kill(3)
    tree.run_for(LOST_AFTER + 1)
    before = tree.now
    outcomes = tree.settle(tree.broadcast())
    assert outcomes[3] == Lost("not in the tree when the command was given")
    assert tree.now - before < 1.0
    assert Counter(map(type, outcomes.values())) == {Exited: 4, Lost: 1}


def test_a_host_that_left_a_moment_ago_is_given_time_to_come_back() -> None:
    tree = _rested(5)
    tree.kill(3)
    tree.run_for(0.5)
    command = tree.broadcast()
    tree.run_for(0.5)
    tree.restart(3)
    assert tree.settle(command)[3] != Lost("not in the tree when the command was given")


@pytest.mark.parametrize("fault", ["kill", "cut", "freeze"])
def test_a_leaf_lost_in_mid_command_is_lost_once_and_the_others_are_exact(fault: str) -> None:
    tree = _rested(50, fanout=4)
    _slow(tree, 20.0)
    command = tree.broadcast()
    tree.run_for(0.5)
    victim = 49
    getattr(tree, fault)(victim)
    outcomes = tree.settle(command)
    lost = outcomes.pop(victim)
    assert isinstance(lost, Lost)
    assert f"h{victim}" in lost.why
    assert set(outcomes.values()) == {Exited(0)}
    tree.check()


@pytest.mark.parametrize("fault", ["kill", "cut", "freeze"])
def test_a_relay_lost_in_mid_broadcast_costs_only_its_own_outcome(fault: str) -> None:
    tree = _rested(85, fanout=4)
    relay = 0
    orphans = [rank for rank, parent in tree.parents.items() if parent == relay]
    assert orphans
    _slow(tree, 10.0)
    command = tree.broadcast()
    tree.run_for(0.5)
    getattr(tree, fault)(relay)
    outcomes = tree.settle(command)
    assert isinstance(outcomes.pop(relay), Lost)
    assert set(outcomes.values()) == {Exited(0)}, "orphans attach to the next ancestor and answer there"
    assert {tree.root.links[orphan].parent for orphan in orphans} == {None}
    tree.check()


def test_a_command_that_a_dying_relay_never_passed_on_is_given_to_its_orphans_again() -> None:
    tree = _rested(85, fanout=4)
    command = tree.broadcast()
    tree.kill(0)
    outcomes = tree.settle(command)
    assert isinstance(outcomes.pop(0), Lost)
    assert set(outcomes.values()) == {Exited(0)}
    tree.check()


def test_two_ancestors_lost_at_once_send_the_orphans_to_the_root() -> None:
    tree = _rested(20, parents={0: None, 1: 0, 2: 1, 3: 2, **dict.fromkeys(range(4, 20), 3)})
    _slow(tree, 5.0)
    command = tree.broadcast()
    tree.run_for(0.1)
    tree.kill(2)
    tree.kill(3)
    outcomes = tree.settle(command)
    assert {rank for rank, outcome in outcomes.items() if isinstance(outcome, Lost)} == {2, 3}
    assert {tree.root.links[rank].parent for rank in range(4, 20)} == {1}


def test_a_restarted_agent_has_lost_its_command_and_never_runs_it_again() -> None:
    tree = _rested(20, fanout=4)
    _slow(tree, 5.0)
    command = tree.broadcast()
    tree.run_for(1.0)
    tree.restart(19)
    outcomes = tree.settle(command)
    assert outcomes.pop(19) == Lost("its agent restarted")
    assert set(outcomes.values()) == {Exited(0)}
    assert tree.executions[19, command] == 1


def test_what_a_host_answered_before_it_restarted_is_not_thrown_away() -> None:
    tree = _rested(20, fanout=4)
    _slow(tree, 0.01, {19})
    tree.work = lambda rank, _id, _body: (0.01 if rank == 19 else 3.0, Exited(0), NO_OUTPUT)
    command = tree.broadcast()
    parent = tree.parents[19]
    tree.run_until(lambda: tree.received[parent, "Outcomes"] > 0)
    tree.restart(19)
    assert tree.settle(command)[19] == Exited(0)


def test_outcomes_of_hosts_that_died_while_their_relay_had_no_way_up_still_arrive() -> None:
    tree = _rested(3, parents={0: None, 1: 0, 2: 1})
    tree.work = lambda rank, _id, _body: (1.0 + rank, Exited(0), NO_OUTPUT)
    command = tree.broadcast()
    tree.run_for(0.5)
    tree.cut(0, None)
    tree.run_until(lambda: tree.received[1, "Outcomes"] == 1, what="the outcome of 2 at its parent")
    tree.kill(2)
    tree.run_for(0.2)
    tree.heal(0, None)
    assert tree.settle(command) == {rank: Exited(0) for rank in range(3)}


def test_a_cancel_ends_what_runs_everywhere() -> None:
    tree = _rested(100)
    _slow(tree, 100.0)
    command = tree.broadcast()
    tree.run_for(1.0)
    tree.cancel(command)
    assert set(tree.settle(command, within=5.0).values()) == {Cancelled(ran=True)}


def test_a_process_that_ignores_the_polite_signal_is_killed() -> None:
    tree = _rested(4)
    tree.stubborn = {2}
    _slow(tree, 100.0)
    command = tree.broadcast()
    tree.run_for(1.0)
    before = tree.now
    tree.cancel(command)
    assert set(tree.settle(command).values()) == {Cancelled(ran=True)}
    assert KILL_AFTER <= tree.now - before < KILL_AFTER + 1


def test_a_cancel_that_overtakes_its_command_keeps_it_from_running() -> None:
    tree = _rested(4)
    tree.cut(2)
    command = tree.broadcast()
    tree.run_for(0.5)
    tree.cancel(command)
    # It has to attach anew to be asked again, and is then told of the cancel alone.
    tree.run_for(SILENT_AFTER)
    tree.heal(2)
    outcomes = tree.settle(command)
    assert outcomes[2] == Cancelled(ran=False) or tree.executions[2, command] == 1
    tree.run_for(_LONG)
    tree.check()


def test_a_deadline_ends_the_command_at_the_hosts_and_not_later_than_the_slack_at_the_root() -> None:
    tree = _rested(50)
    _slow(tree, 100.0, {7, 8})
    before = tree.now
    command = tree.broadcast(ttl=3.0)
    outcomes = tree.settle(command)
    assert {rank for rank, outcome in outcomes.items() if outcome == TimedOut()} == {7, 8}
    assert tree.now - before < 3.0 + DEADLINE_SLACK


def test_a_host_that_does_not_say_what_became_of_it_by_the_deadline_is_lost() -> None:
    tree = _rested(10)
    tree.freeze(4)
    before = tree.now
    outcomes = tree.settle(tree.broadcast(ttl=1.0))
    assert outcomes.pop(4) == Lost("no answer by the deadline")
    assert set(outcomes.values()) == {Exited(0)}
    assert tree.now - before < 1.0 + DEADLINE_SLACK + 0.5


def test_a_command_whose_time_is_over_when_it_arrives_is_not_begun() -> None:
    tree = _rested(10, fanout=2)
    tree.kill(0)
    command = tree.broadcast(ttl=0.0)
    tree.settle(command)
    assert not tree.executions
    assert set(map(type, tree.outcomes(command).values())) <= {TimedOut, Lost}


def test_a_new_plan_in_mid_command_loses_nothing() -> None:
    tree = _rested(60, fanout=4)
    _slow(tree, 8.0)
    command = tree.broadcast()
    tree.run_for(0.5)
    tree.replan({rank: None if rank >= 50 else 50 + rank % 10 for rank in range(60)})
    assert set(tree.settle(command).values()) == {Exited(0)}
    tree.form()
    assert {rank: link.parent for rank, link in tree.root.links.items()} == tree.parents
    tree.check()


def test_a_relay_that_slept_does_not_take_its_healthy_children_down() -> None:
    tree = _rested(20, parents={0: None, **dict.fromkeys(range(1, 20), 0)})
    tree.links.clear()
    tree.freeze(0)
    tree.run_for(SILENT_AFTER - 1)
    tree.thaw(0)
    tree.run_for(20.0)
    assert tree.links == []


def test_a_root_that_slept_calls_nobody_silent_and_no_command_late() -> None:
    tree = _rested(20, fanout=4)
    _slow(tree, 1.0)
    command = tree.broadcast(ttl=5.0)
    tree.run_for(0.5)
    tree.links.clear()
    tree.freeze(None)
    tree.run_for(6.9)
    tree.thaw(None)
    assert set(tree.settle(command).values()) == {Exited(0)}
    tree.run_for(20.0)
    assert [link for link in tree.links if not link.up and "silent" in link.why] == []


def test_a_relay_frozen_for_long_is_left_and_comes_back_by_itself() -> None:
    tree = _rested(20, parents={0: None, **dict.fromkeys(range(1, 20), 0)})
    tree.freeze(0)
    tree.run_until(lambda: tree.root.reachable == tree.living() & ~1, what="orphans to reach the root")
    tree.run_for(30.0)
    tree.thaw(0)
    tree.form()


def test_a_dead_host_is_known_at_the_root_within_ten_seconds_and_a_dead_process_within_one() -> None:
    tree = _rested(30, fanout=3)
    tree.kill(29)
    tree.run_until(lambda: not ranks.holds(tree.root.reachable, 29), within=1.0)
    tree.cut(28)
    tree.run_until(lambda: not ranks.holds(tree.root.reachable, 28), within=10.0)


def test_children_of_a_relay_that_was_taken_out_of_the_fleet_while_away_find_another_way() -> None:
    tree = _rested(4, parents={0: None, 1: 0, 2: 0, 3: None})
    tree.cut(0, None)
    tree.run_for(_LONG)
    tree.replan({1: None, 2: None, 3: None})
    tree.heal(0, None)
    tree.form(within=_LONG)
    assert set(tree.settle(tree.broadcast()).values()) == {Exited(0)}


def test_children_of_a_relay_that_is_cut_off_from_the_root_go_to_the_root_themselves() -> None:
    tree = _rested(13, fanout=3)
    tree.cut(0, None)
    tree.run_until(lambda: tree.root.reachable == tree.living() & ~1, within=_LONG, what="all others to come back")


def test_while_the_service_is_away_its_tree_stays_together() -> None:
    tree = _rested(60, fanout=6)
    tree.kill(None)
    tree.run_for(2 * _LONG)
    moved = 0
    for rank, parent in tree.parents.items():
        moved += tree.nodes[rank].relay.parent_name not in (None, tree.members[parent].name)
    assert moved == 0
    homeless = [r for r, up in tree.parents.items() if up is not None and tree.nodes[r].relay.parent_name is None]
    assert len(homeless) <= 6, "each child of the root lets go of one at a time"
    tree.restart_root()
    tree.form()


def test_a_command_given_to_a_service_that_has_just_begun_reaches_those_who_are_on_their_way_back() -> None:
    tree = _rested(20, fanout=4)
    tree.kill(None)
    tree.run_for(3.0)
    tree.restart_root()
    assert set(tree.settle(tree.broadcast()).values()) == {Exited(0)}


def test_a_command_that_never_went_out_to_a_host_is_not_lost_with_its_predecessor() -> None:
    tree = _rested(3, parents={0: None, 1: 0, 2: 0})
    tree.kill(2)
    tree.run_for(0.1)
    tree.restart(2)
    command = tree.broadcast([2])
    assert tree.settle(command) == {2: Exited(0)}


def test_a_service_that_begins_anew_finds_its_tree_again() -> None:
    tree = _rested(40, fanout=4)
    tree.cut(None)
    tree.run_for(40.0)
    tree.heal(None)
    tree.form()
    assert set(tree.settle(tree.broadcast()).values()) == {Exited(0)}


def test_a_host_that_began_while_its_relay_had_no_way_up_gets_its_first_command_at_once() -> None:
    tree = _rested(3, parents={0: None, 1: 0, 2: 1})
    tree.kill(0)
    tree.restart(2)
    tree.run_for(0.05)
    tree.cut(1, None)
    tree.run_for(10.0)
    tree.restart(0)
    tree.heal(1, None)
    tree.form()
    before = tree.now
    assert tree.settle(tree.broadcast())[2] == Exited(0)
    assert tree.now - before < 0.5


def test_nothing_is_remembered_of_settled_commands() -> None:
    tree = _rested(100, fanout=5)
    for _ in range(5):
        tree.settle(tree.broadcast())
    assert tree.leftovers(), "outcomes are kept until the root has said that it has them"
    tree.run_for(3.0)
    assert tree.leftovers() == {}


def test_leaving_empties_the_tree_from_below_and_tells_each_outcome() -> None:
    tree = _rested(30, fanout=3)
    command = tree.submit(Leave(), ranks.union(range(30)))
    assert set(tree.settle(command).values()) == {Exited(0)}
    tree.run_until(lambda: tree.living() == ranks.NONE, within=15.0, what="all to leave")
    assert all(node.departed for rank, node in tree.nodes.items() if rank is not None)
    tree.run_until(lambda: tree.root.reachable == ranks.NONE, within=1.0)


def test_one_seed_gives_one_trace() -> None:
    def trace(seed: int) -> list[str]:
        tree = Tree(30, fanout=3, seed=seed, keep_trace=True)
        tree.form()
        tree.kill(0)
        tree.settle(tree.broadcast())
        assert tree.trace is not None
        return tree.trace

    assert trace(7) == trace(7)
    assert trace(7) != trace(8)


def test_frames_are_what_travels_and_change_nothing() -> None:
    def outcomes(*, with_codec: bool) -> tuple[dict[int, object], int]:
        tree = Tree(50, fanout=4, seed=3, with_codec=with_codec)
        tree.form()
        tree.kill(1)
        command = tree.broadcast()
        return dict(tree.settle(command)), tree.events_handled

    assert outcomes(with_codec=True) == outcomes(with_codec=False)


def test_streamed_output_arrives_in_order_with_its_host() -> None:
    tree = _rested(10, fanout=2)
    command = tree.submit(Run(argv=("x",), output_limit=0, stream=True), ranks.only(9))
    tree.run_until(lambda: tree.executions[9, command])
    for offset in range(0, 30, 10):
        tree.wrote(9, command, offset, b"0123456789")
    tree.settle(command)
    assert [(piece.rank, piece.offset) for piece in tree.streamed] == [(9, 0), (9, 10), (9, 20)]


def test_progress_of_many_hosts_reaches_the_root_by_few_messages() -> None:
    tree = _rested(200, fanout=20)
    tree.received.clear()
    for rank in range(200):
        tree.advanced(rank, 1, 4_096)
    tree.run_until(lambda: len(tree.progress.get(1, {})) == 200)
    assert tree.received[None, "Progress"] <= 3 * 20


def test_reports_of_many_hosts_reach_the_root_by_few_messages() -> None:
    tree = _rested(200, fanout=20)
    tree.received.clear()
    for rank in range(200):
        tree.observed(rank)
    tree.run_until(lambda: len({r.rank for told in tree.reports for r in told.reports}) == 200)
    assert tree.received[None, "Reports"] <= 3 * 20


def test_who_is_given_a_command_later_has_only_the_time_that_remains() -> None:
    tree = _rested(3, parents={0: None, 1: 0, 2: 0})
    _slow(tree, 100.0)
    tree.cut(2)
    tree.run_until(lambda: not ranks.holds(tree.root.reachable, 2))
    began = tree.now
    command = tree.broadcast(ttl=5.0)
    tree.run_for(1.0)
    tree.heal(2)
    assert tree.settle(command) == dict.fromkeys(range(3), TimedOut())
    assert tree.now - began < 6.0


def test_a_relay_waits_for_nobody_whose_command_was_settled_while_it_waited_for_the_time() -> None:
    """The seed that found it: a restarted child below a slow relay got the command and the word that it is settled
    before it knew the root's time."""
    steps = (
        Step("slow", 4, 233, pause=0.05),
        Step("broadcast to some", 23, 658),
        Step("restart", 19, 237),
        Step("broadcast to some", 22, 119, ttl=0.0, pause=6.0),
    )
    Performance(Schedule(6253, 25, 5, True, steps)).play()


@pytest.mark.parametrize("seed", range(20))
def test_who_is_orphaned_twice_is_waited_for_until_it_can_know(seed: int) -> None:
    """A relay's cable is cut, and its parent dies before anybody noticed: those below the first are well."""
    tree = Tree(3, parents={0: None, 1: 0, 2: 1}, seed=seed)
    tree.work = lambda _rank, _id, _body: (10.0, Exited(0), NO_OUTPUT)
    tree.form()
    command = tree.broadcast(ttl=60.0)
    tree.run_for(0.1 * seed)
    tree.cut(1)
    tree.run_for(1.0)
    tree.kill(0)
    outcomes = tree.settle(command)
    assert outcomes[2] == Exited(0)
    assert isinstance(outcomes[0], Lost)
    assert isinstance(outcomes[1], Lost)
    tree.check()
