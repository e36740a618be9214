"""What glibc does with memory that a push frees; another libc has no such calls, and does as it does."""

from __future__ import annotations

from contextlib import suppress

#: mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Bytes that are kept at the end of the heap for what comes next: the chunks that are in use at a time.
_KEPT = 4 << 20
#: And a block below this many bytes comes from the heap: any chunk, sealed or not.
_FROM_HEAP = 4 << 20


def keep_freed() -> None:
    """Keep some of what is freed. By default each chunk would come as fresh pages from the kernel, which clears them,
    and go back: a tenth of all that a push costs."""
    import ctypes

    with suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _FROM_HEAP)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def give_back() -> None:
    """Return what is free to the system: glibc keeps what was freed below what is still in use, by thread
    (malloc_trim(3))."""
    import ctypes

    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
