"""The addresses of VMs: which IP each VM of a deployment has, and the MAC that follows from it.

IPs come from a subnet, or from the output of `g5k-subnets -im` on Grid'5000, and go to VMs in the order of their
declaration. An address once given stays with its name until it is freed. Pure: the state (name to IP) goes in and
comes out.

The MAC is 00:16:3E, the OUI that Xensource registered for VMs, and the last three octets of the IP: so does
Grid'5000 (https://www.grid5000.fr/w/Subnet_reservation), where two users' VMs share a network.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError

import msgspec

from controller.text_problems import Problems, TextError, shown, some

#: Every Grid'5000 site is one network of this prefix; reserved subnets are ranges in it, not networks.
#: Source: https://www.grid5000.fr/w/Subnet_reservation
GRID5000_PREFIX = 14
#: The MAC holds three octets of the IP, so a network needs to agree on the first one.
SHORTEST_PREFIX = 8

_MAC = re.compile(r"00:16:3E((:[0-9A-F]{2}){3})", re.IGNORECASE)


class AddressError(Exception):
    """No addresses. `problems` holds one sentence for each cause."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(shown(self.problems)))


class SubnetsFileError(TextError):
    """All that is wrong with an output of g5k-subnets."""


def mac_of(ip: str) -> str:
    """00:16:3E and the last three octets of `ip`, in upper case as g5k-subnets prints it. AddressError if no IPv4."""
    return "00:16:3E:{:02X}:{:02X}:{:02X}".format(*_ipv4(ip).packed[1:])


def ip_of(mac: str, *, first_octet: int) -> str:
    """The IP whose `mac_of` is `mac`, in any case; the first octet is not in a MAC. AddressError if there is none."""
    found = _MAC.fullmatch(mac)
    if found is None:
        raise AddressError([f"{mac!r} is not a MAC of the form 00:16:3E:xx:xx:xx."])
    return str(IPv4Address(bytes([first_octet]) + bytes.fromhex(found[1].replace(":", ""))))


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """Where addresses come from, in order. `prefix` and `gateway` are what each VM is told of its network.

    `ranges` are inclusive, as integers. The first `skip` addresses and those in `exclude` are not given to VMs.
    Make one with `subnet_pool` or `grid5000_pool`.
    """

    ranges: tuple[tuple[int, int], ...]
    prefix: int
    gateway: str | None = None
    skip: int = 0
    exclude: frozenset[int] = frozenset()

    def __contains__(self, ip: int) -> bool:
        """Whether the address belongs to the pool, even if it is skipped or excluded."""
        return any(first <= ip <= last for first, last in self.ranges)

    def usable(self) -> Iterator[int]:
        skip = self.skip
        for first, last in self.ranges:
            yield from (ip for ip in range(first + skip, last + 1) if ip not in self.exclude)
            skip = max(0, skip - (last - first + 1))


def subnet_pool(cidr: str, *, skip: int = 0, exclude: Collection[str] = (), gateway: str | None = None) -> Pool:
    """The host addresses of an IPv4 network, without its network and broadcast address (RFC 3021: a /31 has neither).

    `skip` counts host addresses from the first. `exclude` are addresses that others have: hosts, other deployments;
    the gateway is excluded by itself, and has to be in the network. Raises AddressError.
    """
    problems: list[str] = []
    network = None
    try:
        address, slash, _ = cidr.partition("/")
        if not slash:
            raise NetmaskValueError
        network = IPv4Network(cidr, strict=False)
    except (AddressValueError, NetmaskValueError):
        problems.append(f"{cidr!r} is not an IPv4 network; write it like 198.18.0.0/22.")
    else:
        if str(network.network_address) != address:
            problems.append(f"{cidr} is an address in a network; did you mean {network}?")
        if network.prefixlen < SHORTEST_PREFIX:
            problems.append(f"{cidr} is too large: MACs hold 24 bits of an IP, so /{SHORTEST_PREFIX} is the most.")
    excluded = _excluded(exclude, gateway, network, skip, problems)
    if problems or network is None:
        raise AddressError(problems)
    # The ends of a /31 or /32 are hosts.
    ends = 0 if network.prefixlen > 30 else 1
    first, last = int(network.network_address) + ends, int(network.broadcast_address) - ends
    return Pool(ranges=((first, last),), prefix=network.prefixlen, gateway=gateway, skip=skip, exclude=excluded)


