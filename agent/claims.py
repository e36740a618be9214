"""Which addresses somebody on a bridge answers for already, asked by ARP before VMs that are to have them start.

A probe is an ARP request without a sender's address, so that nobody learns anything from it; whoever has the address
answers (RFC 5227, section 2.1.1). Packet sockets take CAP_NET_RAW (packet(7)).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterable

from agent.lanes import within

_ETH_P_ARP = 0x0806
_REQUEST = 1
#: Hardware and protocol type, their lengths, operation; sender's MAC and IP, target's MAC and IP (RFC 826).
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET = struct.Struct("!6s6sH")
_BROADCAST = b"\xff" * 6
_NOBODY = bytes(4)
#: RFC 5227 asks three times (PROBE_NUM). It leaves a second between, for wireless links and bridges that learn for half
#: a minute; hosts on one Ethernet answer within milliseconds, loaded ones within a tenth of a second.
_PROBES, _PAUSE_SECONDS = 3, 0.17


async def claimed(bridge: str, addresses: Iterable[str]) -> dict[str, str]:
    """Who has any of these IPv4 addresses already, in words. Takes about half a second, whatever their number."""
    addresses = list(addresses)
    found = {
        address: f"{mac} answers for it on {bridge}" for address, mac in (await holders(bridge, addresses)).items()
    }
    return found | {address: "this host has it itself" for address in addresses if _is_own(address)}


async def holders(bridge: str, addresses: Iterable[str]) -> dict[str, str]:
    """The MAC, in lower case, that answers for each of these IPv4 addresses on a bridge, for those that one does; also
    where the host itself has no address there. Takes about half a second, whatever their number.

    Where this user may not ask, or there is no such bridge, nothing is known and nobody is named.
    """
    wanted = {socket.inet_aton(address): address for address in addresses}
    found: dict[str, str] = {}
    if not wanted:
        return found
    try:
        endpoint = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_ARP))
    except OSError:
        return found
    with endpoint:
        try:
            endpoint.bind((bridge, _ETH_P_ARP))
            mac = endpoint.getsockname()[4]
        except OSError:
            return found

        def take() -> None:
            # Bounded, so that a storm on the bridge does not hold up the loop.
            for _ in range(100):
                try:
                    frame = endpoint.recv(2048)
                except OSError:
                    return
                sender = _sender(frame)
                if sender is not None and sender[1] in wanted:
                    found.setdefault(wanted[sender[1]], sender[0].hex(":"))

        loop = asyncio.get_running_loop()
        loop.add_reader(endpoint, take)
        try:
            for _ in range(_PROBES):
                for packed, address in wanted.items():
                    if address not in found:
                        # What finds no room now, or a bridge that is down, has its turn again or no one to ask.
                        with contextlib.suppress(OSError):
                            endpoint.send(_probe(mac, packed))
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(_PAUSE_SECONDS, asyncio.Event().wait())
        finally:
            loop.remove_reader(endpoint)
    return found


def _probe(mac: bytes, address: bytes) -> bytes:
    arp = _ARP.pack(1, 0x0800, 6, 4, _REQUEST, mac, _NOBODY, bytes(6), address)
    return _ETHERNET.pack(_BROADCAST, mac, _ETH_P_ARP) + arp


def _sender(frame: bytes) -> tuple[bytes, bytes] | None:
    """MAC and IP that an ARP packet, request or answer, says are its sender's; None for anything else."""
    if len(frame) < _ETHERNET.size + _ARP.size or _ETHERNET.unpack_from(frame)[2] != _ETH_P_ARP:
        return None
    kind, protocol, mac_bytes, ip_bytes, _, mac, ip, _, _ = _ARP.unpack_from(frame, _ETHERNET.size)
    return (mac, ip) if (kind, protocol, mac_bytes, ip_bytes) == (1, 0x0800, 6, 4) else None


def _is_own(address: str) -> bool:
    """Whether the address is this host's: then it is also where packets to it come from. Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as endpoint:
        endpoint.connect((address, 9))
        return bool(endpoint.getsockname()[0] == address)
    return False
