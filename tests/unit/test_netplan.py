"""What ip(8) and bridge(8) are told: of each VM elsewhere once, of nobody else, and nothing where all is well."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.netplan import Have, joining, making, problems
from controller import api
from controller.nets import NetRecord, _checked, nets_of
from controller.on_record import Vm
from controller.status import CtlError
from protocol.commands import SetNets
from protocol.nets import Net, Port, bridge_of, tunnel_of

HOSTS = ("198.18.0.1", "198.18.0.2", "198.18.0.3")


def a_port(number: int, host: int) -> Port:
    return Port(f"00:16:3e:4d:00:{number:02x}", f"10.77.0.{number}", host)


def a_net(*ports: Port, gateway: str | None = None, hosts: tuple[str, ...] = HOSTS) -> Net:
    return Net(name="red", vni=0x100000, gateway=gateway, prefix=24, hosts=hosts, ports=ports)


def apply(have: Have, lines: list[str], entries: list[str]) -> Have:
    """What the kernel makes of lines."""
    remote, bridged, neighbours = dict(have.remote), set(have.bridged), dict(have.neighbours)
    for line in entries:
        words = line.split()
        match words[1], words[-1] if words[-1] != "static" else words[-2]:
            case "replace", "self":
                remote[words[2]] = words[words.index("dst") + 1]
            case "replace", "master":
                bridged.add(words[2])
            case "del", "self":
                del remote[words[2]]
            case "del", "master":
                bridged.remove(words[2])
            case other:
                raise AssertionError(other)
    for line in lines:
        words = line.split()
        if words[1] == "replace":
            neighbours[words[2]] = words[4]
        else:
            del neighbours[words[2]]
    return Have(remote, frozenset(bridged), neighbours)


_PLACES = st.dictionaries(st.integers(2, 40), st.integers(0, 2))


@settings(derandomize=True, deadline=None)
@given(_PLACES, _PLACES, st.sampled_from(HOSTS))
def test_from_any_state_to_any_other_each_vm_elsewhere_is_known_and_doing_it_twice_does_nothing(
    before: dict[int, int], after: dict[int, int], address: str
) -> None:
    have = Have()
    for places in (before, after):
        net = a_net(*(a_port(number, host) for number, host in places.items()))
        have = apply(have, *joining(net, address, have))
        away = [port for port in net.ports if HOSTS[port.host] != address]
        assert have.remote == {port.mac: HOSTS[port.host] for port in away}
        assert have.bridged == {port.mac for port in away}
        assert have.neighbours == {port.ip: port.mac for port in away}
        assert joining(net, address, have) == ([], [])


def test_nobody_is_sent_what_is_for_everybody() -> None:
    lines, entries = joining(a_net(a_port(2, 0), a_port(3, 1)), HOSTS[0], Have())
    assert not any("00:00:00:00:00:00" in line or "ff:ff" in line for line in (*lines, *entries))
    assert all("nolearning" in line for line in making(a_net(), HOSTS[0], 1500, "a") if "vxlan" in line)


def test_hosts_have_an_address_in_a_network_that_is_not_isolated_alone() -> None:
    assert not any("address add" in line for line in making(a_net(), HOSTS[0], 1500, "a"))
    made = making(a_net(gateway="10.77.0.1"), HOSTS[0], 1500, "a")
    assert "address add 10.77.0.1/24 dev cn-red" in made
    assert all("mtu 1450" in line for line in made if line.startswith("link add"))


def test_two_networks_of_one_number_and_a_vm_on_no_host_are_refused() -> None:
    other = msgspec.structs.replace(a_net(), name="blue")
    assert problems([a_net(), other]) == ["blue and red have one number, 1048576"]
    assert problems([a_net(a_port(2, 9))]) == ["red has a VM on a host that it does not name"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", name) for name in ("", "Red", "a b", "x" * 13, "-a", "a\n", "../a", "a;reboot")),
        *(("vni", vni) for vni in (0, 1 << 24)),
        ("gateway", "10.0.0.1 dev eth0"),
        ("hosts", ["10.0.0.1\nlink del eth0"]),
        ("ports", [["00:16:3e:00:00:01 dev eth0", "10.0.0.1", 0]]),
        ("ports", [["00:16:3e:00:00:01", "10.0.0.1", -1]]),
    ],
)
def test_nothing_gets_to_ip_that_is_no_name_address_or_number(field: str, value: object) -> None:
    body = msgspec.to_builtins(SetNets(version=1, nets=(a_net(a_port(2, 0)),)))
    body["nets"][0][field] = value
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(body, SetNets)


def test_names_of_interfaces_fit() -> None:
    assert max(len(bridge_of("x" * 12)), len(tunnel_of("x" * 12))) == 15


def a_vm(name: str, host: str, ip: str) -> Vm:
    mac = "00:16:3e" + "".join(f":{int(part):02x}" for part in ip.split(".")[1:])
    return Vm(deployment="lab", name=name, host=host, ip=ip, mac=mac, vcpus=1, memory_mib=64)


def test_a_vm_is_in_the_network_that_has_its_address() -> None:
    records = [
        NetRecord(name=name, vni=vni, subnet=f"10.7{vni}.0.0/24", isolated=True)
        for name, vni in (("red", 7), ("blue", 8))
    ]
    vms = [
        a_vm("r1", "h1", "10.77.0.2"),
        a_vm("b1", "h1", "10.78.0.2"),
        a_vm("r2", "h2", "10.77.0.3"),
        a_vm("x", "h1", "10.9.0.1"),
    ]
    red, blue = nets_of(records, vms, {"h1": HOSTS[0], "h2": HOSTS[1]})
    assert [(port.ip, red.hosts[port.host]) for port in red.ports] == [("10.77.0.2", HOSTS[0]), ("10.77.0.3", HOSTS[1])]
    assert [(port.ip, blue.hosts[port.host]) for port in blue.ports] == [("10.78.0.2", HOSTS[0])]


def test_all_that_is_wrong_with_a_network_is_said_at_once() -> None:
    there = NetRecord(name="red", vni=0x100000, subnet="10.77.0.0/16", isolated=True)
    with pytest.raises(CtlError, match=r"no name of a network.*overlaps with 10.77.0.0/16 of red"):
        _checked(api.CreateNet(name="Blue", subnet="10.77.3.0/24", isolated=True), [there])
    with pytest.raises(CtlError, match="already"):
        _checked(api.CreateNet(name="red", subnet="10.77.0.0/16", isolated=False), [there])
    assert _checked(api.CreateNet(name="red", subnet="10.77.0.0/16", isolated=True), [there]) == there
    assert _checked(api.CreateNet(name="blue", subnet="10.78.0.0/16", isolated=False), [there]).vni == 0x100001
