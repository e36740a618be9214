"""What of a listing is on this host already, and what must change: looked at before anything is touched.

All functions block; the caller runs them in a thread.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from agent.paths import BadDestination, Below
from agent.source import digest_of
from agent.walk import READ, BadSource, extents_of
from protocol.listing import Entry, Kind, Listing, Map, parent_of, shown

#: Changes that a dry run tells of one by one.
_TOLD = 200
#: In nanoseconds.
_SECOND = 1_000_000_000
#: How exactly file systems keep a time of change, in nanoseconds: NTFS and CIFS 100, exFAT 10 ms, ext4 with inodes of
#: 128 bytes whole seconds (ext4(5)), FAT 2 s. Linux rounds down (fat_truncate_mtime; timestamp_truncate for others).
_GRAINS = (100, _SECOND // 100, _SECOND, 2 * _SECOND)
#: What is put right of things whose content is.
_DRESS = "mode, time, owner or attributes"


class State(IntEnum):
    """What is at an entry's place."""

    RIGHT = 0  # the same content: at most its mode, times, owner or attributes are to be put right
    NEW = 1  # nothing
    OTHER = 2  # a file or link that will be replaced


@dataclass
class Comparison:
    """What is to be done. A *unit* is what one rename puts in place: a file, a link, or a whole new directory."""

    states: bytearray
    #: For each entry that is not right: the entry whose rename brings it there. An array, since there may be 50,000.
    unit_of: array[int] = field(default_factory=lambda: array("l"))
    units: array[int] = field(default_factory=lambda: array("l"))
    #: Entries with the right content whose mode, times, owner or attributes differ.
    to_fix: array[int] = field(default_factory=lambda: array("l"))
    #: Directories that are right, and whose time of change is to be so again once something was put into them.
    to_redate: set[int] = field(default_factory=set)

    def changing(self) -> Iterator[int]:
        """The entries that are not right, in order."""
        right = State.RIGHT
        return (index for index, state in enumerate(self.states) if state != right)

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.states) - self.states.count(State.RIGHT)

    def said(self, listing: Listing) -> str:
        """What comes of it, in words that fold: `pushed`, `unchanged`, `pushed 3 of 10`, or what else is put right."""
        if not self.units:
            return f"{_DRESS} of {len(self.to_fix)}" if self.to_fix else "unchanged"
        if self.count == len(self.states):
            return "pushed"
        total = len(self.states) - sum(entry.kind is Kind.DIRECTORY for entry in listing.entries)
        changed = sum(listing.entries[index].kind is not Kind.DIRECTORY for index in self.changing())
        return "pushed" if changed == total else f"pushed {changed} of {total}"

    def would(self, listing: Listing) -> str:
        """What would come of it, a line for each change."""
        words = {State.NEW: "new", State.OTHER: "changed"}
        lines = [f"{words[State(self.states[i])]}: {shown(listing.entries[i].path)}" for i in self.changing()]
        lines += [f"{_DRESS}: {shown(listing.entries[i].path)}" for i in self.to_fix]
        if not lines:
            return "nothing would change"
        more = len(lines) - _TOLD
        return "\n".join(lines[:_TOLD]) + (f"\nand {more} more" if more > 0 else "")


def first_names(listing: Listing) -> dict[bytes, int]:
    """The files that have other names in the listing (hard links), by the path of the first."""
    same = Kind.SAME
    targets = {entry.target for entry in listing.entries if entry.kind is same}
    return {e.path: index for index, e in enumerate(listing.entries) if e.path in targets} if targets else {}


def owner_ids(listing: Listing) -> tuple[tuple[int, int], ...]:
    """The listing's owners as numbers, -1 for those that are not to change.

    Raises BadDestination for one that this host does not know, or that this process may not give files to.
    """
    found: list[tuple[int, int]] = []
    for user, group in listing.owners:
        uid = gid = -1
        if user:
            uid = _number(user, "user")
        if group:
            gid = _number(group, "group")
        if os.geteuid() != 0 and (uid not in (-1, os.geteuid()) or gid not in (-1, os.getegid(), *os.getgroups())):
            raise BadDestination(
                f"only root can give files to {':'.join(filter(None, (user, group)))}, and this agent is another user"
            )
        found.append((uid, gid))
    return tuple(found)


def _number(name: str, what: str) -> int:
    # pwd is a part of every Python on Linux, and an agent that is not asked for owners does without.
    import grp
    import pwd

    try:
        return grp.getgrnam(name).gr_gid if what == "group" else pwd.getpwnam(name).pw_uid
    except KeyError:
        if name.isascii() and name.isdecimal() and int(name) < 2**32 - 1:
            return int(name)
        raise BadDestination(f"there is no {what} {name} on this host") from None


