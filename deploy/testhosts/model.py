"""What a test host is: its wishes (HostSpec), its facts once it runs (Host), and what the machine must have."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal, get_args

Mode = Literal["ok", "hung", "refusing", "no_python", "old_python"]

# Debian 12 packages; the libvirt ones are for HostSpec(libvirt=True) alone.
DEBIAN_PACKAGES = ("iproute2", "iputils-ping", "openssh-client", "openssh-server", "tini", "util-linux")
LIBVIRT_DEBIAN_PACKAGES = ("libvirt-daemon-system", "libvirt-clients", "qemu-system-x86")

_PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "ping": "iputils-ping",
    "tini": "tini",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
_LIBVIRT_PROGRAMS = {
    "libvirtd": "libvirt-daemon-system",
    "virtlogd": "libvirt-daemon-system",
    "virsh": "libvirt-clients",
    "qemu-system-x86_64": "qemu-system-x86",
}

# capabilities(7): the numbers of what making hosts takes, which a container's root may lack.
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_CHROOT": 18, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27}

# The path that the hosts' programs are looked for on: a superuser's, whatever the caller's own is.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# HOST_NAME_MAX, gethostname(2).
_LONGEST_NAME = 64
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
# IFNAMSIZ - 1, netdevice(7); no slash or white space, kept narrower here.
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")


class TestHostsError(Exception):
    """The test hosts could not be made or driven; the text says why and what to do."""

    __test__ = False


@dataclass(frozen=True)
class HostSpec:
    """A host to be made.

    name: hostname, up to 64 characters, dots allowed; its first label is an alias where no other host has it.
    site: a free word, handed back in ``Host.site``.
    mode: "ok"; "hung": port 22 accepts and never speaks; "refusing": nothing listens on port 22;
        "no_python": sshd but no Python; "old_python": python3 says that it is 3.8.
    rate_mbit: link rate each way in Mbit/s; None is unlimited.
    libvirt: virtlogd and libvirtd run before sshd does.
    vm_bridge: name of a bridge in the host that holds its address and its link, so that VMs' taps on it
        share the segment of all hosts and of the service node.
    aliases: further names in /etc/hosts and the SSH configuration.
    """

    name: str
    site: str = ""
    mode: Mode = "ok"
    rate_mbit: float | None = None
    libvirt: bool = False
    vm_bridge: str | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
                raise TestHostsError(f"{name!r} is no hostname: use letters, digits, '-' and '.'")
        if self.mode not in get_args(Mode):
            raise TestHostsError(f"{self.name}: no mode {self.mode!r}; there are {', '.join(get_args(Mode))}")
        if self.rate_mbit is not None and self.rate_mbit <= 0:
            raise TestHostsError(f"{self.name}: a link rate is above 0 Mbit/s")
        if self.vm_bridge is not None and not _INTERFACE.fullmatch(self.vm_bridge):
            raise TestHostsError(f"{self.name}: {self.vm_bridge!r} is no interface name")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host that was made. ``pid`` is its init as this machine sees it, 0 while it is powered off."""

    name: str
    site: str
    mode: Mode
    address: IPv4Address
    mac: str
    spec: HostSpec = field(repr=False)
    pid: int = 0

    @property
    def root(self) -> Path:
        """The host's / as seen from this machine, while the host is powered."""
        if not self.pid:
            raise TestHostsError(f"{self.name} is powered off: its files can't be seen")
        return Path(f"/proc/{self.pid}/root")


def all_names(specs: list[HostSpec]) -> dict[str, tuple[str, ...]]:
    """Each host's name with all that it is called: the name, its first label where unambiguous, its aliases.

    Raises TestHostsError where two hosts share a name or an alias.
    """
    shorts: dict[str, int] = {}
    for spec in specs:
        short = spec.name.split(".")[0]
        shorts[short] = shorts.get(short, 0) + 1
    taken: dict[str, str] = {"service": "the service node", "localhost": "every host"}
    result: dict[str, tuple[str, ...]] = {}
    full_names = {spec.name for spec in specs}
    for spec in specs:
        names = [spec.name]
        short = spec.name.split(".")[0]
        if shorts[short] == 1 and short not in full_names and short not in taken:
            names.append(short)
        names.extend(alias for alias in spec.aliases if alias not in names)
        for name in names:
            if name in taken:
                raise TestHostsError(f"{name!r} would name both {taken[name]} and {spec.name}: choose another")
            taken[name] = spec.name
        result[spec.name] = tuple(names)
    return result


def missing_requirements(*, libvirt: bool = False) -> str | None:
    """Why test hosts can't be made here, as one sentence, or None where they can."""
    if os.geteuid() != 0:
        return "test hosts need root: they are made of namespaces, mounts and network links"
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    lacking = [name for name, number in _CAPABILITIES.items() if not effective >> number & 1]
    if lacking:
        return f"test hosts need {', '.join(lacking)}: run outside a container, or in a privileged one"
    programs = _PROGRAMS | (_LIBVIRT_PROGRAMS if libvirt else {})
    missing = [name for name in programs if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        packages = " ".join(sorted({programs[name] for name in missing}))
        return f"test hosts need {', '.join(missing)}: apt-get install {packages}"
    return None
