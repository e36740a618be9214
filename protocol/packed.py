"""A long sequence that stays packed: its items are decoded some hundred at a time, when they are looked at. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar, overload

Item = TypeVar("Item")

#: Items that are decoded at a time: enough that the calls for it don't count.
_BLOCK = 256
#: Blocks that stay decoded: of those who write, read for others and put in place at one time, one each and one more.
_KEPT = 4


class Packed(Sequence[Item], Generic[Item]):
    """Items that lie packed one after another in a buffer. May be used by several threads at once."""

    def __init__(
        self, buffer: memoryview, begin: int, sizes: Iterable[int], decode: Callable[[int, memoryview], Sequence[Item]]
    ) -> None:
        """The first item begins at `begin`, each has so many bytes. `decode` makes so many items of such a part of the
        buffer, which stays as it is."""
        self._buffer, self._decode = buffer, decode
        self._starts = array("Q", [begin])
        self._count, end = 0, begin
        for size in sizes:
            end += size
            self._count += 1
            if not self._count % _BLOCK:
                self._starts.append(end)
        if self._count % _BLOCK:
            self._starts.append(end)
        self._kept: list[tuple[int, Sequence[Item]]] = [(-1, ())] * _KEPT

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        for number in range(len(self._starts) - 1):
            yield from self._block(number)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        number, inside = divmod(index % self._count, _BLOCK)
        return self._block(number)[inside]

    def _block(self, number: int) -> Sequence[Item]:
        kept, items = self._kept[number % _KEPT]
        if kept != number:
            begin, end = self._starts[number], self._starts[number + 1]
            items = self._decode(min(_BLOCK, self._count - number * _BLOCK), self._buffer[begin:end])
            self._kept[number % _KEPT] = number, items
        return items
