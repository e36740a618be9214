"""What the service has heard of hosts and VMs, and when. Unknown is said as unknown, never as down or as up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocol.messages import HostHealth, Link, Report
from protocol.vms import VmState


@dataclass(frozen=True)
class Heard:
    """A VM's state, which host said it, and when (seconds, monotonic)."""

    state: VmState
    rank: int
    at: float


class Known:
    """Reports and links, newest first to be asked for."""

    def __init__(self) -> None:
        self.health: dict[int, tuple[HostHealth, float]] = {}
        #: By deployment and name, and then by who said it: a VM that moves is seen on two hosts.
        self.vms: dict[tuple[str, str], dict[int, Heard]] = {}
        self.linked_at: dict[int, float] = {}

    def reports(self, reports: Iterable[Report], now: float) -> None:
        """Hosts spoke of themselves."""
        for report in reports:
            if report.host is not None:
                self.health[report.rank] = (report.host, now)
            if report.whole:
                for heard in self.vms.values():
                    heard.pop(report.rank, None)
                self.vms = {key: heard for key, heard in self.vms.items() if heard}
            for state in report.vms:
                said = self.vms.setdefault((state.deployment, state.name), {})
                said[report.rank] = Heard(state, report.rank, now)

    def links(self, links: Iterable[Link], now: float) -> None:
        """Links changed."""
        for link in links:
            self.linked_at[link.rank] = now
