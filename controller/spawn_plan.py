"""What `ctl spawn` is going to do: where each VM goes, its address, its specification, and which images it needs.

Decides everything and changes nothing. The same file, fleet and options give the same plan.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

import msgspec

from controller import api
from controller.addresses import AddressError, Addresses, Pool, SubnetsFileError, assign, grid5000_pool, subnet_pool
from controller.deployment import DeploymentError, Plan, make_plan, make_specs
from controller.hosts import fold
from controller.infra import Infra, InfraError, load_infra
from controller.placement import MemoryUnit, Placement, PlacementError, place
from controller.status import CtlError, ExitStatus
from controller.text_problems import Notice, some
from protocol.stream import chunk_for, digest_chunks
from protocol.vms import NAME_PATTERN, Bridge, DirectBoot, Disk, Network, VmSpec

#: A qcow2 file's first bytes (QEMU, docs/interop/qcow2.rst, "Header").
_QCOW2 = b"QFI\xfb"
#: Stands for an image's digest in a plan that is only shown: reading gigabytes would add nothing to it.
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class SpawnOptions:
    """What is wanted, beside the infra.conf itself. Either `subnet` or `g5k_subnets` says where addresses come from."""

    deployment: str
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    image: Path | None = None
    subnet: str | None = None
    g5k_subnets: Path | None = None
    skip_ips: int = 0
    gateway: str | None = None
    bridge: str | None = None
    memory_unit: MemoryUnit = MemoryUnit.AUTO
    overcommit: bool = False
    replace_offline: bool = False


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that is decided.

    `images` are the files that hosts need, by digest; `others` are VMs on record that the file lacks.
    """

    plan: Plan
    slices: dict[str, tuple[VmSpec, ...]]
    images: dict[str, Path]
    addresses: Addresses
    others: tuple[str, ...]

    @property
    def to_run(self) -> tuple[str, ...]:
        """The VMs that shall run, by name: all but those that sleep."""
        return tuple(spec.name for specs in self.slices.values() for spec in specs if spec.start)


def deployment_name(path: Path, given: str | None = None) -> str:
    """The name of a file's deployment: the file's own, without what follows its last dot. Raises CtlError (USAGE)."""
    name = path.stem if given is None else given
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise CtlError(
            f"{name!r} is no deployment name: give one with --deployment, of 1 to 63 letters, digits, '-', '_' and '.'",
            ExitStatus.USAGE,
        )
    return name


def load(path: Path) -> tuple[Infra, tuple[Notice, ...]]:
    """An infra.conf and its warnings. Raises CtlError (USAGE) with all that is wrong with it."""
    try:
        return load_infra(path)
    except InfraError as error:
        count = f"{error.total} errors" if error.total != 1 else "an error"
        raise CtlError(f"{path} has {count}, and nothing was changed:\n{error}", ExitStatus.USAGE) from error
    except OSError as error:
        raise CtlError(f"{path}: {error.strerror}", ExitStatus.USAGE) from error


def prepare(
    infra: Infra,
    options: SpawnOptions,
    *,
    status: api.Status | None,
    known: api.Deployment | None,
    warnings: Iterable[object] = (),
    digest: bool = True,
) -> Prepared:
    """Decide where each VM goes, its address and its specification. `status` and `known` are the service's word on the
    fleet and the deployment; None where it isn't asked. Without `digest` images are looked at but not read.

    Raises CtlError with all causes; nothing has been changed then.
    """
    try:
        placement = place(
            infra,
            memory_unit=options.memory_unit,
            overcommit=options.overcommit,
            replace_offline=options.replace_offline,
        )
    except PlacementError as error:
        raise _refused(error) from error
    if status is not None:
        _check_fleet(placement, status)
    if known is not None:
        _check_places(placement, known)
    addresses = _addresses(placement, options, status, known)
    boot, disk, images = _boot(options, digest=digest)
    try:
        slices = make_specs(
            deployment=options.deployment,
            placement=placement,
            addresses=addresses,
            boot=boot,
            disk=disk,
            network=_network(options.bridge),
        )
    except DeploymentError as error:
        raise _refused(error) from error
    _check_specs(slices)
    declared = {vm.name for vm in infra.vms}
    return Prepared(
        plan=make_plan(deployment=options.deployment, placement=placement, specs=slices, warnings=warnings),
        slices=slices,
        images=images,
        addresses=addresses,
        others=tuple(name for name in (known.hosts if known is not None else ()) if name not in declared),
    )


def _check_specs(slices: dict[str, tuple[VmSpec, ...]]) -> None:
    """Raises CtlError where an agent would not take a specification."""
    for specs in slices.values():
        for spec in specs:
            try:
                msgspec.convert(msgspec.to_builtins(spec), VmSpec)
            except msgspec.ValidationError as error:
                raise CtlError(f"{spec.name} can't be made as the file has it: {error}", ExitStatus.USAGE) from error


def _network(bridge: str | None) -> Network:
    try:
        return Network(bridge=None if bridge is None else msgspec.convert(bridge, Bridge))
    except msgspec.ValidationError as error:
        why = "no name of a network interface, which has 1 to 15 letters, digits, '-', '_' and '.'"
        raise CtlError(f"--bridge {bridge!r}: {why}", ExitStatus.USAGE) from error


