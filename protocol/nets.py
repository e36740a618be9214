"""Networks of VMs across hosts: what the root tells every host of them. Pure data.

A network is a bridge on each host, joined by VXLAN (RFC 7348). Nothing is learnt and nothing flooded between hosts:
each knows where every VM is, so that many thousand VMs make no broadcast storm.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from protocol.limits import MAX_RANK
from protocol.vms import Ipv4, Mac

#: It is part of the names of interfaces, of which Linux takes 15 bytes (netdevice(7)).
NET_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?\Z"
#: Bridge and tunnel of a network are these and its name.
BRIDGE_PREFIX, TUNNEL_PREFIX = "cn-", "cx-"
NetName = Annotated[str, msgspec.Meta(pattern=NET_PATTERN)]


class Port(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A VM in a network. `host` is the index of its host in `Net.hosts`."""

    mac: Mac
    ip: Ipv4
    host: Annotated[int, msgspec.Meta(ge=0, le=MAX_RANK)]


class Net(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One network. `vni` is its number in VXLAN, `gateway` the address that each host has in it, None where it is
    isolated: hosts have none then. `hosts` are the addresses of the hosts that have VMs in it."""

    name: NetName
    vni: Annotated[int, msgspec.Meta(ge=1, lt=1 << 24)]
    gateway: Ipv4 | None
    prefix: Annotated[int, msgspec.Meta(ge=8, le=30)]
    hosts: Annotated[tuple[Ipv4, ...], msgspec.Meta(max_length=MAX_RANK + 1)] = ()
    ports: tuple[Port, ...] = ()


def bridge_of(name: str) -> str:
    """The bridge that VMs of a network are on."""
    return BRIDGE_PREFIX + name


def tunnel_of(name: str) -> str:
    """The VXLAN interface that joins a network's bridges."""
    return TUNNEL_PREFIX + name
