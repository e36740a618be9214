"""The fleet's segment: a bridge in a namespace of its own, a link to each host and one to the service node.

The bridge does not live in the machine's own network namespace, so that its packet filter has no say, and so that the
kernel removes every link when the namespace goes, however the supervisor ends. Link speeds are shaped with tc-tbf(8).
"""

from __future__ import annotations

import os
import subprocess
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from .model import SYSTEM_PATH, HostSpec, TestHostsError

_BRIDGE = "segment"
_ENVIRONMENT = {"PATH": SYSTEM_PATH}

# Entries of the neighbour table, which all namespaces share: below the first none is collected, the third is the most
# that there can be. A tree over a thousand hosts, each known to many others, stays under the first.
_NEIGHBOUR_LIMITS = {"gc_thresh1": 16384, "gc_thresh2": 65536, "gc_thresh3": 131072}
# Python's and libvirt's event loops hold an inotify instance or two each; 128 is the kernel's default for a user.
_INOTIFY_INSTANCES = 8192


def service_address(subnet: IPv4Network) -> IPv4Address:
    return subnet.network_address + 1


def host_address(subnet: IPv4Network, index: int) -> IPv4Address:
    """The address of the host of that index, from 0. The service node has the one before the first."""
    address = subnet.network_address + 2 + index
    if address >= subnet.network_address + subnet.num_addresses // 2:
        raise TestHostsError(f"a fleet has room for {subnet.num_addresses // 2 - 2} hosts: make two fleets")
    return address


def mac_of(address: IPv4Address) -> str:
    """A locally administered MAC (02:…) fixed by the address, so that a rebooted host is found at once."""
    return "02:54:" + ":".join(f"{octet:02x}" for octet in address.packed)


def _run(command: list[str], lines: list[str], descriptors: tuple[int, ...] = ()) -> None:
    text = "".join(line + "\n" for line in lines)
    done = subprocess.run(
        command,
        input=text,
        text=True,
        check=False,
        capture_output=True,
        env=_ENVIRONMENT,
        pass_fds=descriptors,
    )
    if done.returncode != 0:
        raise TestHostsError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def ip(lines: list[str]) -> None:
    """Run lines of ip(8) in this process's network namespace, all in one process."""
    if lines:
        _run(["ip", "-batch", "-"], lines)


def shaping(interface: str, rate_mbit: float) -> str:
    """The tc(8) line that limits what leaves through an interface.

    The burst holds two of the largest segments that the kernel hands down at once (64 KiB); the latency bounds
    what may wait, about the buffer of a switch port.
    """
    return f"qdisc replace dev {interface} root tbf rate {rate_mbit:g}mbit burst 128kb latency 100ms"


def without_ipv6() -> None:
    """No IPv6 on links made from here on (lo keeps ::1): each host's announcements would go to all others."""
    _write_setting(Path("/proc/sys/net/ipv6/conf/default/disable_ipv6"), 1)


def build_segment(machine_namespace: int, link: str, subnet: IPv4Network) -> None:
    """Make the bridge in this process's (new) namespace, and the service node's link in the machine's own."""
    without_ipv6()
    path = f"/proc/{os.getpid()}/fd/{machine_namespace}"
    ip(
        [
            "link set lo up",
            # Snooping would flood and track multicast on hundreds of ports that have none to speak of.
            f"link add {_BRIDGE} type bridge stp_state 0 mcast_snooping 0",
            f"link set {_BRIDGE} up",
            f"link add service type veth peer name {link} address {mac_of(service_address(subnet))} netns {path}",
            f"link set service master {_BRIDGE} up",
        ]
    )
    address = IPv4Interface((service_address(subnet), subnet.prefixlen))
    in_machine = ["nsenter", f"--net=/proc/self/fd/{machine_namespace}"]
    lines = [f"address add {address} dev {link}", f"link set {link} up"]
    _run([*in_machine, "ip", "-batch", "-"], lines, (machine_namespace,))


def port(index: int) -> str:
    return f"host{index}"


def plug_in(hosts: list[tuple[int, int, str, HostSpec]]) -> None:
    """Give each (index, pid of its init, MAC, wishes) a link ``eth0`` to the bridge, shaped on this side."""
    ip(
        [
            line
            for index, pid, mac, _ in hosts
            for line in (
                f"link add {port(index)} type veth peer name eth0 address {mac} netns {pid}",
                f"link set {port(index)} master {_BRIDGE} up",
            )
        ]
    )
    shaped = [shaping(port(index), spec.rate_mbit) for index, _, _, spec in hosts if spec.rate_mbit is not None]
    if shaped:
        _run(["tc", "-batch", "-"], shaped)


def set_link(index: int, *, up: bool) -> None:
    """Plug a host's cable in, or pull it: the far side sees no carrier and hears nothing."""
    ip([f"link set {port(index)} {'up' if up else 'down'}"])


def remove_port(index: int) -> None:
    """Take away a host's link where it is still there; it goes with the host's namespace, but not at once."""
    if _has_link(port(index)):
        subprocess.run(["ip", "link", "delete", port(index)], check=False, capture_output=True, env=_ENVIRONMENT)


def _has_link(name: str) -> bool:
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return any(line.split(":")[0].strip() == name for line in lines)


def host_lines(address: IPv4Interface, mac: str, spec: HostSpec) -> list[str]:
    """The ip(8) lines that a host runs inside itself once ``eth0`` is there."""
    lines = ["link set lo up"]
    if spec.vm_bridge is None:
        return [*lines, f"address add {address} dev eth0", "link set eth0 up"]
    # The bridge takes eth0's MAC and keeps it, whatever VMs join: by itself it takes the lowest of its ports'.
    return [
        *lines,
        f"link add {spec.vm_bridge} address {mac} type bridge stp_state 0 mcast_snooping 0",
        f"link set eth0 master {spec.vm_bridge} up",
        f"address add {address} dev {spec.vm_bridge}",
        f"link set {spec.vm_bridge} up",
    ]


def _write_setting(path: Path, value: int) -> None:
    if path.exists():
        path.write_text(str(value))


def raise_machine_limits() -> list[str]:
    """Raise, never lower, the machine-wide limits that hundreds of hosts run into; says what it raised."""
    wanted = {f"net/ipv4/neigh/default/{name}": value for name, value in _NEIGHBOUR_LIMITS.items()}
    wanted["fs/inotify/max_user_instances"] = _INOTIFY_INSTANCES
    raised = []
    for name, value in wanted.items():
        path = Path("/proc/sys", name)
        try:
            present = int(path.read_text())
            if present >= value:
                continue
            _write_setting(path, value)
        except OSError:
            # Containers hide or protect some of these; fewer hosts then fit, which their start reports.
            continue
        raised.append(f"raised {name.replace('/', '.')} from {present} to {value}")
    return raised
