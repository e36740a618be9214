"""Outcomes that the root has not acknowledged, on disk: a file each, for this agent when memory is full and for the one
that comes after it.

A file is a digest, and behind it what was digested. It is written beside and renamed, so that a process that is killed
leaves none or a whole one; it is not synced, so that a power cut may take it, and what it told is lost as it would
be without. What is damaged is told from what is whole by the digest. All functions block.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
from nacl.bindings import crypto_generichash_blake2b_salt_personal

from protocol.limits import KEEP_FOR, MAX_OUTPUT
from protocol.outcomes import Outcome, Output

_DIGEST_BYTES = 16
#: The largest file: both streams, and all else that an outcome has.
_MOST = 2 * MAX_OUTPUT + (64 << 10)


class _Kept(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a file holds. `signature` is the command's: numbers may come again where a service lost its database."""

    id: int
    signature: bytes
    outcome: Outcome
    output: Output


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Kept)


class KeptOutcomes:
    """The files of one agent, named by their commands' numbers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._there: set[int] = set()

    def scan(self) -> dict[int, int]:
        """What is there: commands, and the bytes of each. Removes what is too old, and what is no outcome of ours."""
        found: dict[int, int] = {}
        oldest = time.time() - KEEP_FOR
        with suppress(OSError):
            for entry in os.scandir(self._folder):
                info = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(info.st_mode):
                    continue
                ours = entry.name.isascii() and entry.name.isdecimal()
                if ours and oldest <= info.st_mtime and info.st_size <= _MOST:
                    found[int(entry.name)] = info.st_size
                else:
                    with suppress(OSError):
                        os.unlink(entry.path)
        self._there = set(found)
        return found

    def keep(self, id_: int, signature: bytes, outcome: Outcome, output: Output) -> None:
        """Write an outcome. Raises OSError, and leaves nothing then."""
        body = _encoder.encode(_Kept(id_, signature, outcome, output))
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path, part = self._folder / str(id_), self._folder / f"{id_}.part"
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(_digest(body))
                file.write(body)
            part.rename(path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def load(self, id_: int, signature: bytes) -> tuple[Outcome, Output] | None:
        """The outcome of the command with this number and signature; None where it is not there, or not whole."""
        try:
            fd = os.open(self._folder / str(id_), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                data = file.read(_MOST + 1)
            digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
            if digest != _digest(body):
                return None
            kept = _decoder.decode(body)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        return (kept.outcome, kept.output) if (kept.id, kept.signature) == (id_, signature) else None

    def expect(self, id_: int) -> None:
        """This one is about to be written. Does not block."""
        self._there.add(id_)

    def no_more(self, ids: tuple[int, ...]) -> list[int]:
        """The root has these; those that have to be removed. Does not block."""
        doomed = sorted(self._there.intersection(ids))
        self._there.difference_update(doomed)
        return doomed

    def remove(self, ids: Iterable[int]) -> None:
        """Remove these."""
        for id_ in ids:
            with suppress(OSError):
                (self._folder / str(id_)).unlink(missing_ok=True)


def _digest(body: bytes) -> bytes:
    # hashlib would bring libcrypto with it, and 4 MB of memory; libsodium is there for the signatures.
    digest: bytes = crypto_generichash_blake2b_salt_personal(body, digest_size=_DIGEST_BYTES)
    return digest
