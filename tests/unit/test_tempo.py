"""How fast a connection sends, on a link that is a rate and a queue, in steps of a few milliseconds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.tempo import _AGAIN, _ANOTHERS, _LEAST, FASTEST, LOOK, SLOWEST, Sent, Tempo

_STEP_S = 0.004
#: 80 Mbit/s.
_LINK = 1e7
#: What CUBIC fills a queue to, and what BBR keeps in one, in bytes.
_CUBIC, _BBR = 400_000, 100_000


def always(now: float) -> float:
    return math.inf


@dataclass
class Link:
    """A link with a queue, the connection that sends over it, and what others put into the queue."""

    tempo: Tempo
    #: Bytes in a second.
    rate: float = _LINK
    #: What the kernel has on its way in the queue, in bytes, as far as it is not paced.
    window: float = _BBR
    #: The round trip without a queue, in seconds; what it varies by from one time to the next.
    shortest: float = 0.0005
    varies: Callable[[], float] = lambda: 0.0
    #: Bytes in a second that there are to send, at a time.
    has: Callable[[float], float] = always
    #: What others always keep in the queue, in bytes.
    others: float = 0.0
    #: What the kernel counts time by, in seconds.
    tick: float = 0.004
    now: float = 0.0
    mine: float = 0.0
    sent: float = 0.0
    acknowledged: float = 0.0
    busy: float = 0.0
    waiting: float = 0.0
    looked: float = 0.0
    #: What stood at each look, in seconds; what the limit was.
    stood: list[float] = field(default_factory=list)
    limits: list[float | None] = field(default_factory=list)

    def run(self, seconds: float, *, free: bool = False) -> float:
        """Go on; what part of the link was used by this connection."""
        end, before = self.now + seconds, self.acknowledged
        self.stood, self.limits = [], []
        while self.now < end:
            self._step()
            if self.now - self.looked >= LOOK:
                self.looked = self.now
                standing = (self.mine + self.others) / self.rate
                trip = self.shortest + standing + self.varies()
                busy = self.busy // self.tick * self.tick
                self.tempo.look(Sent(trip, self.shortest, int(self.acknowledged), busy), self.now, free=free)
                self.stood.append(standing)
                self.limits.append(self.tempo.most)
        return (self.acknowledged - before) / seconds / self.rate

    def _step(self) -> None:
        self.now += _STEP_S
        more = self.has(self.now) * _STEP_S
        self.waiting = more if math.isinf(more + self.waiting) else self.waiting + more
        paced = math.inf if self.tempo.most is None else self.tempo.most * _STEP_S
        going = min(self.waiting, paced, max(0.0, self.rate * _STEP_S + self.window - self.mine))
        self.waiting -= going
        self.mine += going
        # First come, first served: of what leaves, each has the part that it has of what stands.
        left = min(self.mine, self.rate * _STEP_S * self.mine / max(self.mine + self.others, self.rate * _STEP_S))
        self.busy += _STEP_S if self.waiting or left < self.mine else self.mine / self.rate
        self.mine -= left
        self.acknowledged += left


ROLES = pytest.mark.parametrize("relays", [False, True], ids=["the root", "a relay"])


@ROLES
@pytest.mark.parametrize("window", [_BBR, _CUBIC], ids=["BBR", "CUBIC"])
@pytest.mark.parametrize("tick", [0.004, 0.01])
def test_a_queue_goes_away_and_stays_away_and_the_link_is_used(relays: bool, window: float, tick: float) -> None:
    link = Link(Tempo(relays=relays), window=window, tick=tick)
    link.run(1)
    assert link.stood[-1] == pytest.approx(window / link.rate), "until more is known"
    link.run(4)
    assert link.run(20) >= 0.97
    # Who relays leaves it to who sends to it to send less.
    assert sum(link.stood) / len(link.stood) < (0.006 if relays else 0.003)
    assert max(link.stood) < (0.012 if relays else 0.008)
    assert max(link.stood) <= window / link.rate


@ROLES
@pytest.mark.parametrize("tick", [0.004, 0.01])
def test_what_a_link_takes_more_is_used_within_seconds(relays: bool, tick: float) -> None:
    link = Link(Tempo(relays=relays), tick=tick)
    link.run(10)
    link.rate *= 2
    link.run(3)
    assert link.run(5) >= 0.97


@ROLES
def test_where_a_link_takes_less_the_queue_goes_away_again(relays: bool) -> None:
    link = Link(Tempo(relays=relays))
    link.run(10)
    link.rate /= 2
    link.run(12)
    assert link.run(10) >= 0.97
    assert sum(link.stood) / len(link.stood) < (0.008 if relays else 0.004)


@ROLES
@pytest.mark.parametrize("others", [100_000.0, 200_000.0])
@pytest.mark.parametrize("pauses", [False, True], ids=["always", "with pauses"])
def test_who_fills_the_queue_for_good_takes_no_more_than_a_tenth_away(
    relays: bool, others: float, pauses: bool
) -> None:
    def has(now: float) -> float:
        return 0.0 if pauses and now % 1.0 < 0.2 else math.inf

    unlimited = Link(Tempo(relays=relays), others=others, has=has, looked=math.inf)
    limited = Link(Tempo(relays=relays), others=others, has=has)
    assert limited.run(60) >= _LEAST * unlimited.run(60)
    released = [most is None for most in limited.limits]
    assert released[-300:].count(True) > 300 / 2, "most of the time nothing is done about it"


@ROLES
@pytest.mark.parametrize("varies", [0.005, 0.02, 0.1])
def test_round_trips_of_a_long_link_that_vary_by_themselves_cost_a_tenth_at_most(relays: bool, varies: float) -> None:
    random_ = random.Random(3)
    link = Link(Tempo(relays=relays), shortest=0.05, window=0, varies=lambda: random_.uniform(0, varies))
    link.run(10)
    assert link.run(30) >= _LEAST


def test_round_trips_that_vary_by_less_than_an_eighth_of_a_long_link_limit_nothing() -> None:
    random_ = random.Random(3)
    link = Link(Tempo(relays=False), shortest=0.05, window=0, varies=lambda: random_.uniform(0, 0.05 / 8))
    link.run(20)
    assert set(link.limits) == {None}


@pytest.mark.parametrize("some", [0.3, 0.5, 0.8])
def test_who_has_everything_but_is_asked_for_little_is_not_limited_to_that(some: float) -> None:
    # A chunk or more at a time, which stand in the queue when they are sent.
    link = Link(Tempo(relays=False), has=lambda now: math.inf if now % 0.2 < 0.2 * some else 0.0)
    link.run(10)
    assert all(most is None or most >= _LEAST**2 * link.rate for most in link.limits)
    link.has = always
    assert link.run(1) >= 0.95
    assert all(most is None or most >= _LEAST**2 * link.rate for most in link.limits)


def test_who_relays_little_smoothly_soon_relays_more() -> None:
    # Chunks of 64 KiB.
    link = Link(Tempo(relays=True), has=lambda now: 65_536 / _STEP_S if now % 0.02 < _STEP_S else 0.0)
    link.run(10)
    assert None not in link.limits[-50:]
    link.has = always
    link.run(2)
    assert link.run(5) >= 0.97


@ROLES
def test_a_link_of_which_little_is_to_be_had_is_left_as_it_is(relays: bool) -> None:
    link = Link(Tempo(relays=relays), rate=0.9 * SLOWEST)
    link.run(20)
    assert set(link.limits) == {None}


@ROLES
def test_where_the_processor_is_the_limit_nothing_is_limited(relays: bool) -> None:
    link = Link(Tempo(relays=relays))
    link.run(10, free=True)
    assert set(link.limits) == {None}
    link.run(5)
    assert None not in link.limits[-20:]
    link.run(5 * LOOK, free=True)
    assert None not in link.limits, "for a moment it always may be"
    link.run(5, free=True)
    assert set(link.limits[10:]) == {None}
    link.run(1)
    assert set(link.limits) == {None}, "it may be so again in a moment"


def test_a_limit_that_is_in_nobodys_way_grows_no_further_than_a_kernel_can_be_told() -> None:
    tempo = Tempo(relays=False)
    for look in range(10_000):
        trip = 0.02 if look < 20 else 0.001
        tempo.look(Sent(trip, 0.001, 10**6 * look, LOOK * look), LOOK * look)
        assert tempo.most is not None or look <= 20
    assert tempo.most == FASTEST


@ROLES
def test_who_has_nothing_to_send_now_and_then_is_let_go_too_where_the_queue_stays(relays: bool) -> None:
    tempo, busy, let_go = Tempo(relays=relays), 0.0, []
    for look in range(100):
        busy += LOOK * (0.6 if look % 7 == 0 else 1)
        tempo.look(Sent(0.02, 0.001, 10**6 * look, busy), LOOK * look)
        let_go.append(tempo.most is None)
    assert not all(let_go[:20])
    assert any(let_go[30:])


_NONE_YET = (2**32 - 1) / 1e6  # what the kernel says before it has seen a round trip


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    relays=st.booleans(),
    looks=st.lists(
        st.tuples(
            st.sampled_from([LOOK, 0.13, 1.0, 900.0]),
            st.sampled_from([0, 1, 1500, 10**5, 10**6, 10**9, 10**15]),
            st.sampled_from([0.0, 0.5, 0.95, 0.99, 1.0, 1.1]),
            st.sampled_from([0.0, 0.0001, 0.005, 0.05, 10.0]),
            st.sampled_from([0.0, 0.0001, 0.03, _NONE_YET]),
            st.integers(1, 30),
            st.booleans(),
        ),
        max_size=12,
    ),
)
def test_whatever_a_connection_says_of_itself_it_never_stands_still(
    relays: bool, looks: list[tuple[float, int, float, float, float, int, bool]]
) -> None:
    tempo, now, acknowledged, busy = Tempo(relays=relays), 0.0, 0, 0.0
    for after, more, share, trip, shortest, times, free in looks:
        for _ in range(times):
            now, acknowledged, busy = now + after, acknowledged + more, busy + share * after
            tempo.look(Sent(trip, shortest, acknowledged, busy), now, free=free)
            assert tempo.most is None or _LEAST * SLOWEST <= tempo.most <= FASTEST


def test_what_does_not_go_away_is_left_alone_for_a_while_and_then_tried_again() -> None:
    link = Link(Tempo(relays=False), others=100_000)
    link.run(60)
    limits = [most is not None for most in link.limits]
    lengths = [len(list(same)) for _, same in itertools.groupby(limits)][1:-1]
    limited, left = lengths[::2], lengths[1::2]  # nothing is limited at first
    assert max(limited) <= _ANOTHERS
    assert min(left) >= _AGAIN / (LOOK + _STEP_S)
