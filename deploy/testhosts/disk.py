"""A host's files: the machine's system as the lowest layer, a "bare" layer over it, and the host's own on top; and
beside that a data disk.

The bare layer is one per fleet. It hides what a freshly installed host would not have (homes, /usr/local, logs, state,
the machine's own keys) and carries what all hosts share. A host's own layer stays when it is powered off, as does its
data disk on /srv, a plain directory: a hypervisor's disks are no overlays, which make each file twice. Layers are as
overlayfs defines them, https://docs.kernel.org/filesystems/overlayfs.html: a directory with the extended attribute
``trusted.overlay.opaque=y`` hides the one below it, a character device 0/0 (a "whiteout") hides a name.
"""

from __future__ import annotations

import os
import re
import stat
import uuid
from pathlib import Path

from .model import HostSpec, Mode

# What is taken from the machine; anything else in its / is hidden.
_SYSTEM = {"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "var", "boot"}
# Empty directories that a fresh host has, with their modes (hier(7), and Debian's base-files).
_FRESH = {
    "dev": 0o755,
    "home": 0o755,
    "media": 0o755,
    "mnt": 0o755,
    "opt": 0o755,
    "proc": 0o555,
    "root": 0o700,
    "run": 0o755,
    "srv": 0o755,
    "sys": 0o555,
    "tmp": 0o1777,
    "etc/ssh": 0o755,
    "var/mail": 0o2775,
    "var/tmp": 0o1777,
}
# Where a host's data disk is mounted, below its root.
DATA_DISK = "srv"
_USR_LOCAL = ("bin", "etc", "games", "include", "lib", "man", "sbin", "share", "src")
# Emptied of files, with their directories (owners and modes) kept, as packages just installed have them.
_EMPTIED = ("var/log", "var/cache", "var/lib/libvirt", "etc/libvirt/qemu")

# The sessions and logins at once that tests may open: far above sshd's 10 and 10:30:100.
_SSHD_CONFIG = """\
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile .ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
AllowAgentForwarding yes
MaxStartups 2000
MaxSessions 2000
PrintMotd no
PrintLastLog no
AcceptEnv LANG LC_*
Subsystem sftp internal-sftp
"""

# A test host has no security module of its own, and the machine's does not know its paths.
_QEMU_CONF = 'security_driver = "none"\n'

# Names the hosts' machine ids and libvirt UUIDs, so that a host has the same ones after each start.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "testhosts.canopy")

# Imported by Python at start (site, https://docs.python.org/3/library/site.html) on an "old_python" host.
_OLD_PYTHON = """\
import collections, sys
_Version = collections.namedtuple("version_info", "major minor micro releaselevel serial")
sys.version_info = _Version(3, 8, 20, "final", 0)
sys.hexversion = 0x030814F0
sys.version = "3.8.20 (default) [GCC]"
sys.implementation.version = sys.version_info
sys.implementation.cache_tag = "cpython-38"
"""


def _whiteout(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(0, 0))


def _opaque(path: Path, mode: int) -> None:
    path.mkdir(parents=True)
    path.chmod(mode)
    os.setxattr(path, "trusted.overlay.opaque", b"y")


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _like_the_machines(layer: Path, directory: Path) -> None:
    """Give a directory of the layer the owner and mode of the machine's: a layer's upper directory wins."""
    for path in (directory, *directory.parents):
        original = Path("/", path.relative_to(layer)) if path != layer else Path("/")
        if original.is_dir() and not original.is_symlink():
            facts = original.stat()
            os.chown(path, facts.st_uid, facts.st_gid)
            path.chmod(stat.S_IMODE(facts.st_mode))
        if path == layer:
            return


def _directories_only(layer: Path, relative: str) -> None:
    if not Path("/", relative).is_dir():
        return
    for top, names, _ in os.walk(Path("/", relative)):
        here = layer / Path(top).relative_to("/")
        if not here.exists():
            here.mkdir(parents=True)
        if top == str(Path("/", relative)):
            os.setxattr(here, "trusted.overlay.opaque", b"y")
        names[:] = [name for name in names if not Path(top, name).is_symlink()]
        facts = Path(top).stat()
        os.chown(here, facts.st_uid, facts.st_gid)
        here.chmod(stat.S_IMODE(facts.st_mode))


def make_bare_layer(layer: Path, *, authorized_key: str, hosts_file: str) -> None:
    """Fill ``layer``, a new directory, with what all hosts of a fleet share."""
    layer.mkdir(parents=True)
    layer.chmod(0o755)
    for name in os.listdir("/"):
        if name not in _SYSTEM and name not in _FRESH:
            _whiteout(layer / name)
    for name, mode in _FRESH.items():
        _opaque(layer / name, mode)
    # A host whose only Python is in /usr/local, as in some containers, keeps it.
    if Path("/usr/bin/python3").exists():
        _opaque(layer / "usr/local", 0o755)
        for name in _USR_LOCAL:
            (layer / "usr/local" / name).mkdir()
    for relative in _EMPTIED:
        _directories_only(layer, relative)

    _write(layer / "etc/hosts", hosts_file)
    # No name server can be reached from a host.
    _write(layer / "etc/resolv.conf", "")
    _write(layer / "etc/ssh/sshd_config", _SSHD_CONFIG)
    _write(layer / "root/.ssh/authorized_keys", authorized_key + "\n", 0o600)
    (layer / "root/.ssh").chmod(0o700)
    # Without PAM, sshd takes "!" for a locked account, and some images lock root so.
    shadow = Path("/etc/shadow").read_text()
    _write(layer / "etc/shadow", re.sub(r"(?m)^root:[^:]*:", "root:*:", shadow), 0o640)
    if Path("/etc/libvirt/qemu.conf").exists():
        _write(layer / "etc/libvirt/qemu.conf", _QEMU_CONF, 0o600)
    for directory in ("usr", "etc", "var", "var/lib", "etc/libvirt"):
        if (layer / directory).is_dir():
            _like_the_machines(layer, layer / directory)


def _hide_python(upper: Path) -> None:
    for directory in {Path("/usr/bin"), Path("/usr/local/bin"), Path("/bin").resolve()}:
        for path in directory.glob("python*"):
            target = upper / path.relative_to("/")
            if not os.path.lexists(target):
                _whiteout(target)


def _age_python(upper: Path) -> None:
    for library in Path("/usr/lib").glob("python3.*"):
        if library.is_dir():
            _write(upper / library.relative_to("/") / "sitecustomize.py", _OLD_PYTHON)
            _like_the_machines(upper, upper / library.relative_to("/"))


def _apply_mode(upper: Path, mode: Mode) -> None:
    if mode == "no_python":
        _hide_python(upper)
    elif mode == "old_python":
        _age_python(upper)


def make_own_layer(disk: Path, spec: HostSpec, *, host_key: bytes) -> None:
    """Make ``disk``/upper and ``disk``/work, the host's own layer: its name, ids, SSH host key and faults; and
    ``disk``/data, what it has on DATA_DISK."""
    upper = disk / "upper"
    upper.mkdir(parents=True)
    upper.chmod(0o755)
    (disk / "work").mkdir()
    (disk / "data").mkdir()
    (disk / "data").chmod(0o755)
    identity = uuid.uuid5(_NAMESPACE, spec.name)
    _write(upper / "etc/hostname", spec.name + "\n")
    _write(upper / "etc/machine-id", identity.hex + "\n", 0o444)
    _write(upper / "etc/ssh/ssh_host_ed25519_key", host_key.decode(), 0o600)
    if spec.libvirt:
        machine_config = Path("/etc/libvirt/libvirtd.conf").read_text()
        own = "\n".join(line for line in machine_config.splitlines() if not line.startswith("host_uuid"))
        _write(upper / "etc/libvirt/libvirtd.conf", f'{own}\nhost_uuid = "{identity}"\n')
    _apply_mode(upper, spec.mode)


def mount_options(bare: Path, disk: Path) -> str:
    """overlayfs's mount options for a host."""
    return f"lowerdir={bare}:/,upperdir={disk}/upper,workdir={disk}/work"
