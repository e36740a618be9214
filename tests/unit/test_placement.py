"""Placement: what fits stays, what waits is placed first fit decreasing, and what is impossible is said all at once."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.infra import Infra, Node, Vm, parse_infra
from controller.placement import (
    MemoryUnit,
    NoRoom,
    OfflineMapping,
    OverCapacity,
    Placement,
    PlacementError,
    place,
)


def infra_of(nodes: str, vms: str, mapping: str = "") -> Infra:
    """An Infra from the three sections, whose lines are cut at `;`."""
    sections = [f"#list of nodes;{nodes}", f"#list of VMs;{vms}", f"#initial configuration;{mapping}"]
    infra, warnings = parse_infra("\n".join(";".join([*sections, "#end of configuration", ""]).split(";")))
    assert warnings == ()
    return infra


def homes(placement: Placement) -> dict[str, str]:
    return {place.vm.name: place.node for place in placement.places}


def refused(infra: Infra, *, overcommit: bool = False, replace_offline: bool = False) -> PlacementError:
    with pytest.raises(PlacementError) as caught:
        place(infra, overcommit=overcommit, replace_offline=replace_offline)
    return caught.value


def test_a_mapping_that_fits_is_kept_and_counted() -> None:
    placement = place(infra_of("n 4 20 8; m 4 20 8", "v 1 2 3; w 1 4 5; x 1 1 1", "n w v; m x"))
    assert homes(placement) == {"v": "n", "w": "n", "x": "m"}
    assert not any(place.planned for place in placement.places)
    assert [(use.node.name, use.vms, use.cpu, use.memory) for use in placement.nodes] == [
        ("n", ("v", "w"), 6, 8),
        ("m", ("x",), 1, 1),
    ]


@pytest.mark.parametrize(
    ("memory", "unit"),
    [(0, MemoryUnit.GIB), (8, MemoryUnit.GIB), (1023, MemoryUnit.GIB), (1024, MemoryUnit.MIB), (16192, MemoryUnit.MIB)],
)
def test_the_memory_unit_follows_from_the_largest_node(memory: int, unit: MemoryUnit) -> None:
    infra = infra_of(f"n 1 1 1; m 1 1 {memory}; k 1 1 0", "")
    assert (place(infra).memory_unit, place(infra).unit_was_auto) == (unit, True)
    for asked in (MemoryUnit.GIB, MemoryUnit.MIB):
        placement = place(infra, memory_unit=asked)
        assert (placement.memory_unit, placement.unit_was_auto) == (asked, False)


def test_a_node_over_its_capacity_is_named_with_by_how_much_it_is_over() -> None:
    infra = infra_of("n 4 20 8; m 4 20 8; k 4 20 8", "v 1 15 8; w 1 10 4; x 1 20 9; y 1 20 8", "n v w; m x; k y")
    error = refused(infra)
    assert error.problems == (
        OverCapacity(node="n", resource="CPU", wanted=25, capacity=20),
        OverCapacity(node="n", resource="memory", wanted=12, capacity=8, unit="GiB"),
        OverCapacity(node="m", resource="memory", wanted=9, capacity=8, unit="GiB"),
    )
    assert str(error) == (
        "n: its VMs want CPU 25, 5 over its capacity of 20\n"
        "n: its VMs want memory 12 GiB, 4 GiB over its capacity of 8 GiB\n"
        "m: its VMs want memory 9 GiB, 1 GiB over its capacity of 8 GiB\n"
        "Map fewer VMs to these nodes, or allow it with --overcommit."
    )


def test_overcommit_lets_a_mapping_pass_and_remembers_it() -> None:
    infra = infra_of("n 4 20 8", "v 1 15 8; w 1 10 4", "n v w")
    placement = place(infra, overcommit=True)
    assert homes(placement) == {"v": "n", "w": "n"}
    assert [(over.resource, over.over) for over in placement.overcommitted] == [("CPU", 5), ("memory", 4)]
    assert place(infra_of("n 4 20 8", "v 1 1 1", "n v"), overcommit=True).overcommitted == ()


def test_the_planner_itself_never_overcommits() -> None:
    infra = infra_of("n 4 20 8", "v 1 15 9; w 1 0 0", "n v; FARM w")
    assert refused(infra, overcommit=True).problems == (NoRoom(vm="w", cpu=0, memory=0, unit="GiB"),)


def test_what_counts_is_the_wanted_demand() -> None:
    infra = infra_of("n 4 20 8", "v 1 1->30 1; w 1 30->1 100->2", "n v w")
    assert refused(infra).problems == (OverCapacity(node="n", resource="CPU", wanted=31, capacity=20),)


@pytest.mark.parametrize(
    ("nodes", "vms", "mapping", "expected"),
    [
        # The largest first: small ones fill what the large ones leave.
        ("n 1 9 4; m 1 9 4", "a 1 1 1; b 1 1 3; c 1 1 4", "", {"c": "n", "b": "m", "a": "m"}),
        # The first node with room, in the order of declaration.
        ("n 1 9 2; m 1 9 9", "a 1 1 3; b 1 1 2; c 1 1 1", "", {"a": "m", "b": "n", "c": "m"}),
        # Of equal memory the larger CPU first; memory before CPU.
        ("n 1 5 9; m 1 9 9", "a 1 4 2; b 1 5 2; c 1 5 1", "", {"b": "n", "a": "m", "c": "m"}),
        # Equals keep the order of their declaration.
        ("n 1 9 2; m 1 9 1", "z 1 1 1; y 1 1 1; x 1 1 1", "", {"z": "n", "y": "n", "x": "m"}),
        # What the file maps is there first, wherever it is declared.
        ("n 1 9 4; m 1 9 4", "a 1 1 4; b 1 1 1", "n b; FARM a", {"b": "n", "a": "m"}),
        # Not mapped is the same as in FARM.
        ("n 1 9 4; m 1 9 4", "a 1 1 4; b 1 1 1", "n b", {"b": "n", "a": "m"}),
        # CPU keeps a VM out although its memory fits.
        ("n 1 1 8; m 1 9 8", "a 1 2 1", "", {"a": "m"}),
        # Offline nodes take nothing.
        ("n 1 9 8; m 1 9 8", "a 1 1 1", "(n)", {"a": "m"}),
        # Room that a size no longer finds on the first node is looked for anew by a smaller one.
        ("n 1 9 3; m 1 9 4", "a 1 1 2; b 1 1 2; c 1 1 1; d 1 1 2", "", {"a": "n", "b": "m", "d": "m", "c": "n"}),
    ],
)
def test_waiting_vms_are_placed_first_fit_decreasing(
    nodes: str, vms: str, mapping: str, expected: dict[str, str]
) -> None:
    infra = infra_of(nodes, vms, mapping)
    placement = place(infra)
    assert homes(placement) == expected
    assert {place.vm.name for place in placement.places if place.planned} == {
        vm.name for vm in infra.vms if vm.node is None
    }


def test_vms_that_fit_nowhere_are_all_named_in_the_order_of_declaration() -> None:
    error = refused(infra_of("n 4 20 2048; m 4 20 2048", "a 1 1 1025; b 1 21 1; c 1 1 2049; d 1 1 1025; e 1 1 1"))
    assert error.problems == (
        NoRoom(vm="b", cpu=21, memory=1, unit="MiB"),
        NoRoom(vm="c", cpu=1, memory=2049, unit="MiB"),
    )
    assert str(error).splitlines()[0] == "b: no online node has room for memory 1 MiB and CPU 21"
    assert str(error).splitlines()[-1] == "Add nodes, or make these VMs smaller."


def test_vms_and_no_node_is_an_error_and_nothing_at_all_is_none() -> None:
    assert refused(infra_of("", "a 1 1 1")).problems == (NoRoom(vm="a", cpu=1, memory=1, unit="GiB"),)
    assert place(infra_of("", "")).places == ()


def test_a_sleeping_vm_that_the_file_maps_takes_no_room() -> None:
    placement = place(infra_of("n 4 20 8", "v 1 20 8; w 1 20 8; x 1 1 1", "n v (w) (x)"))
    assert homes(placement) == {"v": "n", "w": "n", "x": "n"}
    assert (placement.nodes[0].cpu, placement.nodes[0].memory) == (20, 8)
    assert placement.nodes[0].vms == ("v", "w", "x")


def test_a_sleeping_vm_that_the_planner_places_gets_room_to_wake_in() -> None:
    placement = place(infra_of("n 4 20 8; m 4 20 8", "v 1 1 8; w 1 1 8", "n v; FARM (w)"))
    assert homes(placement) == {"v": "n", "w": "m"}
    assert placement.nodes[1].memory == 8
    assert refused(infra_of("n 4 20 8", "v 1 1 8; w 1 1 8", "n v; FARM (w)")).problems


def test_vms_on_an_offline_node_are_an_error_unless_they_are_placed_elsewhere() -> None:
    infra = infra_of("n 4 20 8; m 4 20 8", "v 1 1 1; w 1 1 1; x 1 1 1", "(n) v (w); m x")
    error = refused(infra)
    assert error.problems == (OfflineMapping(node="n", vms=("v", "w")),)
    assert str(error) == (
        "n: offline, with 2 VMs mapped to it (v, w)\n"
        "Have the VMs of offline nodes placed on others with --replace-offline."
    )
    placement = place(infra, replace_offline=True)
    assert homes(placement) == {"v": "m", "w": "m", "x": "m"}
    assert [place.vm.name for place in placement.places if place.planned] == ["v", "w"]


def test_nothing_is_overcommitted_or_moved_unless_it_is_asked_for() -> None:
    for mapping in ("n v", "(n) v; m"):
        with pytest.raises(PlacementError):
            place(infra_of("n 1 1 1; m 9 9 9", "v 1 2 1", mapping))


def test_all_problems_come_at_once() -> None:
    infra = infra_of("n 4 20 8; m 4 20 8; k 4 1 1", "v 1 1 9; w 1 1 1; x 1 1 9; y 1 2 0", "n v; (m) w; FARM x; k y")
    error = refused(infra)
    assert [type(problem) for problem in error.problems] == [OverCapacity, OverCapacity, OfflineMapping, NoRoom]
    assert len(str(error).splitlines()) == 4 + 3
    with_replacement = refused(infra, replace_offline=True)
    assert [type(problem) for problem in with_replacement.problems] == [OverCapacity, OverCapacity, NoRoom, NoRoom]


amounts = st.integers(0, 12)


@st.composite
def infras(draw: st.DrawFn) -> Infra:
    count = draw(st.integers(0, 6))
    nodes = tuple(
        Node(name=f"n{i}", cpus=1, cpu_capacity=draw(amounts), memory=draw(amounts), offline=draw(st.booleans()))
        for i in range(count)
    )
    places = st.sampled_from([None, None, *(node.name for node in nodes)])
    vms = tuple(
        Vm(
            name=f"v{i}",
            vcpus=1,
            cpu=draw(amounts),
            cpu_wanted=draw(st.integers(0, 5)),
            memory=draw(amounts),
            memory_wanted=draw(st.integers(0, 5)),
            node=draw(places),
            sleeping=draw(st.booleans()),
        )
        for i in range(draw(st.integers(0, 12)))
    )
    return Infra(nodes=nodes, vms=vms)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(infras(), st.booleans(), st.booleans())
def test_a_placement_exceeds_no_node_drops_no_vm_and_is_the_same_again(
    infra: Infra, overcommit: bool, replace_offline: bool
) -> None:
    try:
        placement = place(infra, overcommit=overcommit, replace_offline=replace_offline)
    except PlacementError as caught:
        error = caught
    else:
        check(infra, placement, overcommit=overcommit)
        assert placement == place(infra, overcommit=overcommit, replace_offline=replace_offline)
        return
    again = refused(infra, overcommit=overcommit, replace_offline=replace_offline)
    assert (again.problems, str(again)) == (error.problems, str(error))


def check(infra: Infra, placement: Placement, *, overcommit: bool) -> None:
    assert [place.vm for place in placement.places] == list(infra.vms)
    assert [use.node for use in placement.nodes] == list(infra.nodes)
    overcommitted = {over.node for over in placement.overcommitted}
    assert overcommit or not overcommitted
    for use in placement.nodes:
        here = [place for place in placement.places if place.node == use.node.name]
        assert use.vms == tuple(place.vm.name for place in here)
        assert not (use.node.offline and here)
        counted = [place.vm for place in here if place.planned or not place.vm.sleeping]
        assert use.cpu == sum(vm.cpu_wanted for vm in counted)
        assert use.memory == sum(vm.memory_wanted for vm in counted)
        fits = use.cpu <= use.node.cpu_capacity and use.memory <= use.node.memory
        assert fits == (use.node.name not in overcommitted)
        # A node over its capacity is the file's doing alone.
        assert fits or not any(place.planned for place in here)
    for place_ in placement.places:
        assert place_.planned == (place_.node != place_.vm.node)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(infras())
def test_the_planner_finds_for_each_vm_the_first_node_that_a_plain_search_finds(infra: Infra) -> None:
    """The search that skips full nodes against one that tries every node for every VM."""
    waiting = msgspec.structs.replace(infra, vms=tuple(msgspec.structs.replace(vm, node=None) for vm in infra.vms))
    cpu = {node.name: 0 for node in infra.nodes}
    memory = dict(cpu)
    expected: dict[str, str | None] = {vm.name: None for vm in infra.vms}
    for vm in sorted(waiting.vms, key=lambda vm: (vm.memory_wanted, vm.cpu_wanted), reverse=True):
        for node in infra.nodes:
            fits_cpu = cpu[node.name] + vm.cpu_wanted <= node.cpu_capacity
            if not node.offline and fits_cpu and memory[node.name] + vm.memory_wanted <= node.memory:
                expected[vm.name] = node.name
                cpu[node.name] += vm.cpu_wanted
                memory[node.name] += vm.memory_wanted
                break
    lost = [name for name, node in expected.items() if node is None]
    if lost:
        assert [problem.vm for problem in refused(waiting).problems if isinstance(problem, NoRoom)] == lost
    else:
        assert homes(place(waiting)) == expected


def test_ten_thousand_vms_fill_512_nodes_to_the_last_place() -> None:
    nodes = tuple(Node(name=f"n{i}", cpus=20, cpu_capacity=2000, memory=20480) for i in range(512))
    vms = tuple(
        Vm(name=f"v{i}", vcpus=1, cpu=100, cpu_wanted=100, memory=1024, memory_wanted=1024) for i in range(10_240)
    )
    placement = place(Infra(nodes=nodes, vms=vms))
    assert [len(use.vms) for use in placement.nodes] == [20] * 512
    assert homes(placement) == {f"v{i}": f"n{i // 20}" for i in range(10_240)}
    one_more = Vm(name="one-more", vcpus=1, cpu=1, cpu_wanted=1, memory=1, memory_wanted=1)
    assert len(refused(Infra(nodes=nodes, vms=(*vms, one_more))).problems) == 1
