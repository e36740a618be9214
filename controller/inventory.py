"""Hosts as Grid'5000 users have them: names with and without a KaVLAN's suffix, sites by a pattern, good and bad files.

In VLAN N a node answers to `NODE-kavlan-N.SITE.grid5000.fr` (https://www.grid5000.fr/w/KaVLAN).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from controller.hosts import site_of
from controller.infra import Infra
from controller.render import clean
from controller.status import CtlError, ExitStatus

_KAVLAN = re.compile(r"-kavlan-[0-9]+(?=\.|\Z)")
#: A pattern is a person's; this many characters of a name are looked at, which is all that a host name has.
_NAME_MOST = 253


def plain(name: str) -> str:
    """A host's name without the suffix of a KaVLAN."""
    label, dot, rest = name.partition(".")
    return _KAVLAN.sub("", label) + dot + rest


def in_kavlan(name: str, number: int | None) -> str:
    """A host's name in a KaVLAN, whichever it was in; None is as it is."""
    if number is None:
        return name
    label, dot, rest = plain(name).partition(".")
    return f"{label}-kavlan-{number}{dot}{rest}"


def site_from(pattern: str | None) -> Callable[[str], str]:
    """What tells a host's site from its name: the pattern's first group (or all that it matches, where it has none);
    without a pattern what stands between the first two dots. No match is no site. Raises CtlError (USAGE)."""
    if pattern is None:
        return site_of
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CtlError(f"--site-from {pattern!r} is no regular expression: {error}", ExitStatus.USAGE) from error

    def site(name: str) -> str:
        found = compiled.search(name[:_NAME_MOST])
        return (found[1 if compiled.groups else 0] or "") if found else ""

    return site


def as_in_fleet(infra: Infra, fleet: Iterable[str]) -> Infra:
    """The file with its nodes under the names that the fleet has them by: with or without the suffix of a KaVLAN.

    A node that the fleet has under its very name keeps it; so does one that several hosts could be.
    """
    known = set(fleet)
    others: dict[str, list[str]] = {}
    for name in known:
        others.setdefault(plain(name), []).append(name)
    names: dict[str, str] = {}
    taken = {node.name for node in infra.nodes}
    for node in infra.nodes:
        found = [name for name in others.get(plain(node.name), ()) if name not in taken]
        if node.name not in known and len(found) == 1:
            names[node.name] = found[0]
    if not names:
        return infra
    return Infra(
        nodes=tuple(msgspec.structs.replace(node, name=names.get(node.name, node.name)) for node in infra.nodes),
        vms=tuple(
            vm if vm.node is None else msgspec.structs.replace(vm, node=names.get(vm.node, vm.node)) for vm in infra.vms
        ),
    )


def write_hosts(path: Path, hosts: Mapping[str, str]) -> None:
    """A file of hosts, one a line, each with what is to be said of it behind a `#`. Raises CtlError."""
    text = "".join(f"{name}  # {clean(why)}\n" if why else f"{name}\n" for name, why in hosts.items())
    try:
        path.write_text(text)
    except OSError as error:
        raise CtlError(f"{path}: {error.strerror}", ExitStatus.USAGE) from error
