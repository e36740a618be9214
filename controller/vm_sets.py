"""Sets of VMs as people write them: names, ranges (`vm[00-12]`) and wildcards (`web-*`), on hosts, in deployments."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from controller.api import VmStatus
from controller.hosts import expand
from controller.status import CtlError, ExitStatus
from controller.text_problems import some


def pick(
    vms: Iterable[VmStatus],
    texts: Sequence[str],
    *,
    deployment: str | None = None,
    hosts: Collection[str] | None = None,
    everything: bool = False,
) -> dict[str, list[str]]:
    """The VMs on record that are meant, by deployment, in the order of the record. Without `texts` all of them, which
    takes `hosts`, or `everything` of one `deployment`.

    Raises CtlError for names that no VM has, or that VMs of several deployments have, and where none is left.
    """
    if not texts and hosts is None and not (everything and deployment is not None):
        raise CtlError(
            "which VMs? Give names like vm[00-12] or web-*, -w HOSTS, or --deployment NAME --all-vms", ExitStatus.USAGE
        )
    mine = [vm for vm in vms if deployment in (None, vm.deployment) and (hosts is None or vm.host in hosts)]
    owners: dict[str, list[str]] = {}
    for vm in mine:
        owners.setdefault(vm.name, []).append(vm.deployment)
    wanted, absent = _named(texts, owners) if texts else (dict.fromkeys(owners), [])
    if absent:
        raise CtlError(f"not on record: {some(absent)}; `ctl get vms` lists all", ExitStatus.NO_TARGET)
    unclear = [name for name in wanted if len(owners[name]) > 1]
    if unclear and texts:
        raise CtlError(f"several deployments have {some(unclear)}: choose one with --deployment", ExitStatus.USAGE)
    found: dict[str, list[str]] = {}
    for vm in mine:
        if vm.name in wanted:
            found.setdefault(vm.deployment, []).append(vm.name)
    if not found:
        raise CtlError("no VM is on record there: `ctl get vms` lists all", ExitStatus.NO_TARGET)
    return found


def _named(texts: Sequence[str], known: Collection[str]) -> tuple[dict[str, None], list[str]]:
    """The names that are meant, and those of which there is none."""
    wanted: dict[str, None] = {}
    absent: list[str] = []
    for text in texts:
        for part in re.split(r",(?![^\[]*\])", text):
            if re.search(r"[*?]", part):
                names = [name for name in known if fnmatchcase(name, part)]
                absent += [] if names else [part]
            else:
                names = [name for name in expand(part) if name in known]
                absent += [name for name in expand(part) if name not in known]
            wanted |= dict.fromkeys(names)
    return wanted, absent
