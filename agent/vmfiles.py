"""A host's files for VMs: base images by digest, and a directory for each VM with its overlay, console and domain.

    images/<digest>          read-only, put there and verified by the push
    vms/<name>/domain.xml    the domain as it was defined; its mark says whose VM this is, whatever libvirt knows
    vms/<name>/overlay.qcow2 what the VM wrote, over the image
    vms/<name>/seed.iso      what cloud-init reads at the first boot, where the specification has a seed
    vms/<name>/console.log   all that its serial console has shown

Under qemu:///system QEMU is another user than the agent. libvirt hands the files that a VM needs to that user; the
directories are opened to its group alone, so that what is in images and disks is for root and QEMU and nobody else.
"""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import re
import shutil
import tempfile
from collections.abc import Container
from pathlib import Path

from agent.lanes import within
from agent.vmxml import Layout, Mark, mark_in_domain
from protocol.vms import DIGEST_PATTERN, NAME_PATTERN, Disk, VmSpec

_QEMU_CONF = "/etc/libvirt/qemu.conf"
# Debian and its kin, then Fedora, SUSE and Arch.
_QEMU_USERS = ("libvirt-qemu", "qemu")
# It writes a header of 200 KiB; what can take long is a file system that hangs.
_QEMU_IMG_SECONDS = 60.0
_MIB = 1024 * 1024


class VmFileError(Exception):
    """A VM's files can't be made or found; the text says why and what to do."""


class QemuUser:
    """The user that libvirtd's QEMU runs as: `name`, `uid`, the ids of its groups, and the group of its very own."""

    def __init__(self, entry: pwd.struct_passwd) -> None:
        self.name = entry.pw_name
        self.uid = entry.pw_uid
        self.gids = {entry.pw_gid, *os.getgrouplist(entry.pw_name, entry.pw_gid)}
        self.own_gid = entry.pw_gid
        try:
            # On Debian the primary group is kvm, which people join to run VMs of their own.
            gid = grp.getgrnam(entry.pw_name).gr_gid
        except KeyError:
            return
        if gid in self.gids:
            self.own_gid = gid


def qemu_user(settings: str | None = None) -> QemuUser | None:
    """Whom qemu.conf names, or the distribution's default. None where that is root or can't be told.

    `settings` is the path of qemu.conf, by default libvirtd's. Source: the comments on `user` in that file; a number is
    written with a leading +.
    """
    names: tuple[str, ...] = _QEMU_USERS
    try:
        with open(settings or _QEMU_CONF, encoding="utf-8", errors="replace") as file:
            chosen = re.search(r'^\s*user\s*=\s*"([^"]*)"', file.read(), re.MULTILINE)
        if chosen is not None:
            names = (chosen[1],)
    except OSError:
        pass
    for name in names:
        try:
            number = name.removeprefix("+")
            entry = pwd.getpwuid(int(number)) if number.isdecimal() else pwd.getpwnam(name)
        except KeyError:
            continue
        return None if entry.pw_uid == 0 else QemuUser(entry)
    return None


