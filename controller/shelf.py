"""What fast hosts have taken of a command's input and slow ones have not, on the service's disk."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from protocol.limits import INPUT_APART

#: So much of the disk is left to others, in bytes: the service's own record is on it.
_LEFT = 1 << 30


class DiskShelf:
    """A `protocol.feeding.Shelf`: a file without a name, of INPUT_APART at the most, written round and round.

    The service's event loop waits for each `put` and `get`: for a copy to or from the kernel's cache mostly, and for
    the disk itself where that is behind with writing, or where what a slow host needs is no longer in memory. That is
    an INPUT_PIECE at a time. With a thread it would wait for neither, but `protocol.feeding` would have to have its
    bytes given later, in an event of their own.
    """

    def __init__(self, folder: Path) -> None:
        """The file is in `folder`, from the first `put` on."""
        self._folder = folder
        self._file: BinaryIO | None = None
        #: Between these offsets everything was put since the file was empty: round and round, in one stretch.
        self._begin = self._end = 0

    def put(self, offset: int, data: bytes) -> bool:
        """Keep what follows on what was put last; false where the disk has no room."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  closed in `close`
            begin = self._begin if self._end else offset
            # What is written over what was there before takes no more of the disk.
            more = min(len(data), begin + INPUT_APART - offset)
            if more > 0:
                disk = os.fstatvfs(self._file.fileno())
                if disk.f_bavail * disk.f_frsize < _LEFT + more:
                    return False
            at = offset % INPUT_APART
            first = data[: INPUT_APART - at]
            for place, part in ((at, first), (0, data[len(first) :])):
                if os.pwrite(self._file.fileno(), part, place) < len(part):
                    return False
        except OSError:
            return False
        self._begin, self._end = begin, offset + len(data)
        return True

    def get(self, offset: int, size: int) -> bytes:
        """Bytes that were put and not dropped. Raises OSError where they can't be read."""
        if self._file is None:
            raise OSError(errno.EIO, "nothing was put away")
        at = offset % INPUT_APART
        data = os.pread(self._file.fileno(), min(size, INPUT_APART - at), at)
        data += os.pread(self._file.fileno(), size - len(data), 0) if at + size > INPUT_APART else b""
        if len(data) != size:
            raise OSError(errno.EIO, f"{size} bytes were put away, and {len(data)} are there")
        return data

    def drop(self, upto: int) -> None:
        """Nobody needs what is before this offset: where that is all, the disk has its room back."""
        if self._file is not None and 0 < self._end <= upto:
            self._end = 0
            # Where that fails, the room comes back in `close`, and what hosts said is heard to its end.
            with suppress(OSError):
                self._file.truncate(0)

    def close(self) -> None:
        """Nobody needs any of it."""
        if self._file is not None:
            self._file.close()
            self._file = None
