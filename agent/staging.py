"""Where a push is gathered before it is put in place: a hidden directory beside its destination, this user's alone.

It is beside the destination, so that one rename brings each thing there, and group and access lists are inherited from
where it goes. A note in the agent's own directory leads back to it: a push of the very same stream to the same place
goes on with what an earlier one left there, and what nobody comes back for is removed.

    parts/<key>                       the note: where the directory is
    <destination>/.canopy-<random>/   0700, locked (flock(2)) while a push is at work in it
        listing                       the head of the stream
        0, 7/a/b, …                   what will be renamed, by its number in the listing
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from agent.identity import write_atomically
from agent.paths import BadDestination, open_folder
from protocol.commands import Stream
from protocol.digest import content_digest

PREFIX = ".canopy-"
LISTING = "listing"
#: How long what an interrupted push left is kept, in seconds: whoever meant to go on does within a day.
KEPT_S = 86_400.0
#: And how much of it on a host, in bytes: one of the largest pushes. The oldest goes first.
KEPT_MOST = 64 << 30
#: A note that is younger than this is left alone, in seconds: the directory that it names may be about to be made.
_YOUNG_S = 60.0


class _Note(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`folder` is the destination from / on, `name` the hidden directory's."""

    folder: str
    name: str


def key_of(folder: str, stream: Stream, listing: bytes | None) -> str:
    """What stands for a push of these bytes to that folder."""
    found = stream.digest.encode() + content_digest(listing or b"") + os.fsencode(folder)
    return content_digest(found).hex()[:32]


class Staging:
    """One hidden directory, made when it is first needed."""

    def __init__(self, notes: Path, key: str, folder: str, parent: int) -> None:
        """`folder` is the destination's path, `parent` its descriptor, which stays the caller's. Takes over what an
        earlier push with this key left, if nobody else is at work on it."""
        self._parent = parent
        self._folder = folder
        self.fd: int | None = None
        self._name = ""
        self._note = notes / key
        #: Whether there is something of an earlier push in it.
        self.adopted = False
        found = _open_noted(self._note)
        if found is not None:
            above, self._name, self.fd = found
            self.adopted = os.path.samestat(os.fstat(above), os.fstat(parent))
            os.close(above)
            if not self.adopted:  # it is busy, or the destination is another directory now
                os.close(self.fd)
                self.fd, self._name = None, ""
        if self.fd is None and self._note.exists():
            self._note = notes / os.urandom(16).hex()

    def make(self) -> int:
        """The directory's descriptor. Raises OSError."""
        if self.fd is None:
            self._name = PREFIX + os.urandom(8).hex()
            note = _Note(folder=self._folder, name=self._name)
            write_atomically(self._note, msgspec.msgpack.encode(note))
            try:
                os.mkdir(self._name, 0o700, dir_fd=self._parent)
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                self.fd = os.open(self._name, flags, dir_fd=self._parent)
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                self.remove()
                raise
        return self.fd

    def remove(self) -> None:
        """Remove it with all that is in it."""
        with suppress(OSError):  # a file system that can't be written now: the next start tries again
            if self.fd is not None:
                _remove(self._parent, self._name, self.fd)
            if self._name:
                self._note.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave it as it is, for whoever comes back for it."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _open_noted(note: Path) -> tuple[int, str, int] | None:
    """The directory that a note leads to, locked: descriptor of the one above it, name, descriptor. None where there is
    none, somebody is at work in it, or it is not this process's."""
    try:
        noted = msgspec.msgpack.decode(note.read_bytes(), type=_Note)
        if "/" in noted.name or not noted.name.startswith(PREFIX):
            return None
        above = open_folder(noted.folder)
    except (OSError, msgspec.DecodeError, BadDestination):
        return None
    fd = -1
    try:
        fd = os.open(noted.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
            raise BadDestination("it is another's")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, BadDestination):
        if fd >= 0:
            os.close(fd)
        os.close(above)
        return None
    return above, noted.name, fd


def _remove(parent: int, name: str, fd: int) -> None:
    """Remove a directory of ours, open as `fd`: what is in it by that, whatever bears its name now."""
    import shutil  # with it come three compressors, which an agent that has no push does without

    inside = f"/proc/self/fd/{fd}"
    if os.geteuid() != 0:
        # An ordinary user can't remove what is in directories whose mode does not let them.
        for _, names, _, folder in os.fwalk(".", dir_fd=fd):
            for inner in names:
                with suppress(OSError):
                    os.chmod(f"/proc/self/fd/{folder}/{inner}", 0o700)
    with os.scandir(fd) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(f"{inside}/{entry.name}")
        else:
            os.unlink(entry.name, dir_fd=fd)
    with suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=parent)


def _size(fd: int) -> int:
    """What is in a directory takes so many bytes of its disk."""
    total = 0
    for _, _, files, folder in os.fwalk(".", dir_fd=fd):
        for name in files:
            with suppress(OSError):
                total += os.stat(name, dir_fd=folder, follow_symlinks=False).st_blocks * 512
    return total


def _kept(notes: Path) -> Iterator[tuple[float, Path, int, str, int]]:
    for note in sorted(notes.iterdir()) if notes.is_dir() else ():
        with suppress(FileNotFoundError):
            modified = note.stat().st_mtime
            if 0 <= time.time() - modified < _YOUNG_S:
                continue
            found = _open_noted(note)
            if found is not None:
                yield modified, note, *found
            elif not _busy(note):
                note.unlink(missing_ok=True)


def _busy(note: Path) -> bool:
    """Whether a note leads to a directory that somebody is at work in, or that can't be looked at now."""
    try:
        noted = msgspec.msgpack.decode(note.read_bytes(), type=_Note)
        above = open_folder(noted.folder)
    except (msgspec.DecodeError, BadDestination, FileNotFoundError):
        return False
    except OSError:
        return True
    try:
        info = os.stat(noted.name, dir_fd=above, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    finally:
        os.close(above)
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()


def trim(notes: Path, *, most: int = KEPT_MOST, age: float = KEPT_S, now: float | None = None) -> None:
    """Remove what interrupted pushes left `age` seconds ago or more, and the oldest of the rest until the others have
    at most `most` bytes. What is being worked in stays. Blocks."""
    now = time.time() if now is None else now
    kept = sorted(_kept(notes), key=lambda one: one[0], reverse=True)
    total = 0
    for modified, note, above, name, fd in kept:
        total += _size(fd)
        if now - modified >= age or total > most:
            with suppress(OSError):
                _remove(above, name, fd)
                note.unlink(missing_ok=True)
        os.close(fd)
        os.close(above)
