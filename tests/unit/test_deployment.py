"""From a file to what each agent is told: the same every time, in the units that agents use."""

from __future__ import annotations

import json
from collections.abc import Iterable
from uuid import UUID, uuid5

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.addresses import Addresses, assign, mac_of, subnet_pool
from controller.deployment import (
    MAX_CMDLINE,
    NAMESPACE,
    DeploymentError,
    Plan,
    cpu_quota,
    guest_cmdline,
    make_plan,
    make_specs,
    render_plan,
    vm_uuid,
)
from controller.infra import Node, format_infra, parse_infra
from controller.placement import MemoryUnit, Placement, place
from protocol.vms import DirectBoot, Disk, Network, VmSpec

SAMPLE = """\
#list of nodes
suno-9 4 20 8
suno-3 4 20 8
suno-6 4 20 8
#list of VMs
vm02 1 1 1 2147483647
vm00 2 1->4 1->2 5
vm01 1 1 1
vm03 1 1 1
#initial configuration
suno-3 vm02 vm00 (vm01)
(suno-6) vm03
#end of configuration
"""


def planned(text: str = SAMPLE, *, unit: MemoryUnit = MemoryUnit.AUTO) -> tuple[Placement, Addresses]:
    placement = place(parse_infra(text)[0], memory_unit=unit, replace_offline=True)
    pool = subnet_pool("198.18.0.0/22", gateway="198.18.0.1")
    return placement, assign([place.vm.name for place in placement.places], pool)


def specs_of(
    text: str = SAMPLE,
    *,
    unit: MemoryUnit = MemoryUnit.AUTO,
    deployment: str = "test",
    boot: DirectBoot | None = None,
    disk: Disk | None = None,
    network: Network | None = None,
) -> dict[str, tuple[VmSpec, ...]]:
    placement, addresses = planned(text, unit=unit)
    return make_specs(
        deployment=deployment, placement=placement, addresses=addresses, boot=boot, disk=disk, network=network
    )


def refused(text: str = SAMPLE, *, deployment: str = "test", boot: DirectBoot | None = None) -> tuple[str, ...]:
    with pytest.raises(DeploymentError) as caught:
        specs_of(text, deployment=deployment, boot=boot)
    return caught.value.problems


def plan_of(text: str = SAMPLE, *, unit: MemoryUnit = MemoryUnit.AUTO, warnings: Iterable[object] = ()) -> Plan:
    placement, addresses = planned(text, unit=unit)
    specs = make_specs(deployment="test", placement=placement, addresses=addresses)
    return make_plan(deployment="test", placement=placement, specs=specs, warnings=warnings)


def test_each_host_gets_its_own_vms_and_hosts_without_any_get_nothing() -> None:
    specs = specs_of()
    assert [(host, [spec.name for spec in vms]) for host, vms in specs.items()] == [
        ("suno-3", ["vm00", "vm01", "vm02"]),
        ("suno-9", ["vm03"]),
    ]


def test_a_specification_holds_what_the_file_and_the_addresses_say() -> None:
    assert specs_of()["suno-3"][0] == VmSpec(
        name="vm00",
        uuid=vm_uuid("test", "vm00"),
        deployment="test",
        vcpus=2,
        memory_mib=2048,
        mac="00:16:3E:12:00:03",
        ip="198.18.0.3",
        prefix=22,
        gateway="198.18.0.1",
        cpu_quota=100,
        start=True,
        boot=None,
        disk=None,
        network=Network(),
    )


def test_a_sleeping_vm_is_defined_and_not_started() -> None:
    assert {spec.name: spec.start for vms in specs_of().values() for spec in vms} == {
        "vm00": True,
        "vm01": False,
        "vm02": True,
        "vm03": True,
    }


