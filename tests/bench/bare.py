"""The least that a chain of Python relays can take: a chain like a push's that does nothing but open, check, seal and
send on what comes, and write it. No protocol, no event loop, no failures, no order that could change: what `ctl push`
takes beyond it is the price of these.

`relay` runs on each host, with what the agent there has brought (protocol.aegis, protocol.digest); `send` here.
"""

from __future__ import annotations

import inspect
import socket
import threading
import time

from protocol.aegis import NONCE, TAG, seal
from tests.bench.pushfleet import Fleet

PORT = 7_777
#: Bytes in one record, and records that are written at a time.
RECORD, WRITTEN = 256 << 10, 4
KEY = bytes(32)


def relay(order: str, size: int, to: str, *, port: int, record: int, written: int) -> None:
    """Take `size` bytes from who comes before this host in `order` (name=address, in a row), and pass them on."""
    # It is sent to the hosts as it stands here: all that it needs is named in it.
    import os
    import socket
    import sys
    import time

    from protocol.aegis import NONCE, TAG, open_, seal
    from protocol.digest import content_digest

    hosts = [entry.split("=") for entry in order.split(",")]
    at = [name for name, _ in hosts].index(socket.gethostname())
    listening = socket.create_server((hosts[at][1], port))
    after = None
    while after is None and at + 1 < len(hosts):
        try:
            after = socket.create_connection((hosts[at + 1][1], port))
        except OSError:
            time.sleep(0.05)
    before, _ = listening.accept()
    file = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    room, key = memoryview(bytearray(2 * record + TAG)), bytes(32)
    sealed = memoryview(bytearray(record + TAG))
    filled = got = count = 0
    waiting = []
    while got < size:
        length = min(record, size - got) + TAG
        while filled < length:
            filled += before.recv_into(room[filled:]) or sys.exit("who comes before is gone")
        count += 1
        nonce = count.to_bytes(NONCE, "little")
        plain = open_(room[:length], b"", nonce, key)
        if plain is None:
            sys.exit("it does not open")
        content_digest(plain)
        if after is not None:
            seal(plain, b"", nonce, key, sealed)
            after.sendall(sealed[: len(plain) + TAG])
        waiting.append(plain)
        got += len(plain)
        if len(waiting) == written or got == size:
            os.writev(file, waiting)
            waiting = []
        room[: filled - length] = bytes(room[length:filled])
        filled -= length


def send(fleet: Fleet, data: bytes, to: str) -> float:
    """Seconds until all hosts have these bytes in the file `to`."""
    hosts = sorted(fleet.session.status().hosts, key=lambda host: host.rank)
    order = ",".join(f"{host.name}={host.address}" for host in hosts)
    bounds = f"port={PORT}, record={RECORD}, written={WRITTEN}"
    script = f"{inspect.getsource(relay)}\nrelay({order!r}, {len(data)}, {to!r}, {bounds})\n"
    command = 'PYTHONPATH=$(echo /var/lib/canopy/*/current) exec python3 -c "$(cat)"'
    ends: list[float] = []
    wrong: list[str] = []

    def run() -> None:
        for result in fleet.session.run(command, stdin=script.encode()):
            ends.append(time.perf_counter())
            if not result.ok:
                wrong.append(f"{result.hosts}: {result}")

    running = threading.Thread(target=run)
    running.start()
    first = _connect(hosts[0].address)
    # The last to be connected listens before all others connect to who comes after them.
    time.sleep(1 + len(hosts) / 16)
    began = time.perf_counter()
    sealed = memoryview(bytearray(RECORD + TAG))
    for count, at in enumerate(range(0, len(data), RECORD), 1):
        plain = memoryview(data)[at : at + RECORD]
        seal(plain, b"", count.to_bytes(NONCE, "little"), KEY, sealed)
        first.sendall(sealed[: len(plain) + TAG])
    running.join()
    first.close()
    if wrong:
        raise SystemExit(f"the bare chain: {wrong}")
    return max(ends) - began


def _connect(address: str) -> socket.socket:
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection((address, PORT))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
