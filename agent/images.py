"""A host's store of base images: listed, read again against their digests, removed where no VM is made of them.

An image is a read-only file that is named by its digest (`protocol.commands.Stream.digest`). All functions block; the
caller runs them in a thread.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

from agent.vmfiles import VmFiles
from protocol.stream import chunk_for, digest_chunks
from protocol.vms import DIGEST_PATTERN, ImageAction, ImageResult, ImageState, images_of

#: An image that is being removed has this after its name, until it is sure that nobody has begun to use it.
_GOING = ".going"
#: One removal at a time, since each looks at what others left unfinished.
_REMOVING = threading.Lock()


def handle(
    directory: Path,
    action: ImageAction,
    digests: Sequence[str] | None,
    given_up: Callable[[], bool] = lambda: False,
) -> list[ImageResult]:
    """Do it to these images of the agent in `directory`, or to all; a result for each, sorted by digest.

    `given_up` is asked between chunks; once it says so, what comes back is of no interest. Raises OSError.
    """
    with _REMOVING if action is ImageAction.REMOVE else nullcontext():
        return _handle(_Store(directory), action, digests, given_up)


def _handle(
    store: _Store, action: ImageAction, digests: Sequence[str] | None, given_up: Callable[[], bool]
) -> list[ImageResult]:
    if action is ImageAction.REMOVE:
        store.finish_removals()
    results = []
    for digest in sorted(set(store.digests() if digests is None else digests)):
        try:
            results.append(store.do(action, digest, given_up))
        except OSError as error:
            results.append(ImageResult(digest=digest, state=ImageState.FAILED, detail=error.strerror or str(error)))
    return results


class _Store:
    def __init__(self, directory: Path) -> None:
        self._folder = directory / "images"
        self._files = VmFiles(directory)
        self._users = self._used()

    def _used(self) -> Counter[str]:
        """How many VMs are made of each image. Under "" those of which nobody can tell."""
        found: Counter[str] = Counter()
        for mark in self._files.marks().values():
            found.update(images_of(mark.spec) if mark.spec is not None else {""})
        return found

    def digests(self) -> Iterable[str]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        return [name for name in names if re.fullmatch(DIGEST_PATTERN, name)]

    def do(self, action: ImageAction, digest: str, given_up: Callable[[], bool]) -> ImageResult:
        path = self._folder / digest
        try:
            info = path.lstat()
        except FileNotFoundError:
            return ImageResult(digest=digest, state=ImageState.ABSENT)
        vms = self._users[digest]
        if action is ImageAction.VERIFY:
            why = _wrong(path, info, digest, given_up)
            state = ImageState.WRONG if why else ImageState.RIGHT
            return ImageResult(digest=digest, state=state, size=info.st_size, vms=vms, detail=why)
        if action is ImageAction.LIST:
            return ImageResult(digest=digest, state=ImageState.PRESENT, size=info.st_size, vms=vms)
        return self._remove(path, info.st_size)

    def _remove(self, path: Path, size: int) -> ImageResult:
        """A VM's files name its images before it looks for them. So whoever begins to use one meanwhile is seen here,
        or does not find it."""
        going = path.with_name(path.name + _GOING)
        path.rename(going)
        users = self._used()
        if users[path.name] or users[""]:
            going.rename(path)
            detail = "" if users[path.name] else "of some VMs here it can't be told what they are made of"
            return ImageResult(
                digest=path.name, state=ImageState.IN_USE, size=size, vms=users[path.name], detail=detail
            )
        going.unlink()
        return ImageResult(digest=path.name, state=ImageState.REMOVED, size=size)

    def finish_removals(self) -> None:
        """Go on with removals that were cut short."""
        for going in self._folder.glob(f"*{_GOING}"):
            path = going.with_name(going.name.removesuffix(_GOING))
            if path.exists() or not (self._users[path.name] or self._users[""]):
                going.unlink(missing_ok=True)
            else:
                going.rename(path)


def _wrong(path: Path, info: os.stat_result, digest: str, given_up: Callable[[], bool]) -> str:
    """What is wrong with an image; an empty text where it is as it should be."""
    if not stat.S_ISREG(info.st_mode):
        return "it is no regular file"
    if info.st_mode & 0o222:
        return "it is writable; it has to be read-only"
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        chunk = chunk_for(info.st_size)

        def read(index: int) -> bytes:
            if given_up():
                raise InterruptedError("given up")
            return os.pread(fd, chunk, index * chunk)

        try:
            found = digest_chunks(read, info.st_size, chunk)[1]
        except ValueError:
            return "its size has changed while it was read"
    finally:
        os.close(fd)
    return "" if found == digest else "its bytes have changed; push it again with `ctl image add`"
