"""TCP ports for an agent to listen at."""

from __future__ import annotations

import random
import socket

#: What `free_ports` gave out in this process: agents that were enrolled here listen only when they are started.
_given: set[tuple[str, int]] = set()


def is_free(address: str, port: int) -> bool:
    """Whether one could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as candidate:
        # As libzmq has it, so that connections of a predecessor which are still closing down are no obstacle.
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((address, port))
            candidate.listen(1)
        except OSError:
            return False
    return True


def free_ports(address: str, count: int) -> list[int]:
    """`count` TCP ports that nobody listens on at `address` now, drawn at random above the range that Linux gives to
    outgoing connections (ip-sysctl, ip_local_port_range: 32768 to 60999)."""
    found: list[int] = []
    for _ in range(1_000):
        port = random.SystemRandom().randrange(61_000, 65_536)
        if (address, port) not in _given and is_free(address, port):
            _given.add((address, port))
            found.append(port)
            if len(found) == count:
                return found
    raise OSError(f"no free TCP ports at {address}: see `ss -tln` on that host")