@dataclass
class Looker:
    """Looks at every entry's place below `folder`, a descriptor.

    `right(index, fd)` says whether an open file of the right size has entry `index`'s content. With `by_time` a file
    with the same size and time is taken for it. With `exact` modes and times of all that is there are to be right too,
    else those of files alone. A time alone, but for that of a file or link with `exact`, is to be right only where this
    process can set it.
    """

    folder: int
    listing: Listing
    owners: tuple[tuple[int, int], ...]
    right: Callable[[int, int], bool]
    by_time: bool = False
    exact: bool = False

    def look(self) -> Comparison:
        """Raises BadDestination where something is in the way, OSError. Changes nothing."""
        count = len(self.listing.entries)
        self._found = Comparison(bytearray(count), array("l", [-1]) * count)
        self._below = Below(self.folder)
        self._places = first_names(self.listing)
        self._uid = os.geteuid()
        device = os.fstat(self.folder).st_dev
        #: New directories, and the unit that each is part of. Most of a large push is below one.
        new: dict[bytes, int] = {}
        found, writable = self._found, b"\0"
        there: dict[bytes, int] = {}
        directory, is_new = Kind.DIRECTORY, int(State.NEW)
        try:
            for index, entry in enumerate(self.listing.entries):
                above = entry.path.rpartition(b"/")[0]
                unit = new.get(above)
                if unit is not None:
                    found.states[index], found.unit_of[index] = is_new, unit
                    if entry.kind is directory:
                        new[entry.path] = unit
                    continue
                state = found.states[index] = self._at(index, entry, above)
                if state == State.RIGHT:
                    if self.exact and entry.kind is directory:
                        there[entry.path] = index
                    continue
                if state == State.NEW and entry.kind is directory:
                    new[entry.path] = index
                if above in there:
                    found.to_redate.add(there[above])
                if above != writable:
                    self._check_parent(above, device)
                    writable = above
                found.unit_of[index] = index
                found.units.append(index)
        finally:
            self._below.close()
        return found

    def _check_parent(self, above: bytes, device: int) -> None:
        parent = self._below.directory(above)
        if os.fstat(parent).st_dev != device:
            raise BadDestination(f"{shown(above)} is another file system: push to it by itself")
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=parent, effective_ids=True):
            read_only = os.fstatvfs(parent).f_flag & os.ST_RDONLY
            number = errno.EROFS if read_only else errno.EACCES
            raise OSError(number, os.strerror(number), shown(above) or os.readlink(f"/proc/self/fd/{parent}"))

    def _at(self, index: int, entry: Entry, above: bytes) -> State:
        parent = self._below.directory(above)
        name = entry.path[len(above) + 1 :] if above else entry.path
        try:
            info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return State.NEW
        if not self._same(index, entry, info, parent, name):
            return State.OTHER
        if self._differs(entry, info, parent):
            if self._uid not in (0, info.st_uid):  # chown(2), chmod(2), utimensat(2)
                raise BadDestination(
                    f"{shown(entry.path)} is another user's here: only that user or root can put its {_DRESS} right"
                )
            self._found.to_fix.append(index)
        elif entry.xattrs and not _has_attributes(entry, parent, name):
            self._found.to_fix.append(index)
        return State.RIGHT

    def _same(self, index: int, entry: Entry, info: os.stat_result, parent: int, name: bytes) -> bool:
        """Whether what is at an entry's place has its content already."""
        kind = info.st_mode
        if entry.kind is Kind.DIRECTORY:
            if stat.S_ISLNK(kind):
                raise BadDestination(f"{shown(entry.path)} is a symbolic link here, and is not followed")
            if not stat.S_ISDIR(kind):
                raise BadDestination(f"{shown(entry.path)} is no directory here")
            return True
        if stat.S_ISDIR(kind):
            raise BadDestination(f"{shown(entry.path)} is a directory: end the destination with / to push into it")
        if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):
            raise BadDestination(f"{shown(entry.path)} is there and is no regular file")
        if entry.kind is Kind.LINK:
            return stat.S_ISLNK(kind) and os.fsencode(os.readlink(name, dir_fd=parent)) == entry.target
        if not stat.S_ISREG(kind):
            return False  # the rename will replace the link itself, not what it points to
        if entry.kind is Kind.SAME:
            return self._found.states[self._places[entry.target]] == State.RIGHT and self._is_name_of(entry, info)
        if info.st_size != entry.size:
            return False
        # What was made a second later may well have as many bytes: so coarse a time vouches for nothing.
        if self.by_time and entry.mtime_ns is not None and _is_time(entry.mtime_ns, info, _SECOND):
            return True
        fd = os.open(name, READ, dir_fd=parent)  # not blocking, should it have become a pipe since
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode) and self.right(index, fd)
        finally:
            os.close(fd)

    def _is_name_of(self, entry: Entry, info: os.stat_result) -> bool:
        above = parent_of(entry.target)
        name = entry.target[len(above) + 1 :] if above else entry.target
        other = os.stat(name, dir_fd=self._below.directory(above), follow_symlinks=False)
        return os.path.samestat(other, info)

    def _differs(self, entry: Entry, info: os.stat_result, parent: int) -> bool:
        if entry.owner is not None:
            uid, gid = self.owners[entry.owner]
            if uid not in (-1, info.st_uid) or gid not in (-1, info.st_gid):
                return True
        if self.exact or entry.kind is Kind.FILE:
            if entry.mode is not None and entry.kind is not Kind.LINK and stat.S_IMODE(info.st_mode) != entry.mode:
                return True
            if entry.mtime_ns is not None and not _is_time(entry.mtime_ns, info):
                return (self.exact and entry.kind is not Kind.DIRECTORY) or self._can_set_time(info, parent)
        return False

    def _can_set_time(self, info: os.stat_result, parent: int) -> bool:
        """Whether this process may set a time (utimensat(2))."""
        return self._uid in (0, info.st_uid) and not os.fstatvfs(parent).f_flag & os.ST_RDONLY


