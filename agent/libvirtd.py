"""The daemon that serves qemu:///system: which one it is, its configuration, and whether it has read that.

libvirtd, or virtqemud where libvirt is split into a daemon for each driver (https://libvirt.org/daemons.html).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
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
    """Restart it, if it runs; VMs go on. Why that did not work, or nothing."""
    # The test of sd_booted(3) for whether systemd manages the machine.
    if Path("/run/systemd/system").is_dir():
        return _run(["systemctl", "try-restart", f"{daemon.name}.service"])
    return "" if daemon.pid is None else _restart_by_hand(daemon.pid)


def _restart_by_hand(pid: int) -> str:
    """End a process, and start it again with the words that it was started with."""
    try:
        handle = os.pidfd_open(pid)
        try:
            words = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
            program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            ended = select.poll()
            ended.register(handle, select.POLLIN)
            if not ended.poll(_RESTART_WITHIN * 1000):
                return f"it did not end within {_RESTART_WITHIN:.0f} s"
        finally:
            os.close(handle)
    except OSError as error:
        return f"process {pid}: {error.strerror}"
    own = words[1:]
    return _run([program, *own, *([] if {"-d", "--daemon"} & set(own) else ["--daemon"])])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            # No pipes: a daemon has them for as long as it lives.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if command[0] == "systemctl" else subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_RESTART_WITHIN,
            check=False,
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"it took more than {_RESTART_WITHIN:.0f} s"
    said = (done.stderr or "").strip().splitlines()
    return (said[-1] if said else f"{command[0]} exited with {done.returncode}") if done.returncode else ""


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
