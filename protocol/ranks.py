"""Sets of ranks as Python integers: bit r is set when rank r is in the set.

A relay splits the targets of a command with one AND per child and folds outcomes with one OR, whatever the
number of hosts. On the wire a set is its little-endian bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from protocol.limits import MAX_RANK

#: A set of ranks. Non-negative; bit r stands for rank r.
Ranks = int

NONE: Ranks = 0


def only(rank: int) -> Ranks:
    """The set that holds `rank` alone."""
    return 1 << rank


def union(ranks: Iterable[int]) -> Ranks:
    """The set of the given ranks."""
    bits = bytearray()
    for rank in ranks:
        byte = rank >> 3
        if byte >= len(bits):
            bits.extend(bytes(byte + 1 - len(bits)))
        bits[byte] |= 1 << (rank & 7)
    return int.from_bytes(bits, "little")


def each(ranks: Ranks) -> Iterator[int]:
    """The members of the set, in ascending order."""
    if ranks and not ranks & (ranks - 1):  # one alone, as where all outputs differ
        yield ranks.bit_length() - 1
        return
    for index, byte in enumerate(ranks.to_bytes((ranks.bit_length() + 7) // 8, "little")):
        base = index << 3
        left = byte
        while left:
            low = left & -left
            yield base + low.bit_length() - 1
            left ^= low


def count(ranks: Ranks) -> int:
    """How many ranks are in the set."""
    return ranks.bit_count()


def holds(ranks: Ranks, rank: int) -> bool:
    """Whether `rank` is in the set."""
    return bool(ranks >> rank & 1)


def pack(ranks: Ranks) -> bytes:
    """The set as it travels: little-endian, without trailing zero bytes."""
    return ranks.to_bytes((ranks.bit_length() + 7) // 8, "little")


def unpack(data: bytes) -> Ranks:
    """The set of `pack`'s bytes. Raises ValueError where it names a rank above `MAX_RANK`."""
    ranks = int.from_bytes(data, "little")
    if ranks.bit_length() > MAX_RANK + 1:
        raise ValueError(f"a set of ranks may not go above {MAX_RANK}")
    return ranks
