"""What clients of the service ask about VMs, each request turned into commands of the tree or an answer from what is
on record."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from controller import api
from controller.jobs import Job, as_vms_done, as_vms_reached
from controller.node import RootNode
from controller.on_record import Vm
from controller.status import CtlError, ExitStatus
from controller.text_problems import some
from protocol import ranks
from protocol.commands import CreateVms, DestroyVms, ProbeVms, VmAction


class VmRequests:
    """Answers to requests about VMs. Methods that begin a command return its Job and the hosts that it went to, by
    rank."""

    def __init__(self, node: RootNode) -> None:
        self._node = node
        self._removing: set[str] = set()
        node.on_links.append(self._remove_disowned)

    def deployment(self, name: str) -> api.Deployment:
        """What is on record of a deployment."""
        vms = self._node.state.vms()
        mine = [vm for vm in vms if vm.deployment == name]
        return api.Deployment(
            name=name,
            hosts={vm.name: vm.host for vm in mine},
            addresses={vm.name: vm.ip for vm in mine},
            taken=tuple(vm.ip for vm in vms if vm.deployment != name),
            specs=tuple(self._node.state.specs(name)),
        )

    def infra(self) -> api.InfraRecord:
        """What is on record of all VMs."""
        state = self._node.state
        return api.InfraRecord(vms=tuple(state.vms()), specs=tuple(state.specs()), capacities=state.capacities())

    def reserve(self, request: api.Reserve) -> api.Done:
        """Put VMs on record. Raises CtlError, with nothing changed, where one is elsewhere or an address another's."""
        self._node.members.ranks_of({vm.host for vm in request.vms})
        self._put(request.vms)
        self._node.state.put_capacities(request.capacities)
        self._node.vms_changed()
        return api.Done()

    def _put(self, vms: Sequence[Vm]) -> None:
        known = {(vm.deployment, vm.name): vm for vm in self._node.state.vms()}
        moved = [
            f"{vm.name} is on {known[vm.deployment, vm.name].host}"
            for vm in vms
            if (vm.deployment, vm.name) in known and known[vm.deployment, vm.name].host != vm.host
        ]
        against = moved or self._node.state.put_vms(vms)
        if against:
            raise CtlError(
                f"{vms[0].deployment} can't be made as planned: {'; '.join(against[:10])}"
                f"{f' and {len(against) - 10} more' if len(against) > 10 else ''}"
            )

    def create(self, request: api.CreateOn, uid: int) -> tuple[Job, dict[int, str]]:
        """Make VMs. Raises CtlError before anything is done where an address is another VM's."""
        node = self._node
        hosts = node.members.ranks_of(request.slices)
        known = {vm.name: vm for vm in node.state.vms(request.deployment)}
        vms = [
            Vm(
                deployment=request.deployment,
                name=spec.name,
                host=host,
                ip=spec.ip,
                mac=spec.mac,
                vcpus=spec.vcpus,
                memory_mib=spec.memory_mib,
                cpu=known[spec.name].cpu if spec.name in known else 0,
            )
            for host, specs in request.slices.items()
            for spec in specs
        ]
        self._put(vms)
        node.vms_changed()
        job = Job(as_vms_done(node.members.name))
        what = msgspec.json.encode(["create vms", request.deployment]).decode()
        for rank, name in hosts.items():
            body = CreateVms(deployment=request.deployment, specs=request.slices[name], in_flight=request.in_flight)
            node.give(job, [rank], body, timeout_ms=request.timeout_ms, uid=uid, what=what)
        job.seal()
        return job, hosts

    def _placed(self, deployment: str, names: tuple[str, ...] | None) -> dict[str, list[str]]:
        """VM names on record, by host. Raises CtlError for those that are not."""
        mine = {vm.name: vm.host for vm in self._node.state.vms() if vm.deployment == deployment}
        strangers = [name for name in names or () if name not in mine]
        if strangers or not mine:
            what = ", ".join(strangers) or f"any VM of {deployment}"
            raise CtlError(f"not on record: {what}; `ctl get vms` lists them", ExitStatus.NO_TARGET)
        placed: dict[str, list[str]] = {}
        for name in mine if names is None else names:
            placed.setdefault(mine[name], []).append(name)
        return placed

    def _not_moving(self, deployment: str, placed: dict[str, list[str]]) -> None:
        """Raises CtlError where one of these moves: nobody can say on which host it is to be asked for."""
        named = {name for names in placed.values() for name in names}
        moving = [move for move in self._node.state.moves() if move.deployment == deployment and move.name in named]
        if moving:
            which = [f"{move.name} from {move.source} to {move.target}" for move in moving]
            raise CtlError(f"on the move: {some(which)}; wait until they have arrived, see `ctl jobs`")

    def probe(self, request: api.ProbeOn, uid: int) -> tuple[Job, dict[int, str]]:
        """Wait until VMs answer ping."""
        node = self._node
        placed = self._placed(request.deployment, request.names)
        hosts = node.members.ranks_of(placed)
        job = Job(as_vms_reached(node.members.name))
        what = msgspec.json.encode(["probe vms", request.deployment]).decode()
        for rank, name in hosts.items():
            body = ProbeVms(deployment=request.deployment, names=tuple(placed[name]), address=request.address)
            node.give(job, [rank], body, timeout_ms=request.timeout_ms, uid=uid, what=what)
        job.seal()
        return job, hosts

    def destroy(self, request: api.DestroyOn, uid: int) -> tuple[Job, dict[int, str]]:
        """Remove VMs; what their hosts say is gone is forgotten, and its address is free."""
        node = self._node
        placed = self._placed(request.deployment, request.names)
        self._not_moving(request.deployment, placed)
        hosts = node.members.ranks_of(placed)
        job = Job(as_vms_done(node.members.name))
        what = msgspec.json.encode(["destroy vms", request.deployment]).decode()
        for rank, name in hosts.items():
            body = DestroyVms(deployment=request.deployment, names=tuple(placed[name]))
            node.give(job, [rank], body, timeout_ms=request.timeout_ms, uid=uid, what=what)
        job.seal()
        return job, hosts

    def act(self, request: api.ActOn, uid: int) -> tuple[Job, dict[int, str]]:
        """Start, stop, … VMs. Raises CtlError where none is meant."""
        node = self._node
        placed = self._placed(request.deployment, request.names)
        if request.hosts is not None:
            placed = {host: names for host, names in placed.items() if host in set(request.hosts)}
            if not placed:
                raise CtlError(
                    f"none of these VMs of {request.deployment} is on these hosts: see `ctl get map`",
                    ExitStatus.NO_TARGET,
                )
        self._not_moving(request.deployment, placed)
        hosts = node.members.ranks_of(placed)
        job = Job(as_vms_done(node.members.name))
        what = msgspec.json.encode([f"{request.action.value} vms", request.deployment]).decode()
        for rank, name in hosts.items():
            body = VmAction(
                deployment=request.deployment,
                names=tuple(placed[name]),
                action=request.action,
                hard=request.hard,
                label=request.label,
            )
            node.give(job, [rank], body, timeout_ms=request.timeout_ms, uid=uid, what=what)
        job.seal()
        return job, hosts

    def disown(self, request: api.Disown) -> api.Done:
        """Forget VMs. Raises CtlError, with nothing changed, where a host can be asked to remove them."""
        node = self._node
        placed = self._placed(request.deployment, request.names)
        up = [
            host.name
            for rank, host in node.members.present.items()
            if host.name in placed and ranks.holds(node.relay.reachable, rank)
        ]
        if up:
            raise CtlError(f"up, and can be asked: {some(up)}; destroy their VMs without --forget", ExitStatus.USAGE)
        names = set(request.names)
        node.state.disown([vm for vm in node.state.vms(request.deployment) if vm.name in names])
        for name in names:
            node.known.vms.pop((request.deployment, name), None)
        node.vms_changed()
        return api.Done()

    def _remove_disowned(self) -> None:
        """Have hosts that came back remove the VMs that were given up meanwhile."""
        node = self._node
        due = node.state.disowned_hosts() - self._removing
        for rank, host in node.members.present.items() if due else ():
            if host.name not in due or not ranks.holds(node.relay.reachable, rank):
                continue
            self._removing.add(host.name)
            for deployment, names in node.state.disowned(host.name).items():
                job = Job(as_vms_done(node.members.name))
                job.also(lambda _, name=host.name: self._removing.discard(name))  # type: ignore[misc]
                what = msgspec.json.encode(["destroy vms", deployment]).decode()
                body = DestroyVms(deployment=deployment, names=tuple(names))
                node.give(job, [rank], body, uid=0, what=what)
                job.seal()
