"""What is there to be sent: files, directories and links below some roots, listed without following links.

All functions block; the caller runs them in a thread. Holes are not read (lseek(2), SEEK_DATA).
"""

from __future__ import annotations

import errno
import os
import stat

import msgspec

from agent.paths import BadDestination, Below
from protocol.limits import MAX_ENTRIES
from protocol.listing import Entry, Kind, shown
from protocol.wishes import Wishes

#: Parts of one sparse file; where there are more, the smallest holes are sent as zeros.
_EXTENTS_MOST = 4_096
#: For reading, without waiting for the other end of what turns out to be a pipe.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

_KINDS = (
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


class BadSource(Exception):
    """It can't be sent; the text says what and why, all of it at once."""


class Walk:
    """Lists what is below some roots."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._owned = bool(wishes.user or wishes.group or wishes.preserve)
        self.entries: list[Entry] = []
        self.troubles: list[str] = []
        self._seen: dict[tuple[int, int], bytes] = {}
        self._owners: dict[tuple[str, str], int] = {}
        self._names: dict[tuple[bool, int], str] = {}

    @property
    def owners(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._owners)

    def root(self, name: bytes, path: str) -> int:
        """List a root; the descriptor of what it is."""
        info = os.stat(path)
        kind = next((what for judge, what in _KINDS if judge(info.st_mode)), None)
        if kind is not None:
            raise BadSource(f"{path} is {kind}: only files, directories and symbolic links can be sent")
        fd = os.open(path, READ & ~os.O_NOFOLLOW)
        try:
            info = os.fstat(fd)
            self._add(name, info, None, name)
            if stat.S_ISDIR(info.st_mode):
                self._xattrs_of_last(fd)
                self._below(name, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _below(self, root: bytes, fd: int) -> None:
        below = Below(fd)
        waiting = [b""]
        try:
            while waiting:
                folder = waiting.pop()
                path = root + b"/" + folder if folder else root
                inner: list[bytes] = []
                try:
                    here = below.directory(folder)
                    if folder:
                        self._xattrs_of(path, here)
                    with os.scandir(here) as found:
                        names = sorted(found, key=lambda item: item.name)
                except (OSError, BadDestination) as error:
                    self._trouble(path, error)
                    continue
                for item in names:
                    name = os.fsencode(item.name)
                    try:
                        info = item.stat(follow_symlinks=False)
                        if self._add(path + b"/" + name, info, here, name):
                            inner.append(folder + b"/" + name if folder else name)
                    except OSError as error:
                        self._trouble(path + b"/" + name, error)
                if len(self.entries) > MAX_ENTRIES:
                    raise BadSource(f"there are more than {MAX_ENTRIES} files and directories: send fewer at a time")
                waiting += reversed(inner)
        finally:
            below.close()

    def _trouble(self, path: bytes, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self.troubles.append(f"{shown(path)}: {why}")

    def _add(self, path: bytes, info: os.stat_result, folder: int | None, name: bytes) -> bool:
        """One name. Whether it is a directory."""
        wishes, mode = self._wishes, stat.S_IMODE(info.st_mode)
        owner = self._owner(info) if self._owned else None
        mtime = info.st_mtime_ns if wishes.preserve else None
        if stat.S_ISDIR(info.st_mode):
            self.entries.append(Entry(path, Kind.DIRECTORY, mode, mtime, owner=owner))
            return True
        if stat.S_ISLNK(info.st_mode):
            target = os.readlink(name, dir_fd=folder)
            self.entries.append(Entry(path, Kind.LINK, None, mtime, target=os.fsencode(target), owner=owner))
        elif stat.S_ISREG(info.st_mode):
            earlier = self._seen.get((info.st_dev, info.st_ino)) if info.st_nlink > 1 else None
            if earlier is not None:
                self.entries.append(Entry(path, Kind.SAME, target=earlier))
                return False
            if info.st_nlink > 1:
                self._seen[info.st_dev, info.st_ino] = path
            mode = mode if wishes.mode is None else wishes.mode
            mtime = info.st_mtime_ns if wishes.times or wishes.preserve else None
            # What is behind the dot of `extents` is found when the file is read.
            sparse = () if wishes.sparse and info.st_blocks * 512 < info.st_size else None
            self.entries.append(Entry(path, Kind.FILE, mode, mtime, info.st_size, owner=owner, extents=sparse))
        else:
            kind = next(what for judge, what in _KINDS if judge(info.st_mode))
            self.troubles.append(f"{shown(path)}: it is {kind}")
        return False

    def _owner(self, info: os.stat_result) -> int | None:
        wishes = self._wishes
        user = wishes.user or (self._name_of(info.st_uid, group=False) if wishes.preserve else "")
        group = wishes.group or (self._name_of(info.st_gid, group=True) if wishes.preserve else "")
        if not user and not group:
            return None
        return self._owners.setdefault((user, group), len(self._owners))

    def _name_of(self, number: int, *, group: bool) -> str:
        if (group, number) not in self._names:
            import grp
            import pwd

            try:
                name = grp.getgrgid(number).gr_name if group else pwd.getpwuid(number).pw_name
            except KeyError:
                name = str(number)
            self._names[group, number] = name
        return self._names[group, number]

    def _xattrs_of(self, path: bytes, fd: int) -> None:
        """The attributes of a directory, whose entry was made before it was opened."""
        if self._wishes.xattrs and (found := xattrs(fd)):
            index = next(i for i in range(len(self.entries) - 1, -1, -1) if self.entries[i].path == path)
            self.entries[index] = msgspec.structs.replace(self.entries[index], xattrs=found)

    def _xattrs_of_last(self, fd: int) -> None:
        self._xattrs_of(self.entries[-1].path, fd)


def xattrs(fd: int) -> tuple[tuple[str, bytes], ...]:
    """The extended attributes of an open file that mean the same elsewhere (xattr(7)): a user's, access control lists
    and capabilities."""
    kept = ("user.", "system.posix_acl_", "security.capability")
    try:
        return tuple((name, os.getxattr(fd, name)) for name in sorted(os.listxattr(fd)) if name.startswith(kept))
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return ()
        raise


def extents_of(fd: int, size: int) -> tuple[tuple[int, int], ...]:
    """The parts of a file that are data: offset and length each. At most _EXTENTS_MOST of them."""
    found: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to its end
                break
            raise
        at = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        if begin >= size:
            break
        found.append((begin, at - begin))
    gap = 4096
    while len(found) > _EXTENTS_MOST:
        gap *= 4
        joined = found[:1]
        for begin, length in found[1:]:
            last, had = joined[-1]
            if begin - (last + had) < gap:
                joined[-1] = (last, begin + length - last)
            else:
                joined.append((begin, length))
        found = joined
    return tuple(found)
