"""Faults of every kind, each in the middle of a broadcast to 64 hosts in a tree of three levels.

The broadcast leaves a mark on each host where it runs. Whatever is struck, every host has one outcome and at most one
mark, and whoever was not struck has run it to its end, in time.
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from controller.session import Late
from deploy.testhosts import HostSpec
from protocol.limits import DEADLINE_SLACK, LOST_AFTER, MAX_INLINE, RETURN_WITHIN
from protocol.outcomes import Exited, FailedToStart, Lost, Outcome, TimedOut
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.faultfleet import RETURN_S, Broadcast, FaultFleet, fault_fleet, faults_of
from tests.waiting import wait_until

NAMES = [f"h{number}" for number in range(64)]
FANOUT = 4
#: As promised: how long the root may take to know of a dead process, and of a cut cable, and orphans to be back.
DEATH_S, CABLE_S, ORPHANS_S = 1.0, 10.0, 3.0
#: What a broadcast may take here where nothing slows it down: two cores run 64 agents.
TIMEOUT_S = 30.0
#: Which quarter of the hosts is struck.
SEED = 20

pytestmark = [
    pytest.mark.timeout(300),
    # The service is meant to outlive whoever starts it, which here is this very process.
    pytest.mark.filterwarnings(r"ignore:subprocess \d+ is still running:ResourceWarning"),
]


@pytest.fixture(scope="module")
def fleet(testhosts_module: MakeTestHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultFleet]:
    need_test_hosts()
    hosts = testhosts_module([HostSpec(name) for name in NAMES])
    began = time.monotonic()
    with fault_fleet(tmp_path_factory.mktemp("fleets"), hosts, FANOUT) as fleet:
        report("64 hosts up", time.monotonic() - began)
        yield fleet


@pytest.fixture(autouse=True)
def whole_tree(fleet: FaultFleet) -> None:
    """Each test begins with all hosts where they are planned."""
    if not fleet.is_home():
        began = time.monotonic()
        fleet.restore()
        report("  all up again and at home", time.monotonic() - began)


_numbers = itertools.count(1)


def report(what: str, seconds: float) -> None:
    """A figure for whoever runs this with -s."""
    print(f"{what}: {seconds:.2f} s", flush=True)


def broadcast(fleet: FaultFleet, seconds: float = 1.0, timeout: float = TIMEOUT_S) -> Broadcast:
    return Broadcast(fleet.session, f"tag{next(_numbers)}", seconds, timeout=timeout)


def time_until(condition: Callable[[], object], deadline_s: float, what: str, since: float) -> float:
    """Wait for a condition; how long after `since` it came true."""
    wait_until(condition, deadline_s - (time.monotonic() - since), what)
    took = time.monotonic() - since
    report(f"  {what}", took)
    return took


def a_leaf(fleet: FaultFleet) -> str:
    """A host of the third level."""
    children = fleet.children()
    return next(name for name, depth in fleet.depths().items() if depth == 3 and name not in children)


def a_relay(fleet: FaultFleet) -> str:
    """A host of the first level, with two levels below it."""
    children = fleet.children()
    return max(sorted(children[None]), key=lambda name: len(children.get(name, ())))


VICTIMS = pytest.mark.parametrize("choose", [a_leaf, a_relay])


def check(
    fleet: FaultFleet, command: Broadcast, *struck: str, within: float = TIMEOUT_S, powerless: tuple[str, ...] = ()
) -> None:
    """Wait until the broadcast is over, and hold it to all promises."""
    command.wait(within)
    assert not faults_of(command, fleet.marks(), struck, powerless)


def all_survivors_answer(fleet: FaultFleet, *struck: str) -> None:
    command = broadcast(fleet, seconds=0)
    check(fleet, command, *struck)
    assert all(isinstance(command.outcome(name), Lost) for name in struck)


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_64_hosts_at_fanout_4_hang_in_three_levels(fleet: FaultFleet) -> None:
    depths = list(fleet.depths().values())
    assert [depths.count(level) for level in (1, 2, 3)] == [4, 16, 44]
    assert all(len(below) <= FANOUT for below in fleet.children().values())


# --- processes that die -----------------------------------------------------------------------------------------------


def strike(fleet: FaultFleet, command: Broadcast, *struck: str) -> None:
    """Kill -9 these hosts' agents at once; then the root knows, orphans come back, and the next broadcast finds all."""
    survivors = set(NAMES) - set(struck)
    began = fleet.signal(signal.SIGKILL, *struck)
    time_until(lambda: not fleet.in_tree() & set(struck), DEATH_S, "death known", began)
    time_until(lambda: fleet.in_tree() == survivors, ORPHANS_S, "orphans back", began)
    all_survivors_answer(fleet, *struck)
    check(fleet, command, *struck)


