"""The fleet as people read it: its state, tree, health and inventory. Pure functions of what the service knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from controller.api import HostStatus, Status, VmStatus
from controller.foreign import Foreign
from controller.render import clean, label
from protocol.vms import VmPower

_UNKNOWN = "unknown"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns that line up, two spaces apart."""
    lines = [list(header), *([clean(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def age(seconds: float | None) -> str:
    """A time span in its two largest units: `42 s`, `3 min 12 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds is None:
        return _UNKNOWN
    whole = max(0, int(seconds))
    units = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
    for (size, unit), (below, smaller) in pairwise(units):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit} {rest} {smaller}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def mib(count: int) -> str:
    """MiB, in GiB where that reads better."""
    return f"{count / 1024:.1f} GiB" if count >= 10 * 1024 else f"{count} MiB"


def count(number: int, noun: str) -> str:
    """`1 host`, `2 hosts`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def vm_state(vm: VmStatus, *, host_up: bool) -> str:
    """A VM's state in a word; what nobody can vouch for now is `unknown`."""
    return vm.state.power.value if vm.state is not None and host_up else VmPower.UNKNOWN.value


def vm_objects(status: Status) -> list[dict[str, Any]]:
    """VMs for programs; `power` is the word that people read, where `state` is what the host said last."""
    up = _hosts_up(status)
    return [{**msgspec.to_builtins(vm), "power": vm_state(vm, host_up=vm.host in up)} for vm in status.vms]


def _hosts_up(status: Status) -> set[str]:
    return {host.name for host in status.hosts if host.up}


def _down_by_reason(hosts: Iterable[HostStatus]) -> list[tuple[str, list[str]]]:
    reasons: dict[str, list[str]] = {}
    for host in hosts:
        if not host.up:
            reasons.setdefault(host.why or "nobody knows why", []).append(host.name)
    return list(reasons.items())


def summary(status: Status) -> str:
    """The fleet in a few lines."""
    up = _hosts_up(status)
    lines = [
        f"fleet {status.fleet}: service version {status.version}, process {status.pid}, up {age(status.uptime_s)}",
        f"hosts: {len(up)} of {len(status.hosts)} up, fanout {status.fanout}",
        *(f"  down: {label(names)}: {clean(why)}" for why, names in _down_by_reason(status.hosts)),
    ]
    elsewhere = [host.name for host in status.hosts if host.up and host.parent != host.planned_parent]
    if elsewhere:
        lines.append(f"  not where the plan has them: {label(elsewhere)} (see `ctl tree`)")
    states = Counter(vm_state(vm, host_up=vm.host in up) for vm in status.vms)
    told = ", ".join(
        f"{number} {state}" for state, number in sorted(states.items(), key=lambda item: (-item[1], item[0]))
    )
    lines.append(f"VMs: {len(status.vms)}" + (f" ({told})" if told else ""))
    return "\n".join(lines) + "\n"


def tree(status: Status) -> str:
    """Who hangs where.

    Neighbours without children stand on one line; a host that is not where it was planned says why.
    """
    below: dict[str | None, list[HostStatus]] = {}
    for host in status.hosts:
        if host.up:
            below.setdefault(host.parent, []).append(host)
    lines = [f"{status.fleet} (service)"]

    up = _hosts_up(status)

    def note(host: HostStatus) -> str:
        if host.parent == host.planned_parent:
            return ""
        if host.planned_parent is None:
            said = "planned below the service"
        else:
            said = f"planned below {host.planned_parent}"
            said += "" if host.planned_parent in up else ", which is not in the tree"
        return said + (f": {clean(host.why)}" if host.why else "")

    def branch(children: list[HostStatus], indent: str) -> None:
        groups: dict[tuple[str, str, str], list[HostStatus]] = {}
        for host in children:
            alone = host.name if host.name in below else ""
            groups.setdefault((alone, host.site, note(host)), []).append(host)
        for number, ((alone, site, said), hosts) in enumerate(groups.items(), 1):
            last = number == len(groups)
            told = f"  [{site}]" if site else ""
            told += f"  ({said})" if said else ""
            lines.append(f"{indent}{'└─' if last else '├─'} {label([host.name for host in hosts])}{told}")
            if alone:
                branch(below[alone], indent + ("   " if last else "│  "))

    branch(below.get(None, []), "")
    lines += [f"not in the tree: {label(names)}: {clean(why)}" for why, names in _down_by_reason(status.hosts)]
    return "\n".join(lines) + "\n"


def health(status: Status) -> str:
    """How hosts and VMs are, and how old each word of it is."""
    up = _hosts_up(status)
    text = table(
        (
            "HOST",
            "STATE",
            "LOAD",
            "CPUS",
            "MEMORY FREE",
            "DISK FREE",
            "AGENT UP",
            "AGENT RSS",
            "VERSION",
            "TOLD",
            "NOTE",
        ),
        [_host_row(host) for host in status.hosts],
    )
    if status.vms:
        text += "\n" + table(
            ("VM", "HOST", "STATE", "SINCE", "WHY", "ANSWERS", "IP", "TOLD", "NOTE"),
            [_vm_row(vm, host_up=vm.host in up) for vm in status.vms],
        )
    return text


def _host_row(host: HostStatus) -> Sequence[str]:
    state = "up" if host.up else "down"
    said = "" if host.up else host.why
    if host.health is None:
        return (host.name, state, *[_UNKNOWN] * 7, "never", said)
    told = host.health
    notes = [said, told.note]
    if told.vms_known is False:
        notes.append("its VMs are unknown: libvirt does not answer")
    return (
        host.name,
        state,
        f"{told.load1:.2f} {told.load5:.2f}",
        str(told.cpus),
        f"{mib(told.memory_free_mib)} of {mib(told.memory_mib)}",
        f"{mib(told.disk_free_mib)} of {mib(told.disk_mib)}",
        age(told.uptime_s + (host.health_age_s or 0.0)) if host.up else _UNKNOWN,
        f"{told.agent_rss_mib:.0f} MiB",
        told.version,
        f"{age(host.health_age_s)} ago",
        "; ".join(note for note in notes if note),
    )


def _vm_row(vm: VmStatus, *, host_up: bool) -> Sequence[str]:
    state = vm_state(vm, host_up=host_up)
    if vm.state is None:
        note = "" if host_up else "its host is down"
        return vm.name, vm.host, state, "", "", "", vm.ip, "never", note
    answers = "" if vm.state.reachable is None or not host_up else ("yes" if vm.state.reachable else "no")
    since = age(vm.state.age_ms / 1000 + (vm.age_s or 0.0)) if host_up else ""
    why = vm.state.reason if host_up else ""
    note = "" if host_up else f"its host is down; {vm.state.power.value} when last heard of"
    return vm.name, vm.host, state, since, why, answers, vm.ip, f"{age(vm.age_s)} ago", note


def hosts(status: Status) -> str:
    """The hosts of the fleet."""
    return table(
        ("HOST", "SITE", "ADDRESS", "STATE", "BELOW"),
        [
            (
                host.name,
                host.site,
                host.address,
                "up" if host.up else "down",
                host.parent or ("service" if host.up else ""),
            )
            for host in status.hosts
        ],
    )


def wide(status: Status) -> str:
    """The hosts of the fleet, with all that is short enough for a table."""
    return table(
        ("HOST", "RANK", "SITE", "ADDRESS", "STATE", "BELOW", "VERSION", "LABELS"),
        [
            (
                host.name,
                str(host.rank),
                host.site,
                host.address,
                "up" if host.up else "down",
                host.parent or ("service" if host.up else ""),
                host.health.version if host.health else "",
                _labels(host),
            )
            for host in status.hosts
        ],
    )


def _labels(host: HostStatus) -> str:
    return " ".join(f"{key}={value}" for key, value in host.labels.items())


def labels(hosts: Iterable[HostStatus]) -> str:
    """Labels, and who carries each."""
    carried: dict[str, list[str]] = {}
    for host in hosts:
        for key, value in host.labels.items():
            carried.setdefault(f"{key}={value}", []).append(host.name)
    return table(("LABEL", "HOSTS"), [(name, label(carried[name])) for name in sorted(carried)])


def vms(status: Status, others: Iterable[Foreign] = ()) -> str:
    """The VMs of the fleet, and after them domains of others."""
    up = _hosts_up(status)
    return table(
        ("VM", "DEPLOYMENT", "HOST", "IP", "MAC", "VCPUS", "MEMORY", "STATE"),
        [
            (
                vm.name,
                vm.deployment,
                vm.host,
                vm.ip,
                vm.mac,
                str(vm.vcpus),
                mib(vm.memory_mib),
                vm_state(vm, host_up=vm.host in up),
            )
            for vm in status.vms
        ]
        + [(one.name, f"({one.whose})", one.host, "", "", "", "", one.power.value) for one in others],
    )


def wide_vms(status: Status, others: Iterable[Foreign] = ()) -> str:
    """The VMs of the fleet, with all that is known of each, and after them domains of others."""
    up = _hosts_up(status)
    rows = [
        (
            *(vm.name, vm.deployment, vm.host, vm.ip, vm.mac, str(vm.vcpus), mib(vm.memory_mib)),
            vm_state(vm, host_up=vm.host in up),
            vm.state.reason if vm.state is not None else "",
            age(vm.state.age_ms / 1000 + (vm.age_s or 0.0)) if vm.state is not None and vm.host in up else "",
            {True: "yes", False: "no", None: ""}[vm.state.reachable if vm.state is not None else None],
            f"{age(vm.age_s)} ago" if vm.age_s is not None else "never",
        )
        for vm in status.vms
    ] + [(one.name, f"({one.whose})", one.host, "", "", "", "", one.power.value, "", "", "", "") for one in others]
    header = ("VM", "DEPLOYMENT", "HOST", "IP", "MAC", "VCPUS", "MEMORY", "STATE", "WHY", "SINCE", "ANSWERS", "TOLD")
    return table(header, rows)


def by_site(status: Status) -> dict[str, list[HostStatus]]:
    """The hosts of each site, those of none under an empty name."""
    found: dict[str, list[HostStatus]] = {}
    for host in status.hosts:
        found.setdefault(host.site, []).append(host)
    return found


def sites(status: Status) -> str:
    """A line for each site: its hosts, those of them that are up, their VMs, and its relay below the service."""
    vms = Counter(vm.host for vm in status.vms)
    rows = []
    for site, hosts in by_site(status).items():
        relays = [host.name for host in hosts if host.planned_parent is None]
        count_up = sum(host.up for host in hosts)
        count_vms = sum(vms[host.name] for host in hosts)
        rows.append((site, str(len(hosts)), str(count_up), str(count_vms), label(relays) if relays else ""))
    return table(("SITE", "HOSTS", "UP", "VMS", "RELAY"), rows)


def placed(status: Status) -> dict[str, list[str]]:
    """The VMs of each host, hosts in the fleet's order; a host that left the fleet comes last."""
    found: dict[str, list[str]] = {host.name: [] for host in status.hosts}
    for vm in status.vms:
        found.setdefault(vm.host, []).append(vm.name)
    return found
