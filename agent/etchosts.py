"""A block in /etc/hosts with the names of the fleet's VMs, between two comments, for hosts that are to have it.

All else in the file stays as it is. It is replaced by rename, so that nobody reads half of it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from protocol.names import IN_ETC_HOSTS

ETC_HOSTS = Path("/etc/hosts")
#: More than any hosts file that resolvers read in a reasonable time: a million VMs are some 30 MB.
_LONGEST = 64 << 20


class EtcHostsError(Exception):
    """The file can't be changed; the text says why."""


def follow(names: Path, fleet: str, etc_hosts: Path = ETC_HOSTS) -> bool:
    """Bring the block to what the names file asks for: its lines, or no block. Whether anything changed.

    Raises EtcHostsError.
    """
    text = names.read_bytes()
    wanted = text.split(b"\n", 1)[0].endswith(IN_ETC_HOSTS.encode())
    return _put(fleet, text if wanted else None, etc_hosts)


def leave(fleet: str, etc_hosts: Path = ETC_HOSTS) -> None:
    """Take the block away. Raises EtcHostsError."""
    _put(fleet, None, etc_hosts)


def _put(fleet: str, text: bytes | None, etc_hosts: Path) -> bool:
    first, last = (f"# canopy {fleet}: {word}\n".encode() for word in ("begin", "end"))
    try:
        old = etc_hosts.read_bytes() if etc_hosts.exists() else b""
        rest = _without(old, first, last)
        if text is None:
            new = rest
        else:
            gap = b"" if not rest or rest.endswith(b"\n") else b"\n"
            new = rest + gap + first + text + last
        if new == old:
            return False
        if len(new) > _LONGEST:
            raise EtcHostsError(f"{etc_hosts} would be longer than {_LONGEST >> 20} MiB; it is left as it is")
        _replace(etc_hosts, new)
    except OSError as error:
        raise EtcHostsError(
            f"{etc_hosts} can't be changed ({error.strerror}); the names file itself is there"
        ) from error
    return True


def _without(text: bytes, first: bytes, last: bytes) -> bytes:
    """`text` without its block. Of one that somebody cut the end off all lines but the first stay: whose are they?"""
    before, begin, block = text.partition(first)
    if not begin or (before and not before.endswith(b"\n")):
        return text
    _, end, after = block.partition(last)
    return before + after if end else before + block


def _replace(path: Path, text: bytes) -> None:
    temporary = path.with_name(f".{path.name}.canopy-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            if path.exists():
                info = path.stat()
                os.fchown(fd, info.st_uid, info.st_gid)
                os.fchmod(fd, stat.S_IMODE(info.st_mode))
            else:
                os.fchmod(fd, 0o644)
            file.write(text)
            file.flush()
            os.fsync(fd)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
