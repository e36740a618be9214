"""What a host's settings should be at least, for a fleet of a size. Pure."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from agent.hypervisor import CALLS_IN_FLIGHT
from agent.tunables import TUNABLES

# The kernel's own (Linux, net/ipv4/arp.c, arp_tbl): below them there is nothing to gain.
_KERNEL_THRESHOLDS = (128, 512, 1024)
# What a distribution's services take of them, before any VM: half of the kernel's 128 and 8192, and as much to spare.
_INSTANCES, _WATCHES = 128, 8_192
# Each VM's disk, log and control group may be watched by whoever looks after it.
_WATCHES_OF_A_VM = 16
# The agent's connections to libvirt, and one from every other tool and from each migration that comes in.
_CONNECTIONS_OF_AN_AGENT = 3
_OTHER_CLIENTS = 61
#: Files of an agent: 32 children have two connections each, and every command that runs takes four.
AGENT_FILES = 1_024
# Of libvirt's daemon, for each VM: monitor, guest agent, log, console, control groups.
_FILES_OF_LIBVIRT, _FILES_OF_A_VM = 512, 8


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How large a fleet is: its hosts, all its VMs, and the most VMs on one host."""

    hosts: int
    vms: int
    vms_on_one: int


class Advice(NamedTuple):
    """The least that a setting should be, and why."""

    least: int
    why: str


def advice(size: Size, *, forward: bool) -> dict[str, Advice]:
    """For each setting of `TUNABLES` that matters, in its order. `forward`: hosts route VMs' packets."""
    neighbours = size.hosts + size.vms
    power = _power_of_two(neighbours)
    who = f"for {size.hosts} hosts and {size.vms} VMs, each a neighbour"
    here = f"for {size.vms_on_one} VMs on a host and its own services"
    found: dict[str, Advice] = {}
    for family in ("ipv4", "ipv6"):
        for number, usual in enumerate(_KERNEL_THRESHOLDS, 1):
            found[f"net.{family}.neigh.default.gc_thresh{number}"] = Advice(max(usual, number * power), who)
    found["fs.inotify.max_user_instances"] = Advice(_power_of_two(_INSTANCES + size.vms_on_one), here)
    found["fs.inotify.max_user_watches"] = Advice(_power_of_two(_WATCHES + _WATCHES_OF_A_VM * size.vms_on_one), here)
    if forward:
        found["net.ipv4.ip_forward"] = Advice(1, "for VMs whose gateway the host is")
    found["libvirt.max_clients"] = Advice(
        _CONNECTIONS_OF_AN_AGENT + _OTHER_CLIENTS, "for the agent, other tools, and migrations that come in"
    )
    found["libvirt.max_client_requests"] = Advice(
        CALLS_IN_FLIGHT + 1, f"for the agent's {CALLS_IN_FLIGHT} calls at a time and keepalive beside them"
    )
    return {key: found[key] for key in TUNABLES if key in found}


def libvirt_files(size: Size) -> int:
    """How many files libvirt's daemon should be able to have open."""
    return _power_of_two(_FILES_OF_LIBVIRT + _FILES_OF_A_VM * size.vms_on_one)


def _power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
