"""How fast one end of a conduit sends, so that little stands in the queue before a link. Pure.

TCP sends until a queue is full (CUBIC), or keeps twice of what a link takes on its way (BBR, net/ipv4/tcp_bbr.c, and
more where acknowledgements wait). All else waits behind what stands there: a command beside a push over links of 80
Mbit/s took 14 ms more. So the round trip is looked at: what it has beyond the shortest one, it spent in queues. Where
that is too long, a bit less is sent than the link takes until it is gone, and then a bit more each time, as far as the
kernel's own congestion control goes along. (RFC 6817 has another law to the same end.)

The queue may be another's, who then gets all that is left free; and some round trips vary by themselves. So no less is
sent than nine tenths of the most that came through since, and where the queue does not go away, all is as without this
for a while.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

#: How often one looks, in seconds: some chunks at 80 Mbit/s.
LOOK = 0.1
#: What a link takes is the most that came through in a row of so many looks, of so many rows: half a second evens out
#: chunks, and in two seconds it isn't forgotten for what little a queue of another's lets through.
_ROW, _LATELY = 5, 20
#: Nothing is limited before so many looks: whether the processor is the limit is known by then (agent.pressure).
_KNOWN = 12
#: Lately there was to be no limit at so many looks: then there is none. It begins where there was none of them.
_FREED_MOST = 8
#: Where less comes through, in bytes a second, nothing is limited: what would be too long in a queue is four packets
#: there, no more than TCP sends at a time by itself. So whatever is made of its figures, no connection stands still.
SLOWEST = 2e6
#: No limit is higher: 34 Gbit/s are as much as older kernels can be told (32 bits), and more than one end can seal.
FASTEST = 2.0**32 - 2
#: What of a round trip may stand in queues, in seconds: what some packets of each of several connections take. And by
#: what part a distant host's round trips vary.
_ENOUGH, _VARIES = 0.001, 1 / 8
#: What of the time a connection had something to send where nothing but the link, or this, holds it up: who relays
#: `_SMOOTHLY` and waits for what comes has 95 %.
_BUSY = 0.98
#: After a queue is gone it goes on with a little more at each look, up to so much: a queue grows by that where the link
#: takes no more, and where it does, that is twice as much within two seconds.
_STEP, _STEP_MOST = 0.005, 0.25
#: Of the most that came through, so much is always sent.
_LEAST = 0.9
#: Of the time of a row, so much there must have been something to send: else it says nothing of the link.
_TELLING = 0.9
#: Who relays gets a chunk at a time, and sends it in the time in which the next one comes.
_SMOOTHLY = 1.05
#: A queue that is there for so many looks although less is sent than comes through is another's, or none: so long (s)
#: nothing is done about it.
_ANOTHERS, _AGAIN = 20, 5.0


@dataclass(frozen=True, slots=True)
class Sent:
    """What a connection says of what it has sent (`struct tcp_info`)."""

    #: The smoothed and the shortest round trip, in seconds.
    trip: float
    shortest: float
    #: Bytes that were acknowledged, and for how long there was something to send, in seconds: since it began. The time
    #: goes by the kernel's ticks, of up to 10 ms.
    acknowledged: int
    busy: float


class Tempo:
    """Of one connection."""

    def __init__(self, *, relays: bool) -> None:
        """Whoever `relays` sends on what comes to it, another has everything.

        What stands behind a host that relays was sent too fast by another: it goes away where that one sends less, so
        only much of it counts, and is taken away slowly. Less would hold up what comes: at each host of a chain a bit.
        """
        #: Bytes in a second to send at most, at least `_LEAST` of SLOWEST; None: as many as go.
        self.most: float | None = None
        self._relays = relays
        #: What stands in queues too long, in seconds; by what part less is sent then; and with what one begins after.
        self._too_long, self._less, self._after = (0.004, 0.03, 1.0) if relays else (0.003, 0.05, 0.99)
        self._looks = 0
        self._seen: deque[tuple[float, Sent]] = deque(maxlen=_ROW)
        self._rates: deque[float] = deque(maxlen=_LATELY)
        #: Looks at which all was sent that may be and too much stood, without one at which it did not, and at which it
        #: did not, one after the other.
        self._full = self._calm = 0
        #: The most that came through since something is limited: beside a queue that comes and goes by itself, nine
        #: tenths of what came through lately, time after time, would end at nothing.
        self._base = 0.0
        #: Until when nothing is done, and at which looks nothing was to be limited.
        self._free_until = 0.0
        self._freed: deque[bool] = deque(maxlen=_LATELY)

    def look(self, sent: Sent, now: float, *, free: bool = False) -> None:
        """Decide on `most`, LOOK seconds after the last time or later. Nothing is limited where it is to be `free`."""
        busy = self._see(sent, now)
        self._freed.append(free)
        # What holds the processor for a moment is no reason to fill the queue.
        freed = sum(self._freed) > (0 if self.most is None else _FREED_MOST)
        link = max(self._rates, default=0.0)
        if freed or now < self._free_until or self._looks <= _KNOWN or link < SLOWEST:
            self._let_go()
            return
        standing = sent.trip - sent.shortest
        too_long = standing > self._too_long + _VARIES * sent.shortest
        if not too_long:
            self._full = 0
        if self._relays and (self.most is not None or standing > _ENOUGH):
            self._set(max(self.most or 0.0, _SMOOTHLY * link))
        if not busy:
            self._calm = 0
        elif too_long:
            self._calm, self._full = 0, self._full + 1
            self._base = max(self._base, link)
            less = self._rates[-1] * (1 - min(self._less, (standing - _ENOUGH) / LOOK))
            self._set(max(_LEAST * self._base, less))
            if self._full > _ANOTHERS:
                self._let_go()
                self._free_until = now + _AGAIN
        elif self.most is not None:
            self._calm += 1
            self._set(max(self.most, self._after * link) * (1 + min(_STEP_MOST, _STEP * self._calm)))

    def _see(self, sent: Sent, now: float) -> bool:
        """Keep what came through. Whether there always was something to send, since the last look or all of the row:
        by the kernel's ticks one look alone seems shorter than it was at times."""
        self._looks += 1
        busy = False
        if self._seen:
            first, then = self._seen[0]
            busy = any(sent.busy - one.busy >= _BUSY * (now - at) for at, one in (self._seen[-1], self._seen[0]))
            if self._relays or sent.busy - then.busy >= _TELLING * (now - first):
                self._rates.append((sent.acknowledged - then.acknowledged) / (now - first))
        self._seen.append((now, sent))
        return busy

    def _let_go(self) -> None:
        self.most, self._base = None, 0.0
        self._full = self._calm = 0

    def _set(self, most: float) -> None:
        self.most = min(most, FASTEST)