def grid5000_pool(
    text: str,
    *,
    file: str = "g5k-subnets",
    skip: int = 0,
    exclude: Collection[str] = (),
    gateway: str | None = None,
    prefix: int = GRID5000_PREFIX,
) -> Pool:
    """The addresses that `g5k-subnets -im` printed, in its order: lines of an IP, a tab and a MAC.

    `prefix` is that of the network that they are in. Raises SubnetsFileError for the text, and AddressError for the
    rest.
    """
    found = Problems(text, file)
    ips: list[int] = []
    seen: set[int] = set()
    following = 0
    for line in text.split("\n"):
        at, following = following, following + len(line) + 1
        tokens = line.split()
        if not tokens:
            continue
        try:
            ip = IPv4Address(tokens[0])
        except AddressValueError:
            found.add(at, 0, "an IPv4 address, as `g5k-subnets -im` prints them")
            continue
        if len(tokens) != 2:
            found.add(at, min(len(tokens) - 1, 2), "an IP and its MAC on each line, as `g5k-subnets -im` prints them")
        elif tokens[1].upper() != mac_of(str(ip)):
            found.add(at, 1, f"{mac_of(str(ip))}, which goes with {ip}")
        # The MAC's part of the IP, so that no two VMs can have one MAC.
        elif int(ip) & 0xFFFFFF in seen:
            found.add(at, 0, "an address that is not in the file yet")
        else:
            seen.add(int(ip) & 0xFFFFFF)
            ips.append(int(ip))
    if not ips and not found.total:
        found.add(0, -1, "lines of an IP and a MAC, as `g5k-subnets -im` prints them")
    if found.total:
        raise SubnetsFileError(found.located(), found.notices(), found.total)
    problems: list[str] = []
    network = IPv4Network((ips[0], prefix), strict=False)
    outside = [str(IPv4Address(ip)) for ip in ips if IPv4Address(ip) not in network]
    if outside:
        problems.append(f"{some(outside)}: outside {network}, the network of the first address in {file}.")
    excluded = _excluded(exclude, gateway, network, skip, problems)
    if problems:
        raise AddressError(problems)
    return Pool(ranges=_ranges(ips), prefix=prefix, gateway=gateway, skip=skip, exclude=excluded)


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM is told of the network that it is in."""

    prefix: int
    gateway: str | None = None


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """IPs of a deployment, by VM name. `by_name` is in the order of declaration. `prefix` and `gateway` are of the
    network that all are in but those in `segments`.

    `others` belong to names that were not asked for: such VMs may still exist, so their addresses are not free.
    `new` are the names that had none before. What is to be remembered is `by_name` and `others` together.
    """

    by_name: dict[str, str]
    prefix: int = 0
    gateway: str | None = None
    segments: dict[str, Segment] = {}
    new: tuple[str, ...] = ()
    others: dict[str, str] = {}

    def segment(self, name: str) -> Segment:
        """The network of a VM."""
        return self.segments.get(name) or Segment(prefix=self.prefix, gateway=self.gateway)


def assign(names: Sequence[str], pool: Pool, existing: Mapping[str, str] | None = None) -> Addresses:
    """An IP for each name: the one in `existing` if it has one, else the first of the pool that nobody has.

    Raises AddressError with all causes: too few addresses and how many are missing, and existing ones that are not
    in the pool, excluded, or given twice.
    """
    existing = existing or {}
    problems: list[str] = []
    holders: dict[int, str] = {}
    outside, excluded = [], []
    for name, text in existing.items():
        try:
            ip = int(IPv4Address(text))
        except AddressValueError:
            problems.append(f"{name} has {text!r}, which is not an IPv4 address; free it first.")
            continue
        if ip in holders:
            problems.append(f"{name} has {text}, which {holders[ip]} has too; free one of them first.")
        elif ip not in pool:
            outside.append(f"{name} ({text})")
        elif ip in pool.exclude:
            excluded.append(f"{name} ({text})")
        holders.setdefault(ip, name)
    if outside:
        problems.append(f"Addresses outside the subnet: {some(outside)}; use the old subnet, or free them first.")
    if excluded:
        problems.append(f"Addresses that others have by now: {some(excluded)}; free them first.")

    asked = dict.fromkeys(names)
    new = [name for name in asked if name not in existing]
    free = (ip for ip in pool.usable() if ip not in holders)
    given = {name: str(IPv4Address(ip)) for name, ip in zip(new, free, strict=False)}
    if len(given) < len(new):
        problems.append(
            f"{len(new)} VMs need an address and {len(given)} are free: {len(new) - len(given)} missing; "
            "use a larger subnet."
        )
    if problems:
        raise AddressError(problems)
    return Addresses(
        by_name={name: existing.get(name) or given[name] for name in asked},
        prefix=pool.prefix,
        gateway=pool.gateway,
        new=tuple(new),
        others={name: ip for name, ip in existing.items() if name not in asked},
    )


def _ipv4(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except AddressValueError:
        raise AddressError([f"{text!r} is not an IPv4 address."]) from None


def _excluded(
    exclude: Collection[str],
    gateway: str | None,
    network: IPv4Network | None,
    skip: int,
    problems: list[str],
) -> frozenset[int]:
    excluded = set()
    # Sorted, since a set's order changes from run to run and messages shall not.
    for text in sorted({*exclude} if gateway is None else {*exclude, gateway}):
        try:
            excluded.add(int(IPv4Address(text)))
        except AddressValueError:
            what = "The gateway" if text == gateway else "The excluded address"
            problems.append(f"{what} {text!r} is not an IPv4 address.")
            continue
        if text == gateway and network is not None and IPv4Address(text) not in network:
            problems.append(f"The gateway {gateway} is outside {network}, so no VM could reach it.")
    if skip < 0:
        problems.append(f"--skip-ips {skip} is below 0.")
    return frozenset(excluded)


def _ranges(ips: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """`ips` in their order, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for ip in ips:
        if ranges and ip == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], ip)
        else:
            ranges.append((ip, ip))
    return tuple(ranges)
