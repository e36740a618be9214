"""Which addresses answer ping, many at once over one socket.

Linux gives a datagram ICMP socket to the groups in net.ipv4.ping_group_range, which systemd opens to all, and a raw one
to root (icmp(7), raw(7)). Where neither is to be had, nothing can be told.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable

from agent.lanes import within

_ECHO_REQUEST = 8
_ECHO_REPLY = 0
# A guest that boots answers within a moment of having its address; one packet a second is what ping(8) sends.
_INTERVAL_SECONDS = 0.5
_HEADER = struct.Struct("!BBHHH")
_TOKEN_BYTES = 16
# No neighbour answers for the address so far, or there are too many packets on their way.
_PASSING = {errno.EHOSTUNREACH, errno.ENOBUFS, errno.ENOMEM}


async def ping(addresses: Iterable[str], deadline_s: float) -> dict[str, bool | None]:
    """True for each IPv4 address that answered within `deadline_s` seconds, False for those that did not.

    None where it can't be told: this user may not ping, or the host has no route there. Returns as soon as all have
    answered.
    """
    answers: dict[str, bool | None] = dict.fromkeys(addresses, False)
    if not answers:
        return answers
    endpoint = _open_socket()
    if endpoint is None:
        return dict.fromkeys(answers, None)
    loop = asyncio.get_running_loop()
    token = os.urandom(_TOKEN_BYTES)
    all_answered = asyncio.Event()

    def take() -> None:
        # Bounded, so that a flood of packets for others does not hold up the loop.
        for _ in range(len(answers) + 100):
            try:
                packet, (sender, _port) = endpoint.recvfrom(2048)
            except OSError:
                break
            if sender in answers and _is_reply(packet, token):
                answers[sender] = True
        if all(answers.values()):
            all_answered.set()

    loop.add_reader(endpoint, take)
    try:
        until = loop.time() + deadline_s
        sequence = 0
        while not all_answered.is_set() and loop.time() < until:
            request = _request(sequence & 0xFFFF, token)
            for address in [address for address, answer in answers.items() if not answer]:
                answers[address] = _send(endpoint, request, address)
            sequence += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await within(max(0.0, min(_INTERVAL_SECONDS, until - loop.time())), all_answered.wait())
    finally:
        loop.remove_reader(endpoint)
        endpoint.close()
    return answers


def _open_socket() -> socket.socket | None:
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        with contextlib.suppress(PermissionError):
            return socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
    return None


def _send(endpoint: socket.socket, request: bytes, address: str) -> bool | None:
    """What is known of the address after it was sent a request: nothing where it can't be reached from here at all."""
    try:
        endpoint.sendto(request, (address, 0))
    except BlockingIOError:
        return False  # its turn comes again
    except OSError as error:
        return False if error.errno in _PASSING else None
    return False


def _request(sequence: int, token: bytes) -> bytes:
    # The kernel puts an identifier of its own into datagrams; raw ones are told apart by the token.
    identifier = int.from_bytes(token[:2], "big")
    bare = _HEADER.pack(_ECHO_REQUEST, 0, 0, identifier, sequence) + token
    return _HEADER.pack(_ECHO_REQUEST, 0, _checksum(bare), identifier, sequence) + token


def _is_reply(packet: bytes, token: bytes) -> bool:
    # A raw socket's packet begins with its IP header, whose first byte says 4 and its length in words.
    if packet[:1] and packet[0] >> 4 == 4 and len(packet) >= 20:
        packet = packet[(packet[0] & 0xF) * 4 :]
    return len(packet) >= _HEADER.size and packet[0] == _ECHO_REPLY and packet[_HEADER.size :] == token


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
