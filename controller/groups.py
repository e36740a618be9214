"""Names for sets of hosts: `@rack1` in whatever reads host sets.

They come, in this order, from files of one's own (`groups.toml`), from ClusterShell's configuration
(https://clustershell.readthedocs.io/en/latest/config.html#node-groups), and from the sites of the fleet. `@all` and
`@failed` are always there. A group that nobody knows is an error: ClusterShell alone would take it for an empty set.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ClusterShell.NodeSet import ILLEGAL_GROUP_CHARS
from ClusterShell.NodeUtils import (
    GroupResolver,
    GroupResolverConfig,
    GroupResolverError,
    GroupSourceError,
)

from controller.hosts import expand
from controller.nearest import hint
from controller.status import CtlError, ExitStatus, Mistakes

#: Groups that mean something by themselves.
ALL, FAILED = "all", "failed"
#: Prefixes of groups that are made of what the service knows: `@site:sophia`, `@label:rack=3`, `@failed:17`.
SITE, LABEL = "site", "label"
#: What is shown of a bad group name.
_SHOWN = 80

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


class Member(Protocol):
    """What is asked of a host of the fleet."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def site(self) -> str:
        """Its site, or an empty text."""

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels."""


class Facts(Protocol):
    """What the service knows that groups are made of. Both raise CtlError, NO_SERVICE among others."""

    def members(self) -> Sequence[Member]:
        """The hosts of the fleet."""

    def failed(self, job: int | None) -> Sequence[str]:
        """The hosts on which a job (None: the last one) did not end well."""


def _unknown(name: str, known: Iterable[str]) -> CtlError:
    told = hint(f"@{name}"[:_SHOWN], [f"@{one}" for one in known], more="ctl get groups")
    return CtlError(f"there is no group @{name[:_SHOWN]}: {told}", ExitStatus.USAGE)


def read_groups(text: str, *, file: str) -> dict[str, str]:
    """The groups in a TOML document: `rack1 = "h[0-31]"`, or a list of such texts, which may name other groups.

    Raises CtlError (USAGE) with all that is wrong in it.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CtlError(f"{file}: {error}", ExitStatus.USAGE) from error
    groups: dict[str, str] = {}
    wrong = []
    for name, value in found.items():
        texts = [value] if isinstance(value, str) else value
        if not re.fullmatch(_NAME, name):
            wrong.append(f"{name[:_SHOWN]!r} is no name for a group: letters, digits, '_', '.' and '-'")
        elif name in (ALL, FAILED):
            wrong.append(f"{name} means something already: call the group otherwise")
        elif not isinstance(texts, list) or not all(isinstance(one, str) and one.strip() for one in texts):
            wrong.append(f'{name} is neither a host set nor a list of them: {name} = "h[0-31]"')
        else:
            groups[name] = ",".join(texts)
    if wrong:
        raise CtlError(f"{file}: {'; '.join(wrong)}", ExitStatus.USAGE)
    return groups


def files(home: Path) -> list[Path]:
    """Where groups of one's own may be, the file that wins first: `home` is where fleets live, then comes
    `canopy/groups.toml` below `$XDG_CONFIG_HOME`."""
    config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return [home / "groups.toml", Path(config) / "canopy" / "groups.toml"]


def own_groups(home: Path) -> dict[str, str]:
    """The groups in those files that are there. Raises CtlError (USAGE)."""
    groups: dict[str, str] = {}
    for path in files(home):
        try:
            text = path.read_text()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise CtlError(f"{path}: {error}", ExitStatus.USAGE) from error
        groups = read_groups(text, file=str(path)) | groups
    return groups


def _clustershell() -> GroupResolver:
    """ClusterShell's own groups. The example that its package brings is nobody's configuration, and is left out."""
    import sys

    from ClusterShell.Defaults import config_paths

    example = Path(sys.prefix, "etc/clustershell/groups.conf")
    paths = [path for path in config_paths("groups.conf") if Path(path) != example]
    return GroupResolverConfig(paths, ILLEGAL_GROUP_CHARS)


