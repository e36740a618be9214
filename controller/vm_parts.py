"""From what people say of VMs (`controller.profile.Settings`) to the parts of their specifications."""

from __future__ import annotations

from pathlib import Path

import msgspec

from controller.profile import Settings
from controller.spawn_images import ImageFinder
from controller.status import CtlError, ExitStatus
from protocol.vms import DirectBoot, Disk, Network, Seed


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What a VM is made of. The command line of `boot` is without the guest's address."""

    boot: DirectBoot | None = None
    disk: Disk | None = None
    network: Network = Network()
    seed: Seed | None = None


class PartsFinder:
    """Parts for settings, each looked up once."""

    def __init__(self, images: ImageFinder) -> None:
        self._images = images
        self._found: dict[Settings, Parts] = {}

    def of(self, settings: Settings) -> Parts:
        """The parts. Raises CtlError where a file or an image is not there, or nothing boots."""
        if settings not in self._found:
            self._found[settings] = self._look(settings)
        return self._found[settings]

    def _look(self, settings: Settings) -> Parts:
        if settings.kernel is None and settings.image is None:
            raise CtlError("give --kernel or --image: without either VMs have nothing to boot", ExitStatus.USAGE)
        boot = disk = None
        if settings.kernel is not None:
            kernel, _ = self._images.find(settings.kernel)
            initrd = None if settings.initrd is None else self._images.find(settings.initrd)[0]
            boot = DirectBoot(kernel=kernel, initrd=initrd, cmdline=settings.cmdline or "")
        if settings.image is not None:
            digest, kind = self._images.find(settings.image)
            disk = Disk(image=digest, image_format=kind, size_mib=settings.disk_mib)
        elif settings.disk_mib is not None:
            raise CtlError("--disk is the size of a disk over an image; give --image as well", ExitStatus.USAGE)
        return Parts(boot=boot, disk=disk, network=Network(bridge=settings.bridge), seed=self._seed(settings))

    def _seed(self, settings: Settings) -> Seed | None:
        if settings.user_data is None and settings.ssh_keys is None:
            return None
        if settings.image is None:
            raise CtlError(
                "user data and keys are for the cloud-init of an image; give --image as well", ExitStatus.USAGE
            )
        user_data = None if settings.user_data is None else self._images.find(settings.user_data)[0]
        keys = () if settings.ssh_keys is None else _keys(Path(settings.ssh_keys))
        return Seed(user_data=user_data, ssh_keys=keys)


def _keys(path: Path) -> tuple[str, ...]:
    """The public keys in a file, one a line, as in authorized_keys (sshd(8)). Raises CtlError."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CtlError(f"{path}: {why}", ExitStatus.USAGE) from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    bad = [key for key in keys if not key.isascii() or not key.isprintable() or len(key) > 8192 or " " not in key]
    if bad or not keys:
        what = f"{bad[0][:40]!r} is no public key" if bad else "no key is in it"
        raise CtlError(f"{path}: {what}; it takes lines like those of ~/.ssh/id_ed25519.pub", ExitStatus.USAGE)
    if any("PRIVATE KEY" in key for key in keys):
        raise CtlError(f"{path}: that is a private key, which never travels; give the .pub file", ExitStatus.USAGE)
    return keys
