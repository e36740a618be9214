"""Where the addresses of a plan come from: a subnet or a Grid'5000 reservation for most VMs, and the subnet of its
network for each VM that the profile has in one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from ipaddress import IPv4Network

from controller import api
from controller.addresses import AddressError, Addresses, Pool, Segment, SubnetsFileError, assign, subnet_pool
from controller.status import CtlError, ExitStatus
from controller.text_problems import shown, some

Nets = Mapping[str, api.NetStatus]


def gateway_of(net: api.NetStatus) -> str | None:
    """The hosts' address in a network, the first of its subnet; none where it is isolated."""
    return None if net.isolated else str(next(IPv4Network(net.subnet).hosts()))


def check_nets(network_of: Callable[[str], str | None], names: Sequence[str], nets: Nets | None) -> None:
    """Raises CtlError where VMs are to be in networks that there are not. `nets` None is that nobody could be asked."""
    wanted: dict[str, str] = {}
    for name in names:
        network = network_of(name)
        if network is not None:
            wanted.setdefault(network, name)
    if wanted and nets is None:
        raise CtlError(
            f"networks of VMs ({some(sorted(wanted))}) are on record at the service, and none runs", ExitStatus.USAGE
        )
    missing = sorted(wanted.keys() - (nets or {}).keys())
    if missing:
        raise CtlError(
            f"there is no network {some(missing)}, which the profile has for {some([wanted[one] for one in missing])}: "
            "`ctl net create` makes one, `ctl net ls` lists them",
            ExitStatus.USAGE,
        )


def give_addresses(
    names: Sequence[str],
    network_of: Callable[[str], str | None],
    nets: Nets,
    default: Callable[[Collection[str]], Pool],
    *,
    existing: Mapping[str, str],
    taken: Collection[str],
) -> Addresses:
    """An address for each VM: of its network's subnet, or where `network_of` says None of the pool that `default` makes
    without the addresses that it is given. Who has one in `existing` keeps it; nobody gets one of `taken`.

    Raises CtlError with all causes.
    """
    homes: dict[str | None, list[str]] = {}
    for name in names:
        homes.setdefault(network_of(name), []).append(name)
    problems: list[str] = []
    by_name: dict[str, str] = {}
    segments: dict[str, Segment] = {}
    new: set[str] = set()
    for network, members in (homes or {None: []}).items():
        mine = {name: ip for name, ip in existing.items() if network_of(name) == network}
        others = {*taken, *by_name.values(), *(ip for name, ip in existing.items() if name not in mine)}
        try:
            pool = default(others) if network is None else _pool_of(nets[network], others)
            found = assign(members, pool, mine)
        except (AddressError, SubnetsFileError) as error:
            said = error.problems if isinstance(error, AddressError) else (str(error),)
            problems += [line if network is None else f"network {network}: {line}" for line in said]
            continue
        by_name |= found.by_name
        segments |= dict.fromkeys(members, Segment(prefix=found.prefix, gateway=found.gateway))
        new |= set(found.new)
    if problems:
        text = "\n".join(shown(problems))
        raise CtlError(
            f"this can't be done, and nothing was changed:\n{text}" if "\n" in text else text, ExitStatus.USAGE
        )
    return Addresses(
        by_name={name: by_name[name] for name in dict.fromkeys(names)},
        segments=segments,
        new=tuple(name for name in dict.fromkeys(names) if name in new),
        others={name: ip for name, ip in existing.items() if name not in by_name},
    )


def _pool_of(net: api.NetStatus, taken: Collection[str]) -> Pool:
    return subnet_pool(net.subnet, exclude=taken, gateway=gateway_of(net))
