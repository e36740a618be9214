"""What `ctl spawn` is going to do: where each VM goes, its address, its specification, and which images it needs.

Decides everything and changes nothing. The same file, fleet and options give the same plan.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path

import msgspec

from controller import api
from controller.addresses import Addresses, Pool, grid5000_pool, subnet_pool
from controller.deployment import DeploymentError, Plan, make_plan, make_specs
from controller.hosts import fold
from controller.infra import NO_CAP, Infra, InfraError, load_infra
from controller.inventory import as_in_fleet
from controller.on_record import Capacity
from controller.placement import MemoryUnit, Placement, PlacementError, Strategy, place
from controller.plan_addresses import check_nets, gateway_of, give_addresses
from controller.profile import Profile, ProfileError, Settings, load_profile
from controller.shares import needed
from controller.spawn_images import DigestCache, ImageFinder
from controller.status import CtlError, ExitStatus
from controller.text_problems import Notice, some
from controller.vm_parts import PartsFinder
from protocol.vms import NAME_PATTERN, Bridge, Network, VmSpec


@dataclass(frozen=True, kw_only=True)
class SpawnOptions:
    """What is wanted, beside the infra.conf itself. Either `subnet` or `g5k_subnets` says where addresses come from.

    `kernel`, `initrd` and `image` are files, or names or digests of images on record. They and `cmdline`, `bridge`,
    `disk_mib`, `user_data` and `ssh_keys` hold for all VMs of which the profile's patterns say nothing else.
    `min_hosts` is how many of the file's hosts have to be usable, a percentage or a number; None is all with VMs.
    """

    deployment: str
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    image: Path | None = None
    disk_mib: int | None = None
    user_data: Path | None = None
    ssh_keys: Path | None = None
    profile: Path | None = None
    subnet: str | None = None
    g5k_subnets: Path | None = None
    skip_ips: int = 0
    gateway: str | None = None
    bridge: str | None = None
    network: str | None = None
    memory_unit: MemoryUnit = MemoryUnit.AUTO
    overcommit: bool = False
    replace_offline: bool = False
    strategy: Strategy = Strategy.PACK
    min_hosts: str | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that is decided.

    `images` are the files that hosts need, by digest, and `stored` images that they are to have already, digest to
    name; `others` are VMs on record that the file lacks, `held` those that are left alone since their host, which is
    named, is down.
    `capacities` and `demands` (in hundredths of a CPU) are what the file says of hosts and VMs.
    """

    plan: Plan
    slices: dict[str, tuple[VmSpec, ...]]
    images: dict[str, Path]
    addresses: Addresses
    others: tuple[str, ...]
    stored: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    capacities: dict[str, Capacity] = field(default_factory=dict)
    demands: dict[str, int] = field(default_factory=dict)


def in_network(options: SpawnOptions, nets: Iterable[api.NetStatus]) -> SpawnOptions:
    """The options with the bridge, the subnet and the gateway of the network that they name. Raises CtlError."""
    if options.network is None:
        return options
    net = next((one for one in nets if one.name == options.network), None)
    if net is None:
        raise CtlError(f"there is no network {options.network}: `ctl net create` makes one", ExitStatus.USAGE)
    if options.bridge is not None:
        raise CtlError("either --network or --bridge, not both", ExitStatus.USAGE)
    return replace(
        options,
        bridge=net.bridge,
        subnet=options.subnet or (net.subnet if options.g5k_subnets is None else None),
        gateway=options.gateway or gateway_of(net),
    )


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
    images: Sequence[api.KnownImage] = (),
    nets: Sequence[api.NetStatus] | None = (),
    cache: Path | None = None,
) -> Prepared:
    """Decide where each VM goes, its address and its specification. `status`, `known`, `images` and `nets` are the
    service's word on the fleet, the deployment, images and networks; None where it isn't asked. Without `digest`
    images are looked at but not read; `cache` keeps digests from one time to the next.

    Raises CtlError with all causes; nothing has been changed then.
    """
    profile = _profile(options)
    if status is not None:
        infra = as_in_fleet(infra, [host.name for host in status.hosts])
    infra, held = _usable(infra, options, status, known)
    names = [vm.name for vm in infra.vms]
    try:
        placement = place(
            infra,
            memory_unit=options.memory_unit,
            overcommit=options.overcommit,
            replace_offline=options.replace_offline,
            strategy=options.strategy,
            apart=profile.rules(names),
            homes=known.hosts if known is not None else None,
        )
    except PlacementError as error:
        raise _refused(error) from error
    if status is not None:
        _check_fleet(placement, status)
    if known is not None:
        _check_places(placement, known)
    by_net = {net.name: net for net in nets or ()}
    settings = {name: profile.settings(name) for name in {*names, *(known.addresses if known is not None else ())}}
    check_nets(lambda name: settings[name].network, names, None if nets is None else by_net)
    addresses = give_addresses(
        [at.vm.name for at in placement.places],
        lambda name: settings[name].network,
        by_net,
        lambda taken: _pool(options, taken),
        existing=known.addresses if known is not None else {},
        taken=_taken(status, known),
    )
    finder = ImageFinder(known=images, read=digest, cache=DigestCache(cache))
    parts = PartsFinder(finder)
    try:
        slices = make_specs(
            deployment=options.deployment,
            placement=placement,
            addresses=addresses,
            parts={name: parts.of(_bridged(settings[name], by_net)) for name in names},
        )
    except DeploymentError as error:
        raise _refused(error) from error
    _check_specs(slices)
    unused = profile.unused([*names, *held])
    noticed = [f"no VM matches the profile's pattern {some([repr(one) for one in unused])}"] if unused else []
    declared = {*names, *held}
    return Prepared(
        plan=make_plan(
            deployment=options.deployment, placement=placement, specs=slices, warnings=[*warnings, *noticed]
        ),
        slices=slices,
        images=finder.files,
        stored=finder.stored,
        addresses=addresses,
        others=tuple(name for name in (known.hosts if known is not None else ()) if name not in declared),
        held=held,
        capacities=_capacities(placement),
        demands=_demands(placement),
    )


