"""The fleet's members: who they are, where each hangs in the plan, and which part of it each must know."""

from __future__ import annotations

import socket
from collections.abc import Iterable

import msgspec

from agent.identity import Identity
from agent.keyring import from_text
from controller import api
from controller.nearest import not_here
from controller.state import Host, State
from controller.status import CtlError, ExitStatus
from protocol import ranks, topology
from protocol.commands import Below, Hop, Member, Plan
from protocol.ranks import Ranks
from protocol.topology import DEFAULT_FANOUT, Seat

#: How the service node is called where a name is needed.
SERVICE = "service"
_ANY = ("0.0.0.0", "::")  # noqa: S104  compared with, not bound to


def address_towards(host: str) -> str:
    """The address of this machine from which packets to `host` leave. Sends nothing; raises OSError without a route."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # discard; connecting a datagram socket only looks the route up (udp(7))
        return str(probe.getsockname()[0])


class Members:
    """The membership, kept in `state`. Each change gives it a new version; `stale` are the ranks whose part changed."""

    def __init__(self, state: State, root: Identity, advertised: str | None) -> None:
        """`advertised` is the address under which hosts reach the service; None looks it up for each."""
        self._state = state
        self._root = root
        self._advertised = advertised
        self.by_rank: dict[int, Host] = {host.rank: host for host in state.hosts()}
        self.version = int(state.meta("plan_version", "0"))
        self.fanout = int(state.meta("fanout", str(DEFAULT_FANOUT)))
        #: Who hangs below whom, at the version at which it was worked out.
        self._children: tuple[int, dict[int | None, list[int]]] | None = None
        #: Ranks whose part of the plan changed, and the version at which it did.
        self.stale: dict[int, int] = {}

    # --- questions ----------------------------------------------------------------------------------------------------

    @property
    def present(self) -> dict[int, Host]:
        """The members, by rank."""
        return {rank: host for rank, host in self.by_rank.items() if host.member}

    def name(self, rank: int) -> str:
        """The name of a rank, also of one that left."""
        host = self.by_rank.get(rank)
        return f"rank {rank}" if host is None else host.name

    def ranks_of(self, names: Iterable[str] | None) -> dict[int, str]:
        """Ranks and names of these members (None: all), in order of rank. Raises CtlError for those that are none."""
        present = self.present
        if names is None:
            chosen = {rank: host.name for rank, host in present.items()}
        else:
            known = {host.name: rank for rank, host in present.items()}
            wanted = list(dict.fromkeys(names))
            strangers = [name for name in wanted if name not in known]
            if strangers:
                raise CtlError(not_here(strangers, known), ExitStatus.NO_TARGET)
            chosen = {known[name]: name for name in wanted}
        if not chosen:
            raise CtlError("no host matches: `ctl get hosts` lists the fleet", ExitStatus.NO_TARGET)
        return dict(sorted(chosen.items()))

    def _parents(self) -> dict[int, int | None]:
        return {rank: host.parent for rank, host in self.present.items()}

    # --- changes ------------------------------------------------------------------------------------------------------

    def expect(self, hosts: int, fanout: int) -> None:
        """The fleet will have about `hosts` hosts, and no relay more than `fanout` children."""
        self.fanout = topology.even_fanout(max(hosts, len(self.present)), fanout)
        self._state.set_meta("fanout", str(self.fanout))

    def enrol(self, request: api.Enrol, down: Iterable[int]) -> Host:
        """Take a host in, or take it in again. `down` are ranks under which nobody new is put. Raises CtlError."""
        try:
            key = from_text(request.key)
        except ValueError as error:
            raise CtlError(f"{request.name}: {error}") from error
        known = next((host for host in self.by_rank.values() if host.name == request.name), None)
        owner = next((host for host in self.by_rank.values() if host.key == key), None)
        if owner is not None and owner.name != request.name:
            raise CtlError(f"{request.name} has the key of {owner.name}: are they one host under two names?")
        host = Host(
            rank=known.rank if known else max(self.by_rank, default=-1) + 1,
            name=request.name,
            site=request.site,
            address=request.address,
            control_port=request.control_port,
            bulk_port=request.bulk_port,
            key=key,
            parent=None,
            digest=request.digest,
            facts=request.facts,
        )
        if known is not None and known.member and (known.parent is None or known.parent in self.present):
            host = msgspec.structs.replace(host, parent=known.parent)
        else:
            others = {rank: parent for rank, parent in self._parents().items() if rank != host.rank}
            sites = {rank: member.site for rank, member in self.present.items()}
            placed = topology.grow(others, sites, [Seat(host.rank, host.site)], self.fanout, frozenset(down))
            host = msgspec.structs.replace(host, parent=placed[host.rank])
        self._put(host)
        return host

    def remove(self, ranks_: Iterable[int]) -> None:
        """These hosts left. Those that hung below them are planned one level higher."""
        gone = set(ranks_)
        for rank in sorted(gone):
            host = self.by_rank[rank]
            self._put(msgspec.structs.replace(host, member=False))
        for _, host in sorted(self.present.items()):
            parent = host.parent
            while parent is not None and parent in gone:
                parent = self.by_rank[parent].parent
            if parent != host.parent:
                self._put(msgspec.structs.replace(host, parent=parent))

    def renew(self, rank: int) -> None:
        """Give the host's part of the plan a new version, so that it goes where the plan has it."""
        self._new_version()
        self.stale[rank] = self.version

    def _new_version(self) -> None:
        self.version += 1
        self._state.set_meta("plan_version", str(self.version))

    def _put(self, host: Host) -> None:
        before = self.by_rank.get(host.rank)
        if before == host:
            return
        self._new_version()
        self._mark(host.rank)
        self.by_rank[host.rank] = host
        self._state.put_host(host)
        self._mark(host.rank)

    def _mark(self, rank: int) -> None:
        """The host's own part is stale, and that of everybody above and below it."""
        if rank not in self.by_rank:
            return
        for other in (rank, *self._above(rank), *topology.below(topology.children_of(self._parents()), rank)):
            self.stale[other] = self.version

    def depth(self, rank: int) -> int:
        """How many relays are planned between a host and the root."""
        return len(self._above(rank))

    def _above(self, rank: int) -> list[int]:
        above: list[int] = []
        parent = self.by_rank[rank].parent
        while parent is not None and len(above) <= len(self.by_rank):
            above.append(parent)
            parent = self.by_rank[parent].parent
        return above

    # --- plans --------------------------------------------------------------------------------------------------------

    def plan(self, rank: int) -> Plan:
        """The part of the membership that this host must know."""
        host = self.by_rank[rank]
        address = self._advertised or self._root.address
        if address in _ANY:
            address = address_towards(host.address)
        above = [_member(self.by_rank[other]) for other in self._above(rank)]
        return Plan(
            version=self.version,
            you=_member(host),
            ancestors=(*above, self._service(address)),
            below=self._below(rank),
        )

    def order(self, targets: Iterable[int], reachable: Ranks) -> tuple[Hop, ...]:
        """The order in which a push passes through its targets.

        Site by site, so that the links between sites are crossed once for each, and by rank, which hosts of one rack
        are usually given one after the other. Who can't be reached is last: nobody need wait to find that out.
        """

        def place(host: Host) -> tuple[bool, str, int]:
            return not ranks.holds(reachable, host.rank), host.site, host.rank

        hosts = sorted((self.by_rank[rank] for rank in targets), key=place)
        return tuple(Hop(host.rank, host.address, host.bulk_port, host.key) for host in hosts)

    def root_plan(self) -> Plan:
        """The root's own: everybody is below it. It never travels."""
        return Plan(version=self.version, you=self._service("127.0.0.1"), ancestors=(), below=self._below(None))

    def _service(self, address: str) -> Member:
        root = self._root
        return Member(None, SERVICE, address, root.control_port, root.bulk_port, root.public)

    def _below(self, rank: int | None) -> tuple[Below, ...]:
        if self._children is None or self._children[0] != self.version:
            self._children = (self.version, topology.children_of(self._parents()))
        return tuple(
            Below(other, self.by_rank[other].parent, self.by_rank[other].key)
            for other in sorted(topology.below(self._children[1], rank))
        )


def _member(host: Host) -> Member:
    return Member(host.rank, host.name, host.address, host.control_port, host.bulk_port, host.key)