def _refused(error: Exception) -> CtlError:
    text = str(error)
    return CtlError(f"this can't be done, and nothing was changed:\n{text}" if "\n" in text else text, ExitStatus.USAGE)


def _check_fleet(placement: Placement, status: api.Status) -> None:
    """Raises CtlError where VMs would go to hosts that are not in the fleet, or that are down."""
    needed = [use.node.name for use in placement.nodes if use.vms]
    hosts = {host.name: host for host in status.hosts}
    strangers = [name for name in needed if name not in hosts]
    down: dict[str, list[str]] = {}
    for name in needed:
        if name in hosts and not hosts[name].up:
            down.setdefault(hosts[name].why or "nobody knows why", []).append(name)
    causes = []
    if strangers:
        causes.append(f"not in the fleet: {fold(strangers)}; start them with `ctl up -w {fold(strangers)}`")
    causes += [f"down: {fold(names)} ({why})" for why, names in down.items()]
    if causes:
        code = ExitStatus.NO_TARGET if strangers else ExitStatus.UNREACHABLE
        raise CtlError(f"hosts of the file can't take VMs, and nothing was changed: {'; '.join(causes)}", code)


def _check_places(placement: Placement, known: api.Deployment) -> None:
    """Raises CtlError where the file has VMs elsewhere than they are."""
    moved = [
        f"{at.vm.name} is on {known.hosts[at.vm.name]} and the file has it on {at.node}"
        for at in placement.places
        if known.hosts.get(at.vm.name, at.node) != at.node
    ]
    if moved:
        raise CtlError(
            f"VMs are not moved, and nothing was changed: {some(moved)}; destroy them first, or mend the file",
            ExitStatus.USAGE,
        )


def _addresses(
    placement: Placement, options: SpawnOptions, status: api.Status | None, known: api.Deployment | None
) -> Addresses:
    taken = set(known.taken) if known is not None else set()
    taken.update(host.address for host in (status.hosts if status is not None else ()) if _is_ipv4(host.address))
    try:
        pool = _pool(options, taken)
        return assign([at.vm.name for at in placement.places], pool, known.addresses if known is not None else None)
    except (AddressError, SubnetsFileError) as error:
        raise _refused(error) from error


def _pool(options: SpawnOptions, taken: set[str]) -> Pool:
    if (options.subnet is None) == (options.g5k_subnets is None):
        raise CtlError(
            "give either --subnet (as in 198.18.0.0/22) or --g5k-subnets FILE, for the VMs' addresses", ExitStatus.USAGE
        )
    if options.subnet is not None:
        return subnet_pool(options.subnet, skip=options.skip_ips, exclude=taken, gateway=options.gateway)
    path = Path(str(options.g5k_subnets))
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CtlError(f"{path}: {why}", ExitStatus.USAGE) from error
    return grid5000_pool(text, file=str(path), skip=options.skip_ips, exclude=taken, gateway=options.gateway)


def _is_ipv4(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True


def _boot(options: SpawnOptions, *, digest: bool) -> tuple[DirectBoot | None, Disk | None, dict[str, Path]]:
    if options.kernel is None and options.image is None:
        raise CtlError("give --kernel or --image: without either VMs have nothing to boot", ExitStatus.USAGE)
    if options.kernel is None and (options.initrd is not None or options.cmdline):
        raise CtlError("--initrd and --cmdline go with --kernel; an image has its own", ExitStatus.USAGE)
    if not (options.cmdline.isascii() and options.cmdline.isprintable()):
        raise CtlError("--cmdline: a kernel's command line is printable ASCII", ExitStatus.USAGE)
    images: dict[str, Path] = {}

    def image(path: Path) -> str:
        found = image_digest(path) if digest else _readable(path)
        images[found] = path
        return found

    boot = disk = None
    if options.kernel is not None:
        kernel = image(options.kernel)
        initrd = None if options.initrd is None else image(options.initrd)
        boot = DirectBoot(kernel=kernel, initrd=initrd, cmdline=options.cmdline)
    if options.image is not None:
        disk = Disk(image=image(options.image), image_format=image_format(options.image))
    return boot, disk, images


def image_digest(path: Path) -> str:
    """The name that an image has in hosts' stores: the digest over its chunks' digests (protocol.commands.Stream).

    Reads all of it. Raises CtlError (USAGE) where it can't be read.
    """
    try:
        with path.open("rb") as file:
            fd = file.fileno()
            size = os.fstat(fd).st_size
            chunk = chunk_for(size)
            return digest_chunks(lambda index: os.pread(fd, chunk, index * chunk), size, chunk)[1]
    except OSError as error:
        raise CtlError(f"{path}: {error.strerror}", ExitStatus.USAGE) from error
    except ValueError as error:
        raise CtlError(f"{path}: {error}", ExitStatus.USAGE) from error


def _readable(path: Path) -> str:
    try:
        path.open("rb").close()
    except OSError as error:
        raise CtlError(f"{path}: {error.strerror}", ExitStatus.USAGE) from error
    return _NO_DIGEST


def image_format(path: Path) -> Literal["qcow2", "raw"]:
    """What a disk image is, by its first bytes."""
    try:
        with path.open("rb") as file:
            return "qcow2" if file.read(len(_QCOW2)) == _QCOW2 else "raw"
    except OSError as error:
        raise CtlError(f"{path}: {error.strerror}", ExitStatus.USAGE) from error
