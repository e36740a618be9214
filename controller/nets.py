"""Networks of VMs across the fleet's hosts: on record here, and told to every host whenever VMs or hosts come or go."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv4Network

import msgspec

from controller import api
from controller.jobs import Job
from controller.node import RootNode
from controller.on_record import Vm
from controller.status import CtlError, ExitStatus
from protocol import ranks
from protocol.commands import SetNets
from protocol.nets import Net, NetName, Port, bridge_of
from protocol.outcomes import Fold, succeeded

#: Changes wait this long for more of them, in seconds: VMs come and go in crowds.
_WINDOW = 0.3
#: A host that could not follow is told again after this, in seconds, as long as it is in the tree.
_AGAIN = 30.0
#: Numbers of networks, apart from the low ones that people give by hand.
_FIRST_VNI = 0x10_0000


class NetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A network as it was asked for."""

    name: NetName
    vni: int
    subnet: str
    isolated: bool


def nets_of(records: list[NetRecord], vms: list[Vm], addresses: dict[str, str]) -> tuple[Net, ...]:
    """What hosts are told. A VM is in the network in whose subnet its address is; `addresses` are those of hosts."""
    result = []
    for record in records:
        subnet = IPv4Network(record.subnet)
        members = [vm for vm in vms if IPv4Address(vm.ip) in subnet and vm.host in addresses]
        hosts = sorted({addresses[vm.host] for vm in members})
        index = {address: number for number, address in enumerate(hosts)}
        ports = sorted(((vm.mac, vm.ip, index[addresses[vm.host]]) for vm in members), key=lambda port: port[1])
        result.append(
            Net(
                name=record.name,
                vni=record.vni,
                gateway=None if record.isolated else str(subnet[1]),
                prefix=subnet.prefixlen,
                hosts=tuple(hosts),
                ports=tuple(Port(*port) for port in ports),
            )
        )
    return tuple(result)