class VmFiles:
    """The files below `directory`."""

    def __init__(self, directory: Path) -> None:
        self._images = directory / "images"
        self._vms = directory / "vms"
        self._user: QemuUser | None = None
        #: Images that were looked at, with their size in bytes.
        self._sizes: dict[tuple[str, str], int] = {}

    def open_up(self, user: QemuUser | None) -> None:
        """Make the directories, and let `user`, QEMU's where that is not the agent's own, through to what it needs.

        Nobody may be at work on a VM. Raises VmFileError.
        """
        self._user = user
        self._vms.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._images.mkdir(mode=0o700, exist_ok=True)
        for folder in (self._images, self._vms):
            self._let_through(folder)
        if self._user is not None:
            closed = closed_to(self._user, self._vms)
            if closed is not None:
                raise VmFileError(
                    f"libvirt runs QEMU as {self._user.name}, which may not enter {closed}; "
                    "let the agent have its directory elsewhere, such as below /var/lib"
                )
        for leftover in self._vms.glob(".*"):
            if re.fullmatch(NAME_PATTERN, leftover.name) is None:
                shutil.rmtree(leftover, ignore_errors=True)

    @property
    def user(self) -> QemuUser | None:
        """Whom QEMU runs as, where that is not the agent's own user; known once `open_up` was called."""
        return self._user

    def names(self) -> list[str]:
        """The VMs that have a directory here, sorted."""
        try:
            found = os.listdir(self._vms)
        except FileNotFoundError:
            return []
        return sorted(name for name in found if re.fullmatch(NAME_PATTERN, name))

    def has(self, name: str) -> bool:
        """Whether a VM has a directory here."""
        return (self._vms / name).is_dir()

    def mark(self, name: str) -> Mark | None:
        """Whose VM the files of a name are; None where there are none, or none of ours."""
        try:
            return mark_in_domain((self._vms / name / "domain.xml").read_text())
        except (OSError, UnicodeDecodeError):
            return None

    def marks(self, but: Container[str] = ()) -> dict[str, Mark]:
        """The marks of all VMs that have files here, but for the names in `but`."""
        found = {name: self.mark(name) for name in self.names() if name not in but}
        return {name: mark for name, mark in found.items() if mark is not None}

    def layout(self, spec: VmSpec) -> Layout:
        """Where a VM's files are. Raises VmFileError where an image is not on this host."""
        boot, folder = spec.boot, self._vms / spec.name
        return Layout(
            console=str(folder / "console.log"),
            kernel=None if boot is None else str(self._image(boot.kernel, "kernel")),
            initrd=None if boot is None or boot.initrd is None else str(self._image(boot.initrd, "initrd")),
            overlay=None if spec.disk is None else str(folder / "overlay.qcow2"),
            seed=None if spec.seed is None else str(folder / "seed.iso"),
        )

    def make_seed(self, spec: VmSpec, host: str) -> None:
        """The NoCloud disk of a VM on `host`, unless it has one already. Blocks. Raises VmFileError."""
        path = self._vms / spec.name / "seed.iso"
        if spec.seed is None or path.exists():
            return
        from agent import nocloud  # pycdlib costs an agent without such VMs memory for nothing

        template = None if spec.seed.user_data is None else self._image(spec.seed.user_data, "user data").read_bytes()
        unfinished = path.with_suffix(".part")
        try:
            nocloud.write_disk(nocloud.documents(spec, template, host), unfinished)
        except nocloud.SeedError as error:
            raise VmFileError(str(error)) from error
        _put_in_place(unfinished, path)

    def add(self, name: str, document: str) -> None:
        """Make a VM's directory with its domain in it, in one step. Raises FileExistsError."""
        made = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=self._vms))
        try:
            (made / "domain.xml").write_text(document)
            (made / "domain.xml").chmod(0o600)
            self._let_through(made)
            # rename(2) would replace an empty directory; none of ours is ever empty.
            made.rename(self._vms / name)
        except BaseException as error:
            shutil.rmtree(made, ignore_errors=True)
            if isinstance(error, OSError) and (self._vms / name).exists():
                raise FileExistsError(f"{self._vms / name} is there already") from error
            raise

    def remove(self, name: str) -> bool:
        """Remove all files of a VM; whether there were any."""
        folder = self._vms / name
        if not folder.is_dir() or folder.is_symlink():
            return False
        # The new name is none that a VM can have: if this is cut short, `open_up` goes on with it.
        grave = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=self._vms))
        folder.rename(grave)
        shutil.rmtree(grave)
        return True

    async def make_overlay(self, name: str, disk: Disk) -> None:
        """The qcow2 overlay of a VM, unless it has one already. Raises VmFileError."""
        overlay = self._vms / name / "overlay.qcow2"
        if await asyncio.to_thread(overlay.exists):
            return
        base = await asyncio.to_thread(self._image, disk.image, "disk image")
        size = await self._size(base, disk.image_format)
        if disk.size_mib is not None and disk.size_mib * _MIB < size:
            raise VmFileError(
                f"a disk of {disk.size_mib} MiB is smaller than its image {disk.image[:12]} of {-(-size // _MIB)} MiB; "
                "ask for at least that"
            )
        unfinished = overlay.with_suffix(".part")
        command = ["create", "-q", "-f", "qcow2", "-F", disk.image_format, "-b", str(base), str(unfinished)]
        if disk.size_mib is not None:
            command.append(f"{disk.size_mib}M")
        await _qemu_img(*command)
        await asyncio.to_thread(_put_in_place, unfinished, overlay)

    async def _size(self, base: Path, image_format: str) -> int:
        key = (base.name, image_format)
        if key not in self._sizes:
            described = json.loads(await _qemu_img("info", "--output=json", "-f", image_format, str(base)))
            # An image may name any file of the host as a part of itself, and QEMU would open it.
            part = described.get("backing-filename") or described.get("format-specific", {}).get("data", {}).get(
                "data-file"
            )
            if part is not None:
                raise VmFileError(
                    f"the image {base.name[:12]} builds on another file, {part}; push it whole (`qemu-img convert`)"
                )
            self._sizes[key] = int(described["virtual-size"])
        return self._sizes[key]

    def _image(self, digest: str, what: str) -> Path:
        if re.fullmatch(DIGEST_PATTERN, digest) is None:
            raise VmFileError(f"{digest!r} is no image digest")
        path = self._images / digest
        if not path.is_file() or path.is_symlink():
            raise VmFileError(f"the {what} {digest[:12]} is not on this host; push it as an image first")
        return path

    def _let_through(self, folder: Path) -> None:
        if self._user is None:
            folder.chmod(0o700)
        elif os.geteuid() == 0:
            os.chown(folder, -1, self._user.own_gid)
            folder.chmod(0o710)
        else:
            # Giving a directory to QEMU's group takes root. Enter, but don't list.
            folder.chmod(0o711)


def closed_to(user: QemuUser, folder: Path) -> Path | None:
    """The first directory on the way to `folder`, itself included, that the user may not enter."""
    for above in reversed((folder, *folder.parents)):
        info = above.stat()
        if user.uid == info.st_uid:
            allowed = info.st_mode & 0o100
        elif info.st_gid in user.gids:
            allowed = info.st_mode & 0o010
        else:
            allowed = info.st_mode & 0o001
        if not allowed:
            return above
    return None


def _put_in_place(unfinished: Path, overlay: Path) -> None:
    unfinished.chmod(0o600)
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)  # qemu-img does not; a disk of zeros would be there after a power cut
    finally:
        os.close(descriptor)
    unfinished.rename(overlay)


async def _qemu_img(*arguments: str) -> bytes:
    try:
        child = await asyncio.create_subprocess_exec(
            *("qemu-img", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError:
        raise VmFileError("VMs with disks need qemu-img; install it with `apt-get install qemu-utils`") from None
    try:
        output, errors = await within(_QEMU_IMG_SECONDS, child.communicate())
    except asyncio.TimeoutError:
        raise VmFileError(
            f"qemu-img {arguments[0]} did not end within {_QEMU_IMG_SECONDS:g} s; look at the host's disk"
        ) from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        raise VmFileError(" ".join(errors.decode(errors="replace").split()) or f"qemu-img failed: {child.returncode}")
    return output
