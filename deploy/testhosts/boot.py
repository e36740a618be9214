"""One host's start: from a fork to an exec of its init, in namespaces of its own.

The supervisor forks into a new PID namespace; the child, the host's PID 1, makes its other namespaces, says so,
waits for its link, mounts its root and its virtual file systems, sets up its interfaces and becomes tini(1).
It is killed by the kernel when the supervisor ends.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import NoReturn

from . import disk, network, syscalls
from .model import SYSTEM_PATH, HostSpec, TestHostsError

_LOG = "/var/log/testhost.log"
_ENVIRONMENT = {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8"}
# The kernel bounds it by net.core.somaxconn, 4096 since Linux 5.4.
_HUNG_BACKLOG = 4096

_DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
    "net/tun": (10, 200),
}
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}

# Where each daemon reports, and what ends the start: the host goes down again when its libvirtd does not come up.
_START_LIBVIRT = "virtlogd -d && libvirtd -d || exit 1; "
_START_SSHD = "exec /usr/sbin/sshd -D -e"


@dataclass(frozen=True, kw_only=True)
class BootPlan:
    """All that a host needs to start. ``root`` is an empty directory to mount it on, shared by all hosts."""

    spec: HostSpec
    address: IPv4Interface
    mac: str
    bare: Path
    disk: Path
    root: Path


@dataclass(frozen=True, kw_only=True)
class Booting:
    """A host on its way: write a byte to ``go`` once it has its link; ``failure`` ends when it runs its init."""

    pid: int
    isolated: int
    go: int
    failure: int


def fork_host(plan: BootPlan) -> Booting:
    """Fork the host's PID 1. This process must have one thread alone: the child goes on in Python for a while."""
    isolated_read, isolated_write = os.pipe()
    go_read, go_write = os.pipe()
    failure_read, failure_write = os.pipe()
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    # Children alone are born into the new namespace; entering our own again lets the next host have another.
    syscalls.unshare(syscalls.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        os.close(go_write)
        os.close(isolated_read)
        _become(plan, isolated_write, go_read, failure_write)
    syscalls.setns(own, syscalls.CLONE_NEWPID)
    os.close(own)
    for descriptor in (isolated_write, go_read, failure_write):
        os.close(descriptor)
    return Booting(pid=pid, isolated=isolated_read, go=go_write, failure=failure_read)


def wait_isolated(host: Booting) -> None:
    """Return once the host has its network namespace, so that it can be given its link."""
    if os.read(host.isolated, 1) != b"1":
        raise TestHostsError(f"a test host did not start: {_all_of(host.failure)}")
    os.close(host.isolated)


def let_go(host: Booting) -> None:
    os.write(host.go, b"1")
    os.close(host.go)


def wait_init(host: Booting) -> None:
    """Return once the host runs its init. Raises TestHostsError with the host's own reason where it failed."""
    reason = _all_of(host.failure)
    os.close(host.failure)
    if reason:
        raise TestHostsError(f"a test host did not start: {reason}")


def _all_of(descriptor: int) -> str:
    parts = []
    while part := os.read(descriptor, 65536):
        parts.append(part)
    return b"".join(parts).decode(errors="replace")


def _become(plan: BootPlan, isolated: int, go: int, failure: int) -> NoReturn:
    try:
        syscalls.die_with_parent(signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWNET)
        syscalls.set_hostname(plan.spec.name)
        network.without_ipv6()
        os.write(isolated, b"1")
        os.close(isolated)
        _mount_root(plan)
        # An empty read means that the supervisor is gone.
        if os.read(go, 1) != b"1":
            os._exit(1)
        _set_up_network(plan)
        _run_init(plan.spec)
    except BaseException as error:
        os.write(failure, f"{plan.spec.name}: {error}".encode())
    os._exit(1)


def _mount_root(plan: BootPlan) -> None:
    root = str(plan.root)
    syscalls.mount("overlay", root, "overlay", 0, disk.mount_options(plan.bare, plan.disk))
    os.chdir(root)
    syscalls.mount(str(plan.disk / "data"), disk.DATA_DISK, "", syscalls.MS_BIND)
    quiet = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("proc", "proc", "proc", quiet)
    syscalls.mount("sysfs", "sys", "sysfs", quiet)
    syscalls.mount("tmpfs", "run", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=755")
    syscalls.mount("tmpfs", "dev", "tmpfs", syscalls.MS_NOSUID, "mode=755,size=64k")
    for name in ("dev/pts", "dev/shm", "dev/net", "run/sshd", "run/lock"):
        Path(name).mkdir()
    syscalls.mount(
        "devpts", "dev/pts", "devpts", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "newinstance,ptmxmode=666,gid=5"
    )
    syscalls.mount("tmpfs", "dev/shm", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=1777")
    os.umask(0)
    # /dev/kvm is left out: where it opens and yet runs no guest, libvirt probes it for a minute.
    for name, (major, minor) in _DEVICES.items():
        os.mknod(f"dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
    for name, target in _DEVICE_LINKS.items():
        Path("dev", name).symlink_to(target)
    os.umask(0o022)
    # "echo b" there would restart the machine, not the host.
    if Path("proc/sysrq-trigger").exists():
        syscalls.mount("dev/null", "proc/sysrq-trigger", "", syscalls.MS_BIND)
    syscalls.pivot_root_here()


def _set_up_network(plan: BootPlan) -> None:
    # Not with subprocess, which imports modules as it goes: the machine's Python is out of sight by now.
    _call(["ip", "-batch", "-"], network.host_lines(plan.address, plan.mac, plan.spec))
    if plan.spec.rate_mbit is not None:
        _call(["tc", "-batch", "-"], [network.shaping("eth0", plan.spec.rate_mbit)])


def _call(command: list[str], lines: list[str]) -> None:
    given = os.memfd_create("lines")
    said = os.memfd_create("errors")
    os.write(given, "".join(line + "\n" for line in lines).encode())
    os.lseek(given, 0, os.SEEK_SET)
    actions = [
        (os.POSIX_SPAWN_DUP2, given, 0),
        (os.POSIX_SPAWN_DUP2, said, 1),
        (os.POSIX_SPAWN_DUP2, said, 2),
    ]
    pid = os.posix_spawnp(command[0], command, _ENVIRONMENT, file_actions=actions)
    if os.waitpid(pid, 0)[1] != 0:
        text = os.pread(said, 65536, 0).decode(errors="replace")
        raise TestHostsError(f"{' '.join(command)} failed: {text.strip()}")
    os.close(given)
    os.close(said)


def _run_init(spec: HostSpec) -> NoReturn:
    for capability in (syscalls.CAP_SYS_MODULE, syscalls.CAP_SYS_TIME):
        # The machine's modules and clock are not the host's.
        syscalls.drop_from_bounding_set(capability)
    log = os.open(_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if spec.mode == "hung":
        # Nobody accepts, so the kernel completes the handshake and nothing is ever said.
        listener = socket.create_server(("0.0.0.0", 22), backlog=_HUNG_BACKLOG)
        listener.set_inheritable(True)
    os.execvpe("tini", ["tini", "--", "/bin/sh", "-c", init_script(spec)], _ENVIRONMENT)


def init_script(spec: HostSpec) -> str:
    """What a host's init runs, as text for sh."""
    start = _START_LIBVIRT if spec.libvirt else ""
    if spec.mode in ("hung", "refusing"):
        return f"{start}exec sleep infinity"
    return start + _START_SSHD