def _profile(options: SpawnOptions) -> Profile:
    """The profile, with what the options say as the default of all VMs. Raises CtlError."""
    profile = Profile()
    if options.profile is not None:
        try:
            profile = load_profile(options.profile)
        except ProfileError as error:
            raise CtlError(f"the profile can't be used, and nothing was changed:\n{error}", ExitStatus.USAGE) from error
        except OSError as error:
            raise CtlError(f"{options.profile}: {error.strerror}", ExitStatus.USAGE) from error
    if options.kernel is None and (options.initrd is not None or options.cmdline):
        raise CtlError("--initrd and --cmdline go with --kernel; an image has its own", ExitStatus.USAGE)
    if not (options.cmdline.isascii() and options.cmdline.isprintable()):
        raise CtlError("--cmdline: a kernel's command line is printable ASCII", ExitStatus.USAGE)
    _network(options.bridge)
    said = {"image": options.image, "kernel": options.kernel, "initrd": options.initrd}
    said |= {"user_data": options.user_data, "ssh_keys": options.ssh_keys}
    given = Settings(
        **{key: str(path) for key, path in said.items() if path is not None},
        cmdline=options.cmdline if options.kernel is not None else None,
        bridge=options.bridge,
        disk_mib=options.disk_mib,
    )
    return msgspec.structs.replace(profile, defaults=given.over(profile.defaults))


def _usable(
    infra: Infra, options: SpawnOptions, status: api.Status | None, known: api.Deployment | None
) -> tuple[Infra, dict[str, str]]:
    """With --min-hosts: the file with hosts that can't be used taken for offline, without the VMs that are on record
    there, which are left alone; and these. Raises CtlError where too few can be used."""
    if options.min_hosts is None or status is None:
        return infra, {}
    up = {host.name for host in status.hosts if host.up}
    wanted = [node.name for node in infra.nodes if not node.offline]
    down = {name for name in wanted if name not in up}
    least = needed("--min-hosts", options.min_hosts, len(wanted))
    if len(wanted) - len(down) < least:
        raise CtlError(
            f"{len(wanted) - len(down)} of the file's {len(wanted)} hosts can be used, --min-hosts asks for {least}, "
            f"and nothing was changed; down or not in the fleet: {fold(sorted(down))}",
            ExitStatus.UNREACHABLE,
        )
    homes = known.hosts if known is not None else {}
    held = {vm.name: homes[vm.name] for vm in infra.vms if homes.get(vm.name) in down}
    nodes = tuple(msgspec.structs.replace(node, offline=node.offline or node.name in down) for node in infra.nodes)
    return Infra(nodes=nodes, vms=tuple(vm for vm in infra.vms if vm.name not in held)), held


def _capacities(placement: Placement) -> dict[str, Capacity]:
    """The hosts as the file declares them, in units that do not depend on the file."""
    scale = 1024 if placement.memory_unit is MemoryUnit.GIB else 1
    return {
        use.node.name: Capacity(cpus=use.node.cpus, cpu=use.node.cpus * 100, memory_mib=use.node.memory * scale)
        for use in placement.nodes
    }


def _demands(placement: Placement) -> dict[str, int]:
    """The VMs' demand in hundredths of a CPU, rounded down, so that what fits still fits."""
    nodes = {use.node.name: use.node for use in placement.nodes}
    found = {}
    for at in placement.places:
        node = nodes[at.node]
        capacity = max(1, node.cpu_capacity)
        found[at.vm.name] = min(NO_CAP, at.vm.cpu_wanted * node.cpus * 100 // capacity)
    return found


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


def _bridged(settings: Settings, nets: Mapping[str, api.NetStatus]) -> Settings:
    """The same with the bridge of the network that they name."""
    if settings.network is None:
        return settings
    return msgspec.structs.replace(settings, network=None, bridge=nets[settings.network].bridge)


def _taken(status: api.Status | None, known: api.Deployment | None) -> set[str]:
    """The addresses of hosts and of other deployments."""
    taken = set(known.taken) if known is not None else set()
    taken.update(host.address for host in (status.hosts if status is not None else ()) if _is_ipv4(host.address))
    return taken


def _pool(options: SpawnOptions, taken: Collection[str]) -> Pool:
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
