"""What became of VMs, as text. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from controller.api import Status
from controller.hosts import fold
from controller.render import clean, label
from controller.spawn import NOT_RIGHT, DestroyReport, SpawnReport
from controller.tables import count
from protocol.vms import VmChange, VmResult

_SIGNS = {
    VmChange.CREATED: "+",
    VmChange.STARTED: "^",
    VmChange.UNCHANGED: "=",
    VmChange.STOPPED: "v",
    VmChange.REBOOTED: "@",
    VmChange.SUSPENDED: "|",
    VmChange.RESUMED: ">",
    VmChange.SNAPSHOT: "*",
    VmChange.MOVED: "/",
    VmChange.REMOVED: "-",
    VmChange.ABSENT: ".",
    VmChange.DIFFERS: "~",
    VmChange.FAILED: "!",
}


def per_host(answers: Mapping[str, Sequence[VmResult]]) -> list[str]:
    """What hosts did for their VMs, hosts with equal counts on one line: `h[0-3] (4): +2 created =1 unchanged`."""
    groups: dict[str, list[str]] = {}
    for host, results in answers.items():
        groups.setdefault(_counted(results), []).append(host)
    return [f"{label(hosts)}: {text}" for text, hosts in groups.items()]


def _counted(results: Iterable[VmResult]) -> str:
    counts = Counter(result.change for result in results)
    return " ".join(f"{sign}{counts[change]} {change.value}" for change, sign in _SIGNS.items() if counts[change])


def not_right(answers: Mapping[str, Sequence[VmResult]]) -> list[str]:
    """A line for each VM that is not as it should be: `h3: vm07 differs: …`."""
    return [
        f"{host}: {result.name} {result.change.value}" + (f": {clean(result.detail)}" if result.detail else "")
        for host, results in answers.items()
        for result in results
        if result.change in NOT_RIGHT or (result.change is VmChange.ABSENT and result.detail)
    ]


def by_reason(troubles: Mapping[str, str]) -> list[str]:
    """A line for each reason, with its hosts."""
    groups: dict[str, list[str]] = {}
    for host, why in troubles.items():
        groups.setdefault(why, []).append(host)
    return [f"{label(hosts)}: {clean(why)}" for why, hosts in groups.items()]


def total(deployments: str, answers: Mapping[str, Sequence[VmResult]]) -> str:
    """One line for all: `infra: 6 VMs on 3 hosts: 6 unchanged, nothing had to be done`."""
    results = [result for results in answers.values() for result in results]
    counts = Counter(result.change for result in results)
    told = ", ".join(f"{counts[change]} {change.value}" for change in _SIGNS if counts[change])
    if results and counts[VmChange.UNCHANGED] == len(results):
        told += ", nothing had to be done"
    where = f"{count(len(results), 'VM')} on {count(len(answers), 'host')}"
    return f"{deployments}: {where}: {told}" if told else f"{deployments}: {where}"


def spawn_troubles(report: SpawnReport, others: Sequence[str]) -> list[str]:
    """All that is not right after a spawn, by host."""
    lines = [*by_reason(report.troubles), *not_right(report.answers)]
    if report.not_running:
        lines.append(f"not running: {fold(report.not_running)} (see `ctl health`)")
    if report.unreachable:
        lines.append(f"no answer to ping: {fold(report.unreachable)}")
    if report.not_begun:
        lines.append(f"not begun, since too many failed before: {fold(report.not_begun)}")
    lines += [f"without the names file: {line}" for line in by_reason(report.unnamed)]
    if others:
        lines.append(f"on record and not in the file: {fold(others)}; `ctl destroy` removes them")
    return lines


def held(vms: Mapping[str, str]) -> list[str]:
    """VMs that were left alone since their hosts are down."""
    return [f"{label(hosts)}: down, so its VMs were left alone: {fold(names)}" for names, hosts in _by_names(vms)]


def _by_names(vms: Mapping[str, str]) -> list[tuple[list[str], list[str]]]:
    names: dict[str, list[str]] = {}
    for vm, host in vms.items():
        names.setdefault(host, []).append(vm)
    return [(mine, [host]) for host, mine in sorted(names.items())]


def names_paths(status: Status, directory: str) -> list[str]:
    """Where hosts have the name -> IP file: the paths, and the hosts where they are several.

    Agents keep it in their own directory: root's in /var/lib/canopy, others' in ~/.canopy, those of a local fleet below
    the fleet's `directory` on this machine.
    """
    groups: dict[str, list[str]] = {}
    for host in status.hosts:
        if not host.up:
            continue
        if "local" in host.facts:
            path = f"{directory}/hosts/*/vms.hosts"
        elif host.facts.get("uid", "0") == "0":
            path = f"/var/lib/canopy/{status.fleet}/vms.hosts"
        else:
            path = f"~/.canopy/{status.fleet}/vms.hosts"
        groups.setdefault(path, []).append(host.name)
    if len(groups) == 1:
        return list(groups)
    return [f"{path} on {fold(hosts)}" for path, hosts in groups.items()]


def spawn_object(deployment: str, report: SpawnReport, addresses: Mapping[str, str], names: Sequence[str]) -> Any:
    """A spawn for programs."""
    return {
        "deployment": deployment,
        "vms": vm_objects(report.answers.items(), addresses),
        "hosts_failed": report.troubles,
        "not_running": report.not_running,
        "unreachable": report.unreachable,
        "not_begun": report.not_begun,
        "names_file": names,
        "names_file_missing": report.unnamed,
    }


def destroy_object(report: DestroyReport) -> Any:
    """A destroy for programs."""
    return {
        "vms": vm_objects(report.answers.items()),
        "hosts_failed": report.troubles,
        "not_on_record": report.absent,
        "names_file_missing": report.unnamed,
    }


def vm_objects(
    answers: Iterable[tuple[str, Sequence[VmResult]]], addresses: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """What became of VMs for programs, each with its host, and its address where that is known. A host may have
    answered several times, for several deployments or moves."""
    found = []
    for host, results in answers:
        for result in results:
            fields = {"host": host, **msgspec.to_builtins(result)}
            if addresses and result.name in addresses:
                fields["ip"] = addresses[result.name]
            found.append(fields)
    return found
