"""What clients of the service ask of hosts themselves: to be looked at, to be tuned, to name all their domains."""

from __future__ import annotations

import msgspec

from agent.tunables import problems
from controller import api
from controller.jobs import Job
from controller.node import RootNode
from controller.status import CtlError, ExitStatus
from protocol.commands import CheckHost, ListVms, Setting, TuneHost


class HostRequests:
    """Each begins a command, and returns its Job and the hosts that it went to, by rank."""

    def __init__(self, node: RootNode) -> None:
        self._node = node

    def check(self, request: api.CheckOn, uid: int) -> tuple[Job, dict[int, str]]:
        """Have hosts look at themselves."""
        return self._give(request.hosts, CheckHost(), request.timeout_ms, uid, ["check"])

    def domains(self, request: api.DomainsOn, uid: int) -> tuple[Job, dict[int, str]]:
        """Have hosts name all domains of their libvirt."""
        return self._give(request.hosts, ListVms(), request.timeout_ms, uid, ["list vms"])

    def tune(self, request: api.TuneOn, uid: int) -> tuple[Job, dict[int, str]]:
        """Raise settings of hosts, or put them back. Raises CtlError with all that is wrong with them."""
        wrong = problems(request.settings)
        if wrong:
            raise CtlError("; ".join(wrong), ExitStatus.USAGE)
        settings = tuple(Setting(key, least) for key, least in request.settings.items())
        body = TuneHost(settings=settings, undo=request.undo, restart_libvirt=request.restart_libvirt)
        words = ["tune", *(f"{key}={least}" for key, least in request.settings.items())]
        return self._give(request.hosts, body, request.timeout_ms, uid, ["tune", "--undo"] if request.undo else words)

    def _give(
        self,
        names: tuple[str, ...] | None,
        body: CheckHost | TuneHost | ListVms,
        timeout_ms: int,
        uid: int,
        words: list[str],
    ) -> tuple[Job, dict[int, str]]:
        hosts = self._node.members.ranks_of(names)
        job = Job()
        what = msgspec.json.encode(words).decode()
        self._node.give(job, hosts, body, timeout_ms=timeout_ms, uid=uid, what=what)
        job.seal()
        return job, hosts
