"""Directories found without being led astray: by a link of another user, or by one that is swapped in while we look.

Source of the flags' meaning: open(2) and path_resolution(7).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from protocol.listing import shown

#: Symbolic links that one path may lead through: Linux's own limit (path_resolution(7)).
_LINKS_MOST = 40
#: A folder that begins so is in the agent's own directory.
OWN = "@/"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Directories that are kept open at a time: deeper ones are found again from the folder.
_OPEN_MOST = 32


class BadDestination(Exception):
    """Nothing will be put there; the text says why."""


def resolved(folder: str, own: Path) -> str:
    """The folder as a path from / on; `own` is the agent's own directory."""
    return str(own / folder.removeprefix(OWN)) if folder.startswith(OWN) else folder


def open_folder(path: str) -> int:
    """The directory that `path` names, as a descriptor. Raises BadDestination, OSError.

    Each component is opened by itself without following symbolic links; a link is followed only where it belongs to
    root or to this process's user, so that another user of the host can't lead a push elsewhere, also not by swapping a
    directory for a link while we look.
    """
    if not path.startswith("/"):
        raise BadDestination(f"{path}: the destination must be an absolute path")
    if "\0" in path:
        raise BadDestination("the destination has a NUL byte")
    folders = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in folders:
        raise BadDestination(f"{path}: the destination must not go through '..'")
    trusted = (0, os.geteuid())
    links = 0
    fd = os.open("/", _FOLDER)
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
                    inner = os.open("/", _FOLDER) if target.startswith("/") else os.dup(fd)
                else:
                    inner = os.open(".", _FOLDER, dir_fd=thing)
            finally:
                os.close(thing)
            os.close(fd)
            fd = inner
    except NotADirectoryError as error:
        os.close(fd)
        raise BadDestination(f"{path}: {folder} is not a directory") from error
    except FileNotFoundError as error:
        os.close(fd)
        raise BadDestination(f"{path}: {folder} does not exist: make it first") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


class Below:
    """Directories below one folder, each component opened by itself and no link followed, whoever's it is."""

    def __init__(self, folder: int) -> None:
        """`folder` is a descriptor, which stays the caller's."""
        self._folder = folder
        self._open: dict[bytes, int] = {}

    def directory(self, path: bytes) -> int:
        """The directory at `path` (empty: the folder itself), open until `close` or until others are asked for.

        Raises FileNotFoundError where there is none, BadDestination where something else is there.
        """
        if not path:
            return self._folder
        found = self._open.get(path)
        if found is not None:
            return found
        above, _, name = path.rpartition(b"/")
        parent = self.directory(above)
        try:
            fd = os.open(name, _FOLDER, dir_fd=parent)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            kind = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            if stat.S_ISDIR(kind):
                raise
            what = "a symbolic link, and is not followed" if stat.S_ISLNK(kind) else "not a directory"
            raise BadDestination(f"{shown(path)} is {what}") from error
        if len(self._open) >= _OPEN_MOST:
            self._close_others(path)
        self._open[path] = fd
        return fd

    def _close_others(self, path: bytes) -> None:
        for other in [other for other in self._open if not path.startswith(other + b"/")]:
            os.close(self._open.pop(other))
        if len(self._open) >= _OPEN_MOST:  # all of them lead here: the first can be had again
            os.close(self._open.pop(next(iter(self._open))))

    def close(self) -> None:
        """Close them all."""
        while self._open:
            os.close(self._open.popitem()[1])
