"""Output that flows no faster than it is read, input that flows no faster than it is taken; and nothing of either is
lost with what was on its way."""

from __future__ import annotations

import random
from collections import deque

import pytest

from protocol.feeding import Feeding, InputWindow
from protocol.flow import Inflow, Outflow, Window, nobody_reads
from protocol.limits import (
    INPUT_CREDIT,
    INPUT_PIECE,
    INPUT_TOTAL,
    INPUT_WINDOW,
    STREAM_FIRST,
    STREAM_LEAST,
    STREAM_MOST,
    STREAM_PIECE,
    STREAM_TOTAL,
    STREAM_WINDOW,
)
from protocol.messages import Grant


def _sent(flow: Outflow) -> list[tuple[int, int, int]]:
    return [(stream, offset, len(data)) for stream, offset, data, _, _ in flow.take()]


# --- output at its host -----------------------------------------------------------------------------------------------


def test_a_host_sends_what_it_may_and_then_waits() -> None:
    flow = Outflow()
    flow.write(1, b"x" * (STREAM_FIRST + 5))
    assert list(flow.take()) == [(1, 0, b"x" * STREAM_FIRST, STREAM_FIRST + 5, False)]
    assert _sent(flow) == []
    flow.granted(Grant(1, STREAM_FIRST + 3, STREAM_FIRST, 0))
    assert list(flow.take()) == [(1, STREAM_FIRST, b"xxx", STREAM_FIRST + 5, False)]
    assert flow.waiting == 2


def test_who_learns_that_it_has_more_only_after_its_last_piece_asks_for_it() -> None:
    flow = Outflow()
    flow.write(1, b"x" * STREAM_FIRST)
    assert _sent(flow) == [(1, 0, STREAM_FIRST)]
    waits = [flow.sendable]
    flow.write(1, b"yz")
    waits.append(flow.sendable)
    assert list(flow.take()) == [(1, STREAM_FIRST, b"", STREAM_FIRST + 2, False)]
    assert [*waits, flow.sendable] == [False, True, False]


def test_a_command_that_writes_fast_goes_by_whole_pieces_or_by_all_that_it_may() -> None:
    flow = Outflow()
    flow.write(1, b"x" * (STREAM_FIRST + STREAM_PIECE + 5))
    assert [(len(data), fast) for _, _, data, _, fast in flow.take(fast=True)] == [(STREAM_FIRST, True)]
    flow.granted(Grant(1, 2**40, 0, 0))
    assert [len(data) for _, _, data, _, _ in flow.take(fast=True)] == [STREAM_PIECE]
    assert flow.waiting == 5
    assert [len(data) for _, _, data, _, _ in flow.take()] == [5]


@pytest.mark.parametrize("commands", [1, 10, 100, 1_000])
def test_the_more_commands_write_the_less_of_each_is_read_ahead(commands: int) -> None:
    flow = Outflow(0)
    flow.share(commands)
    while not flow.full:
        flow.write(1, b"x" * 1_000)
    assert commands * flow.waiting <= (4 << 20) + commands * ((64 << 10) + 1_000)
    assert flow.piece < flow.waiting, "else a command that writes fast would never be taken for one"


def test_a_host_asks_once_for_more_and_again_by_a_new_way() -> None:
    flow = Outflow(0)
    flow.write(2, b"why")
    assert list(flow.take()) == [(1, 0, b"", 3, False)]
    flow.write(1, b"what")
    assert _sent(flow) == []
    flow.rewind()
    assert list(flow.take()) == [(1, 0, b"", 7, False)]
    flow.granted(Grant(1, 7, 0, 0))
    assert _sent(flow) == [(2, 0, 3), (1, 0, 4)]


def test_standard_error_does_not_wait_behind_a_flood_and_both_count() -> None:
    flow = Outflow()
    flow.write(1, b"x" * STREAM_FIRST)
    flow.write(2, b"why")
    assert _sent(flow) == [(2, 0, 3), (1, 0, STREAM_FIRST - 3)]