def test_the_same_input_gives_the_same_bytes() -> None:
    boot = DirectBoot(kernel="0" * 64)
    assert msgspec.msgpack.encode(specs_of(boot=boot)) == msgspec.msgpack.encode(specs_of(boot=boot))
    on_one_line = " ".join(SAMPLE.split())
    assert specs_of(on_one_line, boot=boot) == specs_of(boot=boot)
    assert list(specs_of(on_one_line)) == list(specs_of())


@pytest.mark.parametrize(("unit", "memory"), [(MemoryUnit.GIB, 2048), (MemoryUnit.MIB, 2)])
def test_memory_is_told_in_mib(unit: MemoryUnit, memory: int) -> None:
    assert specs_of(unit=unit)["suno-3"][0].memory_mib == memory


def test_a_uuid_follows_from_the_names_alone() -> None:
    # Written out: were it to change, every VM that runs would be another one to its agent.
    assert UUID("d8329f30-e236-446e-a12d-9316f00bfef4") == NAMESPACE
    assert vm_uuid("test", "vm00") == str(uuid5(NAMESPACE, "test/vm00")) == "ba4b9aa8-165a-52e9-a2ce-77bd24d9d50a"
    assert len({vm_uuid(deployment, vm) for deployment in ("a", "b") for vm in ("v", "w")}) == 4


@pytest.mark.parametrize(
    ("cap", "cpus", "capacity", "quota"),
    [
        (5, 4, 20, 100),  # units: a CPU is 5 of 20
        (20, 4, 20, 400),
        (150, 4, 400, 150),  # percent of a CPU
        (2400, 8, 19200, 100),  # MHz of eight CPUs
        (1, 1, 3, 33),
        (2, 1, 3, 67),
        (1, 1, 200, 1),  # 0.5 is rounded up
        (1, 1, 2147483647, 1),  # libvirt's least
        (0, 4, 400, 1),
        (2147483646, 4, 20, 400),  # over the capacity: all of the node
        (2147483646, 2147483647, 1, 214748364700),
    ],
)
def test_a_cap_is_a_share_of_the_nodes_cpus(cap: int, cpus: int, capacity: int, quota: int) -> None:
    assert cpu_quota(cap, Node(name="n", cpus=cpus, cpu_capacity=capacity, memory=1)) == quota


def test_a_vm_without_a_cap_has_no_quota() -> None:
    quotas = {spec.name: spec.cpu_quota for vms in specs_of().values() for spec in vms}
    assert quotas == {"vm00": 100, "vm01": None, "vm02": None, "vm03": None}


@pytest.mark.parametrize(
    ("cmdline", "gateway", "expected"),
    [
        ("", "198.18.0.1", "ip=198.18.0.3::198.18.0.1:255.255.252.0:vm00::off"),
        ("", None, "ip=198.18.0.3:::255.255.252.0:vm00::off"),
        ("console=ttyS0 -- x", None, "ip=198.18.0.3:::255.255.252.0:vm00::off console=ttyS0 -- x"),
        ("quiet ip=dhcp panic=1", None, "quiet ip=dhcp panic=1"),
        ("zip=1 -- ip=x", None, "ip=198.18.0.3:::255.255.252.0:vm00::off zip=1 -- ip=x"),
    ],
)
def test_a_kernel_is_told_its_guests_address(cmdline: str, gateway: str | None, expected: str) -> None:
    assert guest_cmdline(cmdline, name="vm00", ip="198.18.0.3", prefix=22, gateway=gateway) == expected


def test_boot_disk_and_network_are_the_same_for_all_vms_but_for_the_address() -> None:
    boot = DirectBoot(kernel="0" * 64, initrd="1" * 64, cmdline="console=ttyS0")
    disk, network = Disk(image="2" * 64, size_mib=10), Network(bridge="br0")
    vms = [spec for vms in specs_of(boot=boot, disk=disk, network=network).values() for spec in vms]
    assert {(spec.disk, spec.network) for spec in vms} == {(disk, network)}
    for spec in vms:
        assert spec.boot == DirectBoot(
            kernel="0" * 64,
            initrd="1" * 64,
            cmdline=f"ip={spec.ip}::198.18.0.1:255.255.252.0:{spec.name}::off console=ttyS0",
        )


