"""`ctl plan`: what a spawn would change, whoever is missing; and the waves in which it is done. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import pytest

from controller import api
from controller.infra import parse_infra
from controller.placement import PlacementError, Strategy, Together, place
from controller.plan_changes import Changes, Sign, changes, changes_object, render_changes
from controller.spawn import in_waves, reserved
from controller.spawn_plan import Prepared, SpawnOptions, in_network, prepare
from controller.status import CtlError, ExitStatus
from protocol.vms import VmPower, VmSpec, VmState
from tests.unit import fake_service as fake

INFRA = """\
#list of nodes
h0 4 400 8192
h1 4 400 8192
h2 4 400 8192
#list of VMs
vm0 1 100 1024
vm1 1 100 1024
vm2 1 100 1024
vm3 1 100 1024
#initial configuration
h0 vm0 vm1
h1 vm2
#end of configuration
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"k")
    return path


def planned(
    kernel: Path,
    text: str = INFRA,
    *,
    up: Sequence[int] = (0, 1, 2),
    known: api.Deployment | None = None,
    nets: Sequence[api.NetStatus] | None = (),
    **options: object,
) -> Prepared:
    wanted: dict[str, object] = {"deployment": "lab", "kernel": kernel, "subnet": "10.0.0.0/16"}
    return prepare(
        parse_infra(text)[0],
        SpawnOptions(**(wanted | options)),  # type: ignore[arg-type]
        status=fake.status(*(fake.host(n, up=n in up) for n in range(3))),
        known=known,
        nets=nets,
    )


def on_record(prepared: Prepared, *, but: Iterable[str] = ()) -> api.Deployment:
    """As after a spawn of this, without the word of hosts on the VMs of `but`."""
    every = {spec.name: (host, spec) for host, specs in prepared.slices.items() for spec in specs}
    return api.Deployment(
        name="lab",
        hosts={name: host for name, (host, _) in every.items()},
        addresses={name: spec.ip for name, (_, spec) in every.items()},
        taken=(),
        specs=tuple(spec for name, (_, spec) in every.items() if name not in set(but)),
    )


def heard(known: api.Deployment, **powers: VmPower) -> api.Status:
    vms = [
        fake.vm(
            name,
            host,
            deployment="lab",
            state=VmState(name=name, deployment="lab", power=powers.get(name, VmPower.RUNNING)),
        )
        for name, host in known.hosts.items()
    ]
    return fake.status(*(fake.host(n) for n in range(3)), vms=vms)


def signs(found: Changes) -> dict[str, tuple[str, str]]:
    return {change.vm: (change.sign.value, change.host) for change in found.changes}


def test_at_first_everything_is_made_and_afterwards_nothing(kernel: Path) -> None:
    first = planned(kernel)
    found = changes(first, fake.status(), None)
    assert signs(found) == {"vm0": ("+", "h0"), "vm1": ("+", "h0"), "vm2": ("+", "h1"), "vm3": ("+", "h0")}
    assert render_changes(found).splitlines()[-1] == "lab: +4, 0 as planned"
    known = on_record(first)
    again = planned(kernel, known=known)
    assert again.slices == first.slices
    found = changes(again, heard(known), known)
    assert (found.changes, found.right) == ((), 4)
    assert render_changes(found) == "lab: 4 VMs as planned, nothing to do\n"


def test_each_difference_has_its_sign_and_its_reason(kernel: Path) -> None:
    known = on_record(planned(kernel), but=["vm1"])
    text = INFRA.replace("vm0 1 100 1024", "vm0 2 100 1024").replace("vm2 1 100 1024\n", "").replace("h1 vm2", "h1")
    text = text.replace("#list of VMs", "#list of VMs\nvm9 1 100 1024")
    found = changes(planned(kernel, text, known=known), heard(known, vm3=VmPower.SHUTOFF), known)
    assert {change.vm: (change.sign, change.why) for change in found.changes} == {
        "vm0": (Sign.CHANGE, "vcpus 1 -> 2"),
        "vm1": (Sign.MAKE, "asked for before, and not made as far as is known"),
        "vm2": (Sign.REMOVE, "on record and not in the file"),
        "vm3": (Sign.CHANGE, "it is off, and would be started"),
        "vm9": (Sign.MAKE, ""),
    }
    assert found.counts() == {"+": 2, "~": 2, "-": 1}
    assert render_changes(found).splitlines()[0] == "h0: +2 ~2"
    told = msgspec.json.decode(msgspec.json.encode(changes_object(found)))
    assert told["total"] == {"+": 2, "~": 2, "-": 1, "=": 0}
    assert told["hosts"]["h1"] == [{"name": "vm2", "change": "-", "detail": "on record and not in the file"}]


