"""What makes a host's networks what they are to be, as lines for ip(8) and bridge(8). Pure.

Sources: ip-link(8), bridge(8), and Linux, Documentation/networking/vxlan.rst. The bridge answers ARP for VMs elsewhere
from its own neighbour entries (neigh_suppress), the tunnel knows for each MAC the one host to send to, and has no entry
for all others: what is broadcast stays on its host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from protocol.nets import Net, bridge_of, tunnel_of

#: What VXLAN over IPv4 adds to a frame: 20 bytes of IP, 8 of UDP, 8 of VXLAN, 14 of Ethernet (RFC 7348, section 5).
OVERHEAD = 50
#: IANA's port for VXLAN; Linux has another by default for reasons of age.
_PORT = 4789


@dataclass(frozen=True)
class Have:
    """What a tunnel and its bridge have now. MACs are in lower case."""

    #: MAC to the host that the tunnel sends to.
    remote: Mapping[str, str] = field(default_factory=dict)
    #: MACs that the bridge has on the tunnel for good.
    bridged: frozenset[str] = frozenset()
    #: Address to MAC, as the bridge answers ARP.
    neighbours: Mapping[str, str] = field(default_factory=dict)


def making(net: Net, address: str, mtu: int, alias: str) -> list[str]:
    """Lines for `ip -batch` that make a network's interfaces. `address` and `mtu` are those of the host's link."""
    bridge, tunnel, inner = bridge_of(net.name), tunnel_of(net.name), mtu - OVERHEAD
    # One address of the gateway on all hosts: a VM that moves finds it where it comes.
    mac = "02:16:3e:" + ":".join(f"{octet:02x}" for octet in net.vni.to_bytes(3, "big"))
    lines = [
        f"link add {bridge} address {mac} mtu {inner} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"link set dev {bridge} alias {alias}",
        f"link add {tunnel} mtu {inner} type vxlan id {net.vni} local {address} dstport {_PORT} nolearning",
        f"link set dev {tunnel} alias {alias}",
        f"link set dev {tunnel} master {bridge}",
        f"link set dev {tunnel} type bridge_slave learning off neigh_suppress on",
    ]
    if net.gateway is not None:
        lines.append(f"address add {net.gateway}/{net.prefix} dev {bridge}")
    return [*lines, f"link set dev {tunnel} up", f"link set dev {bridge} up"]


def joining(net: Net, address: str, have: Have) -> tuple[list[str], list[str]]:
    """Lines for `ip -batch` and for `bridge -batch` that tell this host where the network's VMs are."""
    bridge, tunnel = bridge_of(net.name), tunnel_of(net.name)
    away = [port for port in net.ports if net.hosts[port.host] != address]
    remote = {port.mac.lower(): net.hosts[port.host] for port in away}
    neighbours = {port.ip: port.mac.lower() for port in away}
    entries: list[str] = []
    for mac in sorted(have.remote.keys() - remote.keys()):
        entries.append(f"fdb del {mac} dev {tunnel} self")
    for mac in sorted(have.bridged - remote.keys()):
        entries.append(f"fdb del {mac} dev {tunnel} master")
    for mac, host in sorted(remote.items()):
        if have.remote.get(mac) != host:
            entries.append(f"fdb replace {mac} dev {tunnel} dst {host} self static")
        if mac not in have.bridged:
            entries.append(f"fdb replace {mac} dev {tunnel} master static")
    lines = [f"neigh del {ip} dev {bridge}" for ip in sorted(have.neighbours.keys() - neighbours.keys())]
    lines += [
        f"neigh replace {ip} lladdr {mac} dev {bridge} nud permanent"
        for ip, mac in sorted(neighbours.items())
        if have.neighbours.get(ip) != mac
    ]
    return lines, entries


def problems(nets: Iterable[Net]) -> list[str]:
    """What is wrong with a request, beyond what its types say."""
    found = []
    seen: dict[int, str] = {}
    for net in nets:
        other = seen.setdefault(net.vni, net.name)
        if other != net.name:
            found.append(f"{net.name} and {other} have one number, {net.vni}")
        if any(port.host >= len(net.hosts) for port in net.ports):
            found.append(f"{net.name} has a VM on a host that it does not name")
    return found