class Groups(GroupResolver):  # type: ignore[misc]  # ClusterShell has no types
    """All groups, as ClusterShell asks for them while it reads a host set."""

    def __init__(self, home: Path, facts: Facts) -> None:
        """`home` is where fleets live; `facts` is asked only where a group needs it."""
        super().__init__()
        self._home = home
        self._facts = facts
        self._within: list[str] = []

    @cached_property
    def _own(self) -> dict[str, str]:
        return own_groups(self._home)

    @cached_property
    def _foreign(self) -> GroupResolver:
        return _clustershell()

    @cached_property
    def _members(self) -> Sequence[Member]:
        return self._facts.members()

    # --- what ClusterShell calls --------------------------------------------------------------------------------------

    def group_nodes(self, group: str, namespace: str | None = None) -> list[str]:
        """The hosts of a group, each as a host set. Raises CtlError for one that nobody knows."""
        return list(self.hosts(group, namespace))

    def all_nodes(self, namespace: str | None = None) -> list[str]:
        """What `@*` and wildcards stand for: the fleet, or all of one of ClusterShell's sources."""
        if namespace:
            if namespace not in self._ask(self._foreign.sources, namespace):
                raise _unknown(f"{namespace}:*", self.names())
            # ClusterShell itself minds a source that can't tell all hosts, and one that fails.
            return [str(name) for name in self._foreign.all_nodes(namespace)]
        return [member.name for member in self._members]

    def grouplist(self, namespace: str | None = None) -> list[str]:
        """The names of groups, for folding hosts into them."""
        return self._listed(namespace) if namespace else [*self._own, *self._listed(None), *self._sites()]

    def has_node_groups(self, namespace: str | None = None) -> bool:
        """Asked by NodeSet.regroup (ClusterShell): no, a host's groups are always found by way of the list."""
        return False

    # --- what a name stands for ---------------------------------------------------------------------------------------

    def hosts(self, group: str, source: str | None = None) -> Sequence[str]:
        """The hosts of a group. Raises CtlError."""
        if source == FAILED and re.fullmatch("[0-9]{1,18}", group):
            return self._facts.failed(int(group))
        if source == SITE:
            return self._of_site(group, f"{SITE}:")
        if source == LABEL:
            return labelled(self._members, [group])
        if source:
            return self._of_source(group, source)
        if group == ALL:
            return [member.name for member in self._members]
        if group == FAILED:
            return self._facts.failed(None)
        if group in self._own:
            return self._nested(group)
        if group in self._listed(None):
            return self._ask(lambda: self._foreign.group_nodes(group, None), group)
        return self._of_site(group)

    def _of_site(self, site: str, prefix: str = "") -> list[str]:
        try:
            found = [member.name for member in self._members if site and member.site == site]
        except CtlError as error:
            # Whoever has no service has no sites, and may still have misspelt a group.
            if error.status != ExitStatus.NO_SERVICE:
                raise
            found = []
        if not found:
            raise _unknown(f"{prefix}{site}", [f"{prefix}{one}" for one in self._sites()] if prefix else self.names())
        return found

    def _of_source(self, group: str, source: str) -> list[str]:
        if source not in self._ask(self._foreign.sources, source):
            raise _unknown(f"{source}:{group}", self.names())
        found = self._ask(lambda: self._foreign.group_nodes(group, source), f"{source}:{group}")
        if not found:
            raise _unknown(f"{source}:{group}", [f"{source}:{name}" for name in self._listed(source)])
        return found

    def _nested(self, group: str) -> list[str]:
        if group in self._within:
            circle = " -> ".join(f"@{name}" for name in [*self._within[self._within.index(group) :], group])
            raise CtlError(f"groups go in a circle: {circle}; break it in groups.toml", ExitStatus.USAGE)
        self._within.append(group)
        try:
            return list(expand(self._own[group], lambda: self))
        except CtlError as error:
            raise CtlError(str(error) if self._within[1:] else f"group @{group}: {error}", error.status) from error
        finally:
            self._within.pop()

    # --- which there are ----------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """All groups by name, those without a source first. Of a service that does not run there are no sites."""
        found = [*self._own, *self._listed(None), *self._sites(), ALL, FAILED]
        for source in self._ask(self._foreign.sources, ""):
            found += [f"{source}:{name}" for name in self._listed(source)]
        return list(dict.fromkeys(found))

    def _sites(self) -> list[str]:
        try:
            return sorted({member.site for member in self._members if member.site})
        except CtlError as error:
            if error.status != ExitStatus.NO_SERVICE:
                raise
            return []

    def _listed(self, source: str | None) -> list[str]:
        if not self._ask(self._foreign.sources, ""):
            return []
        try:
            return [str(name) for name in self._foreign.grouplist(source)]
        except (GroupSourceError, GroupResolverError):
            # A source need not be able to list its groups.
            return []

    def _ask(self, ask: Callable[[], Any], group: str) -> list[str]:
        """What ClusterShell's sources say. Raises CtlError where they are not as they should be."""
        import configparser

        try:
            return [str(one) for one in ask()]
        except (GroupSourceError, GroupResolverError, configparser.Error) as error:
            about = f"group @{group}" if group else "groups"
            raise CtlError(f"ClusterShell's {about}: {type(error).__name__}: {error}", ExitStatus.USAGE) from error


def labelled(members: Sequence[Member], wanted: Iterable[str]) -> list[str]:
    """The hosts that carry all the labels in `wanted`, each `key=value`, or several between commas.

    Raises CtlError for what is no label (USAGE), and for those that no host carries (NO_TARGET).
    """
    known = sorted({label for member in members for label in member.labels.items()})
    pairs = dict.fromkeys(one for text in wanted for one in text.split(","))
    wrong = Mistakes()
    for one in pairs:
        with wrong:
            _check_label(one, known)
    wrong.check()
    asked = [(key, value) for key, _, value in (one.partition("=") for one in pairs)]
    return [member.name for member in members if all(member.labels.get(key) == value for key, value in asked)]


def _check_label(label: str, known: Sequence[tuple[str, str]]) -> None:
    """Raise CtlError where no host has that label; `known` are those that some have."""
    key, sign, _ = label.partition("=")
    if not key or not sign:
        raise CtlError(
            f"-l {label[:_SHOWN]}: give a label as key=value (`--user` runs a command as somebody else)",
            ExitStatus.USAGE,
        )
    keys = dict.fromkeys(one for one, _ in known)
    if key not in keys:
        told = hint(key[:_SHOWN], keys, more="ctl label")
        raise CtlError(f"no host has a label {key[:_SHOWN]}: {told}", ExitStatus.NO_TARGET)
    of_key = [f"{one}={value}" for one, value in known if one == key]
    if label not in of_key:
        told = hint(label[:_SHOWN], of_key, more="ctl label")
        raise CtlError(f"no host has the label {label[:_SHOWN]}: {told}", ExitStatus.NO_TARGET)
