"""An input that some hosts read slowly, or not at all: the others go on, in little memory, and nobody lacks a byte."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller import shelf as shelf_module
from controller.shelf import DiskShelf
from protocol import feeding as feeding_module
from protocol.feeding import Feeding, InputWindow
from protocol.limits import INPUT_CREDIT, INPUT_PIECE, INPUT_TOTAL, INPUT_WINDOW

_APART = 4 * INPUT_WINDOW


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (feeding_module, shelf_module):
        monkeypatch.setattr(module, "INPUT_APART", _APART)


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[DiskShelf]:
    made = DiskShelf(tmp_path)
    yield made
    made.close()


class _Hosts:
    """Hosts that read as much of an input as they like, and its client, which sends what it may."""

    def __init__(self, data: bytes, hosts: int, shelf: DiskShelf | None, window: InputWindow | None = None) -> None:
        self.data = data
        self.window = window or InputWindow()
        self.feeding = Feeding(range(hosts), self.window, shelf)
        self.sent = 0
        #: What has come to each, and how much of it was taken.
        self.come = [bytearray() for _ in range(hosts)]
        self.ended: set[int] = set()
        for rank in range(hosts):
            self.feeding.taken(rank, 0, is_open=True, anew=True)

    def go(self) -> None:
        """The client sends what it may, and what may go to hosts goes."""
        while self.sent < len(self.data) and self.feeding.room > self.sent:
            upto = min(self.feeding.room, len(self.data), self.sent + INPUT_PIECE)
            assert self.feeding.add(self.data[self.sent : upto], last=upto == len(self.data))
            self.sent = upto
        for who, offset, data, last in self.feeding.pieces():
            for rank in who:
                assert offset == len(self.come[rank])
                self.come[rank] += data
                self.ended |= {rank} if last else set()

    def take(self, rank: int) -> bool:
        """A host reads all that has come to it; whether that was new."""
        before = len(self.come[rank])
        self.feeding.taken(rank, before, is_open=True, anew=False)
        self.go()
        return len(self.come[rank]) > before


def test_a_host_that_reads_nothing_holds_the_others_up_only_once_they_are_as_far_apart_as_is_said(
    shelf: DiskShelf,
) -> None:
    hosts = _Hosts(os.urandom(_APART + 3 * INPUT_WINDOW), 3, shelf)
    hosts.go()
    while hosts.take(0) | hosts.take(1):
        assert hosts.window.ahead <= INPUT_WINDOW, "in memory"
    assert _APART <= len(hosts.come[0]) <= _APART + INPUT_WINDOW
    while hosts.take(2):  # it wakes up, and they go on with it
        hosts.take(0)
        hosts.take(1)
    assert [bytes(come) for come in hosts.come] == [hosts.data] * 3
    assert hosts.ended == {0, 1, 2}
    hosts.feeding.close()
    assert hosts.window.ahead == 0


def test_hosts_that_are_about_as_fast_as_one_another_need_no_disk(
    shelf: DiskShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = _Hosts(bytes(3 * INPUT_WINDOW), 4, shelf)
    monkeypatch.setattr(shelf, "put", lambda *_: pytest.fail("it was put on the disk"))
    hosts.go()
    draw = random.Random(3)
    while len(hosts.ended) < 4:
        rank = min(draw.choices(range(4), k=2), key=lambda at: len(hosts.come[at]))
        hosts.take(rank)
    assert all(bytes(come) == hosts.data for come in hosts.come)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_read_when_and_sent_again_every_host_gets_all_of_it(shelf: DiskShelf, seed: int) -> None:
    draw = random.Random(seed)
    window = InputWindow(draw.choice((0, INPUT_TOTAL)))
    hosts = _Hosts(draw.randbytes(2 * _APART + 12_345), 4, shelf, window)
    hosts.go()
    speeds = [draw.choice((1, 4, 40)) for _ in range(4)]
    gone = draw.randrange(-2, 4)
    for turn in range(100_000):
        (rank,) = draw.choices(range(4), speeds)
        if rank == gone and turn > 200:
            hosts.feeding.over(rank)
        elif draw.random() < 0.02:  # its way up is a new one: what was on its way is lost
            back = max(0, len(hosts.come[rank]) - draw.randrange(INPUT_CREDIT))
            taken = hosts.feeding._readers[rank].taken if rank in hosts.feeding._readers else 0
            del hosts.come[rank][max(back, taken) :]
            hosts.ended.discard(rank)
            hosts.feeding.taken(rank, max(back, taken), is_open=True, anew=True)
            hosts.go()
        else:
            hosts.take(rank)
        assert window.ahead <= max(INPUT_WINDOW, INPUT_CREDIT)
        if hosts.ended >= {0, 1, 2, 3} - {gone}:
            break
    for rank in {0, 1, 2, 3} - {gone}:
        assert bytes(hosts.come[rank]) == hosts.data


def test_where_the_disk_has_no_room_the_slowest_holds_back_the_others_and_all_get_all(tmp_path: Path) -> None:
    hosts = _Hosts(os.urandom(3 * INPUT_WINDOW), 2, DiskShelf(tmp_path / "none"))
    hosts.go()
    while hosts.take(0):
        pass
    assert len(hosts.come[0]) == INPUT_WINDOW
    while hosts.take(1) | hosts.take(0):
        pass
    assert [bytes(come) for come in hosts.come] == [hosts.data] * 2


def test_the_service_leaves_some_of_its_disk_to_others(shelf: DiskShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shelf.put(0, b"x" * INPUT_PIECE)
    monkeypatch.setattr(shelf_module, "_LEFT", 1 << 62)
    assert not shelf.put(INPUT_PIECE, b"x" * INPUT_PIECE)
    assert shelf.get(0, INPUT_PIECE) == b"x" * INPUT_PIECE


def test_what_is_put_where_something_was_before_needs_no_more_of_the_disk(
    shelf: DiskShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_module, "INPUT_APART", 4 * INPUT_PIECE)

    def put(offset: int, size: int, *, free: bool) -> bool:
        monkeypatch.setattr(shelf_module, "_LEFT", 0 if free else 1 << 62)
        return shelf.put(offset, b"%d" % (offset % 10) * size)

    start = 2 * INPUT_PIECE + 7  # so the file is as long as it gets before it has all its room
    for number in range(3):
        assert put(start + number * INPUT_PIECE, INPUT_PIECE, free=True)
    end = start + 3 * INPUT_PIECE
    assert not put(end, INPUT_PIECE, free=False)
    assert put(end, INPUT_PIECE - 1, free=True)
    end += INPUT_PIECE - 1
    assert not put(end, 2, free=False), "one byte of it has no room yet"
    assert put(end, 2, free=True)
    end += 2
    for _ in range(9):
        shelf.drop(end - INPUT_PIECE)
        assert put(end, INPUT_PIECE, free=False)
        assert shelf.get(end, INPUT_PIECE) == b"%d" % (end % 10) * INPUT_PIECE
        end += INPUT_PIECE
    shelf.drop(end)
    assert not put(end, INPUT_PIECE, free=False), "the disk had its room back"


def test_what_nobody_needs_any_more_takes_no_disk(shelf: DiskShelf) -> None:
    shelf.put(0, b"x" * INPUT_PIECE)
    shelf.put(INPUT_PIECE, b"y" * INPUT_PIECE)
    assert shelf._file is not None
    descriptor = shelf._file.fileno()
    shelf.drop(INPUT_PIECE)
    assert shelf.get(INPUT_PIECE, 5) == b"yyyyy"
    shelf.drop(2 * INPUT_PIECE)
    assert os.fstat(descriptor).st_size == 0
    with pytest.raises(OSError, match="are there"):
        shelf.get(0, 5)


def test_a_disk_that_does_not_take_its_room_back_stops_nobody(shelf: DiskShelf) -> None:
    shelf.put(0, b"x" * INPUT_PIECE)
    assert shelf._file is not None
    file = shelf._file.fileno()
    reading = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    writing = os.dup(file)
    os.dup2(reading, file)
    shelf.drop(INPUT_PIECE)
    assert os.fstat(file).st_size == INPUT_PIECE
    assert not shelf.put(INPUT_PIECE, b"y" * INPUT_PIECE)
    os.dup2(writing, file)
    assert shelf.put(INPUT_PIECE, b"z" * INPUT_PIECE)
    assert shelf.get(INPUT_PIECE, INPUT_PIECE) == b"z" * INPUT_PIECE
    os.close(reading)
    os.close(writing)