def test_a_vm_that_its_host_has_lost_is_made_again(kernel: Path) -> None:
    known = on_record(planned(kernel))
    found = changes(planned(kernel, known=known), heard(known, vm2=VmPower.GONE), known)
    assert [(change.sign, change.vm, change.why) for change in found.changes] == [
        (Sign.MAKE, "vm2", "its host has lost it")
    ]


def test_without_a_place_in_the_file_a_vm_stays_where_it_is(kernel: Path) -> None:
    spread = planned(kernel, strategy=Strategy.SPREAD)
    assert {spec.name: host for host, specs in spread.slices.items() for spec in specs}["vm3"] == "h2"
    again = planned(kernel, known=on_record(spread))
    assert again.slices == spread.slices, "also when it would be packed now"


def test_spread_fills_hosts_evenly_and_pack_fills_few() -> None:
    nodes = "".join(f"n{n} 8 800 8192\n" for n in range(4))
    vms = "".join(f"v{n} 1 100 {512 + n}\n" for n in range(12))
    infra, _ = parse_infra(f"#list of nodes\n{nodes}#list of VMs\n{vms}#end of configuration\n")
    assert [len(use.vms) for use in place(infra, strategy=Strategy.SPREAD).nodes] == [3, 3, 3, 3]
    assert [len(use.vms) for use in place(infra).nodes] == [8, 4, 0, 0]


def test_vms_of_one_rule_share_no_node() -> None:
    nodes = "".join(f"n{n} 8 800 8192\n" for n in range(3))
    vms = "".join(f"{kind}{n} 1 10 64\n" for kind in "ab" for n in range(3))
    text = f"#list of nodes\n{nodes}#list of VMs\n{vms}#initial configuration\n{{}}\n#end of configuration\n"
    rules = {"a0": "a*", "a1": "a*", "a2": "a*"}
    for strategy in Strategy:
        placement = place(parse_infra(text.format("n1 a0"))[0], apart=rules, strategy=strategy)
        assert sorted(at.node for at in placement.places if at.vm.name in rules) == ["n0", "n1", "n2"]
    with pytest.raises(PlacementError) as caught:
        place(parse_infra(text.format("n1 a0 a2"))[0], apart=rules)
    assert caught.value.problems == (Together(node="n1", rule="a*", vms=("a0", "a2")),)
    with pytest.raises(PlacementError, match=r"b2: .*, apart from the others of 'all'"):
        place(parse_infra(text.format("(n0)\nn1 a0"))[0], apart=dict.fromkeys(["a0", "b1", "b2"], "all"))


def test_hosts_that_are_down_are_left_out_where_enough_are_up(kernel: Path) -> None:
    with pytest.raises(CtlError, match="down: h1"):
        planned(kernel, up=(0, 2))
    with pytest.raises(CtlError, match=r"2 of the file's 3 hosts can be used, --min-hosts asks for 3") as caught:
        planned(kernel, up=(0, 2), min_hosts="100%")
    assert caught.value.status is ExitStatus.UNREACHABLE
    with pytest.raises(CtlError, match="--replace-offline"):
        planned(kernel, up=(0, 2), min_hosts="60%")
    moved = planned(kernel, up=(0, 2), min_hosts="60%", replace_offline=True)
    assert "h1" not in moved.slices
    assert sum(map(len, moved.slices.values())) == 4


def test_vms_that_are_on_a_host_which_is_down_are_left_alone(kernel: Path) -> None:
    known = on_record(planned(kernel))
    prepared = planned(kernel, up=(0, 2), min_hosts="2", replace_offline=True, known=known)
    assert prepared.held == {"vm2": "h1"}
    assert (prepared.others, sum(map(len, prepared.slices.values()))) == ((), 3)
    assert known.addresses["vm2"] == "10.0.0.3"
    assert all(spec.ip != "10.0.0.3" for specs in prepared.slices.values() for spec in specs)
    assert "vm2: left alone, since their hosts are down" in render_changes(changes(prepared, None, known))


