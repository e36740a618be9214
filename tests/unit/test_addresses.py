"""Addresses: given in order, kept, never given twice; MACs follow from them and back."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.addresses import (
    AddressError,
    Addresses,
    Pool,
    SubnetsFileError,
    assign,
    grid5000_pool,
    ip_of,
    mac_of,
    subnet_pool,
)


def all_of(pool: Pool) -> list[str]:
    return [str(IPv4Address(ip)) for ip in pool.usable()]


def problems_of(cidr: str, **options: object) -> tuple[str, ...]:
    with pytest.raises(AddressError) as caught:
        subnet_pool(cidr, **options)  # type: ignore[arg-type]
    return caught.value.problems


@pytest.mark.parametrize(
    ("ip", "mac"),
    [
        ("10.158.0.1", "00:16:3E:9E:00:01"),
        ("198.18.255.254", "00:16:3E:12:FF:FE"),
        ("0.0.0.0", "00:16:3E:00:00:00"),
        ("255.255.255.255", "00:16:3E:FF:FF:FF"),
    ],
)
def test_a_mac_is_the_oui_and_the_last_three_octets(ip: str, mac: str) -> None:
    assert mac_of(ip) == mac
    first = int(ip.partition(".")[0])
    assert ip_of(mac, first_octet=first) == ip
    assert ip_of(mac.lower(), first_octet=first) == ip


@settings(deadline=None, derandomize=True)
@given(st.ip_addresses(v=4))
def test_mac_and_ip_are_each_others_inverse(ip: IPv4Address) -> None:
    mac = mac_of(str(ip))
    assert ip_of(mac, first_octet=ip.packed[0]) == str(ip)
    assert mac_of(ip_of(mac, first_octet=0)) == mac


@pytest.mark.parametrize(
    "mac",
    [
        *("", "52:54:00:12:34:56", "00:16:3E:12:34", "00:16:3E:12:34:56:78"),
        *("00-16-3E-12-34-56", "00:16:3E:1:2:3", "00:16:3E:00:00:0G"),
    ],
)
def test_another_mac_has_no_ip(mac: str) -> None:
    with pytest.raises(AddressError, match="is not a MAC of the form 00:16:3E:xx:xx:xx"):
        ip_of(mac, first_octet=10)


@pytest.mark.parametrize("ip", ["", "10.0.0", "10.0.0.256", "10.0.0.1/24", "::1", "10.0.0.01"])
def test_what_is_no_ipv4_address_has_no_mac(ip: str) -> None:
    with pytest.raises(AddressError, match="is not an IPv4 address"):
        mac_of(ip)


def test_a_subnet_gives_its_host_addresses_in_order_without_network_and_broadcast() -> None:
    pool = subnet_pool("198.18.0.0/29")
    assert all_of(pool) == [f"198.18.0.{n}" for n in range(1, 7)]
    assert (pool.prefix, pool.gateway) == (29, None)


@pytest.mark.parametrize(
    ("cidr", "hosts"),
    [
        ("198.18.0.0/30", ["198.18.0.1", "198.18.0.2"]),
        ("198.18.0.0/31", ["198.18.0.0", "198.18.0.1"]),
        ("198.18.0.7/32", ["198.18.0.7"]),
    ],
)
def test_the_smallest_subnets_have_what_rfc_3021_says(cidr: str, hosts: list[str]) -> None:
    assert all_of(subnet_pool(cidr)) == hosts


def test_gateway_excluded_and_skipped_addresses_are_not_given() -> None:
    pool = subnet_pool("198.18.0.0/28", skip=3, exclude={"198.18.0.5", "198.18.0.1"}, gateway="198.18.0.14")
    assert all_of(pool) == [f"198.18.0.{n}" for n in (4, 6, 7, 8, 9, 10, 11, 12, 13)]
    assert pool.gateway == "198.18.0.14"
    # What is skipped is counted from the first host address, whoever has it.
    assert all_of(subnet_pool("198.18.0.0/29", skip=2, gateway="198.18.0.1"))[0] == "198.18.0.3"
    assert all_of(subnet_pool("198.18.0.0/29", skip=6)) == []
    assert all_of(subnet_pool("198.18.0.0/29", skip=60)) == []


@pytest.mark.parametrize(
    ("cidr", "said"),
    [
        ("198.18.0.0", "'198.18.0.0' is not an IPv4 network; write it like 198.18.0.0/22."),
        ("", "'' is not an IPv4 network; write it like 198.18.0.0/22."),
        ("198.18.0.0/33", "'198.18.0.0/33' is not an IPv4 network; write it like 198.18.0.0/22."),
        ("2001:db8::/64", "'2001:db8::/64' is not an IPv4 network; write it like 198.18.0.0/22."),
        ("198.18.0.5/24", "198.18.0.5/24 is an address in a network; did you mean 198.18.0.0/24?"),
        ("0.0.0.0/7", "0.0.0.0/7 is too large: MACs hold 24 bits of an IP, so /8 is the most."),
    ],
)
def test_what_is_no_usable_subnet_is_refused(cidr: str, said: str) -> None:
    assert problems_of(cidr) == (said,)


def test_all_that_is_wrong_with_a_subnet_comes_at_once_in_a_stable_order() -> None:
    assert problems_of("198.18.0.9/24", skip=-1, exclude={"y", "x"}, gateway="198.18.1.1") == (
        "198.18.0.9/24 is an address in a network; did you mean 198.18.0.0/24?",
        "The gateway 198.18.1.1 is outside 198.18.0.0/24, so no VM could reach it.",
        "The excluded address 'x' is not an IPv4 address.",
        "The excluded address 'y' is not an IPv4 address.",
        "--skip-ips -1 is below 0.",
    )
    assert problems_of("198.18.0.0/24", gateway="here") == ("The gateway 'here' is not an IPv4 address.",)


def test_an_excluded_address_outside_the_subnet_is_no_matter() -> None:
    assert all_of(subnet_pool("198.18.0.0/30", exclude=["10.0.0.1"])) == ["198.18.0.1", "198.18.0.2"]


def test_a_large_subnet_costs_no_more_than_what_is_taken_of_it() -> None:
    assert assign(["v"], subnet_pool("10.0.0.0/8", skip=1 << 20)).by_name == {"v": "10.16.0.1"}


SUBNETS = "10.158.0.1\t00:16:3E:9E:00:01\n10.158.0.2\t00:16:3E:9E:00:02\n10.158.4.255\t00:16:3E:9E:04:FF\n"


@pytest.mark.parametrize(
    "text", [SUBNETS, SUBNETS.rstrip(), SUBNETS.replace("\n", "\r\n"), "\n" + SUBNETS, SUBNETS.lower()]
)
def test_the_output_of_g5k_subnets_gives_its_addresses_in_its_order(text: str) -> None:
    pool = grid5000_pool(text)
    assert all_of(pool) == ["10.158.0.1", "10.158.0.2", "10.158.4.255"]
    assert pool.prefix == 14
    # Skipping goes on over the gaps between reserved ranges.
    assert all_of(grid5000_pool(text, skip=2)) == ["10.158.4.255"]
    assert all_of(grid5000_pool(text, skip=3)) == []
    assert all_of(grid5000_pool(text, exclude=["10.158.0.2"])) == ["10.158.0.1", "10.158.4.255"]
    assert grid5000_pool(text, gateway="10.159.255.254", prefix=14).gateway == "10.159.255.254"


def test_neighbours_in_the_output_of_g5k_subnets_are_all_in_the_pool() -> None:
    ips = [f"10.158.0.{n}" for n in (4, 5, 6, 7, 3, 9)]
    pool = grid5000_pool("".join(f"{ip} {mac_of(ip)}\n" for ip in ips))
    assert all_of(pool) == ips
    assert len(pool.ranges) == 3
    assert [n for n in range(12) if int(IPv4Address(f"10.158.0.{n}")) in pool] == [3, 4, 5, 6, 7, 9]


def test_what_is_wrong_with_the_output_of_g5k_subnets_is_said_at_its_column() -> None:
    text = (
        "10.158.0.1\t00:16:3E:9E:00:01\n"
        "hello\n"
        "10.158.0.2\n"
        "10.158.0.3\t00:16:3E:9E:00:04\n"
        "10.158.0.5\t00:16:3E:9E:00:05\tmore\n"
        "  10.158.0.1\t00:16:3E:9E:00:01\n"
        "11.158.0.1\t00:16:3E:9E:00:01\n"
    )
    with pytest.raises(SubnetsFileError) as caught:
        grid5000_pool(text, file="ips")
    assert [(problem.line, problem.column, problem.token) for problem in caught.value.problems] == [
        (2, 1, "hello"),
        (3, 1, "10.158.0.2"),
        (4, 12, "00:16:3E:9E:00:04"),
        (5, 30, "more"),
        (6, 3, "10.158.0.1"),
        (7, 1, "11.158.0.1"),
    ]
    assert str(caught.value).splitlines()[2] == (
        "ips:4:12: '00:16:3E:9E:00:04': expected 00:16:3E:9E:00:03, which goes with 10.158.0.3"
    )
    with pytest.raises(SubnetsFileError, match=r"^g5k-subnets:1:1: expected lines of an IP and a MAC"):
        grid5000_pool("\n")


def test_addresses_of_two_networks_are_no_pool() -> None:
    text = "".join(f"{ip}\t{mac_of(ip)}\n" for ip in ("10.158.0.1", "10.160.0.1", "10.170.0.1"))
    with pytest.raises(AddressError) as caught:
        grid5000_pool(text, gateway="10.160.0.9")
    assert caught.value.problems == (
        "10.160.0.1, 10.170.0.1: outside 10.156.0.0/14, the network of the first address in g5k-subnets.",
        "The gateway 10.160.0.9 is outside 10.156.0.0/14, so no VM could reach it.",
    )


POOL = subnet_pool("198.18.0.0/29", gateway="198.18.0.1")


def test_names_get_addresses_in_the_order_of_their_declaration() -> None:
    addresses = assign(["b", "a", "c"], POOL)
    assert list(addresses.by_name.items()) == [("b", "198.18.0.2"), ("a", "198.18.0.3"), ("c", "198.18.0.4")]
    assert addresses.new == ("b", "a", "c")
    assert (addresses.prefix, addresses.gateway, addresses.others) == (29, "198.18.0.1", {})


def test_a_rerun_keeps_every_address_whatever_the_order_and_whoever_joins() -> None:
    first = assign(["b", "a"], POOL)
    assert assign(["b", "a"], POOL, first.by_name) == Addresses(by_name=first.by_name, prefix=29, gateway="198.18.0.1")
    again = assign(["new", "a", "b"], POOL, first.by_name)
    assert again.by_name == {"new": "198.18.0.4", "a": "198.18.0.3", "b": "198.18.0.2"}
    assert again.new == ("new",)


def test_a_name_that_is_no_longer_asked_for_still_holds_its_address_until_it_is_freed() -> None:
    existing = assign(["a", "b"], POOL).by_name
    without = assign(["b", "c"], POOL, existing)
    assert without.by_name == {"b": "198.18.0.3", "c": "198.18.0.4"}
    assert without.others == {"a": "198.18.0.2"}
    left = {name: ip for name, ip in {**without.others, **without.by_name}.items() if name != "a"}
    assert left == {"b": "198.18.0.3", "c": "198.18.0.4"}
    assert assign(["b", "c", "d"], POOL, left).by_name["d"] == "198.18.0.2"


def test_the_first_and_the_last_address_of_a_subnet_can_be_kept() -> None:
    existing = {"a": "198.18.0.1", "b": "198.18.0.6"}
    assert assign(["a", "b"], subnet_pool("198.18.0.0/29"), existing).by_name == existing


def test_skipping_other_addresses_on_a_rerun_moves_nobody() -> None:
    existing = assign(["a"], POOL).by_name
    assert assign(["a", "b"], subnet_pool("198.18.0.0/29", skip=4), existing).by_name == {
        "a": "198.18.0.2",
        "b": "198.18.0.5",
    }


def test_too_few_addresses_are_an_error_that_says_how_many_are_missing() -> None:
    with pytest.raises(AddressError) as caught:
        assign([f"v{n}" for n in range(8)], POOL, {"v0": "198.18.0.3"})
    assert caught.value.problems == ("7 VMs need an address and 4 are free: 3 missing; use a larger subnet.",)


def test_existing_addresses_that_can_not_stay_are_all_named() -> None:
    existing = {"a": "198.18.0.2", "b": "198.18.0.2", "c": "10.0.0.1", "d": "198.18.0.0", "e": "198.18.0.1", "f": "x"}
    with pytest.raises(AddressError) as caught:
        assign(["a", "g"], POOL, existing)
    assert caught.value.problems == (
        "b has 198.18.0.2, which a has too; free one of them first.",
        "f has 'x', which is not an IPv4 address; free it first.",
        "Addresses outside the subnet: c (10.0.0.1), d (198.18.0.0); use the old subnet, or free them first.",
        "Addresses that others have by now: e (198.18.0.1); free them first.",
    )


def test_a_name_asked_for_twice_has_one_address() -> None:
    assert assign(["a", "b", "a"], POOL).by_name == {"a": "198.18.0.2", "b": "198.18.0.3"}


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_no_address_is_given_twice_or_from_outside_and_none_changes(data: st.DataObject) -> None:
    prefix = data.draw(st.integers(24, 32))
    network = IPv4Network((int(IPv4Address("198.18.5.0")), prefix))
    inside = st.integers(int(network.network_address), int(network.broadcast_address)).map(
        lambda ip: str(IPv4Address(ip))
    )
    pool = subnet_pool(
        str(network),
        skip=data.draw(st.integers(0, 5)),
        exclude=data.draw(st.sets(inside, max_size=5)),
        gateway=data.draw(st.none() | inside),
    )
    names = st.lists(st.sampled_from("abcdefghijklm"), unique=True)
    state: dict[str, str] = {}
    for _ in range(data.draw(st.integers(1, 5))):
        wanted = data.draw(names)
        try:
            addresses = assign(wanted, pool, state)
        except AddressError:
            assert len([name for name in wanted if name not in state]) > len(set(all_of(pool)) - set(state.values()))
            continue
        assert list(addresses.by_name) == wanted
        now = {**addresses.others, **addresses.by_name}
        assert state.items() <= now.items()
        assert len(set(now.values())) == len(now)
        assert len({mac_of(ip) for ip in now.values()}) == len(now)
        assert set(now.values()) <= set(all_of(pool)) <= {str(ip) for ip in network.hosts()}
        gone = set(data.draw(names))
        state = {name: ip for name, ip in now.items() if name not in gone}


def test_ten_thousand_vms_have_ten_thousand_addresses() -> None:
    pool = subnet_pool("10.0.0.0/18", exclude=[f"10.0.1.{n}" for n in range(256)], gateway="10.0.0.1")
    addresses = assign([f"v{n}" for n in range(10_240)], pool)
    assert len(set(addresses.by_name.values())) == 10_240
    # 254 of the first 256 addresses, since network and gateway are not given; the next 256 are excluded.
    assert (addresses.by_name["v253"], addresses.by_name["v254"]) == ("10.0.0.255", "10.0.2.0")
    assert assign([*addresses.by_name], pool, addresses.by_name).by_name == addresses.by_name
