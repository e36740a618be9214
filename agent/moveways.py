"""Where the two ends of a move meet QEMU and libvirt: Unix sockets of the same paths on both hosts; and the seed.

libvirt calls this migration over Unix sockets (https://libvirt.org/migration.html): where the VM is, the agent listens;
where it goes, QEMU does, and the agent connects. The agents' link is between.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.rpcgate import FLAGS, WITH_DISK
from agent.vmactions import CannotAct
from agent.vmfiles import QemuUser
from protocol.commands import Hop
from protocol.limits import SEED_MOST
from protocol.stream import Blob
from protocol.vms import VmSpec

_RUN = Path("/run/libvirt")
#: sun_path, less its NUL (unix(7)).
_PATH_BYTES = 107
#: In the order in which libvirt's own client looks for them: QEMU's daemon, or the one for all.
_DAEMONS = (_RUN / "virtqemud-sock", _RUN / "libvirt-sock")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class CannotMove(CannotAct):
    """The VM can't be moved like that; the text says why and what to do."""


class Links(Protocol):
    """What the agent's shell has for moves."""

    def dial(self, host: Hop, *, heard: Callable[[list[Blob]], None], lost: Callable[[str], None]) -> Any:
        """A link to another host."""

    def await_host(
        self, id_: int, host: Hop, port: int, *, heard: Callable[[list[bytes]], None], lost: Callable[[str], None]
    ) -> Any:
        """Listen for another host, and for nobody else."""

    def dismiss_host(self, id_: int) -> None:
        """Let it in no more."""


@dataclass(frozen=True)
class Ways:
    """The paths of one move's sockets: libvirt's, for the VM's memory, and for its disk."""

    folder: Path
    libvirt: Path
    memory: Path
    disk: Path

    @property
    def paths(self) -> tuple[str, ...]:
        """All three."""
        return str(self.libvirt), str(self.memory), str(self.disk)

    def remove(self) -> None:
        """Remove what is there of them."""
        for path in self.paths:
            Path(path).unlink(missing_ok=True)


def folder_of(fleet: str) -> Path:
    """Where the sockets of a fleet's moves are, on each of its hosts."""
    return _RUN / f"c{hashlib.sha256(fleet.encode()).hexdigest()[:6]}"


def ways(fleet: str, of: int, name: str) -> Ways:
    """The sockets of the move that the command `of` of a fleet awaits. Raises CannotMove where the name is too long."""
    folder = folder_of(fleet)
    number = ""
    while of:
        of, digit = divmod(of, len(_DIGITS))
        number = _DIGITS[digit] + number
    # The one name of a socket that AppArmor's profile of a VM allows its QEMU (libvirt's virt-aa-helper).
    paths = [folder / f"{number}{kind}.tunnelmigrate.dest.{name}" for kind in "lmd"]
    if len(os.fsencode(paths[0])) > _PATH_BYTES:
        raise CannotMove(f"its name is too long for the path of a socket, {paths[0]}; a shorter name can be moved")
    return Ways(folder, *paths)


def make_folder(folder: Path, user: QemuUser | None) -> None:
    """The directory of the sockets, in which QEMU makes its own. Raises OSError."""
    folder.mkdir(mode=0o700, exist_ok=True)
    os.chown(folder, 0, 0 if user is None else user.own_gid)
    folder.chmod(0o700 if user is None else 0o730)


def hand_to(path: Path, user: QemuUser | None) -> None:
    """Let QEMU, and nobody else, connect to a socket."""
    os.chown(path, 0 if user is None else user.uid, 0)
    path.chmod(0o600)


def flags_for(spec: VmSpec) -> int:
    """The flags of a VM's move, as the host that takes it in is told them."""
    return FLAGS | (WITH_DISK if spec.disk is not None else 0)


def only_libvirtd(uri: str) -> None:
    """Raises CannotMove where VMs are run by another driver than QEMU's under a libvirtd."""
    if uri.partition("?")[0] != "qemu:///system":
        raise CannotMove(
            f"this host's VMs run at {uri}, and only those of qemu:///system can be moved while they run; "
            "destroy it, and create it on the other host"
        )


async def connect_libvirt() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to this host's libvirt. Raises OSError."""
    path = next((path for path in _DAEMONS if path.exists()), _DAEMONS[-1])
    return await asyncio.open_unix_connection(path)


async def pair() -> tuple[
    tuple[asyncio.StreamReader, asyncio.StreamWriter], tuple[asyncio.StreamReader, asyncio.StreamWriter]
]:
    """Two ends of a stream within this process."""
    ends = socket.socketpair()
    return await asyncio.open_connection(sock=ends[0]), await asyncio.open_connection(sock=ends[1])


async def read_seed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: Path) -> None:
    """Write what comes to a file, whole and on disk or not at all, and then end the stream."""
    unfinished = path.with_suffix(".part")
    try:
        size = 0
        with unfinished.open("wb") as file:
            while data := await reader.read(1 << 18):
                size += len(data)
                if size > SEED_MOST:
                    raise OSError(f"a seed disk of more than {SEED_MOST} bytes")
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.chmod(0o600)
        unfinished.rename(path)
    except BaseException:
        # The other side learns by the end without a last word that it was not taken.
        unfinished.unlink(missing_ok=True)
        writer.transport.abort()
        raise
    with contextlib.suppress(OSError):
        writer.write(b"\n")
        await writer.drain()
    writer.close()