def test_a_profile_says_what_each_vm_is_made_of(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other kernel")
    (tmp_path / "base").write_bytes(b"QFI\xfb and more")
    (tmp_path / "lab.toml").write_text(
        '[vm."vm[01]"]\nkernel = "other"\n[vm.vm2]\nimage = "base"\ndisk = "4G"\nuser_data = "base"\n[vm.vm7]\n'
    )
    prepared = planned(kernel, profile=tmp_path / "lab.toml", cmdline="quiet", bridge="br0")
    specs: dict[str, VmSpec] = {spec.name: spec for own in prepared.slices.values() for spec in own}
    boots = {name: spec.boot for name, spec in specs.items()}
    assert boots["vm0"] is not None
    assert boots["vm3"] is not None
    assert boots["vm0"].kernel != boots["vm3"].kernel
    assert (boots["vm0"].cmdline.endswith("quiet"), boots["vm3"].cmdline.endswith("quiet")) == (False, True)
    assert boots["vm2"] is None
    assert specs["vm2"].disk is not None
    assert specs["vm2"].seed is not None
    assert (specs["vm2"].disk.image_format, specs["vm2"].disk.size_mib) == ("qcow2", 4096)
    assert specs["vm2"].seed.user_data == specs["vm2"].disk.image
    assert {spec.network.bridge for spec in specs.values()} == {"br0"}
    assert {path.name for path in prepared.images.values()} == {"vmlinuz", "other", "base"}
    assert prepared.plan.warnings == ("no VM matches the profile's pattern 'vm7'",)


def test_a_network_gives_its_bridge_subnet_and_gateway() -> None:
    nets = [
        api.NetStatus(name="lab", subnet="10.77.0.0/16", isolated=False, bridge="cn-lab", vni=7, vms=0),
        api.NetStatus(name="far", subnet="10.78.0.0/16", isolated=True, bridge="cn-far", vni=8, vms=0),
    ]
    found = in_network(SpawnOptions(deployment="d", network="lab"), nets)
    assert (found.bridge, found.subnet, found.gateway) == ("cn-lab", "10.77.0.0/16", "10.77.0.1")
    found = in_network(SpawnOptions(deployment="d", network="far", subnet="10.78.4.0/24"), nets)
    assert (found.bridge, found.subnet, found.gateway) == ("cn-far", "10.78.4.0/24", None)
    none = SpawnOptions(deployment="d")
    assert in_network(none, nets) is none
    with pytest.raises(CtlError, match="there is no network new: `ctl net create`"):
        in_network(SpawnOptions(deployment="d", network="new"), nets)
    with pytest.raises(CtlError, match="either --network or --bridge"):
        in_network(SpawnOptions(deployment="d", network="lab", bridge="br0"), nets)


NETS = (
    api.NetStatus(name="front", subnet="10.77.0.0/30", isolated=False, bridge="cn-front", vni=7, vms=0),
    api.NetStatus(name="back", subnet="10.78.0.0/16", isolated=True, bridge="cn-back", vni=8, vms=0),
)


def test_several_networks_in_one_deployment_each_with_its_subnet_bridge_and_gateway(
    kernel: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "lab.toml"
    profile.write_text('network = "back"\n[vm.vm1]\nnetwork = "front"\n[vm.vm3]\nbridge = "br0"\n')
    first = planned(kernel, profile=profile, nets=NETS, subnet="198.18.0.0/24", gateway="198.18.0.9")
    specs = {spec.name: spec for specs in first.slices.values() for spec in specs}
    assert {name: (spec.network.bridge, f"{spec.ip}/{spec.prefix}", spec.gateway) for name, spec in specs.items()} == {
        "vm0": ("cn-back", "10.78.0.1/16", None),
        "vm1": ("cn-front", "10.77.0.2/30", "10.77.0.1"),
        "vm2": ("cn-back", "10.78.0.2/16", None),
        "vm3": ("br0", "198.18.0.4/24", "198.18.0.9"),  # the first three are hosts'
    }
    boot = specs["vm1"].boot
    assert boot is not None
    assert boot.cmdline.startswith("ip=10.77.0.2::10.77.0.1:255.255.255.252:vm1:")
    # A rerun finds each its own.
    known = on_record(first)
    again = planned(kernel, profile=profile, nets=NETS, subnet="198.18.0.0/24", gateway="198.18.0.9", known=known)
    assert again.slices == first.slices
    assert again.addresses.new == ()


def test_who_is_in_a_network_of_the_profile_needs_no_subnet_and_may_not_be_one_too_many(
    kernel: Path, tmp_path: Path
) -> None:
    profile = tmp_path / "lab.toml"
    profile.write_text('network = "back"\n')
    assert len(planned(kernel, profile=profile, nets=NETS, subnet=None).slices) == 2
    profile.write_text('network = "front"\n[vm.vm0]\nnetwork = "back"\n')
    with pytest.raises(CtlError, match="network front: 3 VMs need an address and 1 are free: 2 missing"):
        planned(kernel, profile=profile, nets=NETS, subnet=None)
    with pytest.raises(CtlError, match="no network back, front, which the profile has for vm0, vm1"):
        planned(kernel, profile=profile, nets=(), subnet=None)
    with pytest.raises(CtlError, match="on record at the service, and none runs"):
        planned(kernel, profile=profile, nets=None, subnet=None)


def test_a_subnet_that_overlaps_a_network_gives_no_address_twice(kernel: Path, tmp_path: Path) -> None:
    profile = tmp_path / "lab.toml"
    profile.write_text('[vm."vm[13]"]\nnetwork = "back"\n')
    prepared = planned(kernel, profile=profile, nets=NETS, subnet="10.78.0.0/24")
    assert len(set(prepared.addresses.by_name.values())) == 4
    known = on_record(prepared)
    assert planned(kernel, profile=profile, nets=NETS, subnet="10.78.0.0/24", known=known).slices == prepared.slices
    # Who moves to another network has no address there, and is told so.
    profile.write_text('[vm."vm[13]"]\nnetwork = "front"\n')
    with pytest.raises(CtlError, match="network front: Addresses outside the subnet: vm1"):
        planned(kernel, profile=profile, nets=NETS, subnet="10.78.0.0/24", known=known)


def test_what_comes_on_record_is_in_units_that_do_not_depend_on_the_file(kernel: Path) -> None:
    gib = INFRA.replace("400 8192", "20 8").replace("100 1024", "5 1")
    one, other = planned(kernel), planned(kernel, gib)
    assert reserved(one) == reserved(other)
    assert one.capacities == other.capacities
    assert {vm.cpu for vm in reserved(one)} == {100}


def test_waves_meet_many_hosts_and_leave_nobody_out(kernel: Path) -> None:
    slices = planned(kernel).slices
    assert in_waves(slices, None) == [slices]
    waves = in_waves(slices, 2)
    assert [{host: [spec.name for spec in specs] for host, specs in wave.items()} for wave in waves] == [
        {"h0": ["vm0"], "h1": ["vm2"]},
        {"h0": ["vm1", "vm3"]},
    ]
    assert in_waves({}, 5) == in_waves({}, None) == []


def large() -> str:
    """512 hosts and 10,240 VMs, half of which have no place in the file."""
    nodes = "".join(f"h{n} 32 3200 262144\n" for n in range(512))
    vms = "".join(f"vm{n:05} 1 {50 + n % 7} {1024 + n % 3 * 512}\n" for n in range(10_240))
    mapping = "".join(" ".join([f"h{n}", *(f"vm{v:05}" for v in range(n, 5_120, 512))]) + "\n" for n in range(512))
    return f"#list of nodes\n{nodes}#list of VMs\n{vms}#initial configuration\n{mapping}#end of configuration\n"


@pytest.mark.parametrize("strategy", list(Strategy))
def test_ten_thousand_vms_on_512_hosts_are_planned_and_found_as_planned(kernel: Path, strategy: Strategy) -> None:
    infra, _ = parse_infra(large())
    status = fake.status(*(fake.host(n) for n in range(512)))
    options = SpawnOptions(deployment="lab", kernel=kernel, subnet="10.0.0.0/16", strategy=strategy)
    began = time.perf_counter()
    first = prepare(infra, options, status=status, known=None)
    print(f"{strategy}: planned in {time.perf_counter() - began:.2f} s")
    assert len({spec.ip for specs in first.slices.values() for spec in specs}) == 10_240
    known = on_record(first)
    again = prepare(infra, options, status=status, known=known)
    assert again.slices == first.slices
    assert changes(again, None, known).changes == ()
