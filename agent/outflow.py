"""How chunks leave by a TCP connection: with which congestion control, and how fast (`protocol.tempo`). Linux's, and
without effect where a kernel has none of it."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

from protocol.tempo import LOOK, Sent, Tempo

#: BBR has no more on its way than twice what the link takes in the shortest round trip that it saw
#: (net/ipv4/tcp_bbr.c), which is some tenths of a millisecond in one segment. The acknowledgements of a host that
#: relays wait for milliseconds in the queue before that host's own link, so BBR sends less than the link takes:
#: measured in a chain at 80 Mbit/s, 5 to 30 % less. CUBIC goes by losses, and there are none, since no more is sent
#: on than comes. The root has everything and keeps its own choice.
_BBR, _CUBIC = b"bbr", b"cubic"
#: Where round trips are longer, in microseconds, the link is one between sites, for which somebody chose BBR.
_SEGMENT_US = 30_000
#: Of the kernel's `struct tcp_info` (linux/tcp.h): the smoothed round trip in microseconds (tcpi_rtt); with it, the
#: bytes that were acknowledged, the shortest round trip, and the microseconds in which there was something to send
#: (tcpi_bytes_acked, tcpi_min_rtt, tcpi_busy_time). Its fields keep their places, new ones come after them.
_RTT, _SENT = struct.Struct("=68xI"), struct.Struct("=68xI48xQ20xI16xQ")
#: SO_MAX_PACING_RATE of asm-generic/socket.h, which Python doesn't name: bytes in a second, an unsigned long, of which
#: older kernels take the lower 32 bits (net/core/sock.c); all bits set: as many as go.
_SO_MAX_PACING_RATE, _PACE = 47, struct.Struct("@L")
_UNPACED = 256**_PACE.size - 1


class Outflow:
    """Of one connection."""

    def __init__(self, sock: socket.socket, now: float, *, relays: bool) -> None:
        """Whoever `relays` sends on what comes to it; the root has everything from the start."""
        self._socket = sock
        self._tempo = Tempo(relays=relays)
        #: When to `look` again, in seconds of the event loop's time.
        self.look_at = now
        if relays:
            self._choose()

    def _choose(self) -> None:
        """Let a host that relays send on as fast as it receives, within a segment, where its own choice is BBR."""
        sock = self._socket
        with suppress(OSError, struct.error):  # another kernel, or one without CUBIC
            chosen = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
            (rtt,) = _RTT.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT.size))
            if chosen.startswith(_BBR) and rtt < _SEGMENT_US:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _CUBIC)

    def look(self, now: float, *, free: bool) -> None:
        """See what has come through, and send so much; as much as goes where it is to be `free`."""
        self.look_at = now + LOOK
        with suppress(OSError, struct.error):  # another kernel, or an old one, whose struct is shorter
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SENT.size)
            trip, acknowledged, shortest, busy = _SENT.unpack(info)
            before = self._tempo.most
            self._tempo.look(Sent(trip / 1e6, shortest / 1e6, acknowledged, busy / 1e6), now, free=free)
            if self._tempo.most != before:
                pace = _UNPACED if self._tempo.most is None else int(self._tempo.most)
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _PACE.pack(pace))