def test_a_command_line_that_linux_would_cut_is_refused() -> None:
    added = len("ip=198.18.0.2::198.18.0.1:255.255.252.0:vm02::off ")
    assert specs_of(boot=DirectBoot(kernel="0" * 64, cmdline="x" * (MAX_CMDLINE - added)))
    problems = refused(boot=DirectBoot(kernel="0" * 64, cmdline="x" * (MAX_CMDLINE - added + 1)))
    assert problems[0] == (
        "vm02 would get a kernel command line of 2048 bytes and Linux reads 2047; shorten --cmdline."
    )
    assert len(problems) == 4


def test_all_that_can_not_be_made_is_said_at_once() -> None:
    text = (
        "#list of nodes\nn 1 0 8\n#list of VMs\nv 1 0 1 5\nw 1 0 0\nx 1 0 1\n"
        "#initial configuration\nn v w x\n#end of configuration\n"
    )
    assert refused(text, deployment="../x") == (
        (
            "'../x' is no deployment name: it takes 1 to 63 letters, digits, '-', '_' and '.', "
            "with a letter or digit first and last."
        ),
        (
            "v has a CPU cap and n a CPU capacity of 0, so the cap is no share of anything; "
            "give the node a capacity, or the VM no cap."
        ),
        "w has memory 0, with which nothing boots; give it at least 1.",
    )
    placement, _ = planned()
    with pytest.raises(DeploymentError, match="vm02 has no address"):
        make_specs(deployment="test", placement=placement, addresses=Addresses(by_name={}, prefix=24))


def test_a_plan_is_rendered_as_it_will_be_made() -> None:
    assert render_plan(plan_of(warnings=parse_infra("#list of nodes")[1])) == (
        "deployment test: 4 VMs, memory in GiB (guessed from the largest node; --memory-unit sets it)\n"
        "suno-3: 3 VMs, CPU 5/20, memory 3/8 GiB\n"
        "  vm00  198.18.0.3       00:16:3E:12:00:03  2 vCPUs, 2048 MiB, at most 100 % of a CPU\n"
        "  vm01  198.18.0.4       00:16:3E:12:00:04  1 vCPU, 1024 MiB, sleeping\n"
        "  vm02  198.18.0.2       00:16:3E:12:00:02  1 vCPU, 1024 MiB\n"
        "suno-6: offline\n"
        "suno-9: 1 VM, CPU 1/20, memory 1/8 GiB\n"
        "  vm03  198.18.0.5       00:16:3E:12:00:05  1 vCPU, 1024 MiB, placed by the planner\n"
        "total: 4 VMs on 2 hosts, CPU 6/40, memory 4/16 GiB\n"
        "warning: infra.conf:1:15: no '#end of configuration': the file may be cut short\n"
        "warning: 1 VM of offline nodes placed elsewhere: vm03\n"
    )


def test_a_plan_in_mib_with_a_unit_that_was_asked_for_says_so() -> None:
    lines = render_plan(plan_of(unit=MemoryUnit.MIB)).splitlines()
    assert lines[0] == "deployment test: 4 VMs, memory in MiB"
    assert lines[1] == "suno-3: 3 VMs, CPU 5/20, memory 3/8 MiB"


def test_overcommitment_and_a_cap_of_nothing_are_warnings_of_the_plan() -> None:
    text = (
        "#list of nodes\nn 1 1 1\n#list of VMs\nv 1 2 1 0\nw 1 1 1\n"
        "#initial configuration\nn v w\n#end of configuration\n"
    )
    placement = place(parse_infra(text)[0], overcommit=True)
    addresses = assign(["v", "w"], subnet_pool("198.18.0.0/24"))
    specs = make_specs(deployment="test", placement=placement, addresses=addresses)
    assert make_plan(deployment="test", placement=placement, specs=specs).warnings == (
        "n: its VMs want CPU 3, 2 over its capacity of 1; let pass by --overcommit",
        "n: its VMs want memory 2 GiB, 1 GiB over its capacity of 1 GiB; let pass by --overcommit",
        "CPU cap 0 becomes 1 % of a CPU, the least that libvirt takes: v",
    )


