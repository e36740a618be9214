"""What a Session has for VMs, their images, networks, names and consoles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from controller.client import Client
from controller.later import Later
from controller.running import Job, Running

if TYPE_CHECKING:
    from controller import api
    from controller.console import ConsoleEnd
    from controller.on_record import Capacity, Vm
    from controller.results import VmAnswer, VmProgress
    from protocol.vms import Action, ImageAction, VmSpec
else:
    api = Later("controller.api")


class VmSession(Client):
    """The part of a Session that is about VMs."""

    # --- VMs ----------------------------------------------------------------------------------------------------------

    def create_vms(
        self,
        deployment: str,
        slices: dict[str, tuple[VmSpec, ...]],
        *,
        in_flight: int | None = None,
        timeout: float = 600.0,
    ) -> Job:
        """Make each host's VMs. Yields a VmAnswer for each host, and a Result for each host that could not."""
        return self._job(
            api.CreateOn(deployment=deployment, slices=slices, timeout_ms=round(timeout * 1000), in_flight=in_flight)
        )

    def reserve_vms(self, vms: Iterable[Vm], capacities: Mapping[str, Capacity]) -> None:
        """Put VMs on record with their addresses, all or none, and what their file says of hosts."""
        self._ask(api.Reserve(vms=tuple(vms), capacities=dict(capacities)), api.Done)

    def probe_vms(self, deployment: str, names: Iterable[str], *, timeout: float, address: bool = False) -> Job:
        """Wait until VMs answer ping from their hosts, or have their addresses. Yields a VmReached for each host."""
        request = api.ProbeOn(
            deployment=deployment, names=tuple(names), timeout_ms=round(timeout * 1000), address=address
        )
        return self._job(request)

    def destroy_vms(self, deployment: str, names: Iterable[str] | None = None, *, timeout: float = 600.0) -> Job:
        """Remove VMs (None: all of the deployment) and free their addresses. Yields as create_vms does."""
        chosen = None if names is None else tuple(names)
        return self._job(api.DestroyOn(deployment=deployment, names=chosen, timeout_ms=round(timeout * 1000)))

    def act(
        self,
        deployment: str,
        names: Iterable[str] | None,
        action: Action,
        *,
        hosts: Iterable[str] | None = None,
        hard: bool = False,
        label: str | None = None,
        timeout: float = 600.0,
    ) -> Job:
        """Start, stop, reboot, suspend, resume or snapshot VMs (None: all of the deployment), on `hosts` alone where
        they are given. Yields as create_vms does."""
        return self._job(
            api.ActOn(
                deployment=deployment,
                names=_tuple(names),
                action=action,
                hosts=self._names(hosts),
                hard=hard,
                label=label,
                timeout_ms=round(timeout * 1000),
            )
        )

    def move_vms(
        self,
        moves: Iterable[tuple[str, str, str]],
        *,
        per_host: int = 1,
        per_link: int = 4,
        overcommit: bool = False,
        timeout: float = 3600.0,
    ) -> Running[VmAnswer | VmProgress]:
        """Move VMs while they run, each given as its deployment, its name and the host that it goes to: of a host
        `per_host` at a time, between two sites `per_link`, each within `timeout` seconds. Yields a VmAnswer for each
        VM, and how far they are. Raises CtlError, with nothing begun, where one can't be moved as asked."""
        wanted = tuple(api.VmMove(deployment=one, name=name, target=target) for one, name, target in moves)
        request = api.MoveOn(
            moves=wanted,
            per_host=per_host,
            per_link=per_link,
            overcommit=overcommit,
            timeout_ms=round(timeout * 1000),
        )
        return self._job(request)

    def disown_vms(self, deployment: str, names: Iterable[str]) -> None:
        """Forget VMs whose hosts are out of reach, which frees their addresses; the hosts remove them when they are
        back."""
        self._ask(api.Disown(deployment=deployment, names=tuple(names)), api.Done)

    def infra(self) -> api.InfraRecord:
        """What is on record of VMs and of hosts' sizes."""
        return self._ask(api.GetInfra(), api.InfraRecord)

    def images(self) -> tuple[api.KnownImage, ...]:
        """The images that were pushed and not removed again."""
        return self._ask(api.GetImages(), api.ImageList).images

    def images_on(
        self, action: ImageAction, digests: Iterable[str] | None = None, hosts: Iterable[str] | None = None
    ) -> Job:
        """List, verify or remove images on hosts. Yields an ImageAnswer for each host, and a Result for each that could
        not."""
        return self._job(api.ImagesOn(hosts=self._names(hosts), action=action, digests=_tuple(digests)))

    def create_net(self, name: str, subnet: str, *, isolated: bool = False) -> Job:
        """Make a network of VMs on every host; `isolated`: hosts have no address in it."""
        return self._job(api.CreateNet(name=name, subnet=subnet, isolated=isolated))

    def remove_net(self, name: str) -> Job:
        """Remove a network, in which there are no VMs any more, from every host."""
        return self._job(api.RemoveNet(name=name))

    def nets(self) -> tuple[api.NetStatus, ...]:
        """The networks on record."""
        return self._ask(api.GetNets(), api.NetList).nets

    def console(self, deployment: str, name: str, *, force: bool = False) -> tuple[ConsoleEnd, str]:
        """Open a VM's console; its end here, and the VM's host. `force` takes it from whoever has it."""
        from controller.console import ConsoleEnd

        job = self._job(api.ConsoleOn(deployment=deployment, name=name, force=force))
        return ConsoleEnd(job._connection), next(iter(job.hosts.values()))

    def send_names(self, *, in_etc_hosts: bool | None = None) -> Job:
        """Bring the name -> IP file to every host. `in_etc_hosts`: from now on into /etc/hosts too, or no more."""
        return self._job(api.SendNames(in_etc_hosts=in_etc_hosts))

    def deployment(self, name: str) -> api.Deployment:
        """A deployment's VMs, their hosts and addresses."""
        return self._ask(api.GetDeployment(name=name), api.Deployment)

    def domains(self, hosts: Iterable[str] | None = None, *, timeout: float = 60.0) -> Job:
        """Have hosts name all their domains, those of others too: each Result's stdout is a JSON array of
        protocol.vms.SeenDomain (see controller.foreign)."""
        return self._job(api.DomainsOn(hosts=self._names(hosts), timeout_ms=round(timeout * 1000)))

    def _names(self, hosts: str | Iterable[str] | None) -> tuple[str, ...] | None:
        """Hosts by name; a text is a host set."""
        raise NotImplementedError


def _tuple(names: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)
