"""Standard input on its way from one client to the processes of many hosts, each of which says how much it has taken.
Pure.

What the fastest have taken and the slowest have not is kept: a little of it in memory, the rest on a shelf, so that a
host that reads slowly, or not at all, holds nobody back before they are INPUT_APART ahead of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from protocol.limits import INPUT_APART, INPUT_CREDIT, INPUT_PIECE, INPUT_TOTAL, INPUT_WINDOW


class Shelf(Protocol):
    """Where bytes of one input are kept that only the slow have not taken: INPUT_APART of them at the most."""

    def put(self, offset: int, data: bytes) -> bool:
        """Keep what follows on what was put last; false where there is no room."""

    def get(self, offset: int, size: int) -> bytes:
        """Bytes that were put and not dropped. Raises OSError where they can't be read."""

    def drop(self, upto: int) -> None:
        """Nobody needs what is before this offset."""

    def close(self) -> None:
        """Nobody needs any of it."""


class InputWindow:
    """What the service keeps in memory of the inputs of all commands together, beyond what each needs to go on."""

    def __init__(self, total: int = INPUT_TOTAL) -> None:
        self._total = total
        #: Bytes that clients may send, or have sent and some host has not taken.
        self.ahead = 0

    @property
    def free(self) -> int:
        """How much more may be kept."""
        return max(0, self._total - self.ahead)


class _Reader:
    """One host that reads an input: how much it has taken, and how much it was sent."""

    def __init__(self) -> None:
        self.taken = 0
        self.sent = 0
        self.ready = False


class Feeding:
    """The standard input of one command at the root. It keeps INPUT_WINDOW in memory, and INPUT_APART where it has a
    shelf: whoever takes least holds back the others once they are so far ahead."""

    def __init__(self, hosts: Iterable[int], window: InputWindow | None = None, shelf: Shelf | None = None) -> None:
        """`window` is shared with other commands, `shelf` is not."""
        self._readers = {rank: _Reader() for rank in hosts}
        self._window = window or InputWindow()
        self._shelf = shelf
        #: What is in memory; where that begins, and where what is kept begins: the rest of that is on the shelf.
        self._data = bytearray()
        self._from = self._start = 0
        self._last = False
        #: How much the fastest has taken.
        self._most = 0
        #: The offset up to which the client may send.
        self.room = 0
        self._closed = False
        self._widen()

    @property
    def _end(self) -> int:
        return self._from + len(self._data)

    def _widen(self) -> None:
        ahead = self.room - self._from
        # What a host may have untaken is each command's own: it goes on, whatever others keep.
        more = max(min(INPUT_WINDOW - ahead, self._window.free), INPUT_CREDIT - ahead)
        if more > 0:
            self.room += more
            self._window.ahead += more

    def close(self) -> None:
        """The command is over, once."""
        self._readers.clear()
        self._data.clear()
        self._window.ahead -= self.room - self._from
        self._closed = True
        if self._shelf is not None:
            self._shelf.close()

    def add(self, data: bytes, *, last: bool) -> bool:
        """More from the client; false where that was more than it may send, or comes after the end."""
        if self._closed:
            return True  # it was on its way
        if self._last or self._end + len(data) > self.room:
            return False
        self._data += data
        if not self._readers:
            self._advance(self._end)
        self._last = last
        return True

    def _advance(self, start: int) -> None:
        """Nobody needs what is before `start`."""
        self._start = start
        if self._shelf is not None:
            self._shelf.drop(start)
        if start > self._from:
            self._take_out(start - self._from)
        self._widen()

    def _take_out(self, count: int) -> None:
        del self._data[:count]
        self._from += count
        self._window.ahead -= count

    def taken(self, rank: int, count: int, *, is_open: bool, anew: bool) -> None:
        """A host has read `count` bytes. With `anew` it begins there, for it may have missed what it was sent."""
        reader = self._readers.get(rank)
        if reader is None:
            return
        if not is_open:
            self.over(rank)
            return
        if not reader.taken <= count <= self._end:
            return  # it can't have taken what it was not sent, nor give it back
        reader.ready |= anew
        reader.taken = count
        reader.sent = count if anew else max(reader.sent, count)
        self._most = max(self._most, count)
        self._forget()

    def over(self, rank: int) -> None:
        """This host reads no more."""
        if self._readers.pop(rank, None) is not None:
            self._forget()

    def _forget(self) -> None:
        least = min((reader.taken for reader in self._readers.values()), default=self._end)
        if least > self._start:
            self._advance(least)
        self._put_away()

    def _put_away(self) -> None:
        """Where somebody has taken more than half of what there is room for in memory, put what is before away for
        those who are slower: so there is room for more."""
        if self._shelf is None or self._closed:
            return
        while self._most - self._from - (self.room - self._from) // 2 >= INPUT_PIECE:
            if self._from + INPUT_PIECE - self._start > INPUT_APART:
                return
            if not self._shelf.put(self._from, bytes(self._data[:INPUT_PIECE])):
                return
            self._take_out(INPUT_PIECE)
            self._widen()

    def _read(self, offset: int) -> bytes:
        if offset < self._from and self._shelf is not None:
            return self._shelf.get(offset, min(INPUT_PIECE, self._from - offset))
        return bytes(self._data[offset - self._from : offset - self._from + INPUT_PIECE])

    def pieces(self) -> Iterator[tuple[list[int], int, bytes, bool]]:
        """What is to be sent now: to whom, from which offset, the bytes, and whether it is the end. Raises OSError
        where what was put away can't be read."""
        end = self._end
        while True:
            groups: dict[int, list[int]] = {}
            for rank, reader in self._readers.items():
                at_end = reader.sent == end and self._last
                if reader.ready and (at_end or (reader.sent < end and reader.sent - reader.taken < INPUT_CREDIT)):
                    groups.setdefault(reader.sent, []).append(rank)
            if not groups:
                return
            for offset, who in sorted(groups.items()):
                data = self._read(offset)
                last = self._last and offset + len(data) == end
                yield who, offset, data, last
                for rank in who:
                    # One beyond the end: it was sent.
                    self._readers[rank].sent = offset + len(data) + last