def test_a_plan_is_json_for_programs() -> None:
    plan = plan_of()
    data = json.loads(msgspec.json.encode(plan))
    assert (data["memory_unit"], data["unit_was_auto"], data["vm_count"]) == ("GiB", True, 4)
    assert (data["memory_mib"], data["memory_mib_capacity"], data["cpu"], data["cpu_capacity"]) == (4096, 16384, 6, 40)
    assert [host["name"] for host in data["hosts"]] == ["suno-3", "suno-6", "suno-9"]
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


@settings(deadline=None, derandomize=True)
@given(st.permutations([f"vm{n:02}" for n in range(6)]))
def test_another_order_of_declaration_changes_addresses_and_nothing_else(order: list[str]) -> None:
    text = "#list of nodes\nn 4 20 8\nm 4 20 8\n#list of VMs\n" + "".join(f"{name} 1 1 1 5\n" for name in order)
    text += "#initial configuration\nn vm00 vm01 vm02\nm vm03 vm04 vm05\n#end of configuration\n"
    specs = specs_of(text)
    assert [spec.name for vms in specs.values() for spec in vms] == [
        *(f"vm0{n}" for n in (3, 4, 5)),
        *(f"vm0{n}" for n in (0, 1, 2)),
    ]
    for spec in (spec for vms in specs.values() for spec in vms):
        assert spec.ip == f"198.18.0.{2 + order.index(spec.name)}"
        assert (spec.mac, spec.uuid) == (mac_of(spec.ip), vm_uuid("test", spec.name))


def test_ten_thousand_vms_go_from_the_file_to_512_agents() -> None:
    nodes = "".join(f"node{n} 16 1600 65536\n" for n in range(512))
    vms = "".join(f"vm-{n} 1 50->{50 + n % 3 * 10} 2048 150\n" for n in range(10_240))
    # Half are mapped, and the planner places the other half.
    mapping = "".join(f"node{n} " + " ".join(f"vm-{n + 512 * i}" for i in range(10)) + "\n" for n in range(512))
    text = (
        f"#list of nodes\n{nodes}#list of VMs\n{vms}#initial configuration\n{mapping}"
        f"FARM {' '.join(f'vm-{n}' for n in range(5120, 10_240))}\n#end of configuration\n"
    )
    infra = parse_infra(text)[0]
    assert parse_infra(format_infra(infra))[0] == infra
    placement = place(infra)
    addresses = assign([vm.name for vm in infra.vms], subnet_pool("10.0.0.0/18", gateway="10.0.0.1"))
    specs = make_specs(deployment="big", placement=placement, addresses=addresses, boot=DirectBoot(kernel="0" * 64))
    everything = [spec for vms in specs.values() for spec in vms]
    assert len(everything) == 10_240
    for what in ("name", "uuid", "ip", "mac"):
        assert len({getattr(spec, what) for spec in everything}) == 10_240
    mapped = {vm.name: vm.node for vm in infra.vms if vm.node is not None}
    assert len(mapped) == 5120
    assert all(mapped.get(spec.name, host) == host for host, vms in specs.items() for spec in vms)
    assert {spec.cpu_quota for spec in everything} == {150}
    plan = make_plan(deployment="big", placement=placement, specs=specs)
    assert all(host.cpu <= host.cpu_capacity and host.memory_mib <= host.memory_mib_capacity for host in plan.hosts)
    assert plan.cpu == sum(vm.cpu_wanted for vm in infra.vms)
    assert plan.memory_mib == 10_240 * 2048
