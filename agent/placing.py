"""From the staging directory to its place: each thing by one rename, after all of them are on disk.

What is promised of a disk that loses power: once a host says that it is done, everything is on disk under its name;
before that, each name has what it had or what it will have. A few files are synced one by one (fsync(2)), many together
with their file system (syncfs(2)), before any is renamed.

All functions block; the caller runs them in threads.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from agent.compare import State, first_names
from agent.paths import BadDestination
from agent.source import digest_of
from agent.staged import Staged, set_attributes
from protocol.listing import Entry, Kind, parent_of, shown

#: Files that are synced one by one; more are synced with all else on their file system, which is one call.
_SYNCED_EACH = 16


@dataclass
class Placing:
    """The way of one listing's things to their places below `folder`, a descriptor that stays the caller's."""

    folder: int
    staged: Staged
    backup: str
    exact: bool

    def __post_init__(self) -> None:
        staged = self.staged
        self.listing, self.owners, self.found, self.staging = (
            staged.listing,
            staged.owners,
            staged.found,
            staged.staging,
        )

    def finish(self) -> None:
        """Put everything in its place. Raises OSError, BadDestination where something is in the way by now."""
        found = self.found
        if found.units:
            self._complete()
            self._sync()
        with self.staged.below_lock:
            if found.units:
                self.staged.below.close()  # what was a directory when it was looked at may be a link now
                for unit in found.units:
                    self._put(unit)
            fixed = set(found.to_fix)
            for index in sorted(found.to_redate | fixed, reverse=True):
                if index in fixed:
                    self._fix(index)
                else:
                    self._redate(index)
            if found.units:
                self._sync_folders()

    def _complete(self) -> None:
        """Make what has no data, and check and dress what came in parts."""
        found, entries, staging = self.found, self.listing.entries, self.staging.make()
        files, done, directories = first_names(self.listing), self.staged.done, []
        for index in found.changing():
            if done[index]:
                continue
            entry = entries[index]
            if entry.kind is Kind.DIRECTORY:
                directories.append(index)
                continue
            path = self.staged.name(index)
            if entry.kind is Kind.FILE:
                with self.staged.file(index) as fd:
                    if os.fstat(fd).st_size != entry.size:
                        os.ftruncate(fd, entry.size)
                    if entry.digest and digest_of(fd, entry) != entry.digest:
                        raise OSError(errno.EIO, f"{shown(entry.path)} does not match its digest")
                    self.staged.dress(fd, entry)
                continue
            with suppress(FileNotFoundError):
                os.unlink(path, dir_fd=staging)  # left by an earlier push
            if entry.kind is Kind.LINK:
                os.symlink(entry.target, path, dir_fd=staging)
                self._dress_link(path, staging, entry)
            else:
                self._link(entry, files[entry.target], path, staging)
        for index in reversed(directories):
            fd = os.open(self.staged.name(index), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staging)
            try:
                self.staged.dress(fd, entries[index])
            finally:
                os.close(fd)

    def _link(self, entry: Entry, first: int, path: bytes, staging: int) -> None:
        """Another name of a file that is staged, or in its place already."""
        if self.found.states[first] == State.RIGHT:
            with self.staged.below_lock:
                parent, name = self.staged.place(first)
                os.link(name, path, src_dir_fd=parent, dst_dir_fd=staging, follow_symlinks=False)
        else:
            os.link(self.staged.name(first), path, src_dir_fd=staging, dst_dir_fd=staging, follow_symlinks=False)

    def _dress_link(self, path: bytes, folder: int, entry: Entry) -> None:
        if entry.owner is not None:
            os.chown(path, *self.owners[entry.owner], dir_fd=folder, follow_symlinks=False)
        if entry.mtime_ns is not None:
            os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder, follow_symlinks=False)

    def _sync(self) -> None:
        """What is staged to disk."""
        found, staging = self.found, self.staging.make()
        if found.count > _SYNCED_EACH:
            _syncfs(staging)
            return
        for index in reversed(list(found.changing())):
            if self.listing.entries[index].kind in (Kind.FILE, Kind.DIRECTORY):
                fd = os.open(self.staged.name(index), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staging)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def _sync_folders(self) -> None:
        """The new names to disk."""
        folders = {parent_of(self.listing.entries[unit].path) for unit in self.found.units}
        if len(folders) > _SYNCED_EACH:
            _syncfs(self.folder)
            return
        for folder in sorted(folders):
            os.fsync(self.staged.below.directory(folder))

    def _put(self, unit: int) -> None:
        parent, name = self.staged.place(unit)
        staging, staged = self.staging.make(), self.staged.name(unit)
        if self.backup and self.found.states[unit] == State.OTHER:
            kept = b"kept"
            with suppress(FileNotFoundError):
                os.unlink(kept, dir_fd=staging)
            with suppress(FileNotFoundError):
                os.link(name, kept, src_dir_fd=parent, dst_dir_fd=staging, follow_symlinks=False)
                os.rename(kept, name + os.fsencode(self.backup), src_dir_fd=staging, dst_dir_fd=parent)
        os.rename(staged, name, src_dir_fd=staging, dst_dir_fd=parent)

    def _fix(self, index: int) -> None:
        """Mode, time, owner and attributes of what has the right content."""
        entry = self.listing.entries[index]
        parent, name = self.staged.place(index)
        if entry.kind is Kind.LINK:
            self._dress_link(name, parent, entry)
            return
        with _itself(entry, parent, name) as itself:
            if entry.owner is not None:
                os.chown(itself, *self.owners[entry.owner])
            set_attributes(itself, entry)
            if self.exact or entry.kind is Kind.FILE:
                if entry.mode is not None:
                    os.chmod(itself, entry.mode)
                if entry.mtime_ns is not None:
                    os.utime(itself, ns=(entry.mtime_ns, entry.mtime_ns))

    def _redate(self, index: int) -> None:
        """A directory's time, after something was put into it. Another user's keeps the time that it got by that: all
        is in its place by now, and a time alone fails nothing."""
        entry = self.listing.entries[index]
        if entry.mtime_ns is not None:
            with _itself(entry, *self.staged.place(index)) as itself, suppress(PermissionError):
                os.utime(itself, ns=(entry.mtime_ns, entry.mtime_ns))


@contextmanager
def _itself(entry: Entry, parent: int, name: bytes) -> Iterator[str]:
    """A path of what is at an entry's place: of the thing itself, which can be had whatever its mode is, and never by a
    link (open(2), O_PATH). Raises BadDestination, OSError."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            raise BadDestination(f"{shown(entry.path)} has become a symbolic link")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _syncfs(fd: int) -> None:
    """syncfs(2), which Python has no name for."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
