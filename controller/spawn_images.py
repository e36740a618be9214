"""The images that VMs are made of: from a file, or from what hosts have already, to a digest."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from controller.api import KnownImage
from controller.status import CtlError, ExitStatus
from controller.text_problems import some
from protocol.stream import chunk_for, digest_chunks

#: A qcow2 file's first bytes (QEMU, docs/interop/qcow2.rst, "Header").
_QCOW2 = b"QFI\xfb"
#: Stands for an image's digest in a plan that is only shown: reading gigabytes would add nothing to it.
NO_DIGEST = "0" * 64
#: A digest may be shortened to so many characters: below it is more likely a name.
_LEAST_DIGEST = 6
#: A file that changed so shortly before it was read may change again within its time stamp, in seconds.
_FRESH = 2.0
#: Digests that are remembered: more images than anybody spawns from.
_REMEMBERED = 1_000


def image_digest(path: Path) -> str:
    """The name that an image has in hosts' stores: the digest over its chunks' digests (protocol.commands.Stream).

    Reads all of it. Raises CtlError (USAGE) where it can't be read.
    """
    try:
        with path.open("rb") as file:
            fd = file.fileno()
            size = os.fstat(fd).st_size
            chunk = chunk_for(size)
            return digest_chunks(lambda index: os.pread(fd, chunk, index * chunk), size, chunk)[1]
    except OSError as error:
        raise CtlError(f"{path}: {error.strerror}", ExitStatus.USAGE) from error
    except ValueError as error:
        raise CtlError(f"{path}: {error}", ExitStatus.USAGE) from error


def format_of(head: bytes) -> Literal["qcow2", "raw"]:
    """What a disk image is, by its first bytes."""
    return "qcow2" if head.startswith(_QCOW2) else "raw"


def image_format(path: Path) -> Literal["qcow2", "raw"]:
    """What a disk image is, by its first bytes."""
    try:
        with path.open("rb") as file:
            return format_of(file.read(4))
    except OSError as error:
        raise CtlError(f"{path}: {error.strerror}", ExitStatus.USAGE) from error


def find_image(known: Sequence[KnownImage], name: str) -> KnownImage:
    """The image of this name or digest, which may be shortened. Raises CtlError where there is none, or several."""
    found = [one for one in known if name in (one.name, one.digest)]
    if not found and len(name) >= _LEAST_DIGEST:
        found = [one for one in known if one.digest.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        digests = some([one.digest[:12] for one in found])
        raise CtlError(f"{name} is the name of several images: choose one by its digest, {digests}", ExitStatus.USAGE)
    raise CtlError(f"no file and no image is named {name}: `ctl image ls` lists images", ExitStatus.USAGE)


class DigestCache:
    """Digests of files that were read before and have not changed since, by what stat(2) says of them.

    A rerun does not read gigabytes to learn that nothing has to be done. A push reads its file in any case.
    """

    def __init__(self, path: Path | None) -> None:
        """`path` is where they are kept; None keeps none."""
        self._path = path
        self._known: dict[str, str] = {}
        try:
            if path is not None:
                self._known = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.DecodeError):
            pass  # it is a cache

    def digest(self, path: Path) -> str:
        """As image_digest."""
        key = self._key(path)
        if key is not None and key in self._known:
            return self._known[key]
        found = image_digest(path)
        if key is not None and key == self._key(path):
            self._known[key] = found
            self._keep()
        return found

    @staticmethod
    def _key(path: Path) -> str | None:
        try:
            info = path.stat()
        except OSError:
            return None
        if abs(time.time() - max(info.st_mtime, info.st_ctime)) < _FRESH:
            return None
        return f"{path.absolute()} {info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"

    def _keep(self) -> None:
        if self._path is not None and self._path.parent.is_dir():
            while len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
            with suppress(OSError):  # it is a cache
                temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
                temporary.write_bytes(msgspec.json.encode(self._known))
                temporary.replace(self._path)


@dataclass
class ImageFinder:
    """Digests for what people write. `files` collects the files that hosts need, by digest, and `stored` the digests
    of images that hosts are to have already. Without `read` files are looked at but not read."""

    known: Sequence[KnownImage] = ()
    read: bool = True
    cache: DigestCache = field(default_factory=lambda: DigestCache(None))
    files: dict[str, Path] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    _found: dict[str, tuple[str, Literal["qcow2", "raw"]]] = field(default_factory=dict)

    def find(self, what: str) -> tuple[str, Literal["qcow2", "raw"]]:
        """The digest and the format of a file or of an image on record. Raises CtlError."""
        if what not in self._found:
            self._found[what] = self._look(what)
        return self._found[what]

    def _look(self, what: str) -> tuple[str, Literal["qcow2", "raw"]]:
        path = Path(what)
        if path.is_file() or (path.parent != Path() and "/" in what) or not self.known:
            kind = image_format(path)
            digest = self.cache.digest(path) if self.read else NO_DIGEST
            self.files[digest] = path
            return digest, kind
        image = find_image(self.known, what)
        self.stored[image.digest] = image.name
        return image.digest, image.format
