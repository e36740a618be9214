"""Builds the small guest. Its two packages come from the Debian archive through apt, which verifies them.

Nothing is installed: packages are downloaded and unpacked in a cache directory. The same packages give the same bytes.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: What building the guest takes, in Debian's words; busybox itself is downloaded, not installed.
DEBIAN_PACKAGES = ("apt", "cpio", "dpkg")
#: What a host needs for VMs of any kind under its agent.
HOST_DEBIAN_PACKAGES = ("libvirt-daemon-system", "python3-libvirt", "qemu-system-x86", "qemu-utils")

# The network, disks, what a NoCloud disk is written in, and the power button with the device that it shows up at.
_MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "isofs", "button", "evdev")
_INIT = Path(__file__).with_name("init.sh")
# The action that busybox's acpid looks up for the power button.
_POWER_BUTTON = "#!/bin/busybox sh\nexec poweroff -f\n"
# A mirror that stalls should not stall a test run for ever.
_DOWNLOAD_SECONDS = 300


class GuestError(Exception):
    """The guest can't be built; the text says why and what to do."""


@dataclass(frozen=True)
class Guest:
    """Files for a direct kernel boot. `release` is the kernel's version. The command line needs console=ttyS0 and ip=
    in the kernel's form; when it is up the guest prints `canopy-guest NAME ready at ADDRESS`."""

    kernel: Path
    initrd: Path
    release: str


def default_cache() -> Path:
    """$XDG_CACHE_HOME/canopy/guest, by the XDG Base Directory Specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "canopy" / "guest"


def build_guest(cache: Path | None = None) -> Guest:
    """The guest, built unless `cache` has it already. Several processes may do so at a time. Raises GuestError."""
    cache = cache or default_cache()
    packages = cache / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for program in ("apt-get", "cpio", "dpkg"):
        if shutil.which(program) is None:
            raise GuestError(f"{program} is not here; on Debian, apt-get install {' '.join(DEBIAN_PACKAGES)}")
    architecture = _run("dpkg", "--print-architecture").strip()
    kernel = package(_real_kernel(f"linux-image-cloud-{architecture}"), packages)
    busybox = package("busybox-static", packages)
    recipe = [kernel.name, busybox.name, _INIT.read_text(), Path(__file__).read_text()]
    built = cache / hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=cache) as work:
            _build(kernel, busybox, Path(work))
            try:
                (Path(work) / "guest").rename(built)
            except OSError:
                if not built.exists():  # else another process was faster
                    raise
    return Guest(built / "vmlinuz", built / "initrd.img", (built / "release").read_text())


def _build(kernel: Path, busybox: Path, work: Path) -> None:
    for package in (kernel, busybox):
        _run("dpkg", "-x", str(package), str(work / "system"))
    guest, tree = work / "guest", work / "tree"
    guest.mkdir()
    [image] = (work / "system" / "boot").glob("vmlinuz-*")
    shutil.copyfile(image, guest / "vmlinuz")
    (guest / "release").write_text(image.name.removeprefix("vmlinuz-"))

    modules = tree / "lib" / "modules"
    for folder in (modules, tree / "bin", tree / "etc" / "acpi" / "PWRF"):
        folder.mkdir(parents=True)
    names = []
    for name, code in _modules(next((work / "system").glob("**/modules.builtin")).parent):
        (modules / f"{name}.ko").write_bytes(code)
        names.append(name)
    (modules / "load").write_text("".join(f"{name}\n" for name in names))
    # Its place depends on whether the release has merged /bin and /usr/bin.
    shutil.copyfile(next((work / "system").glob("**/bin/busybox")), tree / "bin" / "busybox")
    (tree / "etc" / "acpi" / "PWRF" / "00000080").write_text(_POWER_BUTTON)
    shutil.copyfile(_INIT, tree / "init")
    for program in ("bin/busybox", "init", "etc/acpi/PWRF/00000080"):
        (tree / program).chmod(0o755)
    (guest / "initrd.img").write_bytes(gzip.compress(_archive(tree), mtime=0))


def _archive(tree: Path) -> bytes:
    """The tree as cpio's newc, which the kernel unpacks. Times, inodes and owners are left out of it."""
    paths = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*"))
    for path in paths:
        os.utime(tree / path, (0, 0))
        if (tree / path).is_dir():
            (tree / path).chmod(0o755)
    command = ["cpio", "--create", "--format=newc", "--reproducible", "--owner=+0:+0", "--quiet", "--null"]
    names = "".join(f"{path}\0" for path in paths).encode()
    return subprocess.run(command, input=names, cwd=tree, capture_output=True, check=True).stdout


