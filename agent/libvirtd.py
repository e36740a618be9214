"""The daemon that serves qemu:///system: which one it is, its configuration, and whether it has read that.

libvirtd, or virtqemud where libvirt is split into a daemon for each driver (https://libvirt.org/daemons.html).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

_RESTART_WITHIN = 60.0
#: A process's start is told in ticks of 10 ms.
_TICK = 0.02


class Daemon(NamedTuple):
    """`conf` is relative to the root of the file system; `pid` None where it does not run."""

    name: str
    conf: Path
    pid: int | None
    stale: bool


def find_daemon(root: Path) -> Daemon | None:
    """The daemon; None where there is none installed. `stale`: its configuration was written after it began."""
    # Where it is split, virtproxyd has libvirtd's socket.
    if (root / "run/libvirt/virtqemud-sock").exists():
        name = "virtqemud"
    elif (root / "run/libvirt/libvirt-sock").exists() or (root / "etc/libvirt/libvirtd.conf").exists():
        name = "libvirtd"
    else:
        return None
    conf = Path(f"etc/libvirt/{name}.conf")
    pid = _pid(root, name)
    stale = False
    if pid is not None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            stale = (root / conf).stat().st_ctime > _started(pid) + _TICK
    return Daemon(name, conf, pid, stale)


def open_files(daemon: Daemon) -> int | None:
    """How many files the daemon may have open; None where that can't be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{daemon.pid}/limits").read_text().splitlines():
            if line.startswith("Max open files"):
                soft = line.split()[3]
                return sys.maxsize if soft == "unlimited" else int(soft)
    return None


def restart(daemon: Daemon) -> str:
    """Restart it by systemd, if it runs; VMs go on. Why that did not work, or nothing."""
    try:
        done = subprocess.run(
            ["systemctl", "try-restart", f"{daemon.name}.service"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_RESTART_WITHIN,
            check=False,
        )
    except OSError as error:
        return f"systemctl: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"it took more than {_RESTART_WITHIN:.0f} s"
    said = done.stderr.strip().splitlines()
    return (said[-1] if said else f"systemctl exited with {done.returncode}") if done.returncode else ""


def _pid(root: Path, name: str) -> int | None:
    """Its process: by its own word, else the first of that name."""
    candidates: list[str] = []
    with contextlib.suppress(OSError):
        candidates.append((root / f"run/{name}.pid").read_text().strip())
    candidates += sorted(filter(str.isdecimal, os.listdir("/proc")), key=int) if root == Path("/") else []
    for candidate in candidates:
        with contextlib.suppress(OSError, ValueError):
            if Path(f"/proc/{int(candidate)}/comm").read_text().strip() == name:
                return int(candidate)
    return None


def _started(pid: int) -> float:
    """When a process began, in seconds since 1970 (proc(5), stat, field 22)."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
