"""A host as its agent sees it, for `ctl check`. It changes nothing; what the facts mean is judged elsewhere."""

from __future__ import annotations

import asyncio
import os
import platform
import pwd
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

import psutil

from agent import probe
from agent.identity import HostDirectory
from agent.kvmprobe import probe_kvm
from agent.libvirtd import find_daemon, open_files
from agent.tuning import Tuner
from protocol.checks import HostFacts, LibvirtFacts, Presence, Room

_T = TypeVar("_T")

#: QEMU says its version in 0.1 s; a machine short of CPU takes longer to load it.
_QEMU_WITHIN = 20.0
#: What QEMU calls a machine where that is not what the kernel does.
_MACHINES = {"i686": "i386", "armv7l": "arm", "ppc64le": "ppc64"}
#: Where Red Hat's distributions have theirs, which is on nobody's PATH.
_ELSEWHERE = "/usr/libexec/qemu-kvm"
#: Parts of the kernel that networks of VMs take, and the device by which one that has no module is known.
_MODULES = {"bridge": "", "vxlan": "", "tun": "net/tun", "vhost_net": "vhost-net"}


async def look(directory: HostDirectory, uri: str | None, tuner: Tuner, threads: Executor) -> HostFacts:
    """The facts of this host. What blocks runs on `threads`. Never raises for what is missing or broken."""
    arrived = time.time_ns()
    loop = asyncio.get_running_loop()

    def blocking(work: Callable[[], _T]) -> asyncio.Future[_T]:
        return loop.run_in_executor(threads, work)

    kvm = await probe_kvm()
    libvirt = await blocking(lambda: _libvirt(uri or probe.usual_uri()))
    qemu, qemu_why = await blocking(_qemu)
    settings, unread = await blocking(tuner.read)
    rooms = await blocking(lambda: _rooms(directory))
    interface, mtu = await blocking(lambda: _interface(directory.identity().address))
    return HostFacts(
        arrived_ms=arrived // 1_000_000,
        user=_user(),
        kvm=kvm.usable,
        kvm_why=kvm.why,
        qemu=qemu,
        qemu_why=qemu_why,
        libvirt=libvirt,
        rooms=rooms,
        interface=interface,
        mtu=mtu,
        settings=settings,
        unread=unread,
        agent_files=_agent_files(),
        modules={name: presence(name, device) for name, device in _MODULES.items()},
        huge_pages=_number(Path("/proc/sys/vm/nr_hugepages")),
        ksm=_ksm(),
        answered_ms=time.time_ns() // 1_000_000,
    )


def _agent_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _libvirt(uri: str) -> LibvirtFacts:
    found = probe.libvirt(uri)
    daemon = find_daemon(Path("/")) if uri.partition("?")[0].endswith("/system") else None
    return LibvirtFacts(
        uri=found["uri"],
        version=found["version"],
        missing=found["missing"],
        problem=found["problem"],
        daemon="" if daemon is None else daemon.name,
        files=None if daemon is None else open_files(daemon),
        stale=daemon is not None and daemon.stale,
    )


def _qemu() -> tuple[str | None, str]:
    """QEMU's version for this machine, and where it is, or why there is none."""
    machine = platform.machine()
    name = f"qemu-system-{_MACHINES.get(machine, machine)}"
    program = shutil.which(name) or shutil.which(_ELSEWHERE)
    if program is None:
        return None, f"there is no {name}"
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_QEMU_WITHIN,
            check=False,
        )
    except OSError as error:
        return None, f"{program}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return None, f"{program} did not tell its version within {_QEMU_WITHIN:.0f} s"
    found = re.search(r"version ([0-9][0-9A-Za-z.+~-]{0,40})", done.stdout)
    if found is None:
        return None, f"{program} does not run: {probe.last_line(done.stderr) or f'exit {done.returncode}'}"
    return found[1], program


def _rooms(directory: HostDirectory) -> tuple[Room, ...]:
    """The room for the agent and for images, once where both are on one file system."""
    found: dict[int, Room] = {}
    for path in (directory.path, directory.images):
        try:
            room, device = os.statvfs(path), path.stat().st_dev
        except OSError:
            continue
        found.setdefault(
            device,
            Room(
                path=str(path),
                free_mib=room.f_bavail * room.f_frsize >> 20,
                total_mib=room.f_blocks * room.f_frsize >> 20,
                # Some file systems have no such number, and say that they have none at all.
                inodes_left=room.f_favail > 0 or room.f_files == 0,
            ),
        )
    return tuple(found.values())


def _interface(address: str) -> tuple[str, int | None]:
    """The interface that has this address, and its MTU in bytes."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            known = psutil.net_if_stats().get(name)
            return name, None if known is None else known.mtu
    return "", None


def presence(name: str, device: str = "", *, root: Path = Path("/")) -> Presence | None:
    """Whether a part of the kernel is there. None where the kernel's list of modules is not here either."""
    if (root / "sys/module" / name).is_dir():
        return "loaded"
    if device and (root / "sys/class/misc" / Path(device).name).exists():
        return "loaded"
    modules = root / "lib/modules" / os.uname().release
    listed = ""
    for file in ("modules.builtin", "modules.dep"):
        try:
            listed = (modules / file).read_text(errors="replace")
        except OSError:
            continue
        # A line of modules.dep is a file, a colon and what that needs; of modules.builtin a file (modules.dep(5)).
        if re.search(rf"^[^:\n]*/{name.replace('_', '[_-]')}\.ko[^:\n]*(:|$)", listed, re.M):
            return "loaded" if file == "modules.builtin" else "available"
    return "missing" if listed else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _ksm() -> bool | None:
    """Whether the kernel merges equal pages of VMs (Linux, Documentation/admin-guide/mm/ksm.rst)."""
    run = _number(Path("/sys/kernel/mm/ksm/run"))
    return None if run is None else run == 1
