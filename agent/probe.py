"""The probe: what `ctl doctor` runs on a host over SSH, whether or not it has an agent.

It comes in through standard input as the seed does, so it is one file on the standard library alone, for Python 3.10
and later. One line of JSON follows it, with what to look for; it prints one line of JSON with what it found, and
changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARKER = "CANOPY-PROBE 1 "
CONNECT = 3.0  # seconds to reach a parent: a handshake over the longest line takes 0.3
LIBVIRT = 10.0  # seconds to open libvirt: a socket that is there answers in milliseconds
TEXT = 300  # characters of what others say
# How MessagePack begins the key's field in the agent's identity, a map: "public", and 32 bytes.
PUBLIC = b"\xa6public\xc4\x20"

# Run apart, since opening may hang. A private hypervisor is only for the agent that has it.
OPEN = """
import sys
try:
    import libvirt
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
version = libvirt.getVersion()
if not sys.argv[1].startswith("qemu:///embed"):
    try:
        connection = libvirt.open(sys.argv[1])
        version = connection.getLibVersion()
        connection.close()
    except libvirt.libvirtError as error:
        print(error, file=sys.stderr)
        sys.exit(4)
print(version // 1000000, version // 1000 % 1000, version % 1000, sep=".")
"""


def text(path: Path) -> str:
    """A small file's content, or nothing."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def last_line(said: str) -> str:
    """The last line of what somebody said, fit to be shown."""
    lines = said.strip().splitlines()
    return re.sub(r"[^\x20-\x7e]", "?", lines[-1])[:TEXT] if lines else ""


def is_locked(path: Path) -> bool:
    """Whether another process holds the flock on `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def agent(directory: Path) -> dict[str, Any]:
    """The agent of that directory: its bundles, whether it runs, the last word of its log, and its public key."""
    try:
        current = (directory / "current").readlink().name
    except OSError:
        current = ""
    try:
        _, found, rest = (directory / "identity").read_bytes().partition(PUBLIC)
    except OSError:
        found, rest = b"", b""
    running = is_locked(directory / "lock")
    return {
        "installed": current if (directory / "current" / "agent").is_dir() else "",
        "running": running,
        "started": text(directory / "started") if running else "",
        "log": last_line(text(directory / "agent.log")),
        "key": rest[:32].hex() if found else "",
    }


def disk(directory: Path) -> dict[str, Any]:
    """The room in the agent's directory, or where it would be made."""
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    room = os.statvfs(place)
    return {
        "place": str(place),
        "free_mib": room.f_bavail * room.f_frsize >> 20,
        # Some filesystems have no such number, and say that they have none at all.
        "inodes_left": room.f_favail > 0 or room.f_files == 0,
        "writable": os.access(place, os.W_OK | os.X_OK) and not room.f_flag & os.ST_RDONLY,
    }


def reach(address: str, port: int) -> str:
    """Why a TCP connection does not come about, or nothing."""
    try:
        socket.create_connection((address, port), CONNECT).close()
    except OSError as error:
        return "no answer" if isinstance(error, TimeoutError) else str(error.strerror or error).lower()
    return ""


def usual_uri() -> str:
    """The libvirt of this user."""
    return "qemu:///system" if os.geteuid() == 0 else "qemu:///session"


def uri(directory: Path) -> str:
    """The libvirt that the running agent was told to use, else what an agent of this user would."""
    words: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        pid = int(text(directory / "agent.pid"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        words += [word for entry in environment if entry.startswith("CANOPY_LIBVIRT=") for word in entry.split("=", 1)]
    for name in ("--libvirt", "CANOPY_LIBVIRT"):
        if name in words[:-1]:
            return words[words.index(name) + 1]
    return usual_uri()


def libvirt(where: str) -> dict[str, Any]:
    """Whether libvirt's Python binding is there and its daemon answers at this URI, and which version it is."""
    version = ""
    try:
        done = subprocess.run(
            [sys.executable, "-c", OPEN, where],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIBVIRT,
            check=False,
        )
        status, said = done.returncode, last_line(done.stderr)
        version = "" if status else last_line(done.stdout)
    except subprocess.TimeoutExpired:
        status, said = 4, f"no answer within {LIBVIRT:.0f} s"
    problem = (said or f"exit {status}") if status else ""
    return {"uri": where, "missing": status == 3, "problem": problem, "version": version}


def look(asked: dict[str, Any]) -> dict[str, Any]:
    """Everything that is asked for."""
    uid = os.geteuid()
    user = pwd.getpwuid(uid)
    base = Path("/var/lib/canopy") if uid == 0 else Path(user.pw_dir) / ".canopy"
    directory = Path(asked["directory"]) if asked["directory"] else base / asked["fleet"]
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        name, version = "", ""
    return {
        "python": list(sys.version_info[:2]),
        "executable": sys.executable,
        "machine": os.uname().machine,
        "libc": name or "an unknown C library",
        "libc_version": [int(part) for part in version.split(".")[:2]] if version else [0, 0],
        "user": user.pw_name,
        "directory": str(directory),
        "disk": disk(directory),
        "agent": agent(directory),
        "reach": {above["name"]: reach(above["address"], above["control_port"]) for above in asked["ancestors"]},
        "libvirt": libvirt(uri(directory)),
        "time": time.time(),
    }


if __name__ == "__main__":
    # Login scripts may have left a line unfinished.
    print("\n" + MARKER + json.dumps(look(json.loads(sys.stdin.buffer.readline()))), flush=True)