def _modules(folder: Path) -> Iterable[tuple[str, bytes]]:
    """The kernel modules that the guest loads, each after those that it needs. Built-in ones are left out."""
    files = {path.name.split(".")[0].replace("-", "_"): path for path in folder.glob("kernel/**/*.ko*")}
    built_in = {Path(line).stem.replace("-", "_") for line in (folder / "modules.builtin").read_text().split()}
    taken: dict[str, bytes] = {}

    def take(name: str) -> None:
        if name in taken or name in built_in:
            return
        if name not in files:
            raise GuestError(f"the kernel in {folder.name} has no {name}; it can't boot as a guest")
        code = _unpacked(files[name])
        # modinfo(8): a NUL-separated section of key=value.
        needs = re.search(rb"\0depends=([^\0]*)\0", code)
        for need in needs[1].decode().split(",") if needs else ():
            if need:
                take(need.replace("-", "_"))
        taken[name] = code

    for name in _MODULES:
        take(name)
    return taken.items()


def _unpacked(path: Path) -> bytes:
    # Debian 13 has its modules compressed.
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def _real_kernel(package: str) -> str:
    """The package with a kernel in it that the meta-package `package` stands for."""
    needs = re.search(r"^Depends: (linux-image-[^ ,]+)", _described(package), re.MULTILINE)
    if needs is None:
        raise GuestError(f"the package {package} names no kernel; is this a Debian release with a cloud kernel?")
    return needs[1]


def package(name: str, into: Path) -> Path:
    """The package file of the version that apt would install, downloaded unless it is there."""
    version = re.search(r"^Version: (\S+)", _described(name), re.MULTILINE)
    architecture = re.search(r"^Architecture: (\S+)", _described(name), re.MULTILINE)
    if version is None or architecture is None:
        raise GuestError(f"apt does not say which version of {name} there is")
    file = into / f"{name}_{version[1].replace(':', '%3a')}_{architecture[1]}.deb"
    if not file.exists():
        # In a directory of its own, so that a download that is cut short is never taken for a package.
        with tempfile.TemporaryDirectory(dir=into) as fresh:
            # apt would drop to a user that may not write there.
            _run("apt-get", "-o", "APT::Sandbox::User=root", "download", f"{name}={version[1]}", cwd=fresh)
            [downloaded] = Path(fresh).glob("*.deb")
            downloaded.rename(file)
    return file


@functools.cache
def _described(package: str) -> str:
    """What apt knows of the version that it would install. Fetches the lists of packages once where it knows none."""
    for last in (False, True):
        try:
            return _run("apt-cache", "show", "--no-all-versions", package)
        except GuestError as error:
            if last or os.geteuid() != 0:
                raise GuestError(f"apt knows no package {package}; as root, run apt-get update: {error}") from error
            print("guest: apt-get update", flush=True)
            _run("apt-get", "update")
    raise AssertionError("unreachable")


def _run(*command: str, cwd: str | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=_DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise GuestError(f"{' '.join(command)} did not end within {_DOWNLOAD_SECONDS} s") from None
    if done.returncode != 0:
        raise GuestError(f"{' '.join(command)} failed: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout
