"""agent.vmstates: what is known of VMs, and since when."""

from __future__ import annotations

from agent.domains import Domain
from agent.vmstates import StateTable
from agent.vmxml import Mark
from protocol.vms import VmPower, VmState


def a_domain(name: str = "vm1", power: VmPower = VmPower.RUNNING, reason: str = "booted", run: int = 1) -> Domain:
    mark = Mark(name=name, deployment="lab", owner="/o", digest="d")
    return Domain(name=name, uuid=f"uuid of {name}", power=power, reason=reason, run=run, mark=mark)


def a_state(name: str = "vm1", power: VmPower = VmPower.RUNNING, reason: str = "booted", age_ms: int = 0) -> VmState:
    return VmState(name=name, deployment="lab", power=power, reason=reason, age_ms=age_ms)


def test_only_what_is_new_is_told_and_ages_grow() -> None:
    table = StateTable()
    assert table.saw([a_domain("vm2"), a_domain("vm1")], {}, 10.0) == [a_state("vm1"), a_state("vm2")]
    assert table.saw([a_domain("vm1"), a_domain("vm2")], {}, 12.0) == []
    killed = a_domain("vm1", VmPower.SHUTOFF, "crashed", -1)
    assert table.saw([killed, a_domain("vm2")], {}, 14.0) == [a_state("vm1", VmPower.SHUTOFF, "crashed")]
    assert table.states(15.5) == [a_state("vm1", VmPower.SHUTOFF, "crashed", 1500), a_state("vm2", age_ms=5500)]


def test_a_vm_that_was_restarted_between_two_looks_is_young_again() -> None:
    table = StateTable()
    table.saw([a_domain(run=1)], {}, 10.0)
    assert table.saw([a_domain(run=2)], {}, 20.0) == [a_state()]
    assert table.states(21.0) == [a_state(age_ms=1000)]


def test_without_sight_every_vm_is_unknown_and_comes_back_as_old_as_it_was() -> None:
    table = StateTable()
    table.saw([a_domain()], {}, 10.0)
    assert table.lost_sight("no libvirtd", {}, 20.0) == [a_state(power=VmPower.UNKNOWN, reason="no libvirtd")]
    assert table.lost_sight("no libvirtd", {}, 22.0) == []
    assert table.states(25.0) == [a_state(power=VmPower.UNKNOWN, reason="no libvirtd", age_ms=5000)]
    assert len(table.lost_sight("still none", {}, 26.0)) == 1
    assert table.saw([a_domain()], {}, 30.0) == [a_state(age_ms=20_000)]


def test_what_changed_out_of_sight_is_as_old_as_its_first_sight() -> None:
    table = StateTable()
    table.saw([a_domain()], {}, 10.0)
    table.lost_sight("no libvirtd", {}, 20.0)
    stopped = a_domain(power=VmPower.SHUTOFF, reason="crashed", run=-1)
    assert table.saw([stopped], {}, 30.0) == [a_state(power=VmPower.SHUTOFF, reason="crashed")]


def test_vms_that_only_their_files_tell_of_are_unknown_before_the_first_look_and_gone_after_it() -> None:
    table = StateTable()
    assert table.lost_sight("no libvirtd", {"vm1": "lab"}, 5.0) == [
        a_state(power=VmPower.UNKNOWN, reason="no libvirtd")
    ]
    [gone] = table.saw([], {"vm1": "lab"}, 6.0)
    assert gone.power is VmPower.GONE
    assert table.saw([], {"vm1": "lab"}, 8.0) == []


def test_a_vm_without_domain_and_files_is_said_to_be_gone_once_and_forgotten() -> None:
    table = StateTable()
    table.saw([a_domain()], {}, 10.0)
    assert table.saw([], {}, 12.0) == [a_state(power=VmPower.GONE, reason="removed")]
    assert table.saw([], {}, 14.0) == []
    assert table.states(14.0) == []


def test_an_answer_to_ping_is_kept_until_the_vm_is_another_run() -> None:
    table = StateTable()
    table.saw([a_domain()], {}, 10.0)
    [answered] = table.answered({"vm1": True, "vm9": True}, 11.0)
    assert answered.reachable is True
    assert table.answered({"vm1": True}, 12.0) == []
    assert table.saw([a_domain()], {}, 13.0) == []
    assert table.states(13.0)[0].reachable is True
    assert table.saw([a_domain(run=2)], {}, 14.0)[0].reachable is None


def test_a_vm_that_is_off_is_not_reachable_whatever_answers_at_its_address() -> None:
    table = StateTable()
    table.saw([a_domain(power=VmPower.SHUTOFF, reason="shut down", run=-1)], {}, 10.0)
    assert table.answered({"vm1": True}, 11.0) == []
    assert table.states(11.0)[0].reachable is None