def _is_time(mtime_ns: int, info: os.stat_result, coarsest: int = _GRAINS[-1]) -> bool:
    """Whether a file's time is that, as exactly as its file system keeps it: by `coarsest` nanoseconds at worst."""
    there = info.st_mtime_ns
    return there == mtime_ns or any(there == mtime_ns - mtime_ns % grain for grain in _GRAINS if grain <= coarsest)


def _has_attributes(entry: Entry, parent: int, name: bytes) -> bool:
    """Whether a file or directory has an entry's extended attributes. What else it has is its own."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        return all(os.getxattr(f"/proc/self/fd/{fd}", attribute) == value for attribute, value in entry.xattrs)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise
    finally:
        os.close(fd)


def has_holes(entry: Entry, fd: int) -> bool:
    """Whether an open file of the right size has holes wherever an entry has some."""
    if entry.extents is None:
        return True
    parts = iter(entry.extents)
    begin, end = 0, 0
    for offset, length in extents_of(fd, entry.size):
        while offset >= end:
            part = next(parts, None)
            if part is None:
                return False
            begin, end = part[0], part[0] + part[1]
        if offset < begin or offset + length > end:
            return False
    return True


def has_content(entry: Entry, fd: int) -> bool:
    """Whether an open file of the right size has an entry's data, by its digest, and nothing where that has holes."""
    if not has_holes(entry, fd):
        return False
    try:
        return digest_of(fd, entry) == entry.digest
    except BadSource:  # it became shorter meanwhile
        return False


def check_room(folder: int, listing: Listing, found: Comparison, there: int) -> None:
    """Raise OSError (ENOSPC) where the file system of `folder` has no room for what is to come. `there` bytes of it are
    on disk already, from an earlier attempt. Source: statvfs(3)."""
    room = os.statvfs(folder)
    block = room.f_frsize or 4096
    entries, names = listing.entries, found.count
    blocks = 0
    for index in found.changing():
        entry = entries[index]
        data = entry.size if entry.extents is None else entry.data  # of what is no file, 0
        blocks += -(-data // block)
    need = blocks * block
    free = (room.f_bfree if os.geteuid() == 0 else room.f_bavail) * block
    if names and (need - there > free or free == 0):
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {need - there} bytes are needed and {free} are free")
    inodes = room.f_ffree if os.geteuid() == 0 else room.f_favail
    if room.f_files and names > inodes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {names} files are to come and {inodes} can be made")


def missing_chunks(listing: Listing, places: Map, found: Comparison, chunk: int, count: int) -> bytearray:
    """For each of `count` chunks of data whether it has something that is not here (1)."""
    if found.count == len(listing.entries):
        return bytearray(b"\1") * count
    missing = bytearray(count)
    for index in found.changing():
        if listing.entries[index].data:
            begin, end = places.span(index)
            first, last = begin // chunk, (end - 1) // chunk
            missing[first : last + 1] = b"\1" * (last + 1 - first)
    return missing