@VICTIMS
def test_an_agent_killed_while_a_command_runs_costs_only_its_own_outcome(
    choose: Callable[[FaultFleet], str], fleet: FaultFleet
) -> None:
    victim = choose(fleet)
    command = broadcast(fleet, seconds=4)
    fleet.wait_until_begun(command)
    strike(fleet, command, victim)
    assert isinstance(command.outcome(victim), Lost)


@VICTIMS
def test_an_agent_killed_while_a_command_is_given_costs_only_its_own_outcome(
    choose: Callable[[FaultFleet], str], fleet: FaultFleet
) -> None:
    victim = choose(fleet)
    command = broadcast(fleet)
    strike(fleet, command, victim)


def test_a_quarter_of_all_agents_killed_at_once_cost_only_their_own_outcomes(fleet: FaultFleet) -> None:
    victims = random.Random(SEED).sample(NAMES, len(NAMES) // 4)
    command = broadcast(fleet, seconds=4)
    fleet.wait_until_begun(command)
    strike(fleet, command, *victims)
    assert all(isinstance(command.outcome(name), Lost) for name in victims)


def test_killed_agents_come_back_by_up_alone_and_it_starts_no_others(fleet: FaultFleet) -> None:
    victims = {a_leaf(fleet), a_relay(fleet)}
    fleet.signal(signal.SIGKILL, *victims)
    wait_until(lambda: not victims & set(fleet.agents()), 10, "their end")
    before = fleet.agents()
    wait_until(lambda: fleet.in_tree() == set(NAMES) - victims, 10, "the tree without them")
    again = fleet.up()
    assert (set(again.started), again.failed) == (victims, {})
    after = fleet.agents()
    assert {name: after[name] for name in before} == before


# --- the service ------------------------------------------------------------------------------------------------------


def test_a_service_killed_in_mid_command_comes_back_with_every_outcome(fleet: FaultFleet) -> None:
    running = broadcast(fleet, seconds=3)
    fleet.wait_until_begun(running)
    given = broadcast(fleet, seconds=0)  # and one that is on its way
    began = time.monotonic()
    fleet.kill_service()
    fleet.start_service()
    report("  service answers again", time.monotonic() - began)
    time_until(lambda: fleet.in_tree() == set(NAMES), RETURN_WITHIN, "all agents back", began)
    for command in (running, given):
        check(fleet, command)
    assert running.asked_again
    assert [job.missing for job in fleet.session.jobs(2)] == [0, 0]


def test_a_command_given_right_after_the_service_began_waits_for_the_hosts(fleet: FaultFleet) -> None:
    fleet.kill_service()
    fleet.start_service()
    check(fleet, broadcast(fleet, seconds=0))


def test_what_came_while_the_service_was_away_is_told_when_it_is_back(fleet: FaultFleet) -> None:
    command = broadcast(fleet, seconds=1)
    fleet.wait_until_begun(command)
    fleet.kill_service()
    wait_until(lambda: not fleet.sleeping(), 10, "its end on all hosts")
    fleet.start_service()
    check(fleet, command)


# --- processes that freeze --------------------------------------------------------------------------------------------


def test_a_short_pause_of_leaf_and_relay_costs_nothing(fleet: FaultFleet) -> None:
    victims = (a_leaf(fleet), a_relay(fleet))
    before = {name: host.parent for name, host in fleet.status().items()}
    command = broadcast(fleet, seconds=0.5)
    fleet.signal(signal.SIGSTOP, *victims)
    others = set(NAMES) - set(victims) - below(fleet, victims[1])
    wait_until(lambda: others <= set(command.answers), 10, "the others' outcomes")
    fleet.signal(signal.SIGCONT, *victims)
    check(fleet, command)
    assert {name: host.parent for name, host in fleet.status().items()} == before, "nobody left for a pause"


def late_answers(fleet: FaultFleet, command: Broadcast) -> dict[str, Outcome]:
    """What hosts answered that are lost all the same."""
    found: dict[str, Outcome] = {}
    for happening in fleet.session.job(command.id, wait=False):
        if isinstance(happening, Late):
            found |= dict.fromkeys(happening.result.hosts, happening.result.outcome)
    return found


def two_leaves(fleet: FaultFleet) -> tuple[str, str]:
    """Two hosts of the third level, below different parents."""
    children, found = fleet.children(), fleet.status()
    leaves = [name for name, depth in fleet.depths().items() if depth == 3 and name not in children]
    return leaves[0], next(name for name in leaves if found[name].parent != found[leaves[0]].parent)


def two_relays(fleet: FaultFleet) -> tuple[str, str]:
    """Two hosts of the first level, with two levels below each."""
    children = fleet.children()
    first, second, *_ = sorted(children[None], key=lambda name: (-len(children.get(name, ())), name))
    return first, second


@pytest.mark.parametrize("choose", [two_leaves, two_relays])
def test_a_frozen_agent_and_a_pulled_cable_are_known_by_the_deadline_and_all_others_answer_before_it(
    choose: Callable[[FaultFleet], tuple[str, str]], fleet: FaultFleet
) -> None:
    frozen, cut = victims = choose(fleet)
    survivors = set(NAMES) - set(victims)
    command = broadcast(fleet, seconds=3, timeout=20)
    fleet.wait_until_begun(command)
    began = fleet.signal(signal.SIGSTOP, frozen)
    fleet.hosts.cut(cut)
    try:
        time_until(lambda: not fleet.in_tree() & set(victims), CABLE_S, "frozen agent and cut cable known", began)
        time_until(lambda: fleet.in_tree() == survivors, CABLE_S + ORPHANS_S, "orphans back", began)
        check(fleet, command, *victims)
        for victim in victims:
            assert isinstance(command.outcome(victim), Lost)
            took = command.answers[victim][0].at - command.began
            report(f"  outcome of {victim}", took)
            assert took <= command.timeout
        all_survivors_answer(fleet, *victims)
    finally:
        fleet.hosts.heal(cut)
        fleet.signal(signal.SIGCONT, frozen)
    time_until(fleet.is_home, CABLE_S + RETURN_S, "back home by themselves", time.monotonic())
    # What they did is told beside their outcomes, which stay.
    wait_until(lambda: late_answers(fleet, command).keys() == set(victims), RETURN_S, "the late answers")
    late = late_answers(fleet, command)
    assert late[cut] == Exited(0)
    assert late[frozen] in (Exited(0), TimedOut())  # its deadline may pass before it is woken
    check(fleet, broadcast(fleet, seconds=0))


def below(fleet: FaultFleet, name: str) -> set[str]:
    """All hosts below this one."""
    children = fleet.children()
    found, left = set[str](), [name]
    while left:
        found |= (more := children.get(left.pop(), set()))
        left += more
    return found


# --- power and cables -------------------------------------------------------------------------------------------------


def test_a_relay_without_power_costs_only_its_own_outcome(fleet: FaultFleet) -> None:
    victim = a_relay(fleet)
    survivors = set(NAMES) - {victim}
    command = broadcast(fleet, seconds=3)
    fleet.wait_until_begun(command)
    began = time.monotonic()
    fleet.hosts.power_off(victim)
    # Mostly its connections end with its processes; where its link goes first, it is a cable.
    time_until(lambda: victim not in fleet.in_tree(), CABLE_S, "power cut known", began)
    time_until(lambda: fleet.in_tree() == survivors, CABLE_S + ORPHANS_S, "orphans back", began)
    check(fleet, command, victim, powerless=(victim,))
    all_survivors_answer(fleet, victim)
    fleet.hosts.power_on(victim)
    assert fleet.marks()[victim].count(command.tag) == 1
    assert victim in fleet.up().started


@VICTIMS
def test_a_cable_that_is_back_soon_costs_nothing(choose: Callable[[FaultFleet], str], fleet: FaultFleet) -> None:
    victim = choose(fleet)
    command = broadcast(fleet, seconds=0.5)
    fleet.hosts.cut(victim)
    others = set(NAMES) - {victim} - below(fleet, victim)
    wait_until(lambda: others <= set(command.answers), 10, "the others' outcomes")
    fleet.hosts.heal(victim)
    check(fleet, command)


# --- disks ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_what_needs_disk_and_nothing_else(fleet: FaultFleet, tmp_path: Path) -> None:
    victims = (a_leaf(fleet), a_relay(fleet))
    fleet.signal(signal.SIGKILL, *victims)
    wait_until(lambda: not set(victims) & set(fleet.agents()), 10, "their end")
    for name in victims:
        fleet.give_small_disk(name)
    fleet.restore()
    agents = fleet.agents()
    command = broadcast(fleet, seconds=1)
    fleet.wait_until_begun(command)
    for name in victims:
        fleet.fill_disk(name)
    check(fleet, command)

    # More output than its budget: what there is of it arrives, and a host without room says how much it kept.
    wrote = fleet.session.run("head -c 300000 /dev/zero | tr '\\0' x", output_limit=1000, timeout=TIMEOUT_S).results()
    assert {(result.outcome, result.stdout, result.output.out_total) for result in wrote} == {
        (Exited(0), b"x" * 1000, 300_000)
    }

    # A push ends with the cause on the hosts that are full, and arrives at all others, also through a full relay.
    source = tmp_path / "file"
    source.write_bytes(random.Random(SEED).randbytes(8 * MAX_INLINE))
    pushed = {
        name: result.outcome for result in fleet.session.push(source, "@/file").results() for name in result.hosts
    }
    assert {name for name, outcome in pushed.items() if outcome == Exited(0)} == set(NAMES) - set(victims)
    for name in victims:
        outcome = pushed[name]
        assert isinstance(outcome, FailedToStart)
        assert "No space left on device" in outcome.why

    # A new plan can't be kept there, and yet is followed: a host leaves, and is let in again with another's place.
    child = sorted(fleet.children()[victims[1]])[0]
    fleet.session.down([child]).results()
    wait_until(lambda: child not in fleet.agents(), 10, "its end")
    # A full host is not let in anew: it has to be in the tree, where it is left as it is.
    wait_until(lambda: fleet.in_tree() == set(NAMES) - {child}, RETURN_WITHIN, "the tree without it")
    fleet.restore()
    assert "the new plan can't be kept: No space left on device" in fleet.log(victims[1])
    assert fleet.agents().items() >= {name: agents[name] for name in victims}.items(), "the full ones never ended"
    check(fleet, broadcast(fleet, seconds=0))
    for name in victims:
        fleet.free_disk(name)


# --- all of them ------------------------------------------------------------------------------------------------------


def test_no_host_ever_ran_a_command_twice(fleet: FaultFleet) -> None:
    for name, tags in fleet.marks().items():
        assert len(tags) == len(set(tags)), name


def test_neither_service_nor_agents_met_an_error_of_their_own(fleet: FaultFleet) -> None:
    assert "Traceback" not in (fleet.session.directory / "service.log").read_text()
    for name in NAMES:
        assert "Traceback" not in fleet.log(name), name


def test_the_bounds_are_those_of_the_protocol() -> None:
    """The figures that these tests wait for follow from the protocol's own."""
    assert LOST_AFTER + DEADLINE_SLACK < TIMEOUT_S
