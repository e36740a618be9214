"""What `ctl migrate` is going to do: who goes where, in which rounds, and who is not moved; and what is said of it."""

from __future__ import annotations

import pytest

from controller import api, migration
from controller.infra import parse_infra
from controller.move_plan import Moving, Room
from controller.on_record import Capacity, Vm
from controller.results import VmProgress
from controller.status import CtlError
from protocol.vms import VmChange, VmResult

HOSTS = ("h1", "h2", "h3")


def a_vm(name: str, host: str, memory: int = 100) -> Vm:
    number = int(name[2:])
    return Vm(
        deployment="lab",
        name=name,
        host=host,
        ip=f"10.0.0.{number}",
        mac=f"00:16:3e:00:00:{number:02x}",
        vcpus=1,
        memory_mib=memory,
        cpu=10,
    )


def fleet(*vms: Vm, memory: int = 1_000) -> tuple[api.Status, api.InfraRecord]:
    hosts = tuple(
        api.HostStatus(
            name=name,
            rank=rank,
            site="",
            address=f"10.1.0.{rank}",
            up=True,
            parent=None,
            planned_parent=None,
            since_s=None,
            why="",
            digest="",
            facts={},
            health=None,
            health_age_s=None,
            incarnation=1,
            labels={},
        )
        for rank, name in enumerate(HOSTS)
    )
    status = api.Status(fleet="f", version="1", pid=1, uptime_s=1, fanout=32, hosts=hosts, vms=())
    sizes = {name: Capacity(cpus=4, cpu=400, memory_mib=memory) for name in HOSTS}
    return status, api.InfraRecord(vms=vms, specs=(), capacities=sizes)


def places(wanted: migration.Wanted) -> dict[str, str]:
    return {move.name: move.target for move in wanted.moves}


def test_each_goes_to_the_host_with_most_memory_left_and_who_is_there_stays() -> None:
    status, record = fleet(
        a_vm("vm1", "h1"), a_vm("vm2", "h1", 300), a_vm("vm3", "h1"), a_vm("vm4", "h2", 200), a_vm("vm5", "h3", 50)
    )
    meant = {"lab": ["vm1", "vm2", "vm3", "vm4"]}
    wanted = migration.to_hosts(meant, ("h2", "h3"), status, record)
    assert places(wanted) == {"vm1": "h3", "vm2": "h3", "vm3": "h2"}


def test_of_hosts_of_which_nothing_is_known_each_gets_as_many() -> None:
    status, record = fleet(*(a_vm(f"vm{number}", "h1") for number in range(4)))
    record = api.InfraRecord(vms=record.vms, specs=(), capacities={})
    wanted = migration.to_hosts({"lab": [f"vm{number}" for number in range(4)]}, ("h2", "h3"), status, record)
    assert sorted(places(wanted).values()) == ["h2", "h2", "h3", "h3"]


FILE = """#list of nodes
h1 4 400 1000
h2 4 400 1000
#list of VMs
vm1 1 10 100
vm2 1 10 100
vm3 1 10 100
vm4 1 10 100
#initial configuration
h1 vm1
h2 vm2 vm4
#end of configuration
"""


def test_a_file_says_who_moves_and_who_has_no_place_in_it_stays() -> None:
    status, record = fleet(a_vm("vm1", "h2"), a_vm("vm2", "h2"), a_vm("vm3", "h2"))
    wanted = migration.by_file(parse_infra(FILE)[0], "lab", status, record)
    assert places(wanted) == {"vm1": "h1"}
    assert wanted.absent == ("vm4",)
    assert migration.by_file(parse_infra(FILE)[0], "other", status, record).moves == ()


def test_a_file_with_a_host_that_is_not_there_is_refused_before_anything_moves() -> None:
    status, record = fleet(a_vm("vm1", "h2"))
    with pytest.raises(CtlError, match="not in the fleet, and nothing was moved: h9"):
        migration.by_file(parse_infra(FILE.replace("h1", "h9"))[0], "lab", status, record)


def test_rounds_keep_the_limits_and_what_can_not_begin_is_said() -> None:
    moves = [
        Moving(deployment="lab", name=name, source=source, target=target, memory_mib=100)
        for name, source, target in (("vm1", "h1", "h2"), ("vm2", "h1", "h2"), ("vm3", "h1", "h3"))
    ]
    room = {"h2": Room(cpu=400, memory_mib=200), "h3": Room(cpu=400, memory_mib=50)}
    rounds, stuck = migration.in_rounds(moves, room, {}, per_host=1, per_link=1)
    assert [[move.name for move in one] for one in rounds] == [["vm1"], ["vm2"]]
    assert stuck == {"vm3": "h3 has memory for 50 MiB more, and it needs 100"}
    assert migration.plan_lines(rounds, stuck) == [
        "1 vm1: h1 -> h2",
        "2 vm2: h1 -> h2",
        "! vm3: h3 has memory for 50 MiB more, and it needs 100",
        "2 VMs would move, 1 could not",
    ]
    told = migration.plan_object(rounds, stuck, ["vm4"])
    assert [(one["name"], one["from"], one["to"], one["round"]) for one in told["moves"]] == [
        ("vm1", "h1", "h2", 1),
        ("vm2", "h1", "h2", 2),
    ]
    assert (told["stuck"], told["not_on_record"]) == (stuck, ["vm4"])


def test_what_became_of_each_is_told_also_of_one_of_which_nobody_said_anything() -> None:
    moves = [Moving(deployment="lab", name=name, source="h1", target="h2") for name in ("vm1", "vm2", "vm3")]
    results = {
        "vm1": VmResult(name="vm1", change=VmChange.MOVED),
        "vm2": VmResult(name="vm2", change=VmChange.FAILED, detail="no room\x1b[31m"),
    }
    assert migration.moved_lines(moves, results) == ["vm1: h1 -> h2", "1 VM moved"]
    failed = migration.failed_lines(moves, results)
    assert failed[0].startswith("vm2: h1 -> h2: no room")
    assert "\x1b" not in failed[0]
    assert failed[1] == "vm3: h1 -> h2: nobody said what became of it"
    told = migration.moved_object(moves, results, ("vm4",))
    assert [(one["name"], one["moved"]) for one in told["moves"]] == [("vm1", True), ("vm2", False), ("vm3", False)]
    assert told["moves"][2]["detail"] == "nobody said what became of it"
    assert told["not_on_record"] == ["vm4"]


def test_the_live_line_says_how_far_they_are() -> None:
    going = {"vm7": VmProgress("vm7", 3 << 20, 1 << 20), "vm8": VmProgress("vm8", 0, 0)}
    assert migration.moving_line(8, 3, 1, going) == (
        "3/8 VMs moved, 1 failed; vm7 75 %, 1.0 MiB left; vm8 0 %, 0 B left"
    )
