"""Which VMs move when: never more at a time than was said, never to where there is no room, and all that can."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given, settings

from controller.move_plan import MovePlan, Moving, Room

HOSTS = ("a1", "a2", "b1", "b2", "c1")


def site(host: str) -> str:
    return host[0]


def a_move(name: str, source: str, target: str, memory: int = 1, cpu: int = 0) -> Moving:
    return Moving(deployment="d", name=name, source=source, target=target, memory_mib=memory, cpu=cpu)


moves = st.lists(
    st.tuples(st.sampled_from(HOSTS), st.sampled_from(HOSTS), st.integers(0, 9), st.integers(0, 9)), max_size=25
).map(
    lambda drawn: [
        a_move(f"v{number}", source, target, memory, cpu)
        for number, (source, target, memory, cpu) in enumerate(drawn)
        if source != target
    ]
)
rooms = st.dictionaries(
    st.sampled_from(HOSTS),
    st.builds(Room, cpu=st.none() | st.integers(0, 30), memory_mib=st.none() | st.integers(0, 30)),
)


@settings(derandomize=True, deadline=None)
@given(moves, rooms, st.integers(1, 3), st.integers(1, 3), st.data())
def test_limits_and_room_hold_at_every_step_whatever_becomes_of_moves(
    wanted: list[Moving], room: dict[str, Room], per_host: int, per_link: int, data: st.DataObject
) -> None:
    plan = MovePlan(wanted, room, per_host=per_host, per_link=per_link, site=site)
    cpu = {host: one.cpu for host, one in room.items()}
    memory = {host: one.memory_mib for host, one in room.items()}
    begun: list[Moving] = []
    while True:
        fresh = plan.begin()
        begun += fresh
        for move in fresh:
            for left, needs in ((cpu, move.cpu), (memory, move.memory_mib)):
                have = left.get(move.target)
                if have is not None:
                    left[move.target] = have - needs
                    assert have >= needs
        at_host = Counter(host for move in plan.running for host in (move.source, move.target))
        assert max(at_host.values(), default=0) <= per_host
        links = Counter(
            frozenset((site(move.source), site(move.target)))
            for move in plan.running
            if site(move.source) != site(move.target)
        )
        assert max(links.values(), default=0) <= per_link
        if not plan.running:
            break
        over = data.draw(st.sampled_from(plan.running))
        moved = data.draw(st.booleans())
        plan.ended(over, moved=moved)
        for left, needs in ((cpu, over.cpu), (memory, over.memory_mib)):
            free = over.source if moved else over.target
            if left.get(free) is not None:
                left[free] = (left[free] or 0) + needs
    # Nothing runs and nothing may begin: whoever waits lacks room, and says so.
    assert len(begun) + len(plan.waiting) == len(wanted)
    for move in plan.waiting:
        assert "more, and it needs" in plan.why_not(move)


def test_moves_that_wait_for_each_other_go_on_as_soon_as_there_is_room() -> None:
    room = {"a1": Room(cpu=None, memory_mib=0), "a2": Room(cpu=None, memory_mib=1)}
    there, back = a_move("v1", "a1", "a2"), a_move("v2", "a2", "a1")
    plan = MovePlan([back, there], room, per_host=2, per_link=1, site=site)
    assert plan.begin() == [there]
    plan.ended(there, moved=True)
    assert plan.begin() == [back]


def test_two_full_hosts_can_not_swap_and_the_reason_is_said() -> None:
    full = {host: Room(cpu=50, memory_mib=0) for host in ("a1", "a2")}
    plan = MovePlan([a_move("v1", "a1", "a2"), a_move("v2", "a2", "a1")], full, per_host=2, per_link=1, site=site)
    assert plan.begin() == []
    assert plan.why_not(plan.waiting[0]) == "a2 has memory for 0 MiB more, and it needs 1"


def test_a_link_within_a_site_has_no_limit_of_its_own() -> None:
    wanted = [a_move("v1", "a1", "a2"), a_move("v2", "a1", "a2"), a_move("v3", "a1", "b1"), a_move("v4", "a2", "b2")]
    plan = MovePlan(wanted, {}, per_host=9, per_link=1, site=site)
    assert [move.name for move in plan.begin()] == ["v1", "v2", "v3"]


def test_what_has_not_begun_can_be_dropped() -> None:
    plan = MovePlan([a_move("v1", "a1", "a2"), a_move("v2", "a1", "a2")], {}, per_host=1, per_link=1, site=site)
    [first] = plan.begin()
    assert [move.name for move in plan.drop_waiting()] == ["v2"]
    plan.ended(first, moved=True)
    assert plan.begin() == []