class NetKeeper:
    """The networks of one fleet."""

    def __init__(self, node: RootNode) -> None:
        self._node = node
        self._version = int(node.state.meta("nets_version", "0"))
        self._told: tuple[Net, ...] | None = None
        self._have: dict[int, int] = {}
        self._tried_at: dict[int, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        node.on_links.append(self.look_soon)
        node.on_vms.append(self.look_soon)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def records(self) -> list[NetRecord]:
        """All networks, by name."""
        return msgspec.json.decode(self._node.state.meta("nets", "[]"), type=list[NetRecord])

    def _save(self, records: list[NetRecord]) -> None:
        text = msgspec.json.encode(sorted(records, key=lambda record: record.name)).decode()
        self._node.state.set_meta("nets", text)

    def listing(self) -> api.NetList:
        """All networks and how many VMs each has."""
        vms = self._node.state.vms()
        return api.NetList(
            nets=tuple(
                api.NetStatus(
                    name=record.name,
                    subnet=record.subnet,
                    isolated=record.isolated,
                    bridge=bridge_of(record.name),
                    vni=record.vni,
                    vms=sum(IPv4Address(vm.ip) in IPv4Network(record.subnet) for vm in vms),
                )
                for record in self.records()
            )
        )

    def create(self, request: api.CreateNet, uid: int) -> tuple[Job, dict[int, str]]:
        """Make a network on every host. The same one again changes nothing. Raises CtlError."""
        records = self.records()
        record = _checked(request, records)
        if record not in records:
            self._save([*records, record])
        return self._tell(self._reachable(), uid, what="net create", named=request.name)

    def remove(self, name: str, uid: int) -> tuple[Job, dict[int, str]]:
        """Remove a network from every host. Raises CtlError where there is none, or a VM is in it."""
        records = self.records()
        record = next((record for record in records if record.name == name), None)
        if record is None:
            raise CtlError(f"there is no network {name}: `ctl net ls` lists all", ExitStatus.NO_TARGET)
        inside = [vm.name for vm in self._node.state.vms() if IPv4Address(vm.ip) in IPv4Network(record.subnet)]
        if inside:
            more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
            raise CtlError(f"{name} has VMs: {', '.join(inside[:5])}{more}; destroy them first")
        self._save([each for each in records if each.name != name])
        return self._tell(self._reachable(), uid, what="net rm", named=name)

    # --- telling hosts --------------------------------------------------------------------------------------------

    def look_soon(self) -> None:
        """VMs or hosts have come or gone."""
        if self._timer is None and (self._version or self.records()):
            self._timer = self._node.loop.call_later(_WINDOW, self._look)

    def _look(self) -> None:
        self._timer = None
        node, now = self._node, self._node.loop.time()
        self._renew()
        for rank in [rank for rank in self._have if not ranks.holds(node.relay.reachable, rank)]:
            del self._have[rank]  # it may come back from a restart with nothing
            self._tried_at.pop(rank, None)
        behind = {rank: host for rank, host in self._reachable().items() if self._have.get(rank, 0) < self._version}
        due = {rank: host for rank, host in behind.items() if now >= self._tried_at.get(rank, -_AGAIN) + _AGAIN}
        if due and self._version:
            self._tell(due, 0, what="nets", named="")
        if behind:
            self._timer = node.loop.call_later(_AGAIN, self._look)

    def _renew(self) -> None:
        """A new version where anything has changed."""
        state = self._node.state
        addresses = {host.name: host.address for host in self._node.members.present.values()}
        nets = nets_of(self.records(), state.vms(), addresses)
        if nets != self._told:
            self._told = nets
            self._version += 1
            self._tried_at.clear()
            state.set_meta("nets_version", str(self._version))

    def _reachable(self) -> dict[int, str]:
        node = self._node
        return {
            rank: host.name for rank, host in node.members.present.items() if ranks.holds(node.relay.reachable, rank)
        }

    def _tell(self, hosts: dict[int, str], uid: int, *, what: str, named: str) -> tuple[Job, dict[int, str]]:
        self._renew()
        if not hosts:
            raise CtlError("no host is in the tree: see `ctl status`", ExitStatus.NO_TARGET)
        version, now = self._version, self._node.loop.time()
        self._tried_at |= dict.fromkeys(hosts, now)
        job = Job()

        def heard(fold: Fold) -> None:
            if succeeded(fold.outcome):
                for rank in ranks.each(ranks.unpack(fold.ranks)):
                    self._have[rank] = max(version, self._have.get(rank, 0))

        job.also(heard)
        body = SetNets(version=version, nets=self._told or ())
        self._node.give(job, hosts, body, uid=uid, what=msgspec.json.encode([what, named]).decode())
        job.seal()
        return job, hosts


def _checked(request: api.CreateNet, records: list[NetRecord]) -> NetRecord:
    """The record of a network that may be made. Raises CtlError with all that is wrong."""
    wrong = []
    try:
        msgspec.convert(request.name, NetName)
    except msgspec.ValidationError:
        wrong.append(f"{request.name!r} is no name of a network: up to 12 lower-case letters, digits and '-'")
    try:
        subnet = IPv4Network(request.subnet)
    except ValueError as error:
        subnet = None
        wrong.append(f"--subnet: {error}")
    if subnet is not None and not 8 <= subnet.prefixlen <= 30:
        wrong.append(f"--subnet {subnet}: between /8 and /30")
    taken = {record.vni for record in records}
    vni = next(number for number in range(_FIRST_VNI, 1 << 24) if number not in taken)
    for record in records:
        if record.name == request.name:
            if record.subnet == str(subnet) and record.isolated == request.isolated:
                return record
            wrong.append(f"there is a network {record.name} of {record.subnet} already; `ctl net rm` it first")
        elif subnet is not None and subnet.overlaps(IPv4Network(record.subnet)):
            wrong.append(f"{subnet} overlaps with {record.subnet} of {record.name}")
    if wrong:
        raise CtlError("; ".join(wrong), ExitStatus.USAGE)
    return NetRecord(name=request.name, vni=vni, subnet=str(subnet), isolated=request.isolated)