def test_no_piece_is_larger_than_a_message_may_be() -> None:
    flow = Outflow()
    flow.granted(Grant(1, 10 * STREAM_PIECE, 0, 0))
    flow.write(1, b"x" * (2 * STREAM_PIECE + 1))
    assert [size for _, _, size in _sent(flow)] == [STREAM_PIECE, STREAM_PIECE, 1]


def test_a_host_that_may_not_send_reads_no_more_from_its_command() -> None:
    flow = Outflow()
    flow.write(1, b"x" * (STREAM_FIRST + 2 * STREAM_PIECE))
    assert flow.full
    list(flow.take())
    assert flow.full
    flow.granted(Grant(1, STREAM_FIRST + 1, 0, 0))
    list(flow.take())
    assert not flow.full


def test_whatever_it_is_granted_a_host_keeps_no_more_for_the_root_than_it_must() -> None:
    flow = Outflow()
    flow.granted(Grant(1, 2**62, 0, 0))
    for _ in range(2 * STREAM_MOST // STREAM_PIECE):
        flow.write(1, b"x" * STREAM_PIECE)
    assert sum(size for _, _, size in _sent(flow)) == STREAM_MOST
    assert flow.full


def test_a_grant_that_acknowledges_what_was_never_sent_loses_nothing() -> None:
    flow = Outflow()
    flow.write(1, b"x" * 10)
    flow.granted(Grant(1, 100, 1_000, 1_000))
    assert _sent(flow) == [(1, 0, 10)]


def test_an_older_grant_takes_nothing_back() -> None:
    flow = Outflow()
    flow.granted(Grant(1, STREAM_FIRST + 10, 0, 0))
    flow.granted(Grant(1, 5, 0, 0))
    flow.write(1, b"x" * (STREAM_FIRST + 10))
    assert flow.waiting == sum(size for _, _, size in _sent(flow))


def test_on_a_new_way_up_only_what_the_root_has_not_is_sent_again() -> None:
    flow = Outflow()
    flow.write(1, b"abcdef")
    list(flow.take())
    flow.granted(Grant(1, STREAM_FIRST, 4, 0))
    flow.rewind()
    assert _sent(flow) == [(1, 4, 2)]


def test_what_nobody_reads_is_not_kept() -> None:
    flow = Outflow()
    flow.write(1, b"x" * STREAM_MOST)
    flow.granted(nobody_reads([1])[0])
    assert (flow.waiting, flow.full, flow.unread, _sent(flow)) == (0, False, True, [])
    flow.write(1, b"more")
    assert flow.waiting == 0


# --- output at the root -----------------------------------------------------------------------------------------------


def test_pieces_are_taken_once_and_in_order() -> None:
    flow = Inflow([1])
    assert flow.arrived(1, 1, 0, b"abc") == b"abc"
    assert flow.arrived(1, 1, 0, b"abc") == b""
    assert flow.arrived(1, 1, 2, b"cde") == b"de"
    assert flow.arrived(1, 1, 9, b"z") == b""
    assert flow.arrived(1, 2, 0, b"e") == b"e"


def test_a_host_that_sends_again_is_told_what_the_root_has() -> None:
    flow = Inflow([1])
    flow.arrived(1, 1, 0, b"abc")
    assert flow.grants() == ()
    flow.arrived(1, 1, 0, b"abc")
    assert flow.grants() == (Grant(1, STREAM_FIRST, 3, 0),)
    assert flow.grants() == ()


def test_what_is_beyond_a_hosts_limit_is_thrown_away() -> None:
    flow = Inflow([1])
    assert flow.arrived(1, 1, 0, b"x" * STREAM_FIRST)
    assert flow.arrived(1, 1, STREAM_FIRST, b"x") == b""
    assert flow.arrived(1, 2, 0, b"x" * (STREAM_FIRST + 1)) == b""


def test_hosts_that_are_no_targets_are_not_heard() -> None:
    flow = Inflow([1])
    assert flow.arrived(2, 1, 0, b"x") == b""
    flow.read(2, 1)
    flow.ended(2, 5, 5)
    assert flow.grants() == ()


def test_nothing_is_granted_before_something_is_read_and_then_as_much_as_a_flood_uses() -> None:
    flow = Inflow([1])
    flow.arrived(1, 1, 0, b"x" * STREAM_FIRST, 2 * STREAM_FIRST, fast=True)
    assert flow.grants() == ()
    flow.read(1, STREAM_FIRST)
    assert flow.grants() == (Grant(1, STREAM_FIRST + STREAM_MOST, STREAM_FIRST, 0),)


def test_who_has_a_little_more_is_granted_a_little_more_and_who_has_all_nothing() -> None:
    flow = Inflow(range(3))
    for rank, has in enumerate((STREAM_FIRST, STREAM_FIRST + 5, 3 * STREAM_FIRST)):
        flow.arrived(rank, 1, 0, b"x" * STREAM_FIRST, has)
        flow.read(rank, STREAM_FIRST)
    assert flow.grants() == (
        Grant(1, 2 * STREAM_FIRST, STREAM_FIRST, 0),
        Grant(2, 3 * STREAM_FIRST, STREAM_FIRST, 0),
    )


@pytest.mark.parametrize("hosts", [1, 3, 64, 1_000])
def test_all_hosts_together_have_no_more_on_their_way_than_the_window(hosts: int) -> None:
    flow = Inflow(range(hosts))
    limit, read = dict.fromkeys(range(hosts), STREAM_FIRST), dict.fromkeys(range(hosts), 0)
    offset = dict.fromkeys(range(hosts), 0)
    draw = random.Random(7)
    for _ in range(3_000):
        rank = draw.randrange(hosts)
        size = min(STREAM_PIECE, limit[rank] - offset[rank])
        if size:
            has = limit[rank] + STREAM_PIECE
            assert len(flow.arrived(rank, 1, offset[rank], b"x" * size, has, fast=True)) == size
            offset[rank] += size
        if draw.random() < 0.8:
            flow.read(rank, offset[rank] - read[rank])
            read[rank] = offset[rank]
        for grant in flow.grants():
            assert grant.limit is not None
            limit[grant.rank] = grant.limit
        ahead = [limit[rank] - read[rank] for rank in range(hosts)]
        assert sum(ahead) <= STREAM_WINDOW + (hosts + 1) * STREAM_FIRST
        assert max(ahead) <= STREAM_MOST


def test_a_flood_leaves_the_others_their_share() -> None:
    flow = Inflow(range(2))
    offset = [0, 0]
    limit = [STREAM_FIRST, STREAM_FIRST]
    for _ in range(100):  # one host floods, the client reads all of it
        size = min(STREAM_PIECE, limit[0] - offset[0])
        flow.arrived(0, 1, offset[0], b"x" * size, limit[0] + STREAM_PIECE, fast=True)
        flow.read(0, size)
        offset[0] += size
        for grant in flow.grants():
            limit[grant.rank] = grant.limit or 0
    assert flow.arrived(1, 1, 0, b"y" * STREAM_FIRST, 2 * STREAM_FIRST, fast=True)
    flow.read(1, STREAM_FIRST)
    assert flow.grants() == (Grant(1, STREAM_FIRST + STREAM_MOST, STREAM_FIRST, 0),)


@pytest.mark.parametrize("hosts", [1, 16, 64, 300])
def test_a_flood_of_many_hosts_takes_whole_pieces_and_a_grant_for_each_at_most(hosts: int) -> None:
    each, whole = 8 * STREAM_PIECE, bytes(STREAM_PIECE)
    flow, sources = Inflow(range(hosts)), {rank: Outflow() for rank in range(hosts)}
    fed, got = dict.fromkeys(range(hosts), 0), 0
    up: deque[tuple[int, int, int, bytes, int, bool]] = deque()
    pieces = questions = grants = 0
    turn: deque[int] = deque(range(hosts))
    while turn or up:
        while turn:
            rank = turn.popleft()
            source, sent = sources[rank], True
            while sent:
                while not source.full and fed[rank] < each:
                    source.write(1, whole)
                    fed[rank] += len(whole)
                taken = list(source.take(fast=fed[rank] < each))
                up.extend((rank, *piece) for piece in taken)
                sent = bool(taken)
        rank, stream, offset, data, has, fast = up.popleft()
        pieces, questions = pieces + bool(data), questions + (not data)
        assert flow.arrived(rank, stream, offset, data, has, fast=fast) == data
        got += len(data)
        flow.read(rank, len(data))
        for grant in flow.grants():
            grants += 1
            sources[grant.rank].granted(grant)
            turn.append(grant.rank)
    assert got == hosts * each, "all of it came"
    # The first piece of each is small, for nobody knew yet how much there would be; so may be its last.
    assert pieces <= hosts * (each // STREAM_PIECE + 4)
    assert (questions, grants <= pieces) == (0, True)


def test_an_output_is_complete_when_all_of_both_streams_is_there() -> None:
    flow = Inflow([1])
    flow.arrived(1, 1, 0, b"abc")
    assert not flow.complete(1)
    flow.ended(1, 3, 1)
    assert not flow.complete(1)
    flow.arrived(1, 2, 0, b"e")
    assert flow.complete(1)
    assert flow.complete(2)


def test_an_output_over_links_that_break_arrives_whole() -> None:
    draw = random.Random(11)
    for seed in range(20):
        draw.seed(seed)
        whole = {1: draw.randbytes(600_000), 2: draw.randbytes(50_000)}
        written, got = {1: 0, 2: 0}, {1: b"", 2: b""}
        host, root = Outflow(), Inflow([4])
        up: deque[tuple[int, int, bytes, int, bool]] = deque()
        down: deque[Grant] = deque()
        for _ in range(100_000):
            stream = draw.choice((1, 2))
            if not host.full:
                data = whole[stream][written[stream] : written[stream] + draw.randrange(40_000)]
                host.write(stream, data)
                written[stream] += len(data)
            up.extend(host.take(fast=draw.random() < 0.5))
            if up:
                number, offset, data, has, fast = up.popleft()
                fresh = root.arrived(4, number, offset, data, has, fast=fast)
                got[number] += fresh
                root.read(4, len(fresh))
            down.extend(root.grants())
            if down and draw.random() < 0.7:
                host.granted(down.popleft())
            if draw.random() < 0.02:
                up.clear()
                down.clear()
                host.rewind()
            if draw.random() < 0.1:
                host.forgo()
            if got == whole:
                break
        assert got == whole


class _Trips:
    """One command of some hosts, by round trips: what may be sent comes, its client reads it, the grants go back."""

    def __init__(self, hosts: int) -> None:
        self.flow = Inflow(range(hosts))
        self.sources = {rank: Outflow() for rank in range(hosts)}
        #: What each is still to write.
        self.left = dict.fromkeys(range(hosts), 0)

    def trip(self) -> int:
        """One of them; how many bytes came."""
        came = 0
        for rank, source in self.sources.items():
            pieces: list[tuple[int, int, bytes, int, bool]] = []
            while self.left[rank] and not source.full:  # as an outlet does
                size = min(STREAM_PIECE // 4, self.left[rank])
                source.write(1, bytes(size))
                self.left[rank] -= size
                if source.waiting > source.piece:
                    pieces += source.take(fast=True)
            pieces += source.take(fast=self.left[rank] > 0)
            for stream, offset, data, has, fast in pieces:
                fresh = self.flow.arrived(rank, stream, offset, data, has, fast=fast)
                assert fresh == data
                self.flow.read(rank, len(fresh))
                came += len(fresh)
        for grant in self.flow.grants():
            self.sources[grant.rank].granted(grant)
        return came

    def rate(self) -> float:
        """Bytes a round trip, when it has settled."""
        for _ in range(20):
            self.trip()
        return sum(self.trip() for _ in range(20)) / 20


@pytest.mark.parametrize(("hosts", "idle"), [(8, 4), (8, 6), (64, 16), (64, 40)])
def test_hosts_that_wrote_much_and_then_nothing_do_not_slow_the_others(hosts: int, idle: int) -> None:
    trips, alone = _Trips(hosts), _Trips(hosts)
    for rank in range(idle):
        trips.left[rank] = 600_000
        while trips.trip():
            pass
    for rank in range(idle, hosts):
        trips.left[rank] = alone.left[rank] = 1 << 30
    slowed, rate = trips.rate(), alone.rate()
    assert slowed < rate / 2, "as long as they may still write"
    for rank in range(idle):
        trips.sources[rank].forgo()
    assert trips.rate() > 0.95 * rate
    for rank in range(idle):  # and they go on as the others do
        trips.left[rank] = 1 << 20
    while any(trips.left[rank] for rank in range(idle)):
        assert trips.trip()


def test_a_grant_that_was_on_its_way_when_a_host_gave_back_what_it_had_is_not_misread() -> None:
    host, root = Outflow(), Inflow([1])
    host.write(1, bytes(100))
    for stream, offset, data, has, fast in host.take():
        root.read(1, len(root.arrived(1, stream, offset, data, has, fast=fast)))
    root.arrived(1, 1, 0, b"", 5 * STREAM_FIRST, fast=True)  # it will write more
    (late,) = root.grants()
    host.forgo()
    (told,) = list(host.take())
    host.granted(late)
    root.arrived(1, *told[:4], fast=told[4])
    host.granted(late)
    host.write(2, bytes(STREAM_MOST))
    for stream, offset, data, has, fast in host.take():
        assert root.arrived(1, stream, offset, data, has, fast=fast) == data, "no more is sent than is taken"


def test_what_a_host_kept_of_its_limit_lets_it_write_some_lines_at_once() -> None:
    host = Outflow()
    host.forgo()
    assert list(host.take()) == [(2, STREAM_FIRST - STREAM_LEAST, b"", 0, False)]
    host.forgo()
    assert list(host.take()) == [], "once"
    host.write(1, bytes(STREAM_LEAST + 1))
    assert [(stream, offset, len(data), has) for stream, offset, data, has, _ in host.take()] == [
        (1, 0, STREAM_LEAST, STREAM_LEAST + 1)
    ]
    host.rewind()
    assert list(host.take())[-1] == (2, STREAM_FIRST - STREAM_LEAST, b"", STREAM_LEAST + 1, False), "again by a new way"


@pytest.mark.parametrize("offset", [0, 1, STREAM_FIRST, STREAM_FIRST + 1, 2**62])
def test_nobody_gives_back_what_it_does_not_have(offset: int) -> None:
    window = Window()
    flow = Inflow([1], STREAM_FIRST, window)
    flow.arrived(1, 1, 0, b"x")
    for _ in range(3):
        flow.arrived(1, 2, offset, b"")
        flow.arrived(2, 2, offset, b"")
    assert window.ahead == STREAM_FIRST - offset * (offset < STREAM_FIRST)
    flow.ended(1, 1, 0)
    assert flow.complete(1)
    flow.read(1, 1)
    flow.over(1)
    assert window.ahead == 0


def test_commands_that_write_nothing_leave_new_ones_what_they_need() -> None:
    window = Window()
    for _ in range(100):  # a hundred `tail -f`
        first = window.first(64)
        flow = Inflow(range(64), first, window)
        for rank in range(64):
            host = Outflow(first)
            host.forgo()
            for stream, offset, data, has, fast in host.take():
                flow.arrived(rank, stream, offset, data, has, fast=fast)
    assert window.first(64) == STREAM_FIRST
    assert window.free > STREAM_TOTAL // 2


# --- many commands' output at the root --------------------------------------------------------------------------------


class _Command:
    """One command of many: its hosts write without end, as fast as they may."""

    def __init__(self, hosts: int, window: Window) -> None:
        self.first = window.first(hosts)
        self.flow = Inflow(range(hosts), self.first, window)
        self.sources = {rank: Outflow(self.first) for rank in range(hosts)}
        self.unread: deque[tuple[int, int]] = deque()
        self.got = 0

    def go(self) -> None:
        """Let everything travel that may."""
        moved = True
        while moved:
            moved = False
            for rank, source in self.sources.items():
                if not source.full:
                    source.write(1, b"x" * STREAM_PIECE)
                for stream, offset, data, has, fast in list(source.take()):
                    fresh = self.flow.arrived(rank, stream, offset, data, has, fast=fast)
                    if fresh:
                        moved = True
                        self.unread.append((rank, len(fresh)))
            for grant in self.flow.grants():
                moved = True
                self.sources[grant.rank].granted(grant)

    def read(self) -> None:
        """The client takes what there is."""
        while self.unread:
            rank, count = self.unread.popleft()
            self.got += count
            self.flow.read(rank, count)


def test_clients_that_do_not_read_have_no_more_held_than_the_total() -> None:
    window = Window()
    commands = [_Command(16, window) for _ in range(40)]
    for _ in range(3):
        for command in commands:
            command.go()
            for _ in range(min(3, len(command.unread))):  # each reads a little
                command.flow.read(*command.unread.popleft())
    for command in commands:
        command.go()
    assert STREAM_TOTAL // 4 < window.held <= window.ahead <= STREAM_TOTAL + len(commands) * STREAM_FIRST


def test_who_reads_goes_on_though_others_took_all_there_was_and_faster_once_they_are_gone() -> None:
    window = Window(1 << 20)
    stalled = [_Command(64, window) for _ in range(50)]
    for command in stalled:
        command.go()
        command.read()
        command.go()
    late = _Command(8, window)
    assert window.free < 1 << 16
    for turn in range(1, 9):
        late.go()
        late.read()
        assert late.got >= turn * STREAM_FIRST // 8, "a client that reads is not left without"
    assert all(source.waiting for source in late.sources.values())
    for command in stalled:
        command.flow.close()
    assert window.held == 0
    before = late.got
    for _ in range(8):
        late.go()
        late.read()
    assert late.got - before > 64 * STREAM_FIRST


def test_what_a_host_may_send_and_does_not_is_given_back_when_it_is_done() -> None:
    window = Window()
    flow = Inflow(range(4), STREAM_FIRST, window)
    assert window.ahead == 4 * STREAM_FIRST
    flow.arrived(0, 1, 0, b"abc")
    for rank in range(4):
        flow.ended(rank, 3 if rank == 0 else 0, 0)
        assert flow.complete(rank)
        flow.over(rank)
    assert (window.ahead, window.held) == (3, 3)
    assert flow.arrived(0, 1, 3, b"more") == b""
    flow.read(0, 3)
    assert (window.ahead, window.held) == (0, 0)


@pytest.mark.parametrize("wanted", [0, STREAM_FIRST, 2**62])
def test_a_host_that_asks_for_anything_gets_no_more_than_one_that_floods(wanted: int) -> None:
    window = Window(STREAM_TOTAL)
    flow = Inflow([1], STREAM_FIRST, window)
    for _ in range(1_000):
        flow.arrived(1, 1, 0, b"", wanted, fast=bool(wanted))
        flow.arrived(2, 1, 0, b"", wanted, fast=bool(wanted))
    assert window.ahead <= STREAM_MOST
    assert flow.arrived(1, 1, 0, b"x" * STREAM_FIRST)


# --- input ------------------------------------------------------------------------------------------------------------


def _all(feeding: Feeding) -> list[tuple[list[int], int, int, bool]]:
    return [(who, offset, len(data), last) for who, offset, data, last in feeding.pieces()]


def _feeding(hosts: int, data: bytes = b"", *, last: bool = False) -> Feeding:
    feeding = Feeding(range(hosts))
    assert feeding.add(data, last=last)
    return feeding


def test_input_goes_to_those_who_said_that_they_read() -> None:
    feeding = _feeding(3, b"abc", last=True)
    assert _all(feeding) == []
    feeding.taken(0, 0, is_open=True, anew=True)
    feeding.taken(2, 0, is_open=True, anew=True)
    assert _all(feeding) == [([0, 2], 0, 3, True)]
    assert _all(feeding) == []


def test_the_end_reaches_also_whoever_has_all_the_rest() -> None:
    feeding = _feeding(1, b"abc")
    feeding.taken(0, 0, is_open=True, anew=True)
    assert _all(feeding) == [([0], 0, 3, False)]
    assert feeding.add(b"", last=True)
    assert _all(feeding) == [([0], 3, 0, True)]
    assert _all(feeding) == []


def test_a_host_gets_no_more_than_its_credit_before_it_has_taken_some() -> None:
    feeding = _feeding(1, b"x" * (2 * INPUT_CREDIT))
    feeding.taken(0, 0, is_open=True, anew=True)
    assert sum(size for _, _, size, _ in _all(feeding)) == INPUT_CREDIT
    feeding.taken(0, INPUT_PIECE, is_open=True, anew=False)
    assert _all(feeding) == [([0], INPUT_CREDIT, INPUT_PIECE, False)]


def test_a_slow_host_does_not_starve_the_others_within_the_window_and_holds_them_back_beyond_it() -> None:
    feeding = _feeding(2, b"x" * INPUT_WINDOW)
    for rank in (0, 1):
        feeding.taken(rank, 0, is_open=True, anew=True)
    got = 0
    for _ in range(1_000):
        for who, offset, size, _ in _all(feeding):
            if 0 in who:
                got = offset + size
        feeding.taken(0, got, is_open=True, anew=False)
    assert got == INPUT_WINDOW
    assert feeding.room == INPUT_WINDOW
    assert not feeding.add(b"x", last=False)
    feeding.taken(1, INPUT_PIECE, is_open=True, anew=False)
    assert feeding.room == INPUT_WINDOW + INPUT_PIECE
    assert feeding.add(b"x", last=False)


def test_whoever_reads_no_more_or_is_over_holds_back_nobody() -> None:
    feeding = _feeding(3, b"x" * INPUT_WINDOW)
    feeding.taken(0, 0, is_open=False, anew=False)
    feeding.over(1)
    assert feeding.room == INPUT_WINDOW
    feeding.over(2)
    assert feeding.room == 2 * INPUT_WINDOW
    assert feeding.add(b"x" * INPUT_WINDOW, last=False)
    assert feeding.room == 3 * INPUT_WINDOW


def test_a_host_that_begins_anew_is_sent_again_what_it_lacks() -> None:
    feeding = _feeding(1, b"abcdef", last=True)
    feeding.taken(0, 0, is_open=True, anew=True)
    assert _all(feeding) == [([0], 0, 6, True)]
    feeding.taken(0, 2, is_open=True, anew=True)
    assert _all(feeding) == [([0], 2, 4, True)]


@pytest.mark.parametrize("count", [1, 7, 2**40])
def test_a_host_that_says_what_can_not_be_is_not_believed(count: int) -> None:
    feeding = _feeding(2, b"abcdef")
    feeding.taken(0, 2, is_open=True, anew=True)
    feeding.taken(0, count, is_open=True, anew=True)
    feeding.taken(9, 0, is_open=True, anew=True)
    assert _all(feeding) == [([0], 2, 4, False)]


def test_nothing_is_added_after_the_end() -> None:
    feeding = _feeding(1, b"a", last=True)
    assert not feeding.add(b"b", last=False)
    assert not feeding.add(b"", last=True)


def test_all_inputs_together_are_kept_within_the_total_and_each_goes_on() -> None:
    window = InputWindow()
    inputs = [Feeding([0], window) for _ in range(100)]
    assert [feeding.room for feeding in inputs[:8]] == [INPUT_WINDOW] * 8
    assert [feeding.room for feeding in inputs[8:]] == [INPUT_CREDIT] * 92
    assert window.ahead == INPUT_TOTAL + 92 * INPUT_CREDIT
    slow = inputs[-1]
    slow.taken(0, 0, is_open=True, anew=True)
    for turn in range(1, 5):
        assert slow.add(b"x" * INPUT_CREDIT, last=False)
        list(slow.pieces())
        slow.taken(0, turn * INPUT_CREDIT, is_open=True, anew=False)
        assert slow.room == (turn + 1) * INPUT_CREDIT
    for feeding in inputs[:-1]:
        feeding.close()
        assert feeding.add(b"on its way", last=False)
    assert slow.add(b"x" * INPUT_CREDIT, last=True)
    list(slow.pieces())
    slow.taken(0, 5 * INPUT_CREDIT, is_open=True, anew=False)
    assert slow.room == 5 * INPUT_CREDIT + INPUT_WINDOW
    slow.close()
    assert window.ahead == 0
