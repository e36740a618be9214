"""Pushed files on this host: a destination is found without being led astray, and holds the old file or the new one,
never half.

All functions block; the caller runs them in a thread.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.identity import write_atomically
from protocol.commands import Push
from protocol.stream import chunk_size, count_of, is_right

#: Symbolic links that one path may lead through: Linux's own limit (path_resolution(7)).
_LINKS_MOST = 40
_PART = ".canopy-"
#: A destination that begins so is in the agent's own directory.
OWN = "@/"


class BadDestination(Exception):
    """The file will not be put there; the text says why."""


def open_parent(path: str) -> tuple[int, str]:
    """The directory that `path` names, as a descriptor, and the last component. Raises BadDestination, OSError.

    Each component is opened by itself without following symbolic links; a link is followed only where it belongs to
    root or to this process's user, so that another user of the host can't lead a push elsewhere, also not by swapping a
    directory for a link while we look.
    """
    if not path.startswith("/"):
        raise BadDestination(f"{path}: the destination must be an absolute path")
    if "\0" in path:
        raise BadDestination("the destination has a NUL byte")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or path.endswith(("/", "/.")):
        raise BadDestination(f"{path}: the destination must name a file")
    if ".." in parts:
        raise BadDestination(f"{path}: the destination must not go through '..'")
    *folders, name = parts
    trusted = (0, os.geteuid())
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    links = 0
    fd = os.open("/", flags)
    folder = "/"
    try:
        while folders:
            folder = folders.pop(0)
            # O_PATH gives the thing itself, link or directory, so that what is judged is what is followed.
            thing = os.open(folder, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                info = os.fstat(thing)
                if stat.S_ISLNK(info.st_mode):
                    links += 1
                    if info.st_uid not in trusted or links > _LINKS_MOST:
                        raise BadDestination(f"{path}: {folder} is a symbolic link of another user")
                    target = os.readlink("", dir_fd=thing)
                    folders = [part for part in target.split("/") if part not in ("", ".")] + folders
                    inner = os.open("/", flags) if target.startswith("/") else os.dup(fd)
                else:
                    inner = os.open(".", flags, dir_fd=thing)
            finally:
                os.close(thing)
            os.close(fd)
            fd = inner
    except NotADirectoryError as error:
        os.close(fd)
        raise BadDestination(f"{path}: {folder} is not a directory") from error
    except FileNotFoundError as error:
        os.close(fd)
        raise BadDestination(f"{path}: {folder} does not exist") from error
    except BaseException:
        os.close(fd)
        raise
    return fd, name


class Incoming:
    """A file on its way in: chunks go to a temporary file beside the destination, `finish` puts it in place."""

    def __init__(self, id_: int, push: Push, images: Path, notes: Path) -> None:
        """Looks at what is there already. Raises BadDestination, OSError; nothing is changed by then.

        `notes` is the directory where an agent that comes up again learns which temporary files to remove.
        """
        self.push = push
        path = str(images / push.stream.digest) if push.image else push.path
        if path.startswith(OWN):
            path = str(images.parent / path.removeprefix(OWN))
        self._folder, self._name = open_parent(path)
        self._mode = 0o444 if push.image else push.mode
        # Random, since several hosts may push into one directory that they share.
        self._part = f"{_PART}{id_}-{os.urandom(8).hex()}"
        self._note = notes / str(id_)
        self._fd: int | None = None
        self._placed = self._began = self._closing = False
        self._lock = threading.Lock()
        self._users = 0
        try:
            self.have = self._look()
            if not self._placed:
                write_atomically(self._note, os.fsencode(os.path.join(os.path.dirname(path), self._part)))
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._fd = os.open(self._part, flags, 0o600, dir_fd=self._folder)
                self._began = True
                if push.stream.size:
                    os.posix_fallocate(self._fd, 0, push.stream.size)  # a full disk is known now, not in the middle
        except BaseException:
            self.close()
            raise

    @property
    def unchanged(self) -> bool:
        """The destination held these very bytes already."""
        return self._placed

    def _look(self) -> int:
        """All chunks (as bits) where the destination has the right bytes already, else none."""
        try:
            kind = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return 0
        if stat.S_ISLNK(kind):
            return 0  # the rename will replace the link itself, not what it points to
        if stat.S_ISDIR(kind):
            raise BadDestination(f"{self.push.path} is a directory: end the destination with / to push into it")
        if not stat.S_ISREG(kind):
            raise BadDestination(f"{self.push.path} is there and is no regular file")
        # Not blocking: should it have become a FIFO since, nobody waits for its other end.
        fd = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._folder)
        self._fd = fd
        info = os.fstat(fd)
        stream = self.push.stream
        count = count_of(stream)
        same = (stat.S_ISREG(info.st_mode), info.st_size) == (True, stream.size) and all(
            is_right(stream, index, os.pread(fd, chunk_size(stream, index), index * stream.chunk))
            for index in range(count)
        )
        if not same:
            os.close(fd)
            self._fd = None
            return 0
        if stat.S_IMODE(info.st_mode) != self._mode:
            os.fchmod(fd, self._mode)
        self._placed = True
        return (1 << count) - 1

    @contextmanager
    def _in_use(self) -> Iterator[int]:
        """The file's descriptor, which is not closed before the block ends."""
        with self._lock:
            if self._fd is None or self._closing:
                raise OSError("the file is closed")
            fd = self._fd
            self._users += 1
        try:
            yield fd
        finally:
            self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            self._users -= 1
            if self._closing and not self._users:
                self._release()

    def write(self, index: int, blob: bytes) -> None:
        """Store a chunk."""
        with self._in_use() as fd:
            offset = index * self.push.stream.chunk
            view = memoryview(blob)
            while view:
                written = os.pwrite(fd, view, offset)
                view, offset = view[written:], offset + written

    def read(self, index: int) -> bytes:
        """A chunk that was stored before."""
        with self._in_use() as fd:
            return os.pread(fd, chunk_size(self.push.stream, index), index * self.push.stream.chunk)

    def finish(self) -> None:
        """Put the file in its place: mode, time, to disk, rename."""
        with self._in_use() as fd:
            if self._placed:
                return
            os.fchmod(fd, self._mode)
            os.utime(fd, ns=(self.push.mtime_ns, self.push.mtime_ns))
            os.fsync(fd)
            os.rename(self._part, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._placed = True
            os.fsync(self._folder)
            self._note.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go, once nothing is written or read any more; a file that is not in place then is removed."""
        with self._lock:
            self._closing = True
            if not self._users:
                self._release()

    def _release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._folder >= 0:
            if not self._placed:
                if self._began:
                    with suppress(FileNotFoundError):
                        os.unlink(self._part, dir_fd=self._folder)
                self._note.unlink(missing_ok=True)
            os.close(self._folder)
            self._folder = -1


def put(id_: int, push: Push, images: Path, notes: Path) -> bool:
    """A small file whose bytes came with the command. Returns whether anything had to change. Raises as Incoming
    does."""
    incoming = Incoming(id_, push, images, notes)
    try:
        if incoming.unchanged:
            return False
        data = push.stream.inline or b""
        for index in range(count_of(push.stream)):
            blob = data[index * push.stream.chunk : (index + 1) * push.stream.chunk]
            if not is_right(push.stream, index, blob):
                raise BadDestination("the bytes in the command do not match its digests")
            incoming.write(index, blob)
        incoming.finish()
        return True
    finally:
        incoming.close()


def remove_parts(notes: Path) -> None:
    """Remove the temporary files that an agent which was killed left behind."""
    for note in notes.iterdir() if notes.is_dir() else ():
        part = os.fsdecode(note.read_bytes())
        try:
            if os.path.basename(part).startswith(_PART):
                folder, name = open_parent(part)
                try:
                    os.unlink(name, dir_fd=folder)
                finally:
                    os.close(folder)
        except (FileNotFoundError, BadDestination):
            pass  # it had not been made yet, or its directory is gone or is another's now
        except OSError:
            continue  # a file system that is not writable now: the next start tries again
        note.unlink(missing_ok=True)
